"""Log-sums of small problems in two launches, and their gradients in two: `gssf_kernels/statistics/logsumexp.py`.

    forward    a sweep leaves (max, Σ e^(t - max)) of the rows and columns of every tile; one kernel merges them
    backward   a sweep stores ds [N, M], at most `tiles.SMALL` entries; one kernel makes da, db and dκ of it

Larger problems are declined (NotImplemented) and go by chunks, a pass and the library's products.
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels.kernels import hopper, operands, tiles
from gssf_kernels.kernels.dense import log_sums, merge_logs
from gssf_kernels.kernels.epilogues import tile_lines
from gssf_kernels.kernels.gradients import gradients, number, room
from gssf_kernels.kernels.sweep import Sweep


@triton.jit
def log_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's log-sums of each row and column, and the pairs' t where it meets the diagonal."""
    scale, constant, pair, row_max, row_sum, col_max, col_sum = state
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    i, j = i0 + tl.arange(0, BN), j0 + tl.arange(0, BM)
    t = s * number(scale, constant)
    if (i0 < j0 + BM) & (j0 < i0 + BN):
        own = tl.sum(tl.where(i[:, None] == j[None, :], t, 0.0), 1)
        tl.store(pair + i, own, mask=(i >= j0) & (i < j0 + BM) & (i < N) & (i < M))
    t = tl.where((i < N)[:, None] & (j < M)[None, :], t, float("-inf"))
    row_at, col_at, inside = tile_lines(tile_i, tile_j, blocks, M, BN, BM)
    top, total = log_sums(t, 1)  # [BN]
    tl.store(row_max + row_at, top)
    tl.store(row_sum + row_at, total)
    top, total = log_sums(t, 0)  # [BM]
    tl.store(col_max + col_at, top, mask=inside)
    tl.store(col_sum + col_at, total, mask=inside)


@triton.jit
def line(tops, totals, out_max, out_log, lane, length, parts, count, BP: tl.constexpr, BL: tl.constexpr):
    """Merge the parts [parts, length] of lines, and write (max, log) of those below count."""
    top, total = tl.full([BL], float("-inf"), tl.float32), tl.zeros([BL], tl.float32)
    top, total = merge_logs(top, total, tops, totals, lane, length, parts, BP)
    tl.store(out_max + lane, top, mask=lane < count)
    tl.store(out_log + lane, tl.log(total), mask=lane < count)


