"""Sums of a function of every score, of small problems, in two launches, or three of differences from the pairs' own.

    a sweep leaves Σ f, Σ f' and Σ f' s of every tile and stores f' [N, M], at most `plan.SMALL` entries, where a
    gradient is wanted; one kernel makes the sums, da and db of it: `gssf_kernels/statistics/sums.py`

    of rows' own terms the sweep leaves Σ f alone, and one kernel adds them up; backward the same sweep as above takes
    what comes from above, and one kernel makes da and db

More scores than that go by slabs (`kernels/slabs.py`) where they are bf16 and of two sides; else they are declined
(NotImplemented) and go by chunks, a pass and the library's products.
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels import plan
from gssf_kernels._library import outside_autocast
from gssf_kernels.kernels import operands, slabs, tiles
from gssf_kernels.kernels.dense import term
from gssf_kernels.kernels.epilogues import tile_lines
from gssf_kernels.kernels.gradients import gradients, number, outer_slope, part_sums, room
from gssf_kernels.kernels.pairs import pair_scores
from gssf_kernels.kernels.sweep import Sweep
from gssf_kernels.plan import Scores


@triton.jit
def met(i, j, a_ids, b_ids, N, M):
    """(which scores there are, which are of positives)."""
    inside = (i < N)[:, None] & (j < M)[None, :]
    same = i[:, None] == j[None, :]
    if a_ids is not None:
        x, y = tl.load(a_ids + i, mask=i < N, other=0), tl.load(b_ids + j, mask=j < M, other=0)
        same = same | (x[:, None] == y[None, :])
    return inside, same


@triton.jit
def lines_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's Σ f of each row, and with pairs of each column."""
    KIND: tl.constexpr = state[0][0]
    POSITIVES: tl.constexpr = state[0][1]
    scale, constant, bias, offset, pair, a_ids, b_ids, rows, cols = state[1]
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    inside, same = met(i, j, a_ids, b_ids, N, M)
    row_at, col_at, _ = tile_lines(tile_i, tile_j, blocks, M, BN, BM)
    t, beta = s * number(scale, constant), number(bias, offset)
    if pair is None:
        f, _ = term(t + beta, same, inside, KIND, POSITIVES)
    else:
        own = beta - tl.load(pair + j, mask=j < N, other=0.0)
        f, _ = term(t + own[None, :], same, inside & (j < N)[None, :], KIND, POSITIVES)
        tl.store(cols + col_at, tl.sum(f, 0), mask=j < M)
        own = beta - tl.load(pair + i, mask=i < N, other=0.0)
        f, _ = term(t + own[:, None], same, inside, KIND, POSITIVES)
    tl.store(rows + row_at, tl.sum(f, 1))


@triton.jit(do_not_specialize=["N", "M", "length", "across", "down"])
def line_sums_kernel(rows, cols, out, N, M, length, across, down, BP: tl.constexpr, BL: tl.constexpr):
    """out [N]: the sums of the parts rows [across, length], and of cols [down, M] where there are any."""
    i = tl.program_id(0) * BL + tl.arange(0, BL)
    total = part_sums(rows, i, length, N, across, BP)
    if cols is not None:
        total += part_sums(cols, i, M, N, down, BP)
    tl.store(out + i, total, mask=i < N)


