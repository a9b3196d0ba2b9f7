"""da = κ ds b and db = κ dsᵀ a of a stored ds [N, M], in one launch: what ends the backward of a small dense loss.

Each result is summed in fp32 over the other side in tiles, in order, multiplied by κ and rounded once. One program more
adds up the partial sums of Σ_ij ds_ij s_ij that the sweep before left, which κ gets. No atomics.

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
    """What an argument that is a tensor or a number stands for."""
    if tensor is not None:
        return tl.load(tensor)
    else:
        return constant


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


@triton.jit(do_not_specialize=["N", "M", "constant", "count"])
def gradients_kernel(
    ds, a, b, da, db, scale, constant, parts, dscale, stride, a_stride, b_stride, N, M, D, count,
    SAME: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """A program for every tile of da, then of db, then one for dscale; None for what is not wanted."""
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
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(da + at, (total * kappa).to(da.dtype.element_ty), mask=(r < N)[:, None] & (c < D)[None, :])
    if db is not None and (p >= above) & (p < above + below):
        r, c = (p - above) // columns * BR + tl.arange(0, BR), (p - above) % columns * BC + tl.arange(0, BC)
        total = tl.zeros([BR, BC], tl.float32)
        total = products(total, ds, a, r, c, stride, a_stride, M, N, D, True, BK, PRECISION)
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(db + at, (total * kappa).to(db.dtype.element_ty), mask=(r < M)[:, None] & (c < D)[None, :])
    if dscale is not None and p == above + below:
        along = tl.zeros([BT], tl.float64)
        for t0 in range(0, count, BT):
            t = t0 + tl.arange(0, BT)
            along += tl.load(parts + t, mask=t < count, other=0.0).to(tl.float64)
        tl.store(dscale, tl.sum(along, 0).to(tl.float32))


def room(a: torch.Tensor, M: int) -> torch.Tensor:
    """Where the scores' gradient goes, of a [N, D] with M others: [N, M], rows on 16 bytes unless they are short."""
    dtype = a.dtype if a.dtype != torch.float16 else torch.float32
    return a.new_empty(len(a), M + (-M % 16 if M > 64 else 0), dtype=dtype)[:, :M]


def gradients(
    ds: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    constant: float,
    parts: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(κ ds b [N, D], κ dsᵀ a [M, D], Σ parts) in the dtypes of a, b and fp32, each empty where needs says no.

    ds: [N, M] of `room`; a, b: [N, D], [M, D]; b None: a, whose gradient is then that of both sides
    scale: κ, or None: constant is; parts: fp32, any shape
    """
    N, M, D, like = *ds.shape, a.shape[1], a
    same, (b, wanted) = b is None, (a, False) if b is None else (b, needs[1])
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if needs[0] else None
    db = torch.empty_like(b, memory_format=torch.contiguous_format) if wanted else None
    dscale = parts.new_empty(()) if needs[2] else None
    a, b = operands.rows(a), operands.rows(b)
    tile = tiles.gradients_tile(a.dtype)
    columns = triton.cdiv(D, tile.BC)
    programs = sum(triton.cdiv(len(x), tile.BR) * columns for x in (da, db) if x is not None) + (dscale is not None)
    if programs:
        kind = tiles.kind(a.dtype)
        gradients_kernel[(programs,)](
            ds, a, b, da, db, scale, constant, parts, dscale, ds.stride(0), a.stride(0), b.stride(0), N, M, D,
            parts.numel(), SAME=same, BR=tile.BR, BC=tile.BC, BK=tile.BK,
            PRECISION="ieee" if kind == "ieee" else "tf32", BT=tiles.TERMS,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    da, db = (x if x is not None else like.new_empty(0) for x in (da, db))
    return da, db, dscale if dscale is not None else parts.new_empty(0)
