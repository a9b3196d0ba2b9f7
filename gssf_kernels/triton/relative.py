"""r⁻[i] = mean over j ≠ a with not (s_ij < threshold) of e^{−β (n − s_ij)}, where n = s[i, a] is the hardest negative.

Without β the mean is of n − s_ij, without exact ties with n. The same per column, all in the sweep for hardest
negatives; stored are those and r⁻. The sums of a tile are relative to the tile's maxima. Once the slab's maxima have
been merged, the sums are rescaled to those, by factors of at most 1, and the maximum of each tile is added as one term,
except that of the tile that holds the merged maximum. So no maximum's term is ever subtracted, and any β is stable.

Extra memory: that of `hardest`, with 12 bytes (14 without β) per partial instead of 6.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels.triton.epilogues import only_negatives, partial_offsets, within
from gssf_kernels.triton.hardest import empty_results, merge_hardest, negatives_state
from gssf_kernels.triton.reductions import argmax
from gssf_kernels.triton.sweep import Sweep


@triton.jit
def smallest(threshold):
    """The smallest score that counts: above -inf, which marks scores of no negative. If NaN, all negatives count."""
    least = tl.load(threshold)
    return tl.where(least > float("-inf"), least, -3.4028234663852886e38)


@triton.jit
def close_terms(s, score, place, position, least, beta, axis: tl.constexpr):
    """(sum, count + 2¹⁶ ties) over axis of the terms of s, without those at place, where the maxima score are."""
    top = tl.expand_dims(score, axis)
    s = tl.where(position == tl.expand_dims(place, axis), float("-inf"), s)
    far = s < least  # False for NaN
    if beta is None:
        tie = s == top  # inf - inf is no distance
        total = tl.sum(tl.where(far | tie, 0.0, top - s), axis)
        return total, tl.sum(tl.where(far, 0, tl.where(tie, 65537, 1)), axis)
    else:
        total = tl.sum(tl.where(far, 0.0, tl.exp((s - top) * beta)), axis)
        return total, tl.sum(tl.where(far, 0, 1), axis)


@triton.jit
def store_partial(partial, at, score, place, total, counts, mask):
    """Store the partials of a tile's rows, or of its columns."""
    scores, places, totals, all_counts = partial
    tl.store(scores + at, score, mask=mask)
    tl.store(places + at, place.to(tl.int16), mask=mask)
    tl.store(totals + at, total, mask=mask)
    tl.store(all_counts + at, counts, mask=mask)


@triton.jit
def relative_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's hardest negative of each row and column, and the terms of the other negatives relative to it."""
    negatives, limits, threshold, beta, positive_score, rows, cols = state
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    s = only_negatives(s, i0, j0, N, M, negatives, positive_score, BN, BM)
    row_limit, col_limit = limits
    row_at, col_at, inside = partial_offsets(tile_i, tile_j, blocks, M, BN, BM)
    least = smallest(threshold)

    position = tl.arange(0, BM)[None, :]
    row_s = within(s, row_limit, i0 + tl.arange(0, BN), N, 1)
    score, place = argmax(row_s, position, 1)  # [BN]
    total, counts = close_terms(row_s, score, place, position, least, beta, 1)
    store_partial(rows, row_at, score, place, total, counts, None)

    if cols is not None:
        position = tl.arange(0, BN)[:, None]
        col_s = within(s, col_limit, j0 + tl.arange(0, BM), M, 0)
        score, place = argmax(col_s, position, 0)  # [BM]
        total, counts = close_terms(col_s, score, place, position, least, beta, 0)
        store_partial(cols, col_at, score, place, total, counts, inside)


@triton.jit
def rescaled(total, count, ties, score, winner, top, least, beta):
    """(total, count, ties) relative to score, made relative to top >= score; winner: the partial that holds top."""
    joins = ((score >= least) | (score != score)) & (winner == 0)
    tie = score == top
    if beta is None:
        total = tl.where(joins & (tie == 0), total + (count + 1).to(tl.float32) * (top - score), total)
        ties = tl.where(tie, ties + joins.to(tl.int32), 0)
    else:
        total = tl.where(joins, (total + 1.0) * tl.exp((score - top) * beta), total)
    return total, count + joins.to(tl.int32), ties


