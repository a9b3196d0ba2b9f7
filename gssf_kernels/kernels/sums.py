"""Sums of a function of every score, of small problems, in two launches, or three of differences from the pairs' own.

    a sweep leaves Σ f, Σ f' and Σ f' s of every tile and stores f' [N, M], at most `tiles.SMALL` entries, where a
    gradient is wanted; one kernel makes the sums, da and db of it: `gssf_kernels/statistics/sums.py`

Larger problems are declined (NotImplemented) and go by chunks, a pass and the library's products.
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels.kernels import operands, tiles
from gssf_kernels.kernels.dense import term
from gssf_kernels.kernels.epilogues import tile_lines
from gssf_kernels.kernels.gradients import gradients, number, room
from gssf_kernels.kernels.pairs import pair_scores
from gssf_kernels.kernels.sweep import Sweep


@triton.jit
def sums_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's Σ f, Σ f' and Σ f' s, where there is room its f', and with pairs its rows' and columns' slopes."""
    KIND: tl.constexpr = state[0][0]
    POSITIVES: tl.constexpr = state[0][1]
    scale, constant, bias, offset, pair, a_ids, b_ids, parts, slopes, ds, stride = state[1]
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    inside = (i < N)[:, None] & (j < M)[None, :]
    same = i[:, None] == j[None, :]
    if a_ids is not None:
        x, y = tl.load(a_ids + i, mask=i < N, other=0), tl.load(b_ids + j, mask=j < M, other=0)
        same = same | (x[:, None] == y[None, :])
    t, beta = s * number(scale, constant), number(bias, offset)
    if pair is None:
        f, g = term(t + beta, same, inside, KIND, POSITIVES)
        total = tl.sum(f, 1)
    else:
        row_at, col_at, _ = tile_lines(tile_i, tile_j, blocks, M, BN, BM)
        own = beta - tl.load(pair + i, mask=i < N, other=0.0)
        f, g = term(t + own[:, None], same, inside, KIND, POSITIVES)
        total = tl.sum(f, 1)
        tl.store(slopes[0] + row_at, tl.sum(g, 1))
        own = beta - tl.load(pair + j, mask=j < N, other=0.0)
        f, h = term(t + own[None, :], same, inside & (j < N)[None, :], KIND, POSITIVES)
        total += tl.sum(f, 1)
        tl.store(slopes[1] + col_at, tl.sum(h, 0), mask=j < M)
        g += h
    count = blocks * tl.cdiv(M, BM)
    at = parts + tile_i * tl.cdiv(M, BM) + tile_j
    tl.store(at, tl.sum(total, 0))
    tl.store(at + count, tl.sum(tl.sum(g, 1), 0))
    along = tl.sum(tl.where((j < M)[None, :], g * s, 0.0), 1)
    tl.store(at + 2 * count, tl.sum(tl.where(i < N, along, 0.0), 0))
    if ds is not None:
        tl.store(ds + i.to(tl.int64)[:, None] * stride + j[None, :], g.to(ds.dtype.element_ty), mask=inside)


def score_total(
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    constant: float,
    offset: float,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    kind: str,
    positives: str,
    relative: bool,
    share: float,
    needs: list[bool],
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return share Σ f(κ s + β), what κ and what β get of it, and Σ_j f'_ij b_j [N, D] and Σ_i f'_ij a_i [M, D], fp32.

    a: [N, D] fp32, bf16 or fp16; b: [M, D] as a, or None: a; a_ids, b_ids: [N], [M] int64, or None
    scale, bias: κ, β, fp32 scalars, or None: constant and offset are; needs: for a and b
    relative: the sum of f(s_ij + β - s_ii) and, j < N, f(s_ij + β - s_jj), M >= N

    Raises TypeError for other dtypes. Declines more than `tiles.SMALL` scores, and none.
    """
    y = a if b is None else b
    operands.check_dtype("score_total", a, y)
    N, M = len(a), len(y)
    if not 0 < N * M <= tiles.SMALL:
        return NotImplemented
    if b is None and b_ids is None:
        b_ids = a_ids
    with torch.cuda.device_of(a):
        sweep = Sweep(a, y)
        down, across = sweep.row_blocks, sweep.column_blocks
        parts = a.new_empty(3, down * across, dtype=torch.float32)
        pair = slopes = ds = None
        if relative:
            pair = pair_scores(a, y, None, None)
            slopes = parts.new_empty(across, down * sweep.tile.BN), parts.new_empty(down, M)
        if any(needs):
            ds = room(a, M)
        stride = ds.stride(0) if ds is not None else 0
        options = tl.constexpr(kind), tl.constexpr(positives)
        given = (scale, constant, bias, offset, pair, *operands.contiguous(a_ids, b_ids), parts, slopes, ds, stride)
        sweep.run(sums_tile, (options, given), 0, down)
        da, db, sums = gradients(ds, a, b, needs, parts, share=share, slopes=slopes, dtype=torch.float32)
    total, dbias, dscale = sums
    return total, dscale, dbias, da, db


@triton.jit
def scaled(x, out, factor, lane, count):
    """out = factor x, rounded, at the lanes."""
    value = tl.load(x + lane, mask=lane < count, other=0.0)
    tl.store(out + lane, (value * factor).to(out.dtype.element_ty), mask=lane < count)


@triton.jit
def scaled_kernel(
    grad, da, db, dscale, dbias, scale, constant, share, a_out, b_out, scale_out, bias_out, a_count, b_count,
    BT: tl.constexpr,
):  # fmt: skip
    """grad share κ times da and db, BT numbers a program, and grad times what κ and β get."""
    lane = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    upstream = tl.load(grad)
    factor = upstream * share * number(scale, constant)
    if a_out is not None:
        scaled(da, a_out, factor, lane, a_count)
    if b_out is not None:
        scaled(db, b_out, factor, lane, b_count)
    if tl.program_id(0) == 0:
        tl.store(scale_out, upstream * tl.load(dscale))
        tl.store(bias_out, upstream * tl.load(dbias))


def score_total_backward(
    grad: torch.Tensor,
    dscale: torch.Tensor,
    dbias: torch.Tensor,
    da: torch.Tensor,
    db: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    constant: float,
    share: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a, b, κ and β get of grad: what `score_total` found times it; gradients that are empty stay so.

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("score_total_backward", grad, da, db, a)
    out = torch.empty_like(da, dtype=a.dtype), torch.empty_like(db, dtype=a.dtype)
    ends = torch.empty_like(dscale), torch.empty_like(dbias)
    wanted = [t if t.numel() else None for t in out]
    BT = tiles.TERMS
    programs = max(triton.cdiv(max(da.numel(), db.numel()), BT), 1)
    given = operands.contiguous(da, db)
    with torch.cuda.device_of(a):
        scaled_kernel[(programs,)](
            grad, *given, dscale, dbias, scale, constant, share, *wanted, *ends, da.numel(), db.numel(),
            BT=BT, num_warps=4, num_stages=2,
        )  # fmt: skip
    return *out, *ends
