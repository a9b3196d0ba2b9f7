"""InfoNCE of small problems in two launches each way: `gssf_kernels/statistics/contrast.py`.

    forward    a sweep leaves (max, Σ e^(t - max)) of the rows and columns of every tile, and with ids or label
               smoothing what targets are sums of; one kernel merges them and makes the terms, a sum in one program
    backward   a sweep takes what comes from above and stores dL/dt [N, M], at most `plan.SMALL` entries; one kernel
               makes da, db and dκ of it

Larger problems are declined (NotImplemented) and go by their log-sums (`logsumexp.py`).
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels import plan
from gssf_kernels.kernels import operands, tiles
from gssf_kernels.kernels.dense import merge_logs
from gssf_kernels.kernels.epilogues import tile_lines
from gssf_kernels.kernels.gradients import gradients, number, part_sums, room
from gssf_kernels.kernels.logsumexp import log_tile, share_of
from gssf_kernels.kernels.sums import met
from gssf_kernels.kernels.sweep import Sweep
from gssf_kernels.kernels.terms import store_sum, upstream
from gssf_kernels.plan import Scores


@triton.jit
def contrast_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """`log_tile`, and Σ t and the number of positives, and Σ t of all, of each row and column."""
    lines, of_ids, of_all = state
    log_tile(s, tile_i, tile_j, first, blocks, N, M, lines, BN, BM)
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    row_at, col_at, inside = tile_lines(tile_i, tile_j, blocks, M, BN, BM)
    t = s * number(lines[0], lines[1])
    if of_ids is not None:
        a_ids, b_ids, row_sum, row_count, col_sum, col_count = of_ids
        there, same = met(i, j, a_ids, b_ids, N, M)
        same = there & same
        own = tl.where(same, t, 0.0)
        tl.store(row_sum + row_at, tl.sum(own, 1))
        tl.store(col_sum + col_at, tl.sum(own, 0), mask=inside)
        tl.store(row_count + row_at, tl.sum(same.to(tl.float32), 1))
        tl.store(col_count + col_at, tl.sum(same.to(tl.float32), 0), mask=inside)
    if of_all is not None:
        row_sum, col_sum = of_all
        t = tl.where((i < N)[:, None] & (j < M)[None, :], t, 0.0)
        tl.store(row_sum + row_at, tl.sum(t, 1))
        tl.store(col_sum + col_at, tl.sum(t, 0), mask=inside)


@triton.jit
def line_ratio(
    tops, totals, own, counts, whole, pair, out_max, out_log, out_count, lane, length, parts, count, N, others, epsilon,
    BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """(max - target) + log of the lines at the lanes, of which count are; what the backward takes is written.

    own, counts, whole: parts, or None; others: how many scores whole is of
    """
    top, total = tl.full([BL], float("-inf"), tl.float32), tl.zeros([BL], tl.float32)
    top, total = merge_logs(top, total, tops, totals, lane, length, parts, BP)
    log = tl.log(total)
    tl.store(out_max + lane, top, mask=lane < count)
    tl.store(out_log + lane, log, mask=lane < count)
    if own is not None:
        positives = part_sums(counts, lane, length, N, parts, BP)
        tl.store(out_count + lane, positives, mask=lane < N)
        target = part_sums(own, lane, length, N, parts, BP) / tl.where(lane < N, positives, 1.0)
    else:
        target = tl.load(pair + lane, mask=lane < N, other=0.0)
    if whole is not None:
        target += epsilon * (part_sums(whole, lane, length, N, parts, BP) / others - target)
    return (top - target) + log


@triton.jit(do_not_specialize=["N", "M", "rows", "down", "across"])
def contrast_lines_kernel(
    partial, of_ids, of_all, pair, out, found, counts, epsilon, N, M, rows, down, across,
    BOTH: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """BL rows and columns at a time, and their terms; a sum is one program's. rows: a part's length, across: parts."""
    row_maxima, row_sums, col_maxima, col_sums = partial
    row_max, row_log, col_max, col_log = found
    row_own, row_counts, col_own, col_counts, row_all, col_all, row_count, col_count = (None,) * 8
    if of_ids is not None:
        row_own, row_counts, col_own, col_counts = of_ids
        row_count, col_count = counts
    if of_all is not None:
        row_all, col_all = of_all
    total = tl.zeros([BL], tl.float32)
    for i0 in range(tl.program_id(0) * BL, M, tl.num_programs(0) * BL):
        i = i0 + tl.arange(0, BL)
        terms = line_ratio(
            row_maxima, row_sums, row_own, row_counts, row_all, pair, row_max, row_log, row_count,
            i, rows, across, N, N, M, epsilon, BP, BL,
        )  # fmt: skip
        of_cols = line_ratio(
            col_maxima, col_sums, col_own, col_counts, col_all, pair, col_max, col_log, col_count,
            i, M, down, M, N, N, epsilon, BP, BL,
        )  # fmt: skip
        if BOTH:
            terms = 0.5 * (terms + of_cols)
        if SUM:
            total += tl.where(i < N, terms, 0.0)
        else:
            tl.store(out + i, terms, mask=i < N)
    if SUM:
        store_sum(out, total, N, MEAN)


@triton.jit
def contrast_slope_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's dL/dt, stored, and Σ of it times s."""
    BOTH: tl.constexpr = state[0][0]
    SUM: tl.constexpr = state[0][1]
    MEAN: tl.constexpr = state[0][2]
    SMOOTH: tl.constexpr = state[0][3]
    grad, grad_stride, scale, constant, epsilon, lines, of_ids, ds, stride, along = state[1]
    row_max, row_log, col_max, col_log = lines
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    t = s * number(scale, constant)
    a_ids, b_ids = None, None
    if of_ids is not None:
        a_ids, b_ids, row_count, col_count = of_ids
    inside, same = met(i, j, a_ids, b_ids, N, M)
    kept = 1.0 - epsilon
    above = tl.where(i < N, upstream(grad, grad_stride, i, N, SUM, MEAN), 0.0)
    if BOTH:
        above = above * 0.5
    own = above * kept
    if of_ids is not None:
        own = own / tl.load(row_count + i, mask=i < N, other=1.0)
    g = above[:, None] * share_of(t, row_max, row_log, i, i < N, 1) - tl.where(same, own[:, None], 0.0)
    if SMOOTH:
        g -= (above * (epsilon / M))[:, None]
    if BOTH:
        above = 0.5 * tl.where(j < N, upstream(grad, grad_stride, j, N, SUM, MEAN), 0.0)
        own = above * kept
        if of_ids is not None:
            own = own / tl.load(col_count + j, mask=j < N, other=1.0)
        g += above[None, :] * share_of(t, col_max, col_log, j, j < M, 0) - tl.where(same, own[None, :], 0.0)
        if SMOOTH:
            g -= (above * (epsilon / N))[None, :]
    at = i.to(tl.int64)[:, None] * stride + j[None, :]
    tl.store(ds + at, g.to(ds.dtype.element_ty), mask=inside)
    sums = tl.sum(tl.where((j < M)[None, :], g * s, 0.0), 1)
    tl.store(along + tile_i * tl.cdiv(M, BM) + tile_j, tl.sum(tl.where(i < N, sums, 0.0), 0))


