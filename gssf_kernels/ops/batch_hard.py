"""Hardest positive against hardest negative of every row by label, in one op.

    terms_i = [m + n_i − p_i]₊,    n_i = max_{j: label_j ≠ label_i} s_ij,    p_i = min_{j ≠ i: label_j = label_i} s_ij

Rows without a positive or without a negative have term 0. The gradient is a sum over edges, pairs (i, j) whose score
carries gradient: (i, index of n_i) with weight +g_i and (i, index of p_i) with weight −g_i.

    dx_i = Σ_{edges (i, j) and (j, i)} weight x_j

On a GPU the forward is two launches and the backward one. Source: batch-hard, arXiv 1703.07737.
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
    x: Tensor  # [N, D]
    labels: Tensor  # [N] int64
    margin: float
    reduction: str


class BatchHardBackwardCall(NamedTuple):
    grad_out: Tensor  # [] or [N]
    positive_score: Tensor  # [N]
    negative_score: Tensor  # [N]
    positive_index: Tensor  # [N] int64
    negative_index: Tensor  # [N] int64
    x: Tensor  # [N, D]
    margin: float
    reduction: str


class BatchHard(NamedTuple):
    """The terms [N], or their sum or mean, and the scores that they are made of."""

    loss: Tensor
    positive_score: Tensor  # [N]
    negative_score: Tensor  # [N]
    positive_index: Tensor  # [N]; -1: no positive


def batch_hard_terms(x: Tensor, labels: Tensor, margin: float, reduction: str) -> BatchHard:
    """Of x [N, D] and labels [N] int64. Differentiable once; NaN propagates."""
    loss, positive_score, negative_score, positive_index, _ = _BatchHard.apply(x, labels, margin, reduction)
    return BatchHard(loss, positive_score, negative_score, positive_index)


def batch_hard_of_factors(
    a: Tensor, b: Tensor, labels: Tensor, margin: float, reduction: str, symmetric: bool
) -> BatchHard:
    """The same of ``s = a bᵀ``, where a and b [N, D] are the factors of a metric, both made of x.

    symmetric: s is, and half of it is computed.
    """
    negatives = True, False, None, None, None, None, None, symmetric
    negative_index = torch.ops.gssf.hardest_negatives(a.detach(), b.detach(), labels, labels, "", *negatives)[2]
    positive_index = hardest_positives(a, labels, b)
    positive_score, negative_score = pair_scores(a, b, positive_index), pair_scores(a, b, negative_index)
    valid = has_both(positive_index, negative_score)
    p, n = torch.where(valid, positive_score, 0), torch.where(valid, negative_score, 0)
    loss = reference.reduce(torch.where(valid, reference.hinge(margin + n - p), 0), reduction)
    return BatchHard(loss, positive_score, negative_score, positive_index)


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
    def backward(ctx, grad_out, *_):
        if grad_out is None or not ctx.needs_input_grad[0]:
            return (None,) * 4
        op = torch.ops.gssf.batch_hard_backward
        return last_derivative(op, grad_out, *ctx.saved_tensors, ctx.margin, ctx.reduction), None, None, None


def has_both(positive_index, negative_score):
    """Which rows have a positive and a negative."""
    return (positive_index >= 0) & (negative_score != -torch.inf)


def _batch_hard(call):
    x, labels, margin, reduction = call
    _, negative_score, negative_index, *_ = torch.ops.gssf.hardest_negatives(x, x, labels, labels)
    positive_index = torch.ops.gssf.hardest_positives(x, labels)
    i = torch.arange(x.shape[0], device=x.device)
    positive_score = torch.ops.gssf.pair_scores(x, x, i, positive_index, True)
    valid = has_both(positive_index, negative_score)
    p, n = torch.where(valid, positive_score, 0), torch.where(valid, negative_score, 0)
    loss = reference.reduce(torch.where(valid, reference.hinge(margin + n - p), 0), reduction)
    return loss.clone(), positive_score, negative_score, positive_index, negative_index


def _batch_hard_backward(call):
    grad_out, positive_score, negative_score, positive_index, negative_index, x, margin, reduction = call
    count = x.shape[0]
    dterms = grad_out / max(count, 1) if reduction == "mean" else grad_out
    active = has_both(positive_index, negative_score) & ~(margin + negative_score - positive_score < 0)
    weight, i = torch.where(active, dterms, 0), torch.arange(count, device=x.device)
    rows, cols = torch.cat((i, i)), torch.cat((negative_index, positive_index))
    edges = torch.cat((weight, -weight)).repeat(2), torch.cat((rows, cols)), torch.cat((cols, rows))
    return torch.ops.gssf.pair_scores_backward(*edges, x, x, [True, False])[0]


def _fake_batch_hard(call):
    score = call.x.new_empty(call.x.shape[0], dtype=accumulation_dtype(call.x.dtype))
    loss = score.new_empty(score.shape if call.reduction == "none" else ())
    indices = (call.labels.new_empty(call.labels.shape) for _ in range(2))
    return loss, score, torch.empty_like(score), *indices


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
