"""InfoNCE of few scores, in two launches forward and two backward; formulas: `gssf_kernels/ops/info_nce.py`.

forward    a sweep stores (max, Σ e^(t - max)) of the rows and columns of every tile and, with ids or label
           smoothing, the sums that targets need; one kernel merges them and computes the terms, or their sum
backward   a sweep stores dL/dt [N, M]; one kernel computes da, db and dκ from it
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels.plan import Plan
from gssf_kernels.triton import operands
from gssf_kernels.triton.epilogues import partial_offsets
from gssf_kernels.triton.gradients import gradients
from gssf_kernels.triton.logsumexp import SCALED, log_tile
from gssf_kernels.triton.reductions import merge_columns, merge_rows, merge_sums, merge_terms
from gssf_kernels.triton.score_functions import load_scalar, softmax, valid_and_positive
from gssf_kernels.triton.sweep import Sweep, empty_dscores, nothing_kept
from gssf_kernels.triton.terms import upstream


@triton.jit
def info_nce_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """`log_tile`, then of each row and column Σ t of its positives, their number, and Σ t of all its scores."""
    id_sums, all_sums = state[1]
    log_tile(s, tile_i, tile_j, first, blocks, N, M, state[0], BN, BM)
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    row_at, col_at, inside = partial_offsets(tile_i, tile_j, blocks, M, BN, BM)
    t = s * load_scalar(state[0][1][0], state[0][1][1])
    if id_sums is not None:
        a_ids, b_ids, row_sum, row_count, col_sum, col_count = id_sums
        valid, positive = valid_and_positive(i, j, 0, a_ids, b_ids, N, M)
        positive = valid & positive
        positive_t = tl.where(positive, t, 0.0)
        tl.store(row_sum + row_at, tl.sum(positive_t, 1))
        tl.store(col_sum + col_at, tl.sum(positive_t, 0), mask=inside)
        tl.store(row_count + row_at, tl.sum(positive.to(tl.float32), 1))
        tl.store(col_count + col_at, tl.sum(positive.to(tl.float32), 0), mask=inside)
    if all_sums is not None:
        row_sum, col_sum = all_sums
        t = tl.where((i < N)[:, None] & (j < M)[None, :], t, 0.0)
        tl.store(row_sum + row_at, tl.sum(t, 1))
        tl.store(col_sum + col_at, tl.sum(t, 0), mask=inside)


@triton.jit
def log_ratio(
    top, log, positive_sums, counts, all_sums, positive_logit, out_count, lane, length, partials, N, others, epsilon,
    BP: tl.constexpr,
):  # fmt: skip
    """(top - target) + log of the anchors at the lanes; stores the number of positives for the backward.

    positive_sums, counts, all_sums: [partials, length], or None
    others: number of scores that all_sums adds up
    """
    if positive_sums is not None:
        positives = merge_sums(counts, lane, length, N, partials, BP)
        tl.store(out_count + lane, positives, mask=lane < N)
        target = merge_sums(positive_sums, lane, length, N, partials, BP) / tl.where(lane < N, positives, 1.0)
    else:
        target = tl.load(positive_logit + lane, mask=lane < N, other=0.0)
    if all_sums is not None:
        target += epsilon * (merge_sums(all_sums, lane, length, N, partials, BP) / others - target)
    return (top - target) + log


@triton.jit
def info_nce_merged_terms(
    merged, loss, i, N, M, blocks, FUNCTION: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The terms of rows i; with BOTH the mean of those of rows and of columns."""
    row_partial, col_partial, row_results, col_results = merged
    BOTH: tl.constexpr = loss[0]
    id_sums, all_sums, positive_logit, counts, epsilon = loss[1]
    row_positive, row_counts, col_positive, col_counts, row_all, col_all, row_count, col_count = (None,) * 8
    if id_sums is not None:
        row_positive, row_counts, col_positive, col_counts = id_sums
        row_count, col_count = counts
    if all_sums is not None:
        row_all, col_all = all_sums
    rows, across = blocks * BN, tl.cdiv(M, BM)
    top, log = merge_rows(row_partial, row_results, i, N, M, 0, blocks, "log-sum-exp", BN, BM, BP)
    terms = log_ratio(
        top, log, row_positive, row_counts, row_all, positive_logit, row_count, i, rows, across, N, M, epsilon, BP
    )  # fmt: skip
    top, log = merge_columns(col_partial, col_results, i, N, M, 0, blocks, "log-sum-exp", BN, BP)
    col_terms = log_ratio(
        top, log, col_positive, col_counts, col_all, positive_logit, col_count, i, M, blocks, N, N, epsilon, BP
    )  # fmt: skip
    if BOTH:
        terms = 0.5 * (terms + col_terms)
    return terms


