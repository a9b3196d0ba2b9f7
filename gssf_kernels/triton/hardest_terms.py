"""The loss of hardest negatives of few scores in two launches: a sweep, and a merge that computes the terms.

With GOAL's relative terms the sweep stores the scores of negatives [N, M], at most `plan.SMALL`, besides the hardest of
every tile. Then each program merges the hardest of BL rows, or of BL columns, reads their scores and all positive
scores again and computes the weights; further programs merge the hardest for the value Σ (n - p).

Formulas: `score_functions.py`, `gssf_kernels/losses/goal.py`, `gssf_kernels/ops/relative.py`. Relative terms are
fp32, their sums over pieces of a row or column fp64, in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.epilogues import only_negatives
from gssf_kernels.triton.hardest import NO_LIMITS, empty_results, hardest_merged_terms, hardest_tile
from gssf_kernels.triton.reductions import merge_argmax, merge_columns, merge_rows, merge_terms, smaller
from gssf_kernels.triton.relative import close_terms, mean
from gssf_kernels.triton.score_functions import goal, goal_weights
from gssf_kernels.triton.sweep import Sweep
from gssf_kernels.triton.terms import add_or_store, formula_of, store_sum


@triton.jit
def stored_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """`hardest_tile`, which also stores the tile's scores: -inf wherever a score is no negative."""
    negatives, positive_score, scores, stride, masked = state
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    s = only_negatives(s, i0, j0, N, M, negatives, positive_score, BN, BM)
    i, j = i0 + tl.arange(0, BN), j0 + tl.arange(0, BM)
    tl.store(scores + i.to(tl.int64)[:, None] * stride + j[None, :], s, mask=(i < N)[:, None] & (j < M)[None, :])
    hardest_tile(s, tile_i, tile_j, first, blocks, N, M, masked, BN, BM)


@triton.jit
def merged_score(partial, lane, length, partials, WIDTH: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr):
    """The maximum [BL] of the partials [partials, length] at the lanes."""
    score, index = tl.full([BL], float("-inf"), tl.float32), tl.full([BL], -1, tl.int32)
    score, _ = merge_argmax(score, index, partial[0], partial[1], lane, length, partials, 0, WIDTH, BP)
    return score


@triton.jit
def least_close(positive_score, N, threshold, BP: tl.constexpr):
    """min positive_score - threshold, above -inf: the smallest negative score that counts. If NaN, all of them do."""
    lowest = tl.full([BP], float("inf"), tl.float32)
    for k0 in range(0, N, BP):
        k = k0 + tl.arange(0, BP)
        lowest = smaller(lowest, tl.load(positive_score + k, mask=k < N, other=float("inf")))
    least = tl.reduce(lowest, 0, smaller) - threshold
    return tl.where(least > float("-inf"), least, -3.4028234663852886e38)


