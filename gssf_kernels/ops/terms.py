"""The terms of a loss made of statistics, both directions in one op: one launch each way on a GPU.

hinge      terms_i = [m + row_i − p_i]₊ + [m + col_i − p_i]₊,      i < N
goal       terms_i = value(p_i, row_i) + value(p_i, col_i), 0 where there is no negative; gradients are by weights:
           dL/dp = −w⁺(p, row) − w⁺(p, col),   dL/drow = w⁻(p, row),   dL/dcol = w⁻(p, col)     (``goal.py``)
contrast   terms_i = ½ [(row_max_i − row_target_i) + row_log_i] + ½ [(col_max_i − col_target_i) + col_log_i]
weights    the gradients of ``goal`` by weights that are known; it has no terms of its own
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import plan, reference
from gssf_kernels._library import Function, last_derivative, register
from gssf_kernels.ops.goal import Constants, anchor_values, anchor_weights
from gssf_kernels.reference import AnchorStatistics


class LineTermsCall(NamedTuple):
    """Statistics, by formula.

    "hinge", "goal <triplet> <pair>": positive_score [N], row_score [N], col_score [M], of which the first N count
    "contrast": row_max, row_log, row_target [N], col_max, col_log [M], col_target [N]; no columns: of the rows alone,
        not halved; no col_target: row_target stands for both
    Constants: the margin; τ, α, β, λ; none.
    """

    formula: str
    statistics: list[Tensor | None]
    constants: list[float]
    reduction: str


class LineTermsBackwardCall(NamedTuple):
    """The same, with the gradient of the result. Of "contrast" only row_log, col_log and col_target are looked at, for
    what there is; "weights" takes weights [4, N] and any vector of M entries."""

    grad: Tensor
    formula: str
    statistics: list[Tensor | None]
    constants: list[float]
    reduction: str


def line_terms(
    positive_score: Tensor, row_score: Tensor, col_score: Tensor, formula: str, constants: list[float], reduction: str
) -> Tensor:
    """The terms [N] of "hinge" or "goal <triplet> <pair>", or their sum or mean.

    Differentiable once; NaN passes both ways, and -inf (no negative) gives 0.
    """
    return _LineTerms.apply(positive_score, row_score, col_score, formula, constants, reduction)


def hinge_terms(positive_score: Tensor, row_score: Tensor, col_score: Tensor, margin: float, reduction: str) -> Tensor:
    """The terms [N] of ``positive_score [N]``, ``row_score [N]`` and the first N of ``col_score [M]``, or their sum or
    mean. Differentiable once; NaN passes both ways, and -inf (no negative) gives 0."""
    return line_terms(positive_score, row_score, col_score, "hinge", [margin], reduction)


class _LineTerms(Function):
    @staticmethod
    def forward(positive_score, row_score, col_score, formula, constants, reduction):
        return torch.ops.gssf.line_terms(formula, [positive_score, row_score, col_score], constants, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *statistics, ctx.formula, ctx.constants, ctx.reduction = inputs
        ctx.save_for_backward(*statistics)

    @staticmethod
    def backward(ctx, grad):
        grads = last_derivative(line_gradients, grad, ctx.formula, ctx.constants, ctx.reduction, *ctx.saved_tensors)
        return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None)


def line_gradients(grad, formula, constants, reduction, *statistics) -> tuple[Tensor, Tensor, Tensor]:
    """``line_terms_backward`` with the tensors as separate arguments."""
    return torch.ops.gssf.line_terms_backward(grad, formula, list(statistics), constants, reduction)


def _hinge(call):
    positive_score, row_score, col_score = call.statistics
    (margin,) = call.constants
    col_score = col_score[: positive_score.shape[0]]
    return sum(reference.hinge(margin + negative - positive_score) for negative in (row_score, col_score))


def _hinge_backward(grad, call):
    positive_score, row_score, col_score = call.statistics
    (margin,) = call.constants
    count = positive_score.shape[0]
    drow, dcol = (
        torch.where(margin + negative - positive_score < 0, 0, grad) for negative in (row_score, col_score[:count])
    )
    return -(drow + dcol), drow, _padded(dcol, col_score.shape[0])


def _goal(call):
    positive_score, row_score, col_score = call.statistics
    triplet, pair = call.formula.split()[1:]

    def terms(negative):
        values = anchor_values(AnchorStatistics(positive_score, negative), triplet, pair, Constants(*call.constants))
        return torch.where(negative != -torch.inf, values, 0)

    return terms(row_score) + terms(col_score[: positive_score.shape[0]])


def _goal_backward(grad, call):
    positive_score, row_score, col_score = call.statistics
    triplet, pair = call.formula.split()[1:]

    def gradients(negative):
        weights = anchor_weights(AnchorStatistics(positive_score, negative), triplet, pair, Constants(*call.constants))
        return (grad * torch.where(negative != -torch.inf, w, 0) for w in weights)

    row_positive, drow = gradients(row_score)
    col_positive, dcol = gradients(col_score[: positive_score.shape[0]])
    return -(row_positive + col_positive), drow, _padded(dcol, col_score.shape[0])


def _contrast(call):
    row_max, row_log, row_target, col_max, col_log, col_target = call.statistics
    terms = (row_max - row_target) + row_log
    if col_log is not None:
        count = terms.shape[0]
        col_target = row_target if col_target is None else col_target
        terms = (terms + ((col_max[:count] - col_target) + col_log[:count])) / 2
    return terms


def _contrast_backward(grad, call):
    _, row_log, _, _, col_log, col_target = call.statistics
    grad = grad.expand(row_log.shape[0])
    drow = grad.clone() if col_log is None else grad / 2
    if col_log is None:
        return drow, -drow, drow.new_empty(0)
    return drow, -2 * drow if col_target is None else -drow, _padded(drow, col_log.shape[0])


def _weights_backward(grad, call):
    weights, columns = call.statistics
    row_positive, row_negative, col_positive, col_negative = grad * weights
    return -(row_positive + col_positive), row_negative.clone(), _padded(col_negative, columns.shape[0])


def _padded(gradient, length):
    """With zeros behind it; never the same memory."""
    return torch.cat((gradient, gradient.new_zeros(length - gradient.shape[0])))


_TERMS: dict[str, Callable] = {"hinge": _hinge, "goal": _goal, "contrast": _contrast}
_GRADIENTS: dict[str, Callable] = {
    "hinge": _hinge_backward, "goal": _goal_backward, "contrast": _contrast_backward, "weights": _weights_backward,
}  # fmt: skip


def _line_terms(call):
    return reference.reduce(_TERMS[call.formula.split()[0]](call), call.reduction)


def _line_terms_backward(call):
    count = call.statistics[0 if call.formula == "weights" else 1].shape[-1]
    grad = call.grad / max(count, 1) if call.reduction == "mean" else call.grad
    return _GRADIENTS[call.formula.split()[0]](grad, call)


def _fake_line_terms(call):
    like = call.statistics[1]
    return like.new_empty(like.shape if call.reduction == "none" else ())


def _fake_line_terms_backward(call):
    if call.formula == "weights":
        weights, columns = call.statistics
        sizes = (weights.shape[1], weights.shape[1], columns.shape[0])
    else:
        like, columns = call.statistics[1], call.statistics[4 if call.formula == "contrast" else 2]
        sizes = (like.shape[0], like.shape[0], 0 if columns is None else columns.shape[0])
    return tuple(call.grad.new_empty(size) for size in sizes)


register(
    "line_terms",
    LineTermsCall,
    "Tensor",
    composite=_line_terms,
    fake=_fake_line_terms,
    launcher="terms.line_terms",
    plans=plan.kernel,
)
register(
    "line_terms_backward",
    LineTermsBackwardCall,
    "(Tensor, Tensor, Tensor)",
    composite=_line_terms_backward,
    fake=_fake_line_terms_backward,
    launcher="terms.line_terms_backward",
    plans=plan.kernel,
)
