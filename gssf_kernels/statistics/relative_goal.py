"""GOAL with relative terms, the whole loss in one op: weights are made in the forward, being constants.

    terms_i = (row_i − p_i) + (col_i − p_i),     i < N,   each 0 where there is no negative
    dL/dp = −(w⁺ of rows + w⁺ of columns),   dL/drow = w⁻ of rows,   dL/dcol = w⁻ of columns

Formulas of the weights: :mod:`gssf_kernels.losses.goal`. Small problems on a GPU take two launches forward, and one of
the weights back (``kernels/relative_goal.py``).
"""

import torch
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels._library import Function, define, last_derivative
from gssf_kernels.reference import AnchorStatistics, HardestNegatives, RelativeTerms
from gssf_kernels.statistics.goal import Constants, anchor_weights
from gssf_kernels.statistics.hardest import _factors, _given
from gssf_kernels.statistics.hardest import _fake as _fake_hardest
from gssf_kernels.statistics.relative import relative_positives, relative_sweep

RELATIVE = {"lin_ms": "linear", "sig_ms": "exponential"}


def relative_goal(
    x, y, x_ids, y_ids, triplet: str, pair: str, relative: RelativeTerms, constants: Constants, reduction: str,
    *, names, metric=None,
) -> tuple[Tensor, Tensor, HardestNegatives]:  # fmt: skip
    """``(terms [N], or their sum or mean; pair_score, hardest negatives)`` of ``x yᵀ`` or of ``metric``.

    The terms alone carry gradient: the one designed, times what comes from above. Differentiable once.
    """
    sides, weights = _given(x, y, x_ids, y_ids, names, metric)
    mode = (triplet, pair, *constants, relative.positive_threshold, relative.negative_threshold)
    weights = (None, None, None, None) if weights is None else weights  # normalize None: no metric
    loss, pair_score, *hardest, _ = _RelativeGoal.apply(*sides[:2], *weights, *sides[2:], mode, reduction)
    return loss, pair_score, HardestNegatives(*hardest)


class _RelativeGoal(Function):
    """Of a metric no factor is kept, as in ``hardest.py``."""

    @staticmethod
    def forward(x, y, diag, blocks, permutation, normalize, x_ids, y_ids, mode, reduction):
        a, b = (x, y) if normalize is None else _factors(x, y, diag, blocks, permutation, normalize)
        return torch.ops.gssf.relative_goal(a, b, x_ids, y_ids, *mode, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, diag, blocks, permutation, ctx.normalize, *_, ctx.reduction = inputs
        _, _, _, row_index, _, col_index, weights = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights, row_index, col_index, x, y, diag, blocks, permutation)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 10
        needs = list(ctx.needs_input_grad[:4])
        found = last_derivative(_gradients, grad, *ctx.saved_tensors, ctx.normalize, ctx.reduction, needs)
        found = (*found, None, None)[:4]
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 6)


def _gradients(grad, weights, row_index, col_index, x, y, diag, blocks, permutation, normalize, reduction, needs):
    lines = torch.ops.gssf.relative_goal_backward(grad, weights, y.shape[0], reduction)
    given = (*lines, row_index, col_index, x, y)
    if normalize is None:
        return torch.ops.gssf.hardest_negatives_backward(*given, needs[:2])
    return torch.ops.gssf.hardest_project_backward(*given, diag, blocks, permutation, normalize, needs)


def _reference(
    a, b, a_ids, b_ids, triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold, reduction
):
    relative = RelativeTerms(RELATIVE[pair], alpha, beta, positive_threshold, negative_threshold)
    positive, *hardest, row_close, col_close = relative_sweep(a, b, a_ids, b_ids, relative)
    count = positive.shape[0]
    terms, weights = [], []
    for negative, close in ((hardest[0], row_close), (hardest[2][:count], col_close[:count])):
        found = negative != -torch.inf
        anchor = AnchorStatistics(positive, negative, relative_positives(positive, negative, relative), close)
        both = anchor_weights(anchor, triplet, pair, Constants(tau, alpha, beta, lam))
        weights += [torch.where(found, weight, 0) for weight in both]
        terms.append(torch.where(found, negative - positive, 0))
    return reference.reduce(terms[0] + terms[1], reduction), positive, *hardest, torch.stack(weights)


def _fake(a, b, a_ids, b_ids, triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold, reduction):
    found = _fake_hardest(a, b, a_ids, b_ids)
    n = found[0].shape[0]
    return found[0].new_empty(n if reduction == "none" else ()), *found, found[0].new_empty(4, n)


def _reference_backward(grad, weights, columns, reduction):
    count = weights.shape[1]
    grad = grad / max(count, 1) if reduction == "mean" else grad
    row_pull, row_push, col_pull, col_push = grad * weights
    return -(row_pull + col_pull), row_push.clone(), torch.cat((col_push, col_push.new_zeros(columns - count)))


def _fake_backward(grad, weights, columns, reduction):
    n = weights.shape[1]
    return weights.new_empty(n), weights.new_empty(n), weights.new_empty(columns)


define(
    "relative_goal(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids, str triplet, str pair, float tau, float alpha, "
    "float beta, float lam, float positive_threshold, float negative_threshold, str reduction) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    through="relative_negatives",
    triton="relative_goal.relative_goal",
)
define(
    "relative_goal_backward(Tensor grad, Tensor weights, SymInt columns, str reduction) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton="relative_goal.relative_goal_backward",
)
