"""Reductions of a tile's scores, and merges of what the tiles leave (partials), each in one place.

argmax        max and the lowest index that attains it; NaN wins, the first of several; of nothing: -inf and -1
argmin        min and the lowest index that attains it; the tiles leave the argmax of -s
log-sum-exp   partials are (max, Σ e^(t - max)), results (max, log Σ e^(t - max)); of nothing but NaN the max is +inf
exp-sum       the same without the logarithm, so that results can be merged again
sum           Σ in fp32

`merge_kernel` stores the results of rows and columns; `merge_terms_kernel` goes on to a loss's terms.

Merging is associative, and partials are merged in the order of their tiles: all indices merged so far are lower, so an
equal score never replaces one of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels.triton import tiles
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


@triton.jit
def merge_partials(
    x, y, partial, lane, length, partials, start, REDUCTION: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """The two results (x, y) [BL] of a reduction, merged with its partials [partials, length] at the lanes."""
    if REDUCTION == "argmax" or REDUCTION == "argmin":
        return merge_argmax(x, y, partial[0], partial[1], lane, length, partials, start, WIDTH, BP)
    else:
        return merge_logs(x, y, partial[0], partial[1], lane, length, partials, BP)


@triton.jit
def merge_rows(
    partial, results, lane, N, M, first, blocks,
    REDUCTION: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Merge, store and return the two results [BL] of the slab's rows at the lanes."""
    rows = blocks * BN
    x = tl.full(lane.shape, float("-inf"), tl.float32)
    if REDUCTION == "argmax" or REDUCTION == "argmin":
        y = tl.full(lane.shape, -1, tl.int32)
    else:
        y = tl.zeros(lane.shape, tl.float32)
    x, y = merge_partials(x, y, partial, lane, rows, tl.cdiv(M, BM), 0, REDUCTION, BM, BP)
    if REDUCTION == "argmin":
        x = tl.where(y >= 0, -x, float("-inf"))
    if REDUCTION == "log-sum-exp":
        y = tl.log(y)
    i = first * BN + lane
    store_results(results, x, y, i, (lane < rows) & (i < N))
    return x, y


@triton.jit
def merge_columns(
    partial, results, j, N, M, first, blocks, REDUCTION: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """Merge the slab's columns j [BL] into the results of earlier slabs; store and return the two results."""
    before = j < M
    if REDUCTION != "exp-sum":  # whose results hold something before the first slab too
        before = before & (first > 0)
    x = tl.load(results[0] + j, mask=before, other=float("-inf"))
    if REDUCTION == "argmax":
        y = tl.load(results[1] + j, mask=before, other=-1).to(tl.int32)
    else:
        y = tl.load(results[1] + j, mask=before, other=0.0)
    x, y = merge_partials(x, y, partial, j, M, blocks, first * BN, REDUCTION, BN, BP)
    if REDUCTION == "log-sum-exp":
        y = tl.where((first + blocks) * BN >= N, tl.log(y), y)  # the last slab
    store_results(results, x, y, j, j < M)
    return x, y


@triton.jit
def store_results(results, x, y, at, mask):
    tl.store(results[0] + at, x, mask=mask)
    tl.store(results[1] + at, y.to(results[1].dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "M", "first", "blocks"])
def merge_kernel(
    row_partial, col_partial, row_results, col_results, strides, N, M, first, blocks,
    REDUCTION: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Merge the slab's rows, and its columns into the results of earlier slabs: programs of BL rows, then of columns.

    Those of columns are None if they are not wanted.
    strides: None, or for several results of each row and column, the distance from result k to result k + 1 in
    row_partial, col_partial, row_results and col_results; program (·, k) merges result k
    """
    if strides is not None:
        k = tl.program_id(1).to(tl.int64)
        row_partial = row_partial[0] + k * strides[0], row_partial[1] + k * strides[0]
        row_results = row_results[0] + k * strides[2], row_results[1] + k * strides[2]
        if col_partial is not None:
            col_partial = col_partial[0] + k * strides[1], col_partial[1] + k * strides[1]
            col_results = col_results[0] + k * strides[3], col_results[1] + k * strides[3]
    row_programs = tl.cdiv(blocks * BN, BL)
    if tl.program_id(0) < row_programs:
        lane = tl.program_id(0) * BL + tl.arange(0, BL)
        merge_rows(row_partial, row_results, lane, N, M, first, blocks, REDUCTION, BN, BM, BP)
    elif col_partial is not None:
        j = (tl.program_id(0) - row_programs) * BL + tl.arange(0, BL)
        merge_columns(col_partial, col_results, j, N, M, first, blocks, REDUCTION, BN, BP)


@triton.jit(do_not_specialize=["N", "M", "blocks"])
def merge_terms_kernel(
    merged, loss, out, N, M, blocks,
    TERMS: tl.constexpr, FUNCTION: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr,
    SUM: tl.constexpr, MEAN: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """The terms of a loss from the partials of few scores, whose tiles are one slab; one program computes their sum.

    merged: (row_partial, col_partial, row_results, col_results), as in `merge_kernel`
    TERMS merges and stores the results of rows and columns i, and returns the terms of the rows. FUNCTION, TRIPLET and
    PAIR are passed on to it: a formula of `score_functions.py` and its modes, if it takes one.
    """
    total = tl.zeros([BL], tl.float32)
    for i0 in range(tl.program_id(0) * BL, tl.maximum(N, M), tl.num_programs(0) * BL):
        i = i0 + tl.arange(0, BL)
        terms = TERMS(merged, loss, i, N, M, blocks, FUNCTION, TRIPLET, PAIR, BN, BM, BP)
        total = add_or_store(total, out, terms, i, N, SUM)
    if SUM:
        store_sum(out, total, N, MEAN)


def merge_terms(
    sweep: Any, merged: tuple, loss: tuple, out: torch.Tensor, reduction: str,
    TERMS: Any, FUNCTION: Any = None, TRIPLET: str = "", PAIR: str = "",
) -> None:  # fmt: skip
    """Launch `merge_terms_kernel`. out: the terms [N], or their sum or mean."""
    summed, BL = reduction != "none", tiles.TERM_LANES
    merge_terms_kernel[(1 if summed else triton.cdiv(max(sweep.N, sweep.M), BL),)](
        merged, loss, out, sweep.N, sweep.M, sweep.row_blocks, TERMS, FUNCTION, TRIPLET, PAIR,
        SUM=summed, MEAN=reduction == "mean", BN=sweep.BN, BM=sweep.BM, BP=tiles.MERGE_PARTIALS, BL=BL,
        num_warps=8, num_stages=2,
    )  # fmt: skip
