"""Hardest positive against hardest negative of every row by label, in one op: two launches forward on a GPU, one back.

    terms_i = [m + n_i − p_i]₊,    n_i = max_{j: label_j ≠ label_i} s_ij,    p_i = min_{j ≠ i: label_j = label_i} s_ij

Rows without a positive or without a negative give 0. Its gradient is one sum over the edges of both ends:

    dx_i = Σ_{edges (i, j) or (j, i)} ± g x_j,    edges (i, index of n_i) by +g_i and (i, index of p_i) by −g_i

Source of the statistic: batch-hard, arXiv 1703.07737.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import plan, reference
from gssf_kernels._library import Function, last_derivative, register
from gssf_kernels.ops.pairs import pair_scores
from gssf_kernels.ops.positives import hardest_positives
from gssf_kernels.plan import accumulation_dtype


class BatchHardCall(NamedTuple):
    x: Tensor
    labels: Tensor
    margin: float
    reduction: str


class BatchHardBackwardCall(NamedTuple):
    grad: Tensor
    positive: Tensor
    negative: Tensor
    positive_index: Tensor
    negative_index: Tensor
    x: Tensor
    margin: float
    reduction: str


def batch_hard_terms(x: Tensor, labels: Tensor, margin: float, reduction: str) -> Tensor:
    """The terms [N] of x [N, D] and labels [N] int64, or their sum or mean. Differentiable once; NaN propagates."""
    return _BatchHard.apply(x, labels, margin, reduction)[0]


def batch_hard_of_factors(a: Tensor, b: Tensor, labels: Tensor, margin: float, reduction: str) -> Tensor:
    """The same of ``s = a bᵀ``, a and b [N, D] the factors of a metric: row i of both is one thing."""
    negative_index = torch.ops.gssf.hardest_negatives(a.detach(), b.detach(), labels, labels)[2]
    positive_index = hardest_positives(a, labels, b)
    positive, negative = pair_scores(a, b, positive_index), pair_scores(a, b, negative_index)
    valid = _valid(positive_index, negative)
    p, n = torch.where(valid, positive, 0), torch.where(valid, negative, 0)
    return reference.reduce(torch.where(valid, reference.hinge(margin + n - p), 0), reduction)


class _BatchHard(Function):
    @staticmethod
    def forward(x, labels, margin, reduction):
        return torch.ops.gssf.batch_hard(x, labels, margin, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.margin, ctx.reduction = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*statistics, x)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 4
        op = torch.ops.gssf.batch_hard_backward
        return last_derivative(op, grad, *ctx.saved_tensors, ctx.margin, ctx.reduction), None, None, None


def _valid(positive_index, negative):
    """Which rows have both."""
    return (positive_index >= 0) & (negative != -torch.inf)


def _batch_hard(call):
    x, labels, margin, reduction = call
    _, negative, negative_index, *_ = torch.ops.gssf.hardest_negatives(x, x, labels, labels)
    positive_index = torch.ops.gssf.hardest_positives(x, labels)
    i = torch.arange(x.shape[0], device=x.device)
    positive = torch.ops.gssf.pair_scores(x, x, i, positive_index)
    valid = _valid(positive_index, negative)
    p, n = torch.where(valid, positive, 0), torch.where(valid, negative, 0)
    loss = reference.reduce(torch.where(valid, reference.hinge(margin + n - p), 0), reduction)
    return loss.clone(), positive, negative, positive_index, negative_index


def _batch_hard_backward(call):
    grad, positive, negative, positive_index, negative_index, x, margin, reduction = call
    count = x.shape[0]
    grad = grad / max(count, 1) if reduction == "mean" else grad
    active = _valid(positive_index, negative) & ~(margin + negative - positive < 0)
    weight, i = torch.where(active, grad, 0), torch.arange(count, device=x.device)
    rows, cols = torch.cat((i, i)), torch.cat((negative_index, positive_index))
    edges = torch.cat((weight, -weight)).repeat(2), torch.cat((rows, cols)), torch.cat((cols, rows))
    return torch.ops.gssf.pair_scores_backward(*edges, x, x, [True, False])[0]


def _fake_batch_hard(call):
    positive = call.x.new_empty(call.x.shape[0], dtype=accumulation_dtype(call.x.dtype))
    loss = positive.new_empty(positive.shape if call.reduction == "none" else ())
    indices = (call.labels.new_empty(call.labels.shape) for _ in range(2))
    return loss, positive, torch.empty_like(positive), *indices


def _fake_batch_hard_backward(call):
    return call.x.new_empty(call.x.shape)


register(
    "batch_hard",
    BatchHardCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_batch_hard,
    fake=_fake_batch_hard,
    launcher="batch_hard.batch_hard",
    plans=plan.batch_hard,
    through="hardest_negatives",
)
register(
    "batch_hard_backward",
    BatchHardBackwardCall,
    "Tensor",
    composite=_batch_hard_backward,
    fake=_fake_batch_hard_backward,
    launcher="batch_hard.batch_hard_backward",
    plans=plan.few_rows(lambda call: call.x),
    through="pair_scores_backward",
)
