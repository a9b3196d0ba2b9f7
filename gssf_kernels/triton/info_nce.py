"""InfoNCE of few scores in two launches each way: `gssf_kernels/ops/info_nce.py` has the formulas.

forward    a sweep leaves (max, Σ e^(t - max)) of the rows and columns of every tile, and with ids or label
           smoothing what targets are sums of; one kernel merges them and makes the terms, a sum in one program
backward   a sweep stores dL/dt [N, M]; one kernel makes da, db and dκ of it
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels.plan import Plan
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.epilogues import tile_lines
from gssf_kernels.triton.gradients import gradients
from gssf_kernels.triton.logsumexp import log_tile
from gssf_kernels.triton.reductions import merge_logs, merge_sums
from gssf_kernels.triton.score_functions import number, pairs_and_ids, softmax
from gssf_kernels.triton.sweep import Sweep, empty_dscores
from gssf_kernels.triton.terms import store_sum, upstream


@triton.jit
def info_nce_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """`log_tile`, and Σ t and the number of positives, and Σ t of all, of each row and column."""
    log_state, of_ids, of_all = state
    log_tile(s, tile_i, tile_j, first, blocks, N, M, log_state, BN, BM)
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    row_at, col_at, inside = tile_lines(tile_i, tile_j, blocks, M, BN, BM)
    t = s * number(log_state[0], log_state[1])
    if of_ids is not None:
        a_ids, b_ids, row_sum, row_count, col_sum, col_count = of_ids
        inside_both, positive = pairs_and_ids(i, j, 0, a_ids, b_ids, N, M)
        positive = inside_both & positive
        positive_t = tl.where(positive, t, 0.0)
        tl.store(row_sum + row_at, tl.sum(positive_t, 1))
        tl.store(col_sum + col_at, tl.sum(positive_t, 0), mask=inside)
        tl.store(row_count + row_at, tl.sum(positive.to(tl.float32), 1))
        tl.store(col_count + col_at, tl.sum(positive.to(tl.float32), 0), mask=inside)
    if of_all is not None:
        row_sum, col_sum = of_all
        t = tl.where((i < N)[:, None] & (j < M)[None, :], t, 0.0)
        tl.store(row_sum + row_at, tl.sum(t, 1))
        tl.store(col_sum + col_at, tl.sum(t, 0), mask=inside)


@triton.jit
def log_ratio(
    tops, totals, positive_sums, counts, all_sums, positive_logit, out_max, out_log, out_count, lane, length,
    parts, count, N, others, epsilon, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """(max - target) + log of the anchors at the lanes, count in all; what the backward takes is written.

    positive_sums, counts, all_sums: partial [parts, length], or None; others: how many scores all_sums is of
    """
    top, total = tl.full([BL], float("-inf"), tl.float32), tl.zeros([BL], tl.float32)
    top, total = merge_logs(top, total, tops, totals, lane, length, parts, BP)
    log = tl.log(total)
    tl.store(out_max + lane, top, mask=lane < count)
    tl.store(out_log + lane, log, mask=lane < count)
    if positive_sums is not None:
        positives = merge_sums(counts, lane, length, N, parts, BP)
        tl.store(out_count + lane, positives, mask=lane < N)
        target = merge_sums(positive_sums, lane, length, N, parts, BP) / tl.where(lane < N, positives, 1.0)
    else:
        target = tl.load(positive_logit + lane, mask=lane < N, other=0.0)
    if all_sums is not None:
        target += epsilon * (merge_sums(all_sums, lane, length, N, parts, BP) / others - target)
    return (top - target) + log


@triton.jit(do_not_specialize=["N", "M", "rows", "down", "across"])
def merge_info_nce_kernel(
    partial, of_ids, of_all, positive_logit, out, statistics, counts, epsilon, N, M, rows, down, across,
    BOTH: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """BL rows and columns at a time, and their terms; a sum is one program's. rows: a part's length, across: parts."""
    rows_partial, cols_partial = partial
    row_maxima, row_sums = rows_partial[0]
    col_maxima, col_sums = cols_partial[0]
    row_max, row_log, col_max, col_log = statistics
    row_positive, row_counts, col_positive, col_counts, row_all, col_all, row_count, col_count = (None,) * 8
    if of_ids is not None:
        row_positive, row_counts, col_positive, col_counts = of_ids
        row_count, col_count = counts
    if of_all is not None:
        row_all, col_all = of_all
    total = tl.zeros([BL], tl.float32)
    for i0 in range(tl.program_id(0) * BL, M, tl.num_programs(0) * BL):
        i = i0 + tl.arange(0, BL)
        terms = log_ratio(
            row_maxima, row_sums, row_positive, row_counts, row_all, positive_logit, row_max, row_log, row_count,
            i, rows, across, N, N, M, epsilon, BP, BL,
        )  # fmt: skip
        of_cols = log_ratio(
            col_maxima, col_sums, col_positive, col_counts, col_all, positive_logit, col_max, col_log, col_count,
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
def info_nce_slope_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's dL/dt, stored, and Σ of it times s."""
    BOTH: tl.constexpr = state[0][0]
    SUM: tl.constexpr = state[0][1]
    MEAN: tl.constexpr = state[0][2]
    SMOOTH: tl.constexpr = state[0][3]
    grad_out, grad_stride, scale, constant, epsilon, statistics, of_ids, dscores, stride, dscores_dot_s = state[1]
    row_max, row_log, col_max, col_log = statistics
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    t = s * number(scale, constant)
    a_ids, b_ids = None, None
    if of_ids is not None:
        a_ids, b_ids, row_count, col_count = of_ids
    inside, positive = pairs_and_ids(i, j, 0, a_ids, b_ids, N, M)
    kept = 1.0 - epsilon
    g_anchor = tl.where(i < N, upstream(grad_out, grad_stride, i, N, SUM, MEAN), 0.0)
    if BOTH:
        g_anchor = g_anchor * 0.5
    g_positive = g_anchor * kept
    if of_ids is not None:
        g_positive = g_positive / tl.load(row_count + i, mask=i < N, other=1.0)
    g = g_anchor[:, None] * softmax(t, row_max, row_log, i, i < N, 1) - tl.where(positive, g_positive[:, None], 0.0)
    if SMOOTH:
        g -= (g_anchor * (epsilon / M))[:, None]
    if BOTH:
        g_anchor = 0.5 * tl.where(j < N, upstream(grad_out, grad_stride, j, N, SUM, MEAN), 0.0)
        g_positive = g_anchor * kept
        if of_ids is not None:
            g_positive = g_positive / tl.load(col_count + j, mask=j < N, other=1.0)
        g += g_anchor[None, :] * softmax(t, col_max, col_log, j, j < M, 0)
        g -= tl.where(positive, g_positive[None, :], 0.0)
        if SMOOTH:
            g -= (g_anchor * (epsilon / N))[None, :]
    at = dscores + i.to(tl.int64)[:, None] * stride + j[None, :]
    tl.store(at, g.to(dscores.dtype.element_ty), mask=inside)
    sums = tl.sum(tl.where((j < M)[None, :], g * s, 0.0), 1)
    tl.store(dscores_dot_s + tile_i * tl.cdiv(M, BM) + tile_j, tl.sum(tl.where(i < N, sums, 0.0), 0))