@triton.jit
def sums_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's Σ f, Σ f' and Σ f' s, where there is room its f', and with pairs its rows' and columns' slopes.

    above: [N], what a row's f' are times, and with pairs a column's; None for 1.
    """
    KIND: tl.constexpr = state[0][0]
    POSITIVES: tl.constexpr = state[0][1]
    scale, constant, bias, offset, pair, a_ids, b_ids, parts, slopes, ds, stride, above, above_stride = state[1]
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    inside, same = met(i, j, a_ids, b_ids, N, M)
    t, beta = s * number(scale, constant), number(bias, offset)
    if pair is None:
        f, g = term(t + beta, same, inside, KIND, POSITIVES)
        total = tl.sum(f, 1)
        if above is not None:
            g *= tl.load(above + i.to(tl.int64) * above_stride, mask=i < N, other=0.0)[:, None]
    else:
        row_at, col_at, _ = tile_lines(tile_i, tile_j, blocks, M, BN, BM)
        own = beta - tl.load(pair + i, mask=i < N, other=0.0)
        f, g = term(t + own[:, None], same, inside, KIND, POSITIVES)
        total = tl.sum(f, 1)
        if above is not None:
            g *= tl.load(above + i.to(tl.int64) * above_stride, mask=i < N, other=0.0)[:, None]
        tl.store(slopes[0] + row_at, tl.sum(g, 1))
        own = beta - tl.load(pair + j, mask=j < N, other=0.0)
        f, h = term(t + own[None, :], same, inside & (j < N)[None, :], KIND, POSITIVES)
        total += tl.sum(f, 1)
        if above is not None:
            h *= tl.load(above + j.to(tl.int64) * above_stride, mask=j < N, other=0.0)[None, :]
        tl.store(slopes[1] + col_at, tl.sum(h, 0), mask=j < M)
        g += h
    count = blocks * tl.cdiv(M, BM)
    at = parts + tile_i * tl.cdiv(M, BM) + tile_j
    tl.store(at, tl.sum(total, 0))
    tl.store(at + count, tl.sum(tl.sum(g, 1), 0))
    along = tl.sum(tl.where((j < M)[None, :], g * s, 0.0), 1)
    tl.store(at + 2 * count, tl.sum(tl.where(i < N, along, 0.0), 0))
    if ds is not None:
        rows = ds - (first * BN).to(tl.int64) * stride  # ds is of the slab's alone
        tl.store(rows + i.to(tl.int64)[:, None] * stride + j[None, :], g.to(ds.dtype.element_ty), mask=inside)


def score_total(
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    constant: float | None,
    offset: float,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    kind: str,
    positives: str,
    relative: bool,
    share: float,
    needs: list[bool],
    pair: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return share Σ f(κ s + β), what κ and what β get of it, and Σ_j f'_ij b_j [N, D] and Σ_i f'_ij a_i [M, D], fp32.

    a: [N, D] fp32, bf16 or fp16; b: [M, D] as a, or None: a; a_ids, b_ids: [N], [M] int64, or None
    scale, bias: κ, β, fp32 scalars, or None: constant and offset are; scale without constant: log κ; needs: for a and b
    relative: the sum of f(s_ij + β - s_ii) and, j < N, f(s_ij + β - s_jj), M >= N; pair: the s_ii [N] fp32, if known

    Raises TypeError for other dtypes. Declines more than `plan.SMALL` scores, unless `slabs.takes` them and they are
    not relative, and none.
    """
    y = a if b is None else b
    operands.check_dtype("score_total", a, y)
    if b is not None and not relative and slabs.takes(a, b):
        options = tl.constexpr(kind), tl.constexpr(positives)
        ids = operands.contiguous(a_ids, a_ids if b_ids is None else b_ids)
        return _by_slabs(a, b, needs, options, (scale, constant, bias, offset, None, *ids), share)
    if not 0 < len(a) * len(y) <= plan.SMALL:
        return NotImplemented
    with torch.cuda.device_of(a):
        if relative and pair is None:
            pair = pair_scores(a, y, None, None)
        given = (scale, constant, bias, offset, pair if relative else None)
        ds, parts, slopes = swept(a, y, given, a_ids, b_ids, kind, positives, None, any(needs))
        da, db, sums = gradients(ds, a, b, needs, parts, share=share, slopes=slopes, dtype=torch.float32)
    total, dbias, dscale = sums
    return total, dscale, dbias, da, db


def _by_slabs(
    a: torch.Tensor, b: torch.Tensor, needs: list[bool], options: tuple, given: tuple, share: float
) -> tuple[torch.Tensor, ...]:
    """`score_total` of more scores; options, given: what `sums_tile` takes before its parts."""

    def launch(sweep, first, blocks, ds, parts):
        stride = ds.stride(0) if ds is not None else 0
        sweep.run(sums_tile, (options, (*given, parts, None, ds, stride, None, 0)), first, blocks)

    with torch.cuda.device_of(a), outside_autocast(a.device):
        da, db, sums = slabs.gradients_by_slabs(a, b, needs, 3, launch)
    total, dbias, dscale = (share * sums).float().unbind()
    return total.clone(), dscale.clone(), dbias.clone(), da, db


