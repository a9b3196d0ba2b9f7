"""Reductions of a tile's scores and merges of the partials, each in one place; `merge_kernel` may end in a loss.

argmax        max and the lowest index that attains it; NaN wins, the first of several; of nothing: -inf and -1
log-sum-exp   stored as (max, Σ e^(t - max)); if there is nothing but NaN the maximum is +inf
sum           Σ in fp32

Merging is associative, and partials are merged in the order of their tiles: all indices merged so far are lower, so an
equal score never replaces one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gssf_kernels.triton.terms import add_or_store, store_sum


@triton.jit
def larger(x, y):
    """max(x, y), or NaN if either is NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(x, y):
    """min(x, y), or NaN if either is NaN."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def argmax(s, position, axis: tl.constexpr):
    """The maximum of s over axis, and the lowest position that attains it; NaN wins."""
    score = tl.reduce(s, axis, larger)
    top = tl.expand_dims(score, axis)
    hit = tl.where(top != top, s != s, s == top)  # written like this it spills no registers
    return score, tl.min(tl.where(hit, position, 0x7FFFFFFF), axis)


@triton.jit
def take_larger(score, index, new_score, new_index):
    """(score, index) merged with (new_score, new_index), all of whose indices are higher."""
    better = (new_score > score) | ((new_score != new_score) & (score == score))
    return tl.where(better, new_score, score), tl.where(better, new_index, index)


@triton.jit
def merge_argmax(score, index, scores, places, lane, length, partials, start, WIDTH: tl.constexpr, BP: tl.constexpr):
    """(score, index) [BL] at the lanes, merged with the partials scores, places [partials, length].

    Partial p covers WIDTH positions from start + p WIDTH on, all higher than those merged before it.
    """
    for p0 in range(0, partials, BP):
        p = p0 + tl.arange(0, BP)
        at = p.to(tl.int64)[:, None] * length + lane[None, :]  # [BP, BL]
        inside = (p < partials)[:, None] & (lane < length)[None, :]
        s = tl.load(scores + at, mask=inside, other=float("-inf"))
        position = start + p[:, None] * WIDTH + tl.load(places + at, mask=inside, other=0)
        new_score, new_index = argmax(s, position, 0)  # [BL]
        score, index = take_larger(score, index, new_score, new_index)
    return score, index


@triton.jit
def merge_rows(
    scores, places, row_score, row_index, lane, N, M, first, blocks,
    NEGATED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Merge, store and return (score, index) [BL] of the slab's rows at the lanes. NEGATED: partials are of -s."""
    score = tl.full([BL], float("-inf"), tl.float32)
    index = tl.full([BL], -1, tl.int32)
    rows = blocks * BN
    score, index = merge_argmax(score, index, scores, places, lane, rows, tl.cdiv(M, BM), 0, BM, BP)
    if NEGATED:
        score = tl.where(index >= 0, -score, float("-inf"))
    i = first * BN + lane
    inside = (lane < rows) & (i < N)
    tl.store(row_score + i, score, mask=inside)
    tl.store(row_index + i, index.to(tl.int64), mask=inside)
    return score, index


