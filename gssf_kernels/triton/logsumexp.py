"""row log Σ_j e^(t_ij), column log Σ_i e^(t_ij), and their gradients; formulas: `gssf_kernels/ops/logsumexp.py`.

    forward    a sweep stores (max, Σ e^(t - max)) of the rows and columns of every tile; one kernel merges them
    backward   a sweep stores dscores: all of them [N, M] if they are few, else a row panel at a time; one kernel, or
               PyTorch's matrix products, compute da and db from them

The same two epilogues run on a chunk of scores that PyTorch's matrix product has stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels._library import outside_autocast
from gssf_kernels.plan import Plan
from gssf_kernels.triton import hopper, operands, tiles
from gssf_kernels.triton.epilogues import partial_offsets
from gssf_kernels.triton.gradients import gradients
from gssf_kernels.triton.reductions import log_sums, merge_logs
from gssf_kernels.triton.score_functions import load_scalar, logits, logsumexp_slope
from gssf_kernels.triton.sweep import Chunk, Sweep, empty_dscores, gradients_by_row_panels, nothing_kept


@triton.jit
def log_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's log-sums of each row and column, by class; and t of the pairs (i, i) where the diagonal crosses it."""
    scale, constant, by_label, positive_logit, rows, cols = state[1]
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    i, j = i0 + tl.arange(0, BN), j0 + tl.arange(0, BM)
    t, _, positive, row, col = logits(s, i, j, N, M, load_scalar(scale, constant), state[0], by_label)
    if positive_logit is not None and (i0 < j0 + BM) & (j0 < i0 + BN):
        diagonal = tl.sum(tl.where(i[:, None] == j[None, :], t, 0.0), 1)
        tl.store(positive_logit + i, diagonal, mask=(i >= j0) & (i < j0 + BM) & (i < N) & (i < M))
    row_at, col_at, inside = partial_offsets(tile_i, tile_j, blocks, M, BN, BM)
    for c in tl.static_range(len(rows)):
        if len(rows) == 2:
            member = positive if c == 0 else positive == 0
            row_t = tl.where(row & member, t, float("-inf"))
        else:
            row_t = tl.where(row, t, float("-inf"))
        top, total = log_sums(row_t, 1)  # [BN]
        tl.store(rows[c][0] + row_at, top)
        tl.store(rows[c][1] + row_at, total)
        if cols is not None:
            if len(rows) == 2:
                col_t = tl.where(col & (positive if c == 0 else positive == 0), t, float("-inf"))
            else:
                col_t = row_t if state[0][0] == "scaled" else tl.where(col, t, float("-inf"))
            top, total = log_sums(col_t, 0)  # [BM]
            tl.store(cols[c][0] + col_at, top, mask=inside)
            tl.store(cols[c][1] + col_at, total, mask=inside)


