"""da = κ dscores b and db = κ dscoresᵀ a of stored dscores [N, M], and sums, in one launch.

Each gradient is summed in fp32 over the columns (of db: the rows) of dscores tile by tile, in order, multiplied by κ
and rounded once. One further program adds up the partials of the sweep: the loss, or the gradient of κ,
Σ_ij ds_ij s_ij. No atomics.

For fp16 inputs dscores are stored in fp32 and multiplied in TF32, which holds every fp16 number and far smaller ones:
dscores need no loss scaling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.reductions import merge_sums
from gssf_kernels.triton.score_functions import load_scalar


@triton.jit
def logarithm_slope(tensor, constant):
    """d scale / d tensor: scale if the tensor stores log-scale, else 1."""
    if constant is None:
        return tl.exp(tl.load(tensor))
    else:
        return 1.0


@triton.jit
def products(
    total, dscores, x, r, c, stride, x_stride, R, K, D,
    TRANSPOSED: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [BR, BC] + Σ_k<K dscores[r, k] x[k, c]; with TRANSPOSED + Σ_k<K dscores[k, r] x[k, c]."""
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        if TRANSPOSED:
            at = k.to(tl.int64)[:, None] * stride + r[None, :]
            g = tl.load(dscores + at, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0).T  # [BR, BK]
        else:
            at = r.to(tl.int64)[:, None] * stride + k[None, :]
            g = tl.load(dscores + at, mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        at = k.to(tl.int64)[:, None] * x_stride + c[None, :]
        y = tl.load(x + at, mask=(k < K)[:, None] & (c < D)[None, :], other=0.0)  # [BK, BC]
        total = tl.dot(g, y.to(g.dtype), total, input_precision=PRECISION)
    return total


@triton.jit
def dpositive(slopes, r, N, M, rows, across, down, BP: tl.constexpr):
    """Gradients of positive_score at r [BR] from terms s_ij - s_ii and s_ij - s_jj: minus the sums of their slopes."""
    row_slopes, col_slopes = slopes  # [across, rows], [down, M]
    return -(merge_sums(row_slopes, r, rows, N, across, BP) + merge_sums(col_slopes, r, M, N, down, BP))


@triton.jit
def add_pairs(total, weights, x, r, c, stride, N, D):
    """total [BR, BC] + weights [BR] times rows r of x; a zero weight adds nothing, even if the row is infinite."""
    inside = ((r < N) & (weights != 0))[:, None] & (c < D)[None, :]
    y = tl.load(x + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)
    return total + weights[:, None] * y.to(tl.float32)


@triton.jit(do_not_specialize=["N", "M", "constant", "share", "count", "rows", "across", "down"])
def gradients_kernel(
    dscores, a, b, da, db, scale, constant, slopes, partial, sums, share, stride, a_stride, b_stride, N, M, D: tl.int32,
    count, rows, across, down, SAME: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Programs for the tiles of da, then of db, then one for the sums; what is None is not computed."""
    p = tl.program_id(0)
    columns = tl.cdiv(D, BC)
    da_programs = tl.cdiv(N, BR) * columns if da is not None else 0
    db_programs = tl.cdiv(M, BR) * columns if db is not None else 0
    kappa = load_scalar(scale, constant)
    if da is not None and p < da_programs:
        r, c = p // columns * BR + tl.arange(0, BR), p % columns * BC + tl.arange(0, BC)
        total = tl.zeros([BR, BC], tl.float32)
        total = products(total, dscores, b, r, c, stride, b_stride, N, M, D, False, BK, PRECISION)
        if SAME:
            total = products(total, dscores, a, r, c, stride, a_stride, M, N, D, True, BK, PRECISION)
        if slopes is not None:
            weights = dpositive(slopes, r, N, M, rows, across, down, BP)
            total = add_pairs(total, weights, b, r, c, b_stride, N, D)
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(da + at, (total * kappa).to(da.dtype.element_ty), mask=(r < N)[:, None] & (c < D)[None, :])
    if db is not None and (p >= da_programs) & (p < da_programs + db_programs):
        r, c = (p - da_programs) // columns * BR + tl.arange(0, BR), (p - da_programs) % columns * BC + tl.arange(0, BC)
        total = tl.zeros([BR, BC], tl.float32)
        total = products(total, dscores, a, r, c, stride, a_stride, M, N, D, True, BK, PRECISION)
        if slopes is not None:
            weights = dpositive(slopes, r, N, M, rows, across, down, BP)
            total = add_pairs(total, weights, a, r, c, a_stride, N, D)
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(db + at, (total * kappa).to(db.dtype.element_ty), mask=(r < M)[:, None] & (c < D)[None, :])
    if sums is not None and p == da_programs + db_programs:
        for q in tl.static_range(len(sums)):
            lanes = tl.zeros([BT], tl.float64)
            for t0 in range(0, count, BT):
                t = t0 + tl.arange(0, BT)
                lanes += tl.load(partial + q * count + t, mask=t < count, other=0.0).to(tl.float64)
            total = tl.sum(lanes, 0).to(tl.float32) * share
            if q == len(sums) - 1:  # the gradient of κ comes last
                total *= logarithm_slope(scale, constant)
            tl.store(sums[q], total)


def gradients(
    dscores: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor | None,
    needs: list[bool],
    partial: torch.Tensor | None,
    *,
    scale: torch.Tensor | None = None,
    constant: float | None = 1.0,
    share: float = 1.0,
    slopes: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """(κ dscores b [N, D], κ dscoresᵀ a [M, D], P sums: share Σ partial[p]); gradients not in `needs` are empty.

    dscores: [N, M] of `empty_dscores`, or None if no gradient is needed; a, b: [N, D], [M, D]
    b: None means b is a, and da is the sum of both gradients
    partial: [P, any] fp32, or None
    scale: tensor of κ, or of log κ if constant is None, or None if κ is constant; the last sum becomes its gradient
    dtype: of the gradients, a's if None
    slopes: None, or partials of Σ dscores of rows [K, at least N] and of columns [K, M]: terms are relative to
    positive_score, whose gradients are minus these sums
    """
    N, M, D, same = len(a), len(a if b is None else b), a.shape[1], b is None
    b, dtype = a if b is None else b, dtype or a.dtype
    da = a.new_empty(a.shape, dtype=dtype) if needs[0] else None
    db = b.new_empty(b.shape, dtype=dtype) if needs[1] and not same else None
    sums = tuple(partial.new_empty(()) for _ in partial) if partial is not None else ()
    a, b = operands.rows(a), operands.rows(b)
    tile, kind = planning.gradients_tile(a.dtype), planning.kind(a.dtype)
    columns = triton.cdiv(D, tile.BC)
    programs = sum(triton.cdiv(len(x), tile.BR) * columns for x in (da, db) if x is not None) + bool(sums)
    rows, across, down = (slopes[0].shape[1], len(slopes[0]), len(slopes[1])) if slopes else (0, 0, 0)
    if programs:
        gradients_kernel[(programs,)](
            dscores, a, b, da, db, scale, constant, slopes, partial, sums or None, share,
            dscores.stride(0) if dscores is not None else 0, a.stride(0), b.stride(0), N, M, D,
            partial[0].numel() if partial is not None else 0, rows, across, down,
            SAME=same, BR=tile.BR, BC=tile.BC, BK=tile.BK, PRECISION="ieee" if kind == "ieee" else "tf32",
            BP=tiles.MERGE_PARTIALS, BT=tiles.TERMS,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    empty = a.new_empty(0, dtype=dtype)
    return da if da is not None else empty, db if db is not None else empty.clone(), sums