@triton.jit(do_not_specialize=["N", "M", "rows", "down", "across"])
def log_lines_kernel(
    partial, row_max, row_log, col_max, col_log, N, M, rows, down, across, BP: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """BL rows a program, then BL columns a program; rows: a part's length, across: how many there are."""
    row_maxima, row_sums, col_maxima, col_sums = partial
    row_programs = tl.cdiv(N, BL)
    if tl.program_id(0) < row_programs:
        lane = tl.program_id(0) * BL + tl.arange(0, BL)
        line(row_maxima, row_sums, row_max, row_log, lane, rows, across, N, BP, BL)
    else:
        lane = (tl.program_id(0) - row_programs) * BL + tl.arange(0, BL)
        line(col_maxima, col_sums, col_max, col_log, lane, M, down, M, BP, BL)


@triton.jit
def share_of(t, top, log, at, inside, AXIS: tl.constexpr):
    """e^(t - top - log) along lines; where all of a line is -inf, that is 0."""
    least: tl.constexpr = -3.4028234663852886e38
    x = tl.load(top + at, mask=inside, other=0.0)
    y = tl.load(log + at, mask=inside, other=0.0)
    x, y = tl.where(x < least, least, x), tl.where(y < least, least, y)  # in this form NaN stays
    return tl.exp((t - tl.expand_dims(x, AXIS)) - tl.expand_dims(y, AXIS))


@triton.jit
def weighted(t, top, log, grad, at, inside, AXIS: tl.constexpr):
    """grad times `share_of` along lines."""
    g = tl.load(grad + at, mask=inside, other=0.0)
    return tl.expand_dims(g, AXIS) * share_of(t, top, log, at, inside, AXIS)


@triton.jit
def softmax_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's dL/dt, stored, and Σ of it times s."""
    scale, constant, row_max, row_log, row_grad, col_max, col_log, col_grad, pair_grad, ds, stride, along = state
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    i, j = i0 + tl.arange(0, BN), j0 + tl.arange(0, BM)
    inside = (i < N)[:, None] & (j < M)[None, :]
    t = s * number(scale, constant)
    g = tl.zeros([BN, BM], tl.float32)
    if row_grad is not None:
        g += weighted(t, row_max, row_log, row_grad, i, i < N, 1)
    if col_grad is not None:
        g += weighted(t, col_max, col_log, col_grad, j, j < M, 0)
    if pair_grad is not None and (i0 < j0 + BM) & (j0 < i0 + BN):
        own = tl.load(pair_grad + i, mask=(i < N) & (i < M), other=0.0)
        g += tl.where(i[:, None] == j[None, :], own[:, None], 0.0)
    at = i.to(tl.int64)[:, None] * stride + j[None, :]
    tl.store(ds + at, g.to(ds.dtype.element_ty), mask=inside)
    sums = tl.sum(tl.where((j < M)[None, :], g * s, 0.0), 1)
    tl.store(along + tile_i * tl.cdiv(M, BM) + tile_j, tl.sum(tl.where(i < N, sums, 0.0), 0))


def logsumexp_scores(
    a: torch.Tensor, b: torch.Tensor | None, scale: torch.Tensor | None, constant: float, keep: bool = False
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return (row_max [N], row_log [N], col_max [M], col_log [M], pair [min(N, M)]) fp32, and nothing kept: [0].

    a: [N, D] fp32, bf16 or fp16; b: [M, D] as a, or None: a
    scale: κ, fp32 scalar, or None: constant is

    Raises TypeError for other dtypes. Declines more than `tiles.SMALL` scores, and none.
    """
    y = a if b is None else b
    operands.check_dtype("logsumexp_scores", a, y)
    if hopper.takes_over("logsumexp_scores", a, y):
        return *hopper.logsumexp_scores(a, y, scale, constant), a.new_empty(0, dtype=torch.float32)
    N, M = len(a), len(y)
    if not 0 < N * M <= tiles.SMALL:
        return NotImplemented
    with torch.cuda.device_of(a):
        sweep = Sweep(a, y)
        down, across, rows = sweep.row_blocks, sweep.column_blocks, sweep.row_blocks * sweep.tile.BN
        partial = [a.new_empty(*size, dtype=torch.float32) for size in ((across, rows),) * 2 + ((down, M),) * 2]
        found = [a.new_empty(size, dtype=torch.float32) for size in (N, N, M, M)]
        pair = found[0].new_empty(min(N, M))
        sweep.run(log_tile, (scale, constant, pair, *partial), 0, down)
        BL = tiles.MERGE_LANES
        log_lines_kernel[(triton.cdiv(N, BL) + triton.cdiv(M, BL),)](
            tuple(partial), *found, N, M, rows, down, across, BP=tiles.MERGE_PARTS, BL=BL, num_warps=4, num_stages=2
        )
    return *found, pair, pair.new_empty(0)


def logsumexp_scores_backward(
    drow: torch.Tensor | None,
    dcol: torch.Tensor | None,
    dpair: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor | None,
    scale: torch.Tensor | None,
    constant: float,
    row_max: torch.Tensor,
    row_log: torch.Tensor,
    col_max: torch.Tensor,
    col_log: torch.Tensor,
    needs: list[bool],
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | NotImplementedType:
    """Return the gradients of a [N, D], b [M, D] and κ, each empty where needs says no; b None: a has both sides'.

    drow, dcol, dpair: those of row_log, col_log and pair, fp32, or None; the rest as `logsumexp_scores` has it

    Raises TypeError for other dtypes. Declines what `logsumexp_scores` does.
    """
    y = a if b is None else b
    operands.check_dtype("logsumexp_scores_backward", a, y)
    N, M = len(a), len(y)
    if not 0 < N * M <= tiles.SMALL:
        return NotImplemented
    drow, dcol, dpair = operands.contiguous(drow, dcol, dpair)
    with torch.cuda.device_of(a):
        sweep = Sweep(a, y)
        ds, along = room(a, M), a.new_empty(1, sweep.row_blocks * sweep.column_blocks, dtype=torch.float32)
        lines = (row_max, row_log, drow, col_max, col_log, dcol, dpair)
        sweep.run(softmax_tile, (scale, constant, *lines, ds, ds.stride(0), along), 0, sweep.row_blocks)
        da, db, sums = gradients(ds, a, b, needs, along if needs[2] else None, scale=scale, constant=constant)
    return da, db, sums[0] if sums else along.new_empty(0)
