"""The triplet formula of an anchor's statistics, both directions in one op: one launch each way on a GPU.

terms_i = [m + row_i − p_i]₊ + [m + col_i − p_i]₊,      i < N
"""

import torch
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels._library import define, last_derivative


def hinge_terms(positive: Tensor, row: Tensor, col: Tensor, margin: float, reduction: str) -> Tensor:
    """The terms [N] of ``positive [N]``, ``row [N]`` and the first N of ``col [M]``, or their sum or mean.

    Differentiable once; NaN passes both ways, and -inf (no negative) gives 0.
    """
    return _Hinge.apply(positive, row, col, margin, reduction)


class _Hinge(torch.autograd.Function):
    @staticmethod
    def forward(positive, row, col, margin, reduction):
        return torch.ops.gssf.hinge_terms(positive, row, col, margin, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.margin, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        op = torch.ops.gssf.hinge_terms_backward
        found = last_derivative(op, grad, *ctx.saved_tensors, ctx.margin, ctx.reduction)
        return (*(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False)), None, None)


def _reference(positive, row, col, margin, reduction):
    rows = reference.hinge(margin + row - positive)
    cols = reference.hinge(margin + col[: positive.shape[0]] - positive)
    terms = rows + cols
    return terms if reduction == "none" else reference.reduce(terms, reduction)


def _reference_backward(grad, positive, row, col, margin, reduction):
    count = positive.shape[0]
    grad = grad / max(count, 1) if reduction == "mean" else grad
    drow, dcol = (torch.where(margin + negative - positive < 0, 0, grad) for negative in (row, col[:count]))
    return -(drow + dcol), drow, torch.cat((dcol, dcol.new_zeros(col.shape[0] - count)))


def _fake(positive, row, col, margin, reduction):
    return positive.new_empty(positive.shape if reduction == "none" else ())


def _fake_backward(grad, positive, row, col, margin, reduction):
    return tuple(t.new_empty(t.shape) for t in (positive, row, col))


define(
    "hinge_terms(Tensor positive, Tensor row, Tensor col, float margin, str reduction) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton="hinge.hinge_terms",
)
define(
    "hinge_terms_backward(Tensor grad, Tensor positive, Tensor row, Tensor col, float margin, str reduction)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton="hinge.hinge_terms_backward",
)
