"""The terms of a loss of row and column statistics, one for each anchor, both directions in one op.

hinge      terms_i = [m + row_i − p_i]₊ + [m + col_i − p_i]₊,      i < N
goal       terms_i = value(p_i, row_i) + value(p_i, col_i), each 0 where there is no negative
           dL/dp = −w⁺(p, row) − w⁺(p, col),   dL/drow = w⁻(p, row),   dL/dcol = w⁻(p, col)     (``goal.py``)
info_nce   terms_i = ½ [(row_max_i − row_target_i) + row_log_i] + ½ [(col_max_i − col_target_i) + col_log_i]
weights    only a backward: the gradients of ``goal`` from weights that the forward has stored

p: positive_score; row, col: the hardest negatives of row i and column i. On a GPU each pass is one launch.
Sources: VSE++, arXiv 1707.05612 (hinge); GOAL, arXiv 2210.13188; InfoNCE, arXiv 1807.03748 (info_nce).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import plan, reference
from gssf_kernels._library import Function, last_derivative, register
from gssf_kernels.ops.goal import Constants, anchor_values, anchor_weights
from gssf_kernels.reference import AnchorStatistics


class AnchorTermsCall(NamedTuple):
    """The arguments of ``anchor_terms``."""

    # "hinge", "goal <triplet> <pair>" or "info_nce"
    formula: str
    # hinge, goal: positive_score [N], row_score [N], col_score [M], of which the first N count, or None.
    # info_nce: row_max, row_log, row_target [N], col_max, col_log [M], col_target [N]. Without columns (None) the terms
    # are those of the rows, not halved. Without col_target, row_target is the target of both directions.
    statistics: list[Tensor | None]
    constants: list[float]  # hinge: the margin; goal: τ, α, β, λ; info_nce: none
    reduction: str


class AnchorTermsBackwardCall(NamedTuple):
    """The arguments of ``anchor_terms_backward``."""

    grad_out: Tensor  # [] or [N]
    formula: str  # also "weights"
    # As in the forward. info_nce reads only the lengths of row_log and col_log, and which statistics are None.
    # weights: w⁺ and w⁻ of the rows, w⁺ and w⁻ of the columns [4, N], and any vector of M entries.
    statistics: list[Tensor | None]
    constants: list[float]
    reduction: str


def anchor_terms(
    positive_score: Tensor, row_score: Tensor, col_score: Tensor | None, formula: str, constants: list[float],
    reduction: str,
) -> Tensor:  # fmt: skip
    """The terms [N] of "hinge" or "goal <triplet> <pair>", or their sum or mean. Differentiable once.

    col_score: None leaves the terms of columns out.

    NaN propagates, in the forward and in the backward. An anchor without a negative (score -inf) has term 0.
    """
    return _AnchorTerms.apply(positive_score, row_score, col_score, formula, constants, reduction)


def hinge_terms(positive_score: Tensor, row_score: Tensor, col_score: Tensor, margin: float, reduction: str) -> Tensor:
    """:func:`anchor_terms` of "hinge": positive_score [N], row_score [N], and the first N entries of col_score [M]."""
    return anchor_terms(positive_score, row_score, col_score, "hinge", [margin], reduction)


class _AnchorTerms(Function):
    @staticmethod
    def forward(positive_score, row_score, col_score, formula, constants, reduction):
        return torch.ops.gssf.anchor_terms(formula, [positive_score, row_score, col_score], constants, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *statistics, ctx.formula, ctx.constants, ctx.reduction = inputs
        ctx.save_for_backward(*statistics)

    @staticmethod
    def backward(ctx, grad_out):
        options = (ctx.formula, ctx.constants, ctx.reduction)
        grads = last_derivative(anchor_term_gradients, grad_out, *options, *ctx.saved_tensors)
        return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None)


def anchor_term_gradients(grad_out, formula, constants, reduction, *statistics) -> tuple[Tensor, Tensor, Tensor]:
    """``anchor_terms_backward`` with the statistics as separate arguments."""
    return torch.ops.gssf.anchor_terms_backward(grad_out, formula, list(statistics), constants, reduction)


def _directions(call):
    """positive_score, row_score, and col_score of the first N columns unless columns are no anchors: [N] each."""
    positive_score, row_score, col_score = call.statistics
    rows = positive_score, row_score
    return rows if col_score is None else (*rows, col_score[: positive_score.shape[0]])


def _column_gradient(gradients, call):
    """The gradient of col_score [M], or an empty tensor; gradients: of each direction, [N]."""
    col_score = call.statistics[2]
    return gradients[0].new_empty(0) if col_score is None else _padded(gradients[1], col_score.shape[0])


def direction_value(formula: str, constants: list[float], positive: Tensor, negative: Tensor) -> Tensor:
    """The terms of one direction, "hinge" or "goal <triplet> <pair>", of scores that broadcast."""
    if formula == "hinge":
        return reference.hinge(constants[0] + negative - positive)
    triplet, pair = formula.split()[1:]
    values = anchor_values(AnchorStatistics(positive, negative), triplet, pair, Constants(*constants))
    return torch.where(negative != -torch.inf, values, 0)


def direction_gradients(
    dterms: Tensor, formula: str, constants: list[float], positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    """``(−dL/dpositive, dL/dnegative)`` of the terms of one direction; dterms: dL/dterms."""
    if formula == "hinge":
        gradient = torch.where(constants[0] + negative - positive < 0, 0, dterms)
        return gradient, gradient
    triplet, pair = formula.split()[1:]
    weights = anchor_weights(AnchorStatistics(positive, negative), triplet, pair, Constants(*constants))
    positive_weight, negative_weight = (torch.where(negative != -torch.inf, w, 0) for w in weights)
    return dterms * positive_weight, dterms * negative_weight


def _of_directions(call):
    positive_score, *negatives = _directions(call)
    return sum(direction_value(call.formula, call.constants, positive_score, negative) for negative in negatives)


def _of_directions_backward(dterms, call):
    positive_score, *negatives = _directions(call)
    gradients = [direction_gradients(dterms, call.formula, call.constants, positive_score, n) for n in negatives]
    positives, gradients_of_negatives = zip(*gradients, strict=True)
    return -sum(positives), gradients_of_negatives[0], _column_gradient(gradients_of_negatives, call)


def _info_nce(call):
    row_max, row_log, row_target, col_max, col_log, col_target = call.statistics
    terms = (row_max - row_target) + row_log
    if col_log is not None:
        count = terms.shape[0]
        col_target = row_target if col_target is None else col_target
        terms = (terms + ((col_max[:count] - col_target) + col_log[:count])) / 2
    return terms


def _info_nce_backward(dterms, call):
    _, row_log, _, _, col_log, col_target = call.statistics
    dterms = dterms.expand(row_log.shape[0])
    drow = dterms.clone() if col_log is None else dterms / 2
    if col_log is None:
        return drow, -drow, drow.new_empty(0)
    return drow, -2 * drow if col_target is None else -drow, _padded(drow, col_log.shape[0])


def _weights_backward(dterms, call):
    weights, columns = call.statistics
    row_positive, row_negative, col_positive, col_negative = dterms * weights
    return -(row_positive + col_positive), row_negative.clone(), _padded(col_negative, columns.shape[0])


def _padded(gradient, length):
    """gradient followed by zeros, [length]. Always a copy: an op's result must not be one of its inputs."""
    return torch.cat((gradient, gradient.new_zeros(length - gradient.shape[0])))