@triton.jit
def close_negatives(
    scores, stride, lane, lanes, length, top, index, least, beta,
    ACROSS: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """r⁻ [BL] of the rows of scores at lane, with ACROSS of the columns; their maxima top are at index."""
    total = tl.zeros([BL], tl.float64)
    count, ties = tl.zeros([BL], tl.int32), tl.zeros([BL], tl.int32)
    for k0 in range(0, length, BP):
        k = k0 + tl.arange(0, BP)
        inside = (lane < lanes)[:, None] & (k < length)[None, :]
        if ACROSS:
            at = k.to(tl.int64)[None, :] * stride + lane[:, None]
        else:
            at = lane.to(tl.int64)[:, None] * stride + k[None, :]
        s = tl.load(scores + at, mask=inside, other=float("-inf"))
        terms, counts = close_terms(s, top, index, k[None, :], least, beta, 1)
        total += terms.to(tl.float64)
        count += counts & 0xFFFF
        ties += counts >> 16
    return mean(total, count, ties, beta).to(tl.float32)


@triton.jit
def close_positives(
    positive_score, N, lane, p, bound, alpha, LINEAR: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """r⁺ [BL] of the anchors at lane with positive scores p, over all other positive scores that do not exceed
    bound.
    """
    total, count = tl.zeros([BL], tl.float64), tl.zeros([BL], tl.int32)
    for k0 in range(0, N, BP):
        k = k0 + tl.arange(0, BP)
        other = tl.load(positive_score + k, mask=k < N, other=float("inf"))[None, :]
        close = ((other > bound[:, None]) == 0) & (k < N)[None, :] & (lane[:, None] != k[None, :])  # NaN counts
        gap = p[:, None] - other
        if LINEAR:
            close = close & ((gap == 0) == 0)  # inf - inf is NaN, and counts
        else:
            gap = tl.exp(gap * alpha)
        total += tl.sum(tl.where(close, gap, 0.0), 1).to(tl.float64)
        count += tl.sum(close.to(tl.int32), 1)
    return (total / tl.maximum(count, 1)).to(tl.float32)


@triton.jit
def relative_weights(
    positive_weights, negative_weights, positive_score, top, index, scores, stride, lane, length, constants, N,
    TRIPLET: tl.constexpr, PAIR: tl.constexpr, ACROSS: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """w⁺ and w⁻ of the anchors at lane, 0 where they have no negative."""
    _, alpha, beta, lam, positive_threshold, negative_threshold = constants
    LINEAR: tl.constexpr = PAIR == "lin_ms"
    inside = lane < N
    p = tl.load(positive_score + lane, mask=inside, other=0.0)
    close_p = close_positives(positive_score, N, lane, p, top + positive_threshold, alpha, LINEAR, BL, BP)
    least = least_close(positive_score, N, negative_threshold, BP)
    weight, _ = goal_weights(p, top, constants, TRIPLET, "con")
    if LINEAR:
        close_n = close_negatives(scores, stride, lane, N, length, top, index, least, None, ACROSS, BL, BP)
        of_positive, of_negative = (1 - close_p) * (1 - p), (1 + close_n) * top
    else:
        close_n = close_negatives(scores, stride, lane, N, length, top, index, least, beta, ACROSS, BL, BP)
        of_positive = 1.0 / (tl.exp(alpha * (p - lam)) + close_p)
        of_negative = 1.0 / (tl.exp(-beta * (top - lam)) + close_n)
    valid = top != float("-inf")
    tl.store(positive_weights + lane, tl.where(valid, weight * of_positive, 0.0), mask=inside)
    tl.store(negative_weights + lane, tl.where(valid, weight * of_negative, 0.0), mask=inside)


@triton.jit(do_not_specialize=["N", "M", "blocks"])
def relative_goal_kernel(
    row_partial, col_partial, row_results, col_results, scores, positive_score, out, weights, constants, stride,
    N, M, blocks,
    TRIPLET: tl.constexpr, PAIR: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Programs of BL rows each, then of BL columns each, then of BT terms each; one program computes a sum of terms.

    weights: [4, N], w⁺ and w⁻ of rows, then of columns
    """
    rows, across = blocks * BN, tl.cdiv(M, BM)
    row_programs, col_programs = tl.cdiv(N, BL), tl.cdiv(M, BL)
    p = tl.program_id(0)
    if p < row_programs:
        i = p * BL + tl.arange(0, BL)
        top, index = merge_rows(row_partial, row_results, i, N, M, 0, blocks, "argmax", BN, BM, BP)
        relative_weights(
            weights, weights + N, positive_score, top, index, scores, stride, i, M, constants, N,
            TRIPLET, PAIR, False, BL, BS,
        )  # fmt: skip
    elif p < row_programs + col_programs:
        i = (p - row_programs) * BL + tl.arange(0, BL)
        top, index = merge_columns(col_partial, col_results, i, N, M, 0, blocks, "argmax", BN, BP)
        if (p - row_programs) * BL < N:  # columns from N on are no anchors
            relative_weights(
                weights + 2 * N, weights + 3 * N, positive_score, top, index, scores, stride, i, N, constants, N,
                TRIPLET, PAIR, True, BL, BS,
            )  # fmt: skip
    else:
        total = tl.zeros([BT], tl.float32)
        first, step = p - row_programs - col_programs, tl.num_programs(0) - row_programs - col_programs
        for t0 in range(first * BT, N, step * BT):
            t = t0 + tl.arange(0, BT)
            positive = tl.load(positive_score + t, mask=t < N, other=0.0)
            row = merged_score(row_partial, t, rows, across, BM, BP, BT)
            terms = goal(positive, row, constants, TRIPLET, PAIR)
            col = merged_score(col_partial, t, M, blocks, BN, BP, BT)
            terms += goal(positive, col, constants, TRIPLET, PAIR)
            total = add_or_store(total, out, terms, t, N, SUM)
        if SUM:
            store_sum(out, total, N, MEAN)


def hardest_terms(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """Return (terms [N] or their sum or mean, positive_score, row_score, row_index, col_score, col_index, weights).

    weights: with relative terms [4, N], w⁺ and w⁻ of rows and of columns, else empty; all but indices are fp32

    Raises TypeError unless a and b are fp32, bf16 or fp16.
    """
    a, b, a_ids, b_ids, formula, constants, reduction = call
    N, M, summed = len(a), len(b), reduction != "none"
    positive_score, *results = empty_results(a, b)
    out = positive_score.new_empty(() if summed else N)
    with torch.cuda.device_of(a):
        sweep = Sweep(a, b, plan.tile)
        rows, cols = sweep.empty_partials(torch.float32, torch.int16)
        merged = rows, cols, tuple(results[:2]), tuple(results[2:])
        negatives = (tl.constexpr(True), (*operands.contiguous(a_ids, b_ids), None))
        if not formula.endswith("_ms"):
            weights = positive_score.new_empty(0)
            sweep.run(hardest_tile, (negatives, *NO_LIMITS, positive_score, *rows, *cols), 0, sweep.row_blocks)
            functions, modes = formula_of(formula)
            loss = positive_score, tuple(constants)
            merge_terms(sweep, merged, loss, out, reduction, hardest_merged_terms, functions.function, **modes)
        else:
            weights, tile = positive_score.new_empty(4, N), tiles.CLOSE
            scores = positive_score.new_empty(N, M + -M % 4)  # rows on 16 bytes
            done = (tl.constexpr(False), (None, None, None))  # scores are masked and positive_score is stored already
            state = (negatives, positive_score, scores, scores.stride(0), (done, *NO_LIMITS, None, *rows, *cols))
            sweep.run(stored_tile, state, 0, sweep.row_blocks)
            BL, BT = tile.BR, tiles.TERM_LANES
            programs = triton.cdiv(N, BL) + triton.cdiv(M, BL) + (1 if summed else triton.cdiv(N, BT))
            relative_goal_kernel[(programs,)](
                *merged, scores, positive_score, out, weights, tuple(constants), scores.stride(0), N, M,
                sweep.row_blocks, **formula_of(formula)[1], SUM=summed, MEAN=reduction == "mean",
                BN=sweep.tile.BN, BM=sweep.tile.BM, BP=tiles.MERGE_PARTIALS, BL=BL, BS=tile.BM, BT=BT,
                num_warps=tile.num_warps, num_stages=2,
            )  # fmt: skip
    return out, positive_score, *results, weights
