"""GOAL with relative terms of a small problem: two launches forward, one of the weights back.

    a sweep stores the scores of negatives [N, M], at most `plan.SMALL`, and leaves every tile's bests; then a program
    for some rows, or columns, merges their bests, reads their scores and all positives again and makes the weights,
    and another merges the bests alone, of which the value Σ (n - p) is made

Formulas: `gssf_kernels/losses/goal.py`, `gssf_kernels/statistics/relative.py`. Terms are fp32, their sums over chunks
of a line fp64, in order. Larger problems are declined (NotImplemented): with one sweep they store no score.
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels import plan
from gssf_kernels.kernels import operands, tiles
from gssf_kernels.kernels.epilogues import only_negatives
from gssf_kernels.kernels.goal import value, weights
from gssf_kernels.kernels.hardest import fold, hardest_tile, nothing_found
from gssf_kernels.kernels.relative import close_terms, mean
from gssf_kernels.kernels.sweep import Sweep
from gssf_kernels.kernels.terms import store_sum, upstream
from gssf_kernels.plan import Scores


@triton.jit
def stored_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """`hardest_tile`, and the tile's scores as they are searched: -inf at all that is no negative."""
    a_ids, b_ids, pair_score, scores, stride, bests = state
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    s = only_negatives(s, i0, j0, N, M, a_ids, b_ids, pair_score, BN, BM)
    i, j = i0 + tl.arange(0, BN), j0 + tl.arange(0, BM)
    tl.store(scores + i.to(tl.int64)[:, None] * stride + j[None, :], s, mask=(i < N)[:, None] & (j < M)[None, :])
    hardest_tile(s, tile_i, tile_j, first, blocks, N, M, bests, BN, BM)


@triton.jit
def merged(scores, places, lane, length, parts, WIDTH: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr):
    """(score, index) [BL] of the best among the tiles' [parts, length] at the lanes."""
    low, none = tl.full([BL], float("-inf"), tl.float32), tl.full([BL], -1, tl.int32)
    return fold(low, none, scores, places, lane, length, parts, 0, WIDTH, BP)


@triton.jit
def smaller(x, y):
    """min(x, y), NaN below all."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def least_close(positive, N, below, BP: tl.constexpr):
    """The smallest score that counts: `below` below the least positive. Above -inf; under NaN all negatives count."""
    lowest = tl.full([BP], float("inf"), tl.float32)
    for k0 in range(0, N, BP):
        k = k0 + tl.arange(0, BP)
        lowest = smaller(lowest, tl.load(positive + k, mask=k < N, other=float("inf")))
    least = tl.reduce(lowest, 0, smaller) - below
    return tl.where(least > float("-inf"), least, -3.4028234663852886e38)


@triton.jit
def close_negatives(
    scores, stride, lane, lanes, length, top, index, least, beta,
    ACROSS: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """r⁻ [BL] of the lanes' lines: rows of scores, with ACROSS its columns; their maxima top stand at index."""
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
        part, counts = close_terms(s, top, index, k[None, :], least, beta, 1)
        total += part.to(tl.float64)
        count += counts & 0xFFFF
        ties += counts >> 16
    return mean(total, count, ties, beta).to(tl.float32)


@triton.jit
def close_positives(positive, N, lane, p, bound, alpha, LINEAR: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr):
    """r⁺ [BL] of the lanes, whose own positives are p: of all others that are not above bound."""
    total, count = tl.zeros([BL], tl.float64), tl.zeros([BL], tl.int32)
    for k0 in range(0, N, BP):
        k = k0 + tl.arange(0, BP)
        other = tl.load(positive + k, mask=k < N, other=float("inf"))[None, :]
        close = ((other > bound[:, None]) == 0) & (k < N)[None, :] & (lane[:, None] != k[None, :])  # NaN is
        gap = p[:, None] - other
        if LINEAR:
            close = close & ((gap == 0) == 0)  # the distance of two infinities is NaN, and counts
        else:
            gap = tl.exp(gap * alpha)
        total += tl.sum(tl.where(close, gap, 0.0), 1).to(tl.float64)
        count += tl.sum(close.to(tl.int32), 1)
    return (total / tl.maximum(count, 1)).to(tl.float32)