# call -> terms [N]
_TERMS: dict[str, Callable] = {"hinge": _of_directions, "goal": _of_directions, "info_nce": _info_nce}
# (dL/dterms [] or [N], call) -> the gradients with respect to positive_score or row_target [N], rows [N], columns [M]
_GRADIENTS: dict[str, Callable] = {
    "hinge": _of_directions_backward,
    "goal": _of_directions_backward,
    "info_nce": _info_nce_backward,
    "weights": _weights_backward,
}


def _anchor_terms(call):
    return reference.reduce(_TERMS[call.formula.split()[0]](call), call.reduction)


def _anchor_terms_backward(call):
    count = call.statistics[0 if call.formula == "weights" else 1].shape[-1]
    dterms = call.grad_out / max(count, 1) if call.reduction == "mean" else call.grad_out
    return _GRADIENTS[call.formula.split()[0]](dterms, call)


def _fake_anchor_terms(call):
    like = call.statistics[1]
    return like.new_empty(like.shape if call.reduction == "none" else ())


def _fake_anchor_terms_backward(call):
    if call.formula == "weights":
        weights, columns = call.statistics
        sizes = (weights.shape[1], weights.shape[1], columns.shape[0])
    else:
        like, columns = call.statistics[1], call.statistics[4 if call.formula == "info_nce" else 2]
        sizes = (like.shape[0], like.shape[0], 0 if columns is None else columns.shape[0])
    return tuple(call.grad_out.new_empty(size) for size in sizes)


register(
    "anchor_terms",
    AnchorTermsCall,
    "Tensor",
    composite=_anchor_terms,
    fake=_fake_anchor_terms,
    launcher="terms.anchor_terms",
    plans=plan.kernel,
)
register(
    "anchor_terms_backward",
    AnchorTermsBackwardCall,
    "(Tensor, Tensor, Tensor)",
    composite=_anchor_terms_backward,
    fake=_fake_anchor_terms_backward,
    launcher="terms.anchor_terms_backward",
    plans=plan.kernel,
)