def info_nce(call: Any, plan: Plan) -> tuple[torch.Tensor, ...]:
    """Return (loss, row_max, row_log [N], col_max, col_log [M], row_count, col_count [N], and [0] for nothing kept).

    All fp32: the terms [N] or their sum or mean, log-sums in two parts, and numbers of positives, empty without ids.

    """
    a, b, ids = call.a, call.a if call.b is None else call.b, call.a_ids is not None
    N, M, reduced = len(a), len(b), call.reduction != "none"
    statistics = tuple(a.new_empty(size, dtype=torch.float32) for size in (N, N, M, M))
    positive_logit = statistics[0].new_empty(N)
    counts = tuple(positive_logit.new_empty(N if ids else 0) for _ in range(2))
    out = positive_logit.new_empty(() if reduced else N)
    assert plan.tile is not None
    with torch.cuda.device_of(a):
        sweep = Sweep(a, b, plan.tile)
        down, across, rows = sweep.row_blocks, sweep.column_blocks, sweep.row_blocks * sweep.tile.BN

        def partials(each: int) -> tuple[tuple[torch.Tensor, ...], ...]:
            """Of rows, and of columns: each of them."""
            sizes = (across, rows), (down, M)
            return tuple(tuple(positive_logit.new_empty(*size) for _ in range(each)) for size in sizes)

        row_partial, col_partial = partials(2)
        of_ids = tuple(t for side in partials(2) for t in side) if ids else None
        of_all = tuple(t for side in partials(1) for t in side) if call.epsilon else None
        id_state = (*operands.contiguous(call.a_ids, call.b_ids), *of_ids) if of_ids is not None else None
        log_state = (call.scale, call.constant, None, positive_logit, (row_partial,), (col_partial,))
        sweep.run(info_nce_tile, (log_state, id_state, of_all), 0, down)
        BL = tiles.TERM_LANES
        merge_info_nce_kernel[(1 if reduced else triton.cdiv(M, BL),)](
            ((row_partial,), (col_partial,)), of_ids, of_all, positive_logit, out, statistics, counts, call.epsilon,
            N, M, rows, down, across, BOTH=call.symmetric, SUM=reduced, MEAN=call.reduction == "mean",
            BP=tiles.MERGE_PARTS, BL=BL, num_warps=8, num_stages=2,
        )  # fmt: skip
    return out, *statistics, *counts, positive_logit.new_empty(0)


def info_nce_backward(call: Any, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of a [N, D], b [M, D] and κ, each empty where needs says no; b None: a has both sides'."""
    a, b, needs = call.a, call.a if call.b is None else call.b, call.needs
    reduced = call.reduction != "none"
    of_ids = None
    if call.a_ids is not None:
        of_ids = (*operands.contiguous(call.a_ids, call.b_ids), call.row_count, call.col_count)
    assert plan.tile is not None
    with torch.cuda.device_of(a):
        sweep, dscores = Sweep(a, b, plan.tile), empty_dscores(a, len(b))
        dscores_dot_s = a.new_empty(1, sweep.row_blocks * sweep.column_blocks, dtype=torch.float32)
        flags = (call.symmetric, reduced, call.reduction == "mean", call.epsilon > 0)
        statistics = (call.row_max, call.row_log, call.col_max, call.col_log)
        upstreams = (call.grad_out, 0 if reduced else call.grad_out.stride(0), call.scale, call.constant, call.epsilon)
        outputs = (dscores, dscores.stride(0), dscores_dot_s)
        state = (tuple(tl.constexpr(flag) for flag in flags), (*upstreams, statistics, of_ids, *outputs))
        sweep.run(info_nce_slope_tile, state, 0, sweep.row_blocks)
        logit_scale = {"scale": call.scale, "constant": call.constant}
        da, db, ends = gradients(dscores, a, call.b, needs, dscores_dot_s if needs[2] else None, **logit_scale)
    return da, db, ends[0] if ends else dscores_dot_s.new_empty(0)