@triton.jit
def line_weights(
    pulls, pushes, positive, top, index, scores, stride, lane, length, below, above, tau, alpha, beta, lam, N,
    TRIPLET: tl.constexpr, PAIR: tl.constexpr, ACROSS: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """w⁺ and w⁻ of the anchors at lane, 0 where they have no negative."""
    LINEAR: tl.constexpr = PAIR == "lin_ms"
    inside = lane < N
    p = tl.load(positive + lane, mask=inside, other=0.0)
    close_p = close_positives(positive, N, lane, p, top + above, alpha, LINEAR, BL, BP)
    least = least_close(positive, N, below, BP)
    weight, _ = weights(p, top, tau, alpha, beta, lam, TRIPLET, "con")
    if LINEAR:
        close_n = close_negatives(scores, stride, lane, N, length, top, index, least, None, ACROSS, BL, BP)
        pull, push = (1 - close_p) * (1 - p), (1 + close_n) * top
    else:
        close_n = close_negatives(scores, stride, lane, N, length, top, index, least, beta, ACROSS, BL, BP)
        pull = 1.0 / (tl.exp(alpha * (p - lam)) + close_p)
        push = 1.0 / (tl.exp(-beta * (top - lam)) + close_n)
    found = top != float("-inf")
    tl.store(pulls + lane, tl.where(found, weight * pull, 0.0), mask=inside)
    tl.store(pushes + lane, tl.where(found, weight * push, 0.0), mask=inside)


@triton.jit(do_not_specialize=["N", "M", "blocks"])
def relative_goal_kernel(
    bests, scores, positive, out, weights_out, row_score, row_index, col_score, col_index, below, above,
    tau, alpha, beta, lam, stride, N, M, blocks,
    TRIPLET: tl.constexpr, PAIR: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Programs for BL rows each, then for BL columns, then for BT terms; a sum is one's.

    weights_out: [4, N], w⁺ and w⁻ of rows, then of columns
    """
    row_scores, row_places, col_scores, col_places = bests
    rows, across = blocks * BN, tl.cdiv(M, BM)
    row_programs, col_programs = tl.cdiv(N, BL), tl.cdiv(M, BL)
    p = tl.program_id(0)
    if p < row_programs:
        i = p * BL + tl.arange(0, BL)
        top, index = merged(row_scores, row_places, i, rows, across, BM, BP, BL)
        tl.store(row_score + i, top, mask=i < N)
        tl.store(row_index + i, index.to(tl.int64), mask=i < N)
        line_weights(
            weights_out, weights_out + N, positive, top, index, scores, stride, i, M, below, above, tau, alpha, beta,
            lam, N, TRIPLET, PAIR, False, BL, BS,
        )  # fmt: skip
    elif p < row_programs + col_programs:
        i = (p - row_programs) * BL + tl.arange(0, BL)
        top, index = merged(col_scores, col_places, i, M, blocks, BN, BP, BL)
        tl.store(col_score + i, top, mask=i < M)
        tl.store(col_index + i, index.to(tl.int64), mask=i < M)
        if (p - row_programs) * BL < N:  # the others are no anchors
            line_weights(
                weights_out + 2 * N, weights_out + 3 * N, positive, top, index, scores, stride, i, N, below, above,
                tau, alpha, beta, lam, N, TRIPLET, PAIR, True, BL, BS,
            )  # fmt: skip
    else:
        total = tl.zeros([BT], tl.float32)
        first, step = p - row_programs - col_programs, tl.num_programs(0) - row_programs - col_programs
        for t0 in range(first * BT, N, step * BT):
            t = t0 + tl.arange(0, BT)
            own = tl.load(positive + t, mask=t < N, other=0.0)
            n, _ = merged(row_scores, row_places, t, rows, across, BM, BP, BT)
            terms = tl.where(n != float("-inf"), value(own, n, tau, alpha, beta, lam, TRIPLET, PAIR), 0.0)
            n, _ = merged(col_scores, col_places, t, M, blocks, BN, BP, BT)
            terms += tl.where(n != float("-inf"), value(own, n, tau, alpha, beta, lam, TRIPLET, PAIR), 0.0)
            if SUM:
                total += tl.where(t < N, terms, 0.0)
            else:
                tl.store(out + t, terms, mask=t < N)
        if SUM:
            store_sum(out, total, N, MEAN)


def relative_goal(
    a: torch.Tensor,
    b: torch.Tensor,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    triplet: str,
    pair: str,
    tau: float,
    alpha: float,
    beta: float,
    lam: float,
    positive_threshold: float,
    negative_threshold: float,
    reduction: str,
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return the terms [N] or their sum or mean, what `hardest_negatives` gives, and w⁺, w⁻ of rows and of columns.

    a: [N, D] fp32, bf16 or fp16; b: [M, D] as a, M ≥ N; a_ids, b_ids: [N], [M] int64, or both None
    triplet: "con", "nca" or "cir"; pair: "lin_ms" or "sig_ms"; the weights: [4, N]; all but indices are fp32

    Raises TypeError for other dtypes. Declines more than `plan.SMALL` scores, none, and lines longer than
    `plan.LONGEST_ROW`, which one program would read for too long.
    """
    operands.check_dtype("relative_goal", a, b)
    N, M, some = len(a), len(b), reduction != "none"
    if not 0 < N * M <= plan.SMALL or M > plan.LONGEST_ROW:
        return NotImplemented
    pair_score, *found = nothing_found(a, b)
    out, made = pair_score.new_empty(() if some else N), pair_score.new_empty(4, N)
    scores = pair_score.new_empty(N, M + -M % 4)  # rows on 16 bytes
    with torch.cuda.device_of(a):
        sweep, tile = Sweep(a, b, Scores(a, b).tile()), tiles.CLOSE
        ((_, blocks),) = sweep.slabs()  # so few scores are one
        rows, cols = sweep.partial_results(torch.float32, torch.int16)
        bests = (*rows, *cols)
        masked = (None, None, None, *bests)  # nothing is left to mask, nor a pair to find
        state = (*operands.contiguous(a_ids, b_ids), pair_score, scores, scores.stride(0), masked)
        sweep.run(stored_tile, state, 0, blocks)
        BL, BT = tile.BR, tiles.TERM_LANES
        lines = triton.cdiv(N, BL) + triton.cdiv(M, BL)
        relative_goal_kernel[(lines + (1 if some else triton.cdiv(N, BT)),)](
            bests, scores, pair_score, out, made, *found, negative_threshold, positive_threshold, tau, alpha, beta, lam,
            scores.stride(0), N, M, blocks, TRIPLET=triplet, PAIR=pair, SUM=some, MEAN=reduction == "mean",
            BN=sweep.tile.BN, BM=sweep.tile.BM, BP=tiles.MERGE_PARTS, BL=BL, BS=tile.BM, BT=BT,
            num_warps=tile.num_warps, num_stages=2,
        )  # fmt: skip
    return out, pair_score, *found, made


@triton.jit(do_not_specialize=["N", "M"])
def relative_goal_backward_kernel(
    grad, given, dpositive, drow, dcol, grad_stride, N, M, SUM: tl.constexpr, MEAN: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BT + tl.arange(0, BT)
    g = upstream(grad, grad_stride, i, N, SUM, MEAN)
    at, line = given + i, N.to(tl.int64)
    pull = tl.load(at, mask=i < N, other=0.0)
    push = tl.load(at + line, mask=i < N, other=0.0)
    col_pull = tl.load(at + 2 * line, mask=i < N, other=0.0)
    col_push = tl.load(at + 3 * line, mask=i < N, other=0.0)
    tl.store(drow + i, g * push, mask=i < N)
    tl.store(dcol + i, tl.where(i < N, g * col_push, 0.0), mask=i < M)
    tl.store(dpositive + i, -(g * pull + g * col_pull), mask=i < N)


def relative_goal_backward(
    grad: torch.Tensor, weights: torch.Tensor, columns: int, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what p [N], the rows' hardest [N] and the columns' [M] get, fp32.

    grad: of what `relative_goal` gives, weights: [4, N], both fp32; columns: M, at least N

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("relative_goal_backward", grad, weights)
    N, M, some, BT = weights.shape[1], columns, reduction != "none", tiles.TERMS
    out = weights.new_empty(N), weights.new_empty(N), weights.new_empty(M)
    if M > 0:
        with torch.cuda.device_of(weights):
            relative_goal_backward_kernel[(triton.cdiv(M, BT),)](
                grad, weights.contiguous(), *out, 0 if some else grad.stride(0), N, M,
                SUM=some, MEAN=reduction == "mean", BT=BT, num_warps=4, num_stages=2,
            )  # fmt: skip
    return out