def swept(
    a: torch.Tensor,
    b: torch.Tensor,
    given: tuple,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    kind: str,
    positives: str,
    above: torch.Tensor | None,
    gradient: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """What `sums_tile` leaves: ds [N, M] or None, its parts [3, tiles], and with pairs its slopes.

    given: scale, constant, bias, offset and the pairs' scores or None; above: [N] fp32 at any stride, or None
    """
    sweep, M = Sweep(a, b, Scores(a, b).tile()), len(b)
    down, across = sweep.row_blocks, sweep.column_blocks
    parts = a.new_empty(3, down * across, dtype=torch.float32)
    slopes = ds = None
    if given[4] is not None:
        slopes = parts.new_empty(across, down * sweep.tile.BN), parts.new_empty(down, M)
    if gradient:
        ds = room(a, M)
    stride, above_stride = (t.stride(0) if t is not None else 0 for t in (ds, above))
    ids = operands.contiguous(a_ids, a_ids if b_ids is None else b_ids)
    options = tl.constexpr(kind), tl.constexpr(positives)
    sweep.run(sums_tile, (options, (*given, *ids, parts, slopes, ds, stride, above, above_stride)), 0, down)
    return ds, parts, slopes


def score_rows(
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    constant: float | None,
    offset: float,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    kind: str,
    positives: str,
    relative: bool,
    pair: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | NotImplementedType:
    """Return the rows' Σ_j f(κ s_ij + β) [N] fp32, with relative and the columns' where their pairs are, and s_ii [N].

    The last is empty where pair is given or not asked for. The rest as for `score_total`.

    Raises TypeError for other dtypes. Declines more than `plan.SMALL` scores, and none.
    """
    y = a if b is None else b
    operands.check_dtype("score_rows", a, y)
    N, M = len(a), len(y)
    if not 0 < N * M <= plan.SMALL:
        return NotImplemented
    own, out = a.new_empty(0, dtype=torch.float32), a.new_empty(N, dtype=torch.float32)
    with torch.cuda.device_of(a):
        if relative and pair is None:
            own = pair = pair_scores(a, y, None, None)
        sweep = Sweep(a, y, Scores(a, y).tile())
        down, across, length = sweep.row_blocks, sweep.column_blocks, sweep.row_blocks * sweep.tile.BN
        rows, cols = out.new_empty(across, length), out.new_empty(down, M) if relative else None
        options, ids = (tl.constexpr(kind), tl.constexpr(positives)), (a_ids, a_ids if b_ids is None else b_ids)
        given = (scale, constant, bias, offset, pair if relative else None, *operands.contiguous(*ids), rows, cols)
        sweep.run(lines_tile, (options, given), 0, down)
        BL = tiles.MERGE_LANES
        line_sums_kernel[(triton.cdiv(N, BL),)](
            rows, cols, out, N, M, length, across, down, BP=tiles.MERGE_PARTS, BL=BL, num_warps=4, num_stages=2
        )
    return out, own


def score_rows_backward(
    grad: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    constant: float | None,
    offset: float,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    kind: str,
    positives: str,
    relative: bool,
    pair: torch.Tensor | None,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | NotImplementedType:
    """Return what a [N, D], b [M, D], κ and β get of grad [N] fp32; b None: a has both sides'.

    needs: for a and b; empty where it says no; pair: the s_ii [N], with relative; the rest as for `score_rows`

    Raises TypeError for other dtypes. Declines what `score_rows` does.
    """
    y = a if b is None else b
    operands.check_dtype("score_rows_backward", grad, a, y)
    if not 0 < len(a) * len(y) <= plan.SMALL:
        return NotImplemented
    with torch.cuda.device_of(a):
        given = (scale, constant, bias, offset, pair if relative else None)
        ds, parts, slopes = swept(a, y, given, a_ids, b_ids, kind, positives, grad, any(needs))
        da, db, sums = gradients(ds, a, b, needs, parts, scale=scale, constant=constant, slopes=slopes)
    _, dbias, dscale = sums
    return da, db, dscale, dbias


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
        tl.store(scale_out, upstream * tl.load(dscale) * outer_slope(scale, constant))
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
    constant: float | None,
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
