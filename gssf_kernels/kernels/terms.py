"""Formulas over statistics in one launch, and their gradients.

hinge      terms[i] = [m + row[i] - p[i]]₊ + [m + col[i] - p[i]]₊
contrast   terms[i] = ½ [(row_max - row_target) + row_log] + ½ [(col_max - col_target) + col_log], all at i

A sum is one program's: BT terms at a time into a vector, then that vector. The same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gssf_kernels.kernels import operands, tiles


@triton.jit
def store_sum(out, total, N, MEAN: tl.constexpr):
    """out = Σ total [BT], or that over N."""
    whole = tl.sum(total, 0)
    if MEAN:
        whole = whole / N
    tl.store(out, whole)


@triton.jit
def upstream(grad, stride, i, N, SUM: tl.constexpr, MEAN: tl.constexpr):
    """What the terms at i get from above: of a sum or a mean all the same, a scalar."""
    if SUM:
        g = tl.load(grad)
        if MEAN:
            g = g / N
    else:
        g = tl.load(grad + i.to(tl.int64) * stride, mask=i < N, other=0.0)
    return g


@triton.jit
def hinge(p, n, margin):
    """(m + n - p, whether it is not below 0), which holds of NaN."""
    t = (n + margin) - p
    return t, (t < 0) == 0


@triton.jit
def beyond(positive, negative, margin, i, inside):
    """`hinge` of what lies at i."""
    n = tl.load(negative + i, mask=inside, other=float("-inf"))
    return hinge(tl.load(positive + i, mask=inside, other=0.0), n, margin)


@triton.jit(do_not_specialize=["N"])
def hinge_kernel(
    positive, row, col, out, margin, N, SUM: tl.constexpr, MEAN: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    total = tl.zeros([BT], tl.float32)
    step = tl.num_programs(0) * BT
    for i0 in range(tl.program_id(0) * BT, N, step):
        i = i0 + tl.arange(0, BT)
        rows, over_rows = beyond(positive, row, margin, i, i < N)
        cols, over_cols = beyond(positive, col, margin, i, i < N)
        terms = tl.where(over_rows, rows, 0.0) + tl.where(over_cols, cols, 0.0)
        if SUM:
            total += tl.where(i < N, terms, 0.0)
        else:
            tl.store(out + i, terms, mask=i < N)
    if SUM:
        store_sum(out, total, N, MEAN)


@triton.jit(do_not_specialize=["N", "M"])
def hinge_backward_kernel(
    grad, positive, row, col, dpositive, drow, dcol, margin, grad_stride, N, M,
    SUM: tl.constexpr, MEAN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BT + tl.arange(0, BT)
    _, over_rows = beyond(positive, row, margin, i, i < N)
    _, over_cols = beyond(positive, col, margin, i, i < N)
    g = upstream(grad, grad_stride, i, N, SUM, MEAN)
    rows = tl.where(over_rows, g, 0.0)
    cols = tl.where(over_cols & (i < N), g, 0.0)
    tl.store(drow + i, rows, mask=i < N)
    tl.store(dcol + i, cols, mask=i < M)
    tl.store(dpositive + i, -(rows + cols), mask=i < N)


def hinge_terms(
    positive: torch.Tensor, row: torch.Tensor, col: torch.Tensor, margin: float, reduction: str
) -> torch.Tensor:
    """Return the terms [N] fp32, or for "sum" and "mean" a scalar.

    positive, row: [N] fp32; col: [M] fp32, M >= N

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("hinge_terms", positive, row, col)
    N, some = len(positive), reduction != "none"
    if N == 0:
        return positive.new_zeros(() if some else 0)
    out = positive.new_empty(() if some else N)
    given = operands.contiguous(positive, row, col)
    BT = tiles.TERMS
    with torch.cuda.device_of(positive):
        hinge_kernel[(1 if some else triton.cdiv(N, BT),)](
            *given, out, margin, N, SUM=some, MEAN=reduction == "mean", BT=BT, num_warps=4, num_stages=2
        )
    return out