@triton.jit
def collect(
    total, count, ties, top, index, partial, lane, length, partials, start, least, beta,
    WIDTH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(total, count, ties) [BL], relative to top at index, plus those of the partials [partials, length]."""
    scores, _, sums, counts = partial
    for p0 in range(0, partials, BP):
        p = p0 + tl.arange(0, BP)
        at = p.to(tl.int64)[:, None] * length + lane[None, :]  # [BP, BL]
        inside = (p < partials)[:, None] & (lane < length)[None, :]
        score = tl.load(scores + at, mask=inside, other=float("-inf"))
        partial_sum = tl.load(sums + at, mask=inside, other=0.0)
        packed_counts = tl.load(counts + at, mask=inside, other=0)
        begin = start + p[:, None] * WIDTH
        winner = (index[None, :] >= begin) & (index[None, :] < begin + WIDTH)
        partial_sum, partial_count, partial_ties = rescaled(
            partial_sum, packed_counts & 0xFFFF, packed_counts >> 16, score, winner, top[None, :], least, beta
        )
        total += tl.sum(partial_sum, 0)
        count += tl.sum(partial_count, 0)
        ties += tl.sum(partial_ties, 0)
    return total, count, ties


@triton.jit
def mean(total, count, ties, beta):
    divisor = count
    if beta is None:
        divisor = count - ties
    return total / tl.maximum(divisor, 1).to(tl.float32)


@triton.jit(do_not_specialize=["N", "M", "first", "blocks"])
def relative_terms_kernel(
    rows, cols, threshold, beta, row_score, row_index, col_score, col_index, row_relative, col_relative, column_sums,
    N, M, first, blocks, BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """r⁻ of the slab's rows; and of its columns, by adding to the sums of earlier slabs. Runs after `merge_kernel`.

    column_sums: the columns' (maximum, total, count, ties) of earlier slabs
    """
    least = smallest(threshold)
    slab_rows = blocks * BN
    row_programs = tl.cdiv(slab_rows, BL)
    total = tl.zeros([BL], tl.float32)
    count = tl.zeros([BL], tl.int32)
    ties = tl.zeros([BL], tl.int32)
    if tl.program_id(0) < row_programs:
        lane = tl.program_id(0) * BL + tl.arange(0, BL)
        i = first * BN + lane
        inside = (lane < slab_rows) & (i < N)
        top = tl.load(row_score + i, mask=inside, other=float("-inf"))
        index = tl.load(row_index + i, mask=inside, other=-1)
        total, count, ties = collect(
            total, count, ties, top, index, rows, lane, slab_rows, tl.cdiv(M, BM), 0, least, beta, BM, BP
        )
        tl.store(row_relative + i, mean(total, count, ties, beta), mask=inside)
    elif cols is not None:
        j = (tl.program_id(0) - row_programs) * BL + tl.arange(0, BL)
        inside = j < M
        top = tl.load(col_score + j, mask=inside, other=float("-inf"))
        index = tl.load(col_index + j, mask=inside, other=-1)
        tops, sums, counts, all_ties = column_sums
        before = inside & (first > 0)
        score = tl.load(tops + j, mask=before, other=float("-inf"))
        total = tl.load(sums + j, mask=before, other=0.0)
        count = tl.load(counts + j, mask=before, other=0)
        ties = tl.load(all_ties + j, mask=before, other=0)
        total, count, ties = rescaled(total, count, ties, score, index < first * BN, top, least, beta)
        total, count, ties = collect(
            total, count, ties, top, index, cols, j, M, blocks, first * BN, least, beta, BN, BP
        )
        tl.store(col_relative + j, mean(total, count, ties, beta), mask=inside)
        tl.store(tops + j, top, mask=inside)
        tl.store(sums + j, total, mask=inside)
        tl.store(counts + j, count, mask=inside)
        tl.store(all_ties + j, ties, mask=inside)


def relative_negatives(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """Return (positive_score, row_score, row_index, col_score, col_index), r⁻ of the rows [N] and of the columns [M].

    Scores and r⁻ are fp32. The threshold is read on the device, so the host never synchronises. Raises TypeError unless
    a and b are fp32, bf16 or fp16.
    """
    a, b, threshold, beta, columns = call.a, call.b, call.threshold, call.beta, call.columns
    positive_score, *results = empty_results(a, b, call.negatives)
    merged = (*results[:2], *(results[2:] if columns else (None, None)))
    row_relative, col_relative = (torch.zeros_like(t) for t in (results[0], results[2]))
    if len(a) > 0 and len(b) > 0:
        threshold = threshold.to(torch.float32)
        with torch.cuda.device_of(a):
            sweep = Sweep(a, b, plan.tile)
            dtypes = (torch.float32, torch.int16, torch.float32, torch.int32)
            rows, cols = sweep.empty_partials(*dtypes, columns=columns)
            column_sums = (*col_relative.new_empty(2, len(b)), *col_relative.new_empty(2, len(b), dtype=torch.int32))
            relative = (row_relative, col_relative, column_sums) if columns else (row_relative, None, None)
            col_state = cols if columns else None
            positives = positive_score if len(positive_score) else None
            state = (*negatives_state(call), threshold, beta, positives, rows, col_state)
            for first, blocks in sweep.slabs():
                sweep.run(relative_tile, state, first, blocks)
                merge_hardest(sweep, first, blocks, (rows[:2], cols[:2]), results)
                sweep.merge(relative_terms_kernel, first, blocks, rows, col_state, threshold, beta, *merged, *relative)
    return positive_score, *results, row_relative, col_relative