@triton.jit(do_not_specialize=["N", "M", "first", "blocks"])
def merge_logs_kernel(
    partial, rows, cols, N, M, first, blocks, BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    """Merge the slab's rows, and its columns into the results of earlier slabs.

    rows, cols: (max, sum) of each class. With LOG the sums' logarithms are stored: of rows at once, of columns with
    the last slab. Without LOG columns are merged with what cols holds, even for the first slab.
    """
    row_partial, col_partial = partial
    slab_rows = blocks * BN
    row_programs = tl.cdiv(slab_rows, BL)
    for c in tl.static_range(len(rows)):
        if tl.program_id(0) < row_programs:
            lane = tl.program_id(0) * BL + tl.arange(0, BL)
            top, total = tl.full([BL], float("-inf"), tl.float32), tl.zeros([BL], tl.float32)
            top, total = merge_logs(
                top, total, row_partial[c][0], row_partial[c][1], lane, slab_rows, tl.cdiv(M, BM), BP
            )
            i = first * BN + lane
            inside = (lane < slab_rows) & (i < N)
            tl.store(rows[c][0] + i, top, mask=inside)
            tl.store(rows[c][1] + i, tl.log(total) if LOG else total, mask=inside)
        elif cols is not None:
            j = (tl.program_id(0) - row_programs) * BL + tl.arange(0, BL)
            before = (j < M) & (first > 0) if LOG else j < M
            top = tl.load(cols[c][0] + j, mask=before, other=float("-inf"))
            total = tl.load(cols[c][1] + j, mask=before, other=0.0)  # of earlier slabs: not a logarithm yet
            top, total = merge_logs(top, total, col_partial[c][0], col_partial[c][1], j, M, blocks, BP)
            if LOG:
                total = tl.where((first + blocks) * BN >= N, tl.log(total), total)
            tl.store(cols[c][0] + j, top, mask=j < M)
            tl.store(cols[c][1] + j, total, mask=j < M)


@triton.jit
def softmax_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """Store the tile's dL/dt, or by label dL/ds; and Σ of it times s, of the tile or with BY_ROW of each row."""
    SCORE: tl.constexpr = state[0][0]
    BY_ROW: tl.constexpr = state[0][2]
    scale, constant, by_label, rows, cols, dpositive, dscores, stride, dscores_dot_s = state[1]
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    i, j = i0 + tl.arange(0, BN), j0 + tl.arange(0, BM)
    inside = (i < N)[:, None] & (j < M)[None, :]
    t, slope, positive, row, col = logits(s, i, j, N, M, load_scalar(scale, constant), state[0], by_label)
    g = tl.zeros([BN, BM], tl.float32)
    if rows is not None:
        g += logsumexp_slope(t, positive, row, rows, i, i < N, 1, SCORE == "scaled")
    if cols is not None:
        g += logsumexp_slope(t, positive, col, cols, j, j < M, 0, SCORE == "scaled")
    if SCORE != "scaled" and SCORE != "limited":
        g *= slope
    if dpositive is not None and (i0 < j0 + BM) & (j0 < i0 + BN):
        diagonal = tl.load(dpositive + i, mask=(i < N) & (i < M), other=0.0)
        g += tl.where(i[:, None] == j[None, :], diagonal[:, None], 0.0)
    if dscores is not None:
        rows_at = dscores - (first * BN).to(tl.int64) * stride  # dscores holds this slab's rows only
        at = rows_at + i.to(tl.int64)[:, None] * stride + j[None, :]
        tl.store(at, g.to(dscores.dtype.element_ty), mask=inside)
    sums = tl.sum(tl.where((j < M)[None, :], g * s, 0.0), 1)
    if BY_ROW:
        tl.store(dscores_dot_s + tile_j.to(tl.int64) * blocks * BN + tile_i * BN + tl.arange(0, BN), sums)
    else:
        tl.store(dscores_dot_s + tile_i * tl.cdiv(M, BM) + tile_j, tl.sum(tl.where(i < N, sums, 0.0), 0))


def classes(*statistics: torch.Tensor | None) -> tuple[tuple[torch.Tensor, ...], ...] | None:
    """Statistics [N] or [2, N] as the kernels take them: one tuple per class; None if the last statistic is None."""
    if statistics[-1] is None:
        return None
    return tuple(zip(*([t] if t.dim() == 1 else [*t] for t in statistics if t is not None), strict=True))


SCALED = (tl.constexpr("scaled"), tl.constexpr(False))  # of losses without labels: t = κ s


def score_options(call: Any, *flags: bool) -> tuple:
    """The argument `OPTIONS` of `logits`, then the tile's own flags."""
    return tuple(tl.constexpr(option) for option in (call.score, call.leave_out, *flags))


def by_label(call: Any, row_labels, col_labels, row_bounds, col_bounds, first: int) -> tuple | None:
    """The argument `by_label` of `logits`."""
    if call.score == "scaled":
        return None
    constants = (*map(float, call.constants), 0.0, 0.0)[:3]
    bounds = (x for t in (row_bounds, col_bounds) for x in (t, t.stride(0) if t is not None and t.dim() == 2 else 0))
    return constants, row_labels, col_labels, *bounds, first


def _by_label(call: Any) -> tuple | None:
    if call.score == "scaled":
        return None
    row_labels, col_labels, bounds = operands.contiguous(call.a_labels, call.b_labels, call.bounds)
    return by_label(call, row_labels, col_labels, bounds, bounds if call.b is None else None, 0)


def logsumexp_scores(call: Any, plan: Plan) -> tuple[torch.Tensor, ...]:
    """Return (row_max, row_log [N], col_max, col_log [M], positive_logit [min(N, M)], an empty tensor), all fp32.

    By label the rows' statistics are [2, N] and the others are empty. Columns' statistics are empty if they are not
    wanted. The last would be what is kept: this route keeps nothing.
    """
    a, b = call.a, call.a if call.b is None else call.b
    if plan.route == "hopper":
        return *hopper.logsumexp_scores(a, b, call.scale, call.constant), a.new_empty(0, dtype=torch.float32)
    row_shape, col_shape, pairs = call.sizes()
    row_max, row_log = (a.new_empty(row_shape, dtype=torch.float32) for _ in range(2))
    col_max, col_log = (row_max.new_empty(col_shape) for _ in range(2))
    positive_logit = row_max.new_empty(pairs)
    labelled = call.score != "scaled"
    count, columns = 1 + labelled, call.columns and not labelled
    assert plan.tile is not None
    with torch.cuda.device_of(a):
        sweep = Sweep(a, b, plan.tile)
        partials = [sweep.empty_partials(torch.float32, torch.float32) for _ in range(count)]
        row_partial = tuple(rows for rows, _ in partials)
        col_partial = tuple(of_columns for _, of_columns in partials) if columns else None
        rows, cols = classes(row_max, row_log), classes(col_max, col_log) if columns else None
        score, label_state = score_options(call), _by_label(call)
        for first, blocks in sweep.slabs():
            outputs = (None if labelled else positive_logit, row_partial, col_partial)
            sweep.run(log_tile, (score, (call.scale, call.constant, label_state, *outputs)), first, blocks)
            sweep.merge(merge_logs_kernel, first, blocks, (row_partial, col_partial), rows, cols, LOG=True)
    return row_max, row_log, col_max, col_log, positive_logit, nothing_kept(positive_logit, a, call.keep)


def logsumexp_scores_backward(call: Any, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of a [N, D], b [M, D] and κ, each empty if `needs` is False; b=None: b is a."""
    a, b, needs = call.a, call.a if call.b is None else call.b, call.needs
    grads = (call.drow, call.dcol, call.dpositive)
    drow, dcol, dpositive = (grad.contiguous() if grad is not None else None for grad in grads)
    if call.score != "scaled":
        dcol = dpositive = None
    if not call.columns:
        dcol = None
    rows = classes(call.row_max, call.row_log, drow)
    cols = classes(call.col_max, call.col_log, dcol)
    gradient = (call.scale, call.constant, _by_label(call), rows, cols, dpositive)
    score = score_options(call, False)
    assert plan.tile is not None
    with torch.cuda.device_of(a):
        if plan.route == "row panels":

            def launch(sweep, first, blocks, dscores, sums):
                stride = dscores.stride(0) if dscores is not None else 0
                sweep.run(softmax_tile, (score, (*gradient, dscores, stride, sums)), first, blocks)

            with outside_autocast(a.device):
                da, db, (total,) = gradients_by_row_panels(a, b, plan.tile, needs, 1, launch)
            kappa = call.constant if call.scale is None else call.scale
            dscale = total.float() if needs[2] else da.new_empty(0)
            return da.mul_(kappa).to(a.dtype), db.mul_(kappa).to(b.dtype), dscale
        sweep = Sweep(a, b, plan.tile)
        dscores = empty_dscores(a, len(b))
        sums = a.new_empty(1, sweep.row_blocks * sweep.column_blocks, dtype=torch.float32)
        state = (score, (*gradient, dscores, dscores.stride(0), sums))
        sweep.run(softmax_tile, state, 0, sweep.row_blocks)
        logit_scale = {"scale": call.scale, "constant": call.constant}
        da, db, ends = gradients(dscores, a, call.b, needs, sums if needs[2] else None, **logit_scale)
    return da, db, ends[0] if ends else sums.new_empty(0)


def logsumexp_pass(call: Any, plan: Plan) -> None:
    """Write (max, Σ e^(t - max)) of the rows of s [R, M] fp32, and merge its columns' into col_max, col_sum."""
    if call.s.numel() == 0:
        call.row_max.fill_(float("-inf"))
        call.row_sum.zero_()
        return
    chunk, count = Chunk(call.s), call.by_label.classes
    rows, cols = classes(call.row_max, call.row_sum), classes(call.col_max, call.col_sum)
    row_partial = classes(*chunk.row_partials(2, count))
    col_partial = classes(*chunk.column_partials(2, count)) if cols is not None else None
    labels = by_label(call, call.row_labels, call.col_labels, call.row_bounds, call.col_bounds, call.first)
    with torch.cuda.device_of(call.s):
        chunk.run(log_tile, (score_options(call), (call.scale, 1.0, labels, None, row_partial, col_partial)))
        BN, BL = chunk.tile.BR, tiles.MERGE_LANES
        programs = triton.cdiv(chunk.row_blocks * BN, BL) + (triton.cdiv(chunk.M, BL) if cols is not None else 0)
        merge_logs_kernel[(programs,)](
            (row_partial, col_partial), rows, cols, chunk.N, chunk.M, 0, chunk.row_blocks,
            BN=BN, BM=chunk.tile.BM, BP=tiles.MERGE_PARTIALS, BL=BL, LOG=False, num_warps=4, num_stages=2,
        )  # fmt: skip


def softmax_pass(call: Any, plan: Plan) -> None:
    """Overwrite s [R, M] fp32 with dL/dt, or by label dL/ds; and write Σ_j of it times s [R]."""
    if call.s.numel() == 0:
        call.dscores_dot_s.zero_()
        return
    chunk = Chunk(call.s)
    rows = classes(call.row_max, call.row_log, call.row_grad)
    cols = classes(call.col_max, call.col_log, call.col_grad)
    labels = by_label(call, call.row_labels, call.col_labels, call.row_bounds, call.col_bounds, call.first)
    sums = chunk.row_partials()
    with torch.cuda.device_of(call.s):
        gradient = (call.scale, 1.0, labels, rows, cols, None)
        state = (score_options(call, True), (*gradient, call.s, call.s.stride(0), sums))
        chunk.run(softmax_tile, state)
    torch.sum(sums[:, : chunk.N], 0, out=call.dscores_dot_s)
