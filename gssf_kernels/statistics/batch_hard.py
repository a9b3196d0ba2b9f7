"""Hardest positive against hardest negative of every row by label, in one op: two launches forward on a GPU, one back.

    terms_i = [m + n_i − p_i]₊,    n_i = max_{j: label_j ≠ label_i} s_ij,    p_i = min_{j ≠ i: label_j = label_i} s_ij

Rows without a positive or without a negative give 0. Its gradient is one sum over the edges of both ends:

    dx_i = Σ_{edges (i, j) or (j, i)} ± g x_j,    edges (i, place of n_i) by +g_i and (i, place of p_i) by −g_i

Source of the statistic: batch-hard, arXiv 1703.07737.
"""

import torch
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels._library import Function, define, last_derivative
from gssf_kernels.precision import accumulation_dtype


def batch_hard_terms(x: Tensor, labels: Tensor, margin: float, reduction: str) -> Tensor:
    """The terms [N] of x [N, D] and labels [N] int64, or their sum or mean. Differentiable once; NaN propagates."""
    return _BatchHard.apply(x, labels, margin, reduction)[0]


class _BatchHard(Function):
    @staticmethod
    def forward(x, labels, margin, reduction):
        return torch.ops.gssf.batch_hard(x, labels, margin, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.margin, ctx.reduction = inputs
        _, *found = output
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*found, x)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 4
        op = torch.ops.gssf.batch_hard_backward
        return last_derivative(op, grad, *ctx.saved_tensors, ctx.margin, ctx.reduction), None, None, None


def _whole(positive_place, negative):
    return (positive_place >= 0) & (negative != -torch.inf)


def _reference(x, labels, margin, reduction):
    _, negative, negative_place, *_ = torch.ops.gssf.hardest_negatives(x, x, labels, labels)
    positive_place = torch.ops.gssf.hardest_positives(x, labels)
    i = torch.arange(x.shape[0], device=x.device)
    positive = torch.ops.gssf.pair_scores(x, x, i, positive_place)
    whole = _whole(positive_place, negative)
    p, n = torch.where(whole, positive, 0), torch.where(whole, negative, 0)
    loss = reference.reduce(torch.where(whole, reference.hinge(margin + n - p), 0), reduction)
    return loss.clone(), positive, negative, positive_place, negative_place


def _reference_backward(grad, positive, negative, positive_place, negative_place, x, margin, reduction):
    count = x.shape[0]
    grad = grad / max(count, 1) if reduction == "mean" else grad
    active = _whole(positive_place, negative) & ~(margin + negative - positive < 0)
    weight, i = torch.where(active, grad, 0), torch.arange(count, device=x.device)
    near, far = torch.cat((i, i)), torch.cat((negative_place, positive_place))
    edges = torch.cat((weight, -weight)).repeat(2), torch.cat((near, far)), torch.cat((far, near))
    return torch.ops.gssf.pair_scores_backward(*edges, x, x, [True, False])[0]


def _fake(x, labels, margin, reduction):
    line = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    loss = line.new_empty(line.shape if reduction == "none" else ())
    return loss, line, torch.empty_like(line), labels.new_empty(labels.shape), labels.new_empty(labels.shape)


def _fake_backward(grad, positive, negative, positive_place, negative_place, x, margin, reduction):
    return x.new_empty(x.shape)


define(
    "batch_hard(Tensor x, Tensor labels, float margin, str reduction) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    through="hardest_negatives",
    triton="batch_hard.batch_hard",
)
define(
    "batch_hard_backward(Tensor grad, Tensor positive, Tensor negative, Tensor positive_place, Tensor negative_place, "
    "Tensor x, float margin, str reduction) -> Tensor",
    reference=_reference_backward,
    fake=_fake_backward,
    through="pair_scores_backward",
    triton="batch_hard.batch_hard_backward",
)