@triton.jit
def info_nce_slope_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """Store the tile's dL/dt, and Σ dL/dt s."""
    BOTH: tl.constexpr = state[0][0]
    SUM: tl.constexpr = state[0][1]
    MEAN: tl.constexpr = state[0][2]
    SMOOTH: tl.constexpr = state[0][3]
    grad_out, grad_stride, scale, constant, epsilon, statistics, id_sums, dscores, stride, dscores_dot_s = state[1]
    row_max, row_log, col_max, col_log = statistics
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    t = s * load_scalar(scale, constant)
    a_ids, b_ids = None, None
    if id_sums is not None:
        a_ids, b_ids, row_count, col_count = id_sums
    inside, positive = valid_and_positive(i, j, 0, a_ids, b_ids, N, M)
    unsmoothed = 1.0 - epsilon
    g_anchor = tl.where(i < N, upstream(grad_out, grad_stride, i, N, SUM, MEAN), 0.0)
    if BOTH:
        g_anchor = g_anchor * 0.5
    g_positive = g_anchor * unsmoothed
    if id_sums is not None:
        g_positive = g_positive / tl.load(row_count + i, mask=i < N, other=1.0)
    g = g_anchor[:, None] * softmax(t, row_max, row_log, i, i < N, 1) - tl.where(positive, g_positive[:, None], 0.0)
    if SMOOTH:
        g -= (g_anchor * (epsilon / M))[:, None]
    if BOTH:
        g_anchor = 0.5 * tl.where(j < N, upstream(grad_out, grad_stride, j, N, SUM, MEAN), 0.0)
        g_positive = g_anchor * unsmoothed
        if id_sums is not None:
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
    """Return (loss, row_max, row_log, col_max, col_log, row_count, col_count, an empty tensor, positive_logit), fp32.

    loss: the terms [N] or their sum or mean; a log-sum is max + log, those of columns empty without their direction;
    counts are numbers of positives, empty without ids; the empty tensor would be what is kept: this route keeps nothing
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
            """`each` empty row partials, and as many column partials."""
            sizes = (across, rows), (down, M)
            return tuple(tuple(positive_logit.new_empty(*size) for _ in range(each)) for size in sizes)

        row_partial, col_partial = partials(2)
        id_sums = tuple(t for direction in partials(2) for t in direction) if ids else None
        all_sums = tuple(t for direction in partials(1) for t in direction) if call.epsilon else None
        id_state = (*operands.contiguous(call.a_ids, call.b_ids), *id_sums) if id_sums is not None else None
        log_state = (SCALED, (call.scale, call.constant, None, positive_logit, (row_partial,), (col_partial,)))
        sweep.run(info_nce_tile, (log_state, (id_state, all_sums)), 0, down)
        loss = tl.constexpr(call.symmetric), (id_sums, all_sums, positive_logit, counts, call.epsilon)
        merged = row_partial, col_partial, statistics[:2], statistics[2:]
        merge_terms(sweep, merged, loss, out, call.reduction, info_nce_merged_terms)
    if not call.symmetric:  # the kernel wrote the columns' statistics too, but nobody reads them
        statistics = (*statistics[:2], *(t.new_empty(0) for t in statistics[2:]))
    return out, *statistics, *counts, nothing_kept(positive_logit, a, call.keep), positive_logit


def info_nce_backward(call: Any, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of a [N, D], b [M, D] and κ, each empty if `needs` is False; b=None: b is a."""
    a, b, needs = call.a, call.a if call.b is None else call.b, call.needs
    reduced = call.reduction != "none"
    id_sums = None
    if call.a_ids is not None:
        id_sums = (*operands.contiguous(call.a_ids, call.b_ids), call.row_count, call.col_count)
    assert plan.tile is not None
    with torch.cuda.device_of(a):
        sweep, dscores = Sweep(a, b, plan.tile), empty_dscores(a, len(b))
        dscores_dot_s = a.new_empty(1, sweep.row_blocks * sweep.column_blocks, dtype=torch.float32)
        flags = (call.symmetric, reduced, call.reduction == "mean", call.epsilon > 0)
        statistics = (call.row_max, call.row_log, call.col_max, call.col_log)
        inputs = (call.grad_out, 0 if reduced else call.grad_out.stride(0), call.scale, call.constant, call.epsilon)
        outputs = (dscores, dscores.stride(0), dscores_dot_s)
        state = (tuple(tl.constexpr(flag) for flag in flags), (*inputs, statistics, id_sums, *outputs))
        sweep.run(info_nce_slope_tile, state, 0, sweep.row_blocks)
        logit_scale = {"scale": call.scale, "constant": call.constant}
        da, db, ends = gradients(dscores, a, call.b, needs, dscores_dot_s if needs[2] else None, **logit_scale)
    return da, db, ends[0] if ends else dscores_dot_s.new_empty(0)