def contrast(
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    constant: float | None,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    epsilon: float,
    symmetric: bool,
    reduction: str,
    keep: bool = False,
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return (loss, row_max, row_log [N], col_max, col_log [M], row_count, col_count [N], and [0] for nothing kept).

    All fp32: the terms [N] or their sum or mean, log-sums in two parts, and numbers of positives, empty without ids.

    a: [N, D] fp32, bf16 or fp16; b: [M, D] as a, M >= N, or None: a; a_ids, b_ids: [N], [M] int64, or both None
    scale: κ, fp32 scalar, or None: constant is; without constant its logarithm
    epsilon: of label smoothing; symmetric: both directions, or rows alone

    Raises TypeError for other dtypes. Declines more than `plan.SMALL` scores, and none.
    """
    y = a if b is None else b
    operands.check_dtype("contrast", a, y)
    N, M, some = len(a), len(y), reduction != "none"
    if not 0 < N * M <= plan.SMALL:
        return NotImplemented
    found = tuple(a.new_empty(size, dtype=torch.float32) for size in (N, N, M, M))
    pair, counts = found[0].new_empty(N), tuple(found[0].new_empty(N if a_ids is not None else 0) for _ in range(2))
    out = pair.new_empty(() if some else N)
    with torch.cuda.device_of(a):
        sweep = Sweep(a, y, Scores(a, y).tile())
        down, across, rows = sweep.row_blocks, sweep.column_blocks, sweep.row_blocks * sweep.tile.BN

        def parts(each: int) -> tuple[torch.Tensor, ...]:
            return tuple(pair.new_empty(*size) for size in ((across, rows),) * each + ((down, M),) * each)

        partial, of_ids, of_all = parts(2), parts(2) if a_ids is not None else None, parts(1) if epsilon else None
        given = (*operands.contiguous(a_ids, b_ids), *of_ids) if of_ids is not None else None
        sweep.run(contrast_tile, ((scale, constant, pair, *partial), given, of_all), 0, down)
        BL = tiles.TERM_LANES
        contrast_lines_kernel[(1 if some else triton.cdiv(M, BL),)](
            partial, of_ids, of_all, pair, out, found, counts, epsilon, N, M, rows, down, across, BOTH=symmetric,
            SUM=some, MEAN=reduction == "mean", BP=tiles.MERGE_PARTS, BL=BL, num_warps=8, num_stages=2,
        )  # fmt: skip
    return out, *found, *counts, pair.new_empty(0)


def contrast_backward(
    grad: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    constant: float | None,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    epsilon: float,
    symmetric: bool,
    reduction: str,
    row_max: torch.Tensor,
    row_log: torch.Tensor,
    col_max: torch.Tensor,
    col_log: torch.Tensor,
    row_count: torch.Tensor,
    col_count: torch.Tensor,
    needs: list[bool],
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | NotImplementedType:
    """Return the gradients of a [N, D], b [M, D] and κ, each empty where needs says no; b None: a has both sides'.

    grad: of the terms [N], or of their sum or mean, fp32; the rest as `contrast` has it

    Raises TypeError for other dtypes. Declines what `contrast` does.
    """
    y = a if b is None else b
    operands.check_dtype("contrast_backward", grad, a, y)
    N, M, some = len(a), len(y), reduction != "none"
    if not 0 < N * M <= plan.SMALL:
        return NotImplemented
    of_ids = (*operands.contiguous(a_ids, b_ids), row_count, col_count) if a_ids is not None else None
    with torch.cuda.device_of(a):
        sweep = Sweep(a, y, Scores(a, y).tile())
        ds, along = room(a, M), a.new_empty(1, sweep.row_blocks * sweep.column_blocks, dtype=torch.float32)
        options = tuple(tl.constexpr(flag) for flag in (symmetric, some, reduction == "mean", epsilon > 0))
        lines = (row_max, row_log, col_max, col_log)
        above = (grad, 0 if some else grad.stride(0), scale, constant, epsilon)
        sweep.run(contrast_slope_tile, (options, (*above, lines, of_ids, ds, ds.stride(0), along)), 0, sweep.row_blocks)
        da, db, sums = gradients(ds, a, b, needs, along if needs[2] else None, scale=scale, constant=constant)
    return da, db, sums[0] if sums else along.new_empty(0)