@triton.jit
def merge_columns(
    scores, places, col_score, col_index, j, M, first, blocks, BN: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """Merge the slab's columns j [BL] into the results of earlier slabs; store and return (score, index)."""
    before = (j < M) & (first > 0)
    score = tl.load(col_score + j, mask=before, other=float("-inf"))
    index = tl.load(col_index + j, mask=before, other=-1).to(tl.int32)
    score, index = merge_argmax(score, index, scores, places, j, M, blocks, first * BN, BN, BP)
    tl.store(col_score + j, score, mask=j < M)
    tl.store(col_index + j, index.to(tl.int64), mask=j < M)
    return score, index


@triton.jit(do_not_specialize=["N", "M", "first", "blocks"])
def merge_kernel(
    partial, results, loss, N, M, first, blocks,
    BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
    FUNCTION: tl.constexpr = None, TRIPLET: tl.constexpr = "", PAIR: tl.constexpr = "", BY_LABEL: tl.constexpr = False,
    SUM: tl.constexpr = False, MEAN: tl.constexpr = False, several=None,
):  # fmt: skip
    """Merge the slab's rows, and its columns into the results of earlier slabs.

    several: None, or the numbers of row and of column partials of one result. Then each row and column has several
    results, one behind another, and program (·, k) merges those of number k.
    With FUNCTION, from `score_functions.py`, there is one slab, and the merge ends in the terms of a loss; one program
    computes a sum of them.
    loss: (positive_score [N], out, the formula's constants)
    BY_LABEL: s is symmetric, and in the columns' place are the rows' smallest positive scores, as the largest -s
    """
    row_scores, row_places, col_scores, col_places = partial
    row_score, row_index, col_score, col_index = results
    if several is not None:
        row_partials, col_partials = several
        k = tl.program_id(1).to(tl.int64)
        row_scores, row_places = row_scores + k * row_partials, row_places + k * row_partials
        row_score, row_index = row_score + k * N, row_index + k * N
        if col_scores is not None:
            col_scores, col_places = col_scores + k * col_partials, col_places + k * col_partials
            col_score, col_index = col_score + k * M, col_index + k * M
    if FUNCTION is None:
        row_programs = tl.cdiv(blocks * BN, BL)
        if tl.program_id(0) < row_programs:
            lane = tl.program_id(0) * BL + tl.arange(0, BL)
            merge_rows(
                row_scores, row_places, row_score, row_index, lane, N, M, first, blocks, False, BN, BM, BP, BL
            )  # fmt: skip
        elif col_scores is not None:
            j = (tl.program_id(0) - row_programs) * BL + tl.arange(0, BL)
            merge_columns(col_scores, col_places, col_score, col_index, j, M, first, blocks, BN, BP)
    else:
        positive_score, out, constants = loss
        total = tl.zeros([BL], tl.float32)
        for i0 in range(tl.program_id(0) * BL, M, tl.num_programs(0) * BL):
            i = i0 + tl.arange(0, BL)
            row, _ = merge_rows(
                row_scores, row_places, row_score, row_index, i, N, M, first, blocks, False, BN, BM, BP, BL
            )  # fmt: skip
            if BY_LABEL:
                p, place = merge_rows(
                    col_scores, col_places, col_score, col_index, i, N, M, first, blocks, True, BN, BM, BP, BL
                )  # fmt: skip
                terms = FUNCTION(p, row, constants, TRIPLET, PAIR)
                terms = tl.where((place >= 0) & (row != float("-inf")), terms, 0.0)
            else:
                col, _ = merge_columns(col_scores, col_places, col_score, col_index, i, M, first, blocks, BN, BP)
                p = tl.load(positive_score + i, mask=i < N, other=0.0)
                terms = FUNCTION(p, row, constants, TRIPLET, PAIR) + FUNCTION(p, col, constants, TRIPLET, PAIR)
            total = add_or_store(total, out, terms, i, N, SUM)
        if SUM:
            store_sum(out, total, N, MEAN)


@triton.jit
def log_sums(t, axis: tl.constexpr):
    """(max, Σ e^(t - max)) over axis; an infinite max is not subtracted, and if all t are NaN or -inf max is +inf."""
    top = tl.max(t, axis)  # ignores NaN
    shift = tl.where((top == float("inf")) | (top == float("-inf")), 0.0, top)
    total = tl.sum(tl.exp(t - tl.expand_dims(shift, axis)), axis)
    return tl.where((total != total) & (top == float("-inf")), float("inf"), top), total


@triton.jit
def merge_logs(top, total, tops, totals, lane, length, partials, BP: tl.constexpr):
    """(max, Σ e^(t - max)) [BL] at the lanes, merged with the partials tops, totals [partials, length]."""
    for p0 in range(0, partials, BP):
        p = p0 + tl.arange(0, BP)
        at = p.to(tl.int64)[:, None] * length + lane[None, :]  # [BP, BL]
        inside = (p < partials)[:, None] & (lane < length)[None, :]
        t = tl.load(tops + at, mask=inside, other=float("-inf"))
        sums = tl.load(totals + at, mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(t, 0))
        factor = tl.where(t == new[None, :], 1.0, tl.exp(t - new[None, :]))  # infinite ones too
        merged = tl.sum(tl.where(t == float("-inf"), 0.0, sums * factor), 0)
        before = tl.where(top == float("-inf"), 0.0, total * tl.where(top == new, 1.0, tl.exp(top - new)))
        top, total = new, before + merged
    return top, total


@triton.jit
def merge_sums(source, lane, length, count, partials, BP: tl.constexpr):
    """Σ of source [partials, length] over the partials, at the lanes; 0 at lanes from count on."""
    total = tl.zeros(lane.shape, tl.float32)
    for p0 in range(0, partials, BP):
        p = p0 + tl.arange(0, BP)
        inside = (p < partials)[:, None] & (lane < count)[None, :]
        total += tl.sum(tl.load(source + p.to(tl.int64)[:, None] * length + lane[None, :], mask=inside, other=0.0), 0)
    return total