def hinge_terms_backward(
    grad: torch.Tensor,
    positive: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
    margin: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of positive [N], row [N] and col [M], fp32; grad: of what `hinge_terms` gives.

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("hinge_terms_backward", grad, positive, row, col)
    N, M, some, BT = len(positive), len(col), reduction != "none", tiles.TERMS
    out = positive.new_empty(N), positive.new_empty(N), positive.new_empty(M)
    if M > 0:
        given = operands.contiguous(positive, row, col)
        with torch.cuda.device_of(positive):
            hinge_backward_kernel[(triton.cdiv(M, BT),)](
                grad, *given, *out, margin, 0 if some else grad.stride(0), N, M,
                SUM=some, MEAN=reduction == "mean", BT=BT, num_warps=4, num_stages=2,
            )  # fmt: skip
    return out


@triton.jit
def log_ratio(top, log, target, i, inside):
    t = tl.load(top + i, mask=inside, other=0.0) - tl.load(target + i, mask=inside, other=0.0)
    return t + tl.load(log + i, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["N"])
def contrast_kernel(
    row_max, row_log, row_target, col_max, col_log, col_target, out, N,
    SUM: tl.constexpr, MEAN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BT], tl.float32)
    step = tl.num_programs(0) * BT
    for i0 in range(tl.program_id(0) * BT, N, step):
        i = i0 + tl.arange(0, BT)
        terms = log_ratio(row_max, row_log, row_target, i, i < N)
        if col_log is not None:
            if col_target is not None:
                terms += log_ratio(col_max, col_log, col_target, i, i < N)
            else:
                terms += log_ratio(col_max, col_log, row_target, i, i < N)
            terms *= 0.5
        if SUM:
            total += tl.where(i < N, terms, 0.0)
        else:
            tl.store(out + i, terms, mask=i < N)
    if SUM:
        store_sum(out, total, N, MEAN)


@triton.jit(do_not_specialize=["N", "M"])
def contrast_backward_kernel(
    grad, drow, dtarget, dcol, grad_stride, N, M,
    SHARED: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BT + tl.arange(0, BT)
    g = tl.where(i < N, upstream(grad, grad_stride, i, N, SUM, MEAN), 0.0)
    if dcol is not None:
        g = g * 0.5
        tl.store(dcol + i, g, mask=i < M)
    tl.store(drow + i, g, mask=i < N)
    tl.store(dtarget + i, -2.0 * g if SHARED else -g, mask=i < N)


def contrast_terms(
    row_max: torch.Tensor,
    row_log: torch.Tensor,
    row_target: torch.Tensor,
    col_max: torch.Tensor | None,
    col_log: torch.Tensor | None,
    col_target: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """Return the terms [N] fp32, or for "sum" and "mean" a scalar; of the rows alone, not halved, without columns.

    row_max, row_log, row_target, col_target: [N] fp32; col_max, col_log: [M] fp32, M >= N; col_target None: the rows'

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("contrast_terms", row_max, row_log, row_target)
    N, some, BT = len(row_log), reduction != "none", tiles.TERMS
    if N == 0:
        return row_log.new_zeros(() if some else 0)
    out = row_log.new_empty(() if some else N)
    given = operands.contiguous(row_max, row_log, row_target, col_max, col_log, col_target)
    with torch.cuda.device_of(row_log):
        contrast_kernel[(1 if some else triton.cdiv(N, BT),)](
            *given, out, N, SUM=some, MEAN=reduction == "mean", BT=BT, num_warps=4, num_stages=2
        )
    return out


def contrast_terms_backward(
    grad: torch.Tensor, row_log: torch.Tensor, col_log: torch.Tensor | None, shared: bool, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of row_log [N], of either target [N] and of col_log [M], or [0] where there is none.

    grad: of what `contrast_terms` gives; shared: whether one target stands for both, and gets both gradients

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("contrast_terms_backward", grad, row_log)
    N, some, BT = len(row_log), reduction != "none", tiles.TERMS
    M = len(col_log) if col_log is not None else 0
    drow, dtarget = row_log.new_empty(N), row_log.new_empty(N)
    dcol = row_log.new_empty(M) if col_log is not None else None
    if max(N, M) > 0:
        with torch.cuda.device_of(row_log):
            contrast_backward_kernel[(triton.cdiv(max(N, M), BT),)](
                grad, drow, dtarget, dcol, 0 if some else grad.stride(0), N, M,
                SHARED=shared, SUM=some, MEAN=reduction == "mean", BT=BT, num_warps=4, num_stages=2,
            )  # fmt: skip
    return drow, dtarget, dcol if dcol is not None else row_log.new_empty(0)
