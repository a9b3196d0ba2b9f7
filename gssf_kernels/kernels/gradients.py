"""da = κ ds b and db = κ dsᵀ a of a stored ds [N, M], and sums, in one launch: what ends a small dense loss.

Each gradient is summed in fp32 over the other side in tiles, in order, multiplied by κ and rounded once. One program
more adds up what the sweep before left of every tile: the loss, or what κ gets of Σ_ij ds_ij s_ij. No atomics.

fp16 takes ds in fp32 and its products in tf32, which hold all of fp16 and the small numbers that it does not: ds needs
no unit of its own there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gssf_kernels.kernels import operands, tiles


@triton.jit
def number(tensor, constant):
    """What an argument that is a tensor or a number stands for; a tensor without a number is its logarithm."""
    if tensor is None:
        return constant
    elif constant is None:
        return tl.exp(tl.load(tensor))
    else:
        return tl.load(tensor)


@triton.jit
def outer_slope(tensor, constant):
    """What a number's gradient is times to be its tensor's: the number where that is the logarithm."""
    if constant is None:
        return tl.exp(tl.load(tensor))
    else:
        return 1.0


@triton.jit
def products(
    total, ds, x, r, c, stride, x_stride, R, K, D,
    ACROSS: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [BR, BC] and Σ_k ds[r, k] x[k, c], k below K; with ACROSS Σ_k ds[k, r] x[k, c]."""
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        if ACROSS:
            at = k.to(tl.int64)[:, None] * stride + r[None, :]
            g = tl.load(ds + at, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0).T  # [BR, BK]
        else:
            at = r.to(tl.int64)[:, None] * stride + k[None, :]
            g = tl.load(ds + at, mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        at = k.to(tl.int64)[:, None] * x_stride + c[None, :]
        y = tl.load(x + at, mask=(k < K)[:, None] & (c < D)[None, :], other=0.0)  # [BK, BC]
        total = tl.dot(g, y.to(g.dtype), total, input_precision=PRECISION)
    return total


@triton.jit
def part_sums(source, lane, length, count, parts, BP: tl.constexpr):
    """Σ of source [parts, length] over the parts at the lanes, 0 from count on."""
    total = tl.zeros(lane.shape, tl.float32)
    for p0 in range(0, parts, BP):
        p = p0 + tl.arange(0, BP)
        inside = (p < parts)[:, None] & (lane < count)[None, :]
        total += tl.sum(tl.load(source + p.to(tl.int64)[:, None] * length + lane[None, :], mask=inside, other=0.0), 0)
    return total


@triton.jit
def own_weights(slopes, r, N, M, rows, across, down, BP: tl.constexpr):
    """What pair r [BR] gets of terms s_ij - s_ii and s_ij - s_jj: minus the slopes of its row and of its column."""
    of_rows, of_cols = slopes  # [across, rows], [down, M]
    return -(part_sums(of_rows, r, rows, N, across, BP) + part_sums(of_cols, r, M, N, down, BP))


@triton.jit
def add_own(total, weights, x, r, c, stride, N, D):
    """total [BR, BC] and weights [BR] times rows r of x; a zero weight adds nothing, even to an infinite row."""
    inside = ((r < N) & (weights != 0))[:, None] & (c < D)[None, :]
    y = tl.load(x + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)
    return total + weights[:, None] * y.to(tl.float32)


@triton.jit(do_not_specialize=["N", "M", "constant", "share", "count", "rows", "across", "down"])
def gradients_kernel(
    ds, a, b, da, db, scale, constant, slopes, parts, sums, share, stride, a_stride, b_stride, N, M, D: tl.int32,
    count, rows, across, down, SAME: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A program for every tile of da, then of db, then one for the sums; None for what is not wanted."""
    p = tl.program_id(0)
    columns = tl.cdiv(D, BC)
    above = tl.cdiv(N, BR) * columns if da is not None else 0
    below = tl.cdiv(M, BR) * columns if db is not None else 0
    kappa = number(scale, constant)
    if da is not None and p < above:
        r, c = p // columns * BR + tl.arange(0, BR), p % columns * BC + tl.arange(0, BC)
        total = tl.zeros([BR, BC], tl.float32)
        total = products(total, ds, b, r, c, stride, b_stride, N, M, D, False, BK, PRECISION)
        if SAME:
            total = products(total, ds, a, r, c, stride, a_stride, M, N, D, True, BK, PRECISION)
        if slopes is not None:
            weights = own_weights(slopes, r, N, M, rows, across, down, BP)
            total = add_own(total, weights, b, r, c, b_stride, N, D)
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(da + at, (total * kappa).to(da.dtype.element_ty), mask=(r < N)[:, None] & (c < D)[None, :])
    if db is not None and (p >= above) & (p < above + below):
        r, c = (p - above) // columns * BR + tl.arange(0, BR), (p - above) % columns * BC + tl.arange(0, BC)
        total = tl.zeros([BR, BC], tl.float32)
        total = products(total, ds, a, r, c, stride, a_stride, M, N, D, True, BK, PRECISION)
        if slopes is not None:
            weights = own_weights(slopes, r, N, M, rows, across, down, BP)
            total = add_own(total, weights, a, r, c, a_stride, N, D)
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(db + at, (total * kappa).to(db.dtype.element_ty), mask=(r < M)[:, None] & (c < D)[None, :])
    if sums is not None and p == above + below:
        for q in tl.static_range(len(sums)):
            whole = tl.zeros([BT], tl.float64)
            for t0 in range(0, count, BT):
                t = t0 + tl.arange(0, BT)
                whole += tl.load(parts + q * count + t, mask=t < count, other=0.0).to(tl.float64)
            total = tl.sum(whole, 0).to(tl.float32) * share
            if q == len(sums) - 1:  # what κ gets comes last
                total *= outer_slope(scale, constant)
            tl.store(sums[q], total)


def room(a: torch.Tensor, M: int) -> torch.Tensor:
    """Where the scores' gradient goes, of a [N, D] with M others: [N, M], rows on 16 bytes unless they are short."""
    dtype = a.dtype if a.dtype != torch.float16 else torch.float32
    return a.new_empty(len(a), M + (-M % 16 if M > 64 else 0), dtype=dtype)[:, :M]


def gradients(
    ds: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor | None,
    needs: list[bool],
    parts: torch.Tensor | None,
    *,
    scale: torch.Tensor | None = None,
    constant: float | None = 1.0,
    share: float = 1.0,
    slopes: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """(κ ds b [N, D], κ dsᵀ a [M, D], share Σ parts [P times a scalar]), gradients empty where needs says no.

    ds: [N, M] of `room`, or None where no gradient is wanted; a, b: [N, D], [M, D]
    b: None for a, whose gradient is then that of both sides; parts: [P, any] fp32
    scale: κ, or None: constant is; without constant log κ, and the last of the sums is what that gets
    dtype: of the gradients, a's if None
    slopes: partial slopes of rows [K, at least N] and columns [K, M] that pairs (i, i) get back, negative, or None
    """
    N, M, D, same = len(a), len(a if b is None else b), a.shape[1], b is None
    b, dtype = a if b is None else b, dtype or a.dtype
    da = a.new_empty(a.shape, dtype=dtype) if needs[0] else None
    db = b.new_empty(b.shape, dtype=dtype) if needs[1] and not same else None
    sums = tuple(parts.new_empty(()) for _ in parts) if parts is not None else ()
    a, b = operands.rows(a), operands.rows(b)
    tile, kind = tiles.gradients_tile(a.dtype), tiles.kind(a.dtype)
    columns = triton.cdiv(D, tile.BC)
    programs = sum(triton.cdiv(len(x), tile.BR) * columns for x in (da, db) if x is not None) + bool(sums)
    rows, across, down = (slopes[0].shape[1], len(slopes[0]), len(slopes[1])) if slopes else (0, 0, 0)
    if programs:
        gradients_kernel[(programs,)](
            ds, a, b, da, db, scale, constant, slopes, parts, sums or None, share,
            ds.stride(0) if ds is not None else 0, a.stride(0), b.stride(0), N, M, D,
            parts[0].numel() if parts is not None else 0, rows, across, down,
            SAME=same, BR=tile.BR, BC=tile.BC, BK=tile.BK, PRECISION="ieee" if kind == "ieee" else "tf32",
            BP=tiles.MERGE_PARTS, BT=tiles.TERMS,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    empty = a.new_empty(0, dtype=dtype)
    return da if da is not None else empty, db if db is not None else empty.clone(), sums
