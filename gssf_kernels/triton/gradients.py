"""da = κ dscores b and db = κ dscoresᵀ a of stored dscores [N, M], and sums, in one launch.

Each gradient is summed in fp32 over the other side in tiles, in order, multiplied by κ and rounded once. One program
more adds up what the sweep before left of every tile: the loss, or the gradient of κ, Σ_ij ds_ij s_ij. No atomics.

fp16 stores dscores in fp32 and multiplies in tf32, which holds all of fp16 and the small numbers that it does not: so
dscores need no scaling there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.reductions import merge_sums
from gssf_kernels.triton.score_functions import number


@triton.jit
def logarithm_slope(tensor, constant):
    """d number / d tensor: the number itself if the tensor stores its logarithm, else 1."""
    if constant is None:
        return tl.exp(tl.load(tensor))
    else:
        return 1.0


@triton.jit
def products(
    total, dscores, x, r, c, stride, x_stride, R, K, D,
    ACROSS: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [BR, BC] and Σ_k dscores[r, k] x[k, c], k below K; with ACROSS Σ_k dscores[k, r] x[k, c]."""
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        if ACROSS:
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
    """Gradients of the pairs' scores r [BR] from terms s_ij - s_ii and s_ij - s_jj: minus the slopes of both."""
    of_rows, of_cols = slopes  # [across, rows], [down, M]
    return -(merge_sums(of_rows, r, rows, N, across, BP) + merge_sums(of_cols, r, M, N, down, BP))


@triton.jit
def add_pairs(total, weights, x, r, c, stride, N, D):
    """total [BR, BC] and weights [BR] times rows r of x; a zero weight adds nothing, even to an infinite row."""
    inside = ((r < N) & (weights != 0))[:, None] & (c < D)[None, :]
    y = tl.load(x + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)
    return total + weights[:, None] * y.to(tl.float32)


@triton.jit(do_not_specialize=["N", "M", "constant", "share", "count", "rows", "across", "down"])
def gradients_kernel(
    dscores, a, b, da, db, scale, constant, slopes, partial, sums, share, stride, a_stride, b_stride, N, M, D: tl.int32,
    count, rows, across, down, SAME: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A program for every tile of da, then of db, then one for the sums; None for what is not wanted."""
    p = tl.program_id(0)
    columns = tl.cdiv(D, BC)
    da_programs = tl.cdiv(N, BR) * columns if da is not None else 0
    db_programs = tl.cdiv(M, BR) * columns if db is not None else 0
    kappa = number(scale, constant)
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
            whole = tl.zeros([BT], tl.float64)
            for t0 in range(0, count, BT):
                t = t0 + tl.arange(0, BT)
                whole += tl.load(partial + q * count + t, mask=t < count, other=0.0).to(tl.float64)
            total = tl.sum(whole, 0).to(tl.float32) * share
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
    """(κ dscores b [N, D], κ dsᵀ a [M, D], share Σ partial [P times a scalar]), gradients empty where needs says no.

    dscores: [N, M] of `empty_dscores`, or None where no gradient is wanted; a, b: [N, D], [M, D]
    b: None for a, whose gradient is then that of both sides; partial: [P, any] fp32
    scale: κ, or None: constant is; without constant log κ, and the last of the sums becomes its gradient
    dtype: of the gradients, a's if None
    slopes: partial slopes of rows [K, at least N] and of columns [K, M], minus which are the pairs', or None
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
            BP=tiles.MERGE_PARTS, BT=tiles.TERMS,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    empty = a.new_empty(0, dtype=dtype)
    return da if da is not None else empty, db if db is not None else empty.clone(), sums
