"""Formulas of losses over their statistics, both directions in one op: one launch each way on a GPU.

hinge:     terms_i = [m + row_i − p_i]₊ + [m + col_i − p_i]₊,      i < N
contrast:  terms_i = ½ [(row_max_i − row_target_i) + row_log_i] + ½ [(col_max_i − col_target_i) + col_log_i]
"""

import torch
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels._library import Function, define, last_derivative


def hinge_terms(positive: Tensor, row: Tensor, col: Tensor, margin: float, reduction: str) -> Tensor:
    """The terms [N] of ``positive [N]``, ``row [N]`` and the first N of ``col [M]``, or their sum or mean.

    Differentiable once; NaN passes both ways, and -inf (no negative) gives 0.
    """
    return _Hinge.apply(positive, row, col, margin, reduction)


class _Hinge(Function):
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


def _contrast_reference(row_max, row_log, row_target, col_max, col_log, col_target, reduction):
    terms = (row_max - row_target) + row_log
    if col_log is not None:
        count = terms.shape[0]
        col_target = row_target if col_target is None else col_target
        terms = (terms + ((col_max[:count] - col_target) + col_log[:count])) / 2
    return reference.reduce(terms, reduction)


def _contrast_reference_backward(grad, row_log, col_log, shared, reduction):
    count = row_log.shape[0]
    share = (1 if col_log is None else 2) * (max(count, 1) if reduction == "mean" else 1)
    drow = (grad / share).expand(count).clone()
    extra = 0 if col_log is None else col_log.shape[0] - count
    dtarget = -2 * drow if shared else -drow
    return drow, dtarget, drow.new_empty(0) if col_log is None else torch.cat((drow, drow.new_zeros(extra)))


def _contrast_fake(row_max, row_log, row_target, col_max, col_log, col_target, reduction):
    return row_log.new_empty(row_log.shape if reduction == "none" else ())


def _contrast_fake_backward(grad, row_log, col_log, shared, reduction):
    lines = (row_log, row_log, col_log)
    return tuple(row_log.new_empty(0) if t is None else t.new_empty(t.shape) for t in lines)


define(
    "contrast_terms(Tensor row_max, Tensor row_log, Tensor row_target, Tensor? col_max, Tensor? col_log, "
    "Tensor? col_target, str reduction) -> Tensor",
    reference=_contrast_reference,
    fake=_contrast_fake,
    triton="terms.contrast_terms",
)
define(
    "contrast_terms_backward(Tensor grad, Tensor row_log, Tensor? col_log, bool shared, str reduction) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_contrast_reference_backward,
    fake=_contrast_fake_backward,
    triton="terms.contrast_terms_backward",
)
define(
    "hinge_terms(Tensor positive, Tensor row, Tensor col, float margin, str reduction) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton="terms.hinge_terms",
)
define(
    "hinge_terms_backward(Tensor grad, Tensor positive, Tensor row, Tensor col, float margin, str reduction)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton="terms.hinge_terms_backward",
)
