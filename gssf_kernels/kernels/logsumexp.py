"""Log-sums and their gradients by sweeps: `gssf_kernels/statistics/logsumexp.py` has the formulas.

    forward    a sweep leaves (max, Σ e^(t - max)) of the rows and columns of every tile; one kernel merges them
    backward   a sweep stores ds [N, M], at most `plan.SMALL` entries; one kernel makes da, db and dκ of it

More scores than that go by slabs of row blocks: forward the same two kernels for each, backward `kernels/slabs.py`. So
do those of bf16 alone; others, and those of one side twice, are declined (NotImplemented) and go by chunks, a pass and
the library's products.
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels import plan
from gssf_kernels._library import outside_autocast
from gssf_kernels.kernels import hopper, operands, slabs
from gssf_kernels.kernels.dense import log_sums, merge_logs
from gssf_kernels.kernels.epilogues import tile_lines
from gssf_kernels.kernels.gradients import gradients, number, room
from gssf_kernels.kernels.sweep import Sweep
from gssf_kernels.plan import Scores


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


@triton.jit(do_not_specialize=["N", "M", "first", "blocks"])
def log_lines_kernel(
    partial, row_max, row_log, col_max, col_log, N, M, first, blocks,
    BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Finish the slab's rows, and merge its columns into those of the slabs before; the last makes their logarithms."""
    row_maxima, row_sums, col_maxima, col_sums = partial
    rows = blocks * BN
    row_programs = tl.cdiv(rows, BL)
    if tl.program_id(0) < row_programs:
        lane = tl.program_id(0) * BL + tl.arange(0, BL)
        top, total = tl.full([BL], float("-inf"), tl.float32), tl.zeros([BL], tl.float32)
        top, total = merge_logs(top, total, row_maxima, row_sums, lane, rows, tl.cdiv(M, BM), BP)
        i = first * BN + lane
        inside = (lane < rows) & (i < N)
        tl.store(row_max + i, top, mask=inside)
        tl.store(row_log + i, tl.log(total), mask=inside)
    else:
        j = (tl.program_id(0) - row_programs) * BL + tl.arange(0, BL)
        before = (j < M) & (first > 0)
        top = tl.load(col_max + j, mask=before, other=float("-inf"))
        total = tl.load(col_log + j, mask=before, other=0.0)  # of the slabs before not a logarithm yet
        top, total = merge_logs(top, total, col_maxima, col_sums, j, M, blocks, BP)
        last = (first + blocks) * BN >= N
        tl.store(col_max + j, top, mask=j < M)
        tl.store(col_log + j, tl.where(last, tl.log(total), total), mask=j < M)


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
    if ds is not None:
        rows = ds - (first * BN).to(tl.int64) * stride  # ds is of the slab's alone
        tl.store(rows + i.to(tl.int64)[:, None] * stride + j[None, :], g.to(ds.dtype.element_ty), mask=inside)
    sums = tl.sum(tl.where((j < M)[None, :], g * s, 0.0), 1)
    tl.store(along + tile_i * tl.cdiv(M, BM) + tile_j, tl.sum(tl.where(i < N, sums, 0.0), 0))


def logsumexp_scores(
    a: torch.Tensor, b: torch.Tensor | None, scale: torch.Tensor | None, constant: float, keep: bool = False
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return (row_max [N], row_log [N], col_max [M], col_log [M], pair [min(N, M)]) fp32, and nothing kept: [0].

    a: [N, D] fp32, bf16 or fp16; b: [M, D] as a, or None: a
    scale: κ, fp32 scalar, or None: constant is

    Raises TypeError for other dtypes. Declines more than `plan.SMALL` scores unless `slabs.takes` them, and none.
    """
    y = a if b is None else b
    operands.check_dtype("logsumexp_scores", a, y)
    if hopper.takes_over("logsumexp_scores", a, y):
        return *hopper.logsumexp_scores(a, y, scale, constant), a.new_empty(0, dtype=torch.float32)
    N, M = len(a), len(y)
    if not (0 < N * M <= plan.SMALL or slabs.takes(a, b)):
        return NotImplemented
    found = [a.new_empty(size, dtype=torch.float32) for size in (N, N, M, M)]
    pair = found[0].new_empty(min(N, M))
    with torch.cuda.device_of(a):
        sweep = Sweep(a, y, Scores(a, y).tile("sums"))
        rows, cols = sweep.partial_results(torch.float32, torch.float32)
        for first, blocks in sweep.slabs():
            sweep.run(log_tile, (scale, constant, pair, *rows, *cols), first, blocks)
            sweep.merge(log_lines_kernel, first, blocks, (*rows, *cols), *found)
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
    drow, dcol, dpair = operands.contiguous(drow, dcol, dpair)
    given = (scale, constant, row_max, row_log, drow, col_max, col_log, dcol, dpair)
    if b is not None and slabs.takes(a, b):
        return _by_slabs(a, b, needs, given)
    if not 0 < N * M <= plan.SMALL:
        return NotImplemented
    with torch.cuda.device_of(a):
        sweep = Sweep(a, y, Scores(a, y).tile())
        ds, along = room(a, M), a.new_empty(1, sweep.row_blocks * sweep.column_blocks, dtype=torch.float32)
        sweep.run(softmax_tile, (*given, ds, ds.stride(0), along), 0, sweep.row_blocks)
        da, db, sums = gradients(ds, a, b, needs, along if needs[2] else None, scale=scale, constant=constant)
    return da, db, sums[0] if sums else along.new_empty(0)


def _by_slabs(
    a: torch.Tensor, b: torch.Tensor, needs: list[bool], given: tuple
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logsumexp_scores_backward` of more scores; given: what `softmax_tile` takes before ds."""

    def launch(sweep, first, blocks, ds, along):
        sweep.run(softmax_tile, (*given, ds, ds.stride(0) if ds is not None else 0, along), first, blocks)

    with torch.cuda.device_of(a), outside_autocast(a.device):
        da, db, (total,) = slabs.gradients_by_slabs(a, b, needs, 1, launch)
    kappa = given[1] if given[0] is None else given[0]
    dscale = total.float() if needs[2] else da.new_empty(0)
    return da.mul_(kappa).to(a.dtype), db.mul_(kappa).to(b.dtype), dscale
