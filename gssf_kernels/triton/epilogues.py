"""What epilogues of the sweep share: which scores of a tile are negatives, and where its partials go.

See :mod:`gssf_kernels.triton.sweep` for what an epilogue is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_at_least(starts, cols, i, N, least):
    """The first and the end of the listed pairs of rows i [BN] whose column is at least `least`."""
    low = tl.load(starts + i, mask=i < N, other=0)
    end = tl.load(starts + i + 1, mask=i < N, other=0)
    high = end
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        open = low < high
        below = open & (tl.load(cols + middle, mask=open, other=0) < least)
        high = tl.where(open & (below == 0), middle, high)
        low = tl.where(below, middle + 1, low)
    return low, end


@triton.jit
def without_pairs(s, i, j, N, listed, positive_score, last):
    """s [BN, BM] with -inf at listed pairs, whose scores are stored; last: the column behind the tile's."""
    starts, cols = listed
    at, end = first_at_least(starts, cols, i, N, tl.min(j, 0))
    col = tl.load(cols + at, mask=at < end, other=last)
    while tl.min(col, 0) < last:  # once for each pair of the row that has the most in this tile
        pair = col[:, None] == j[None, :]
        if positive_score is not None:
            tl.store(positive_score + at, tl.sum(tl.where(pair, s, 0.0), 1), mask=(at < end) & (col < last))
        s = tl.where(pair, float("-inf"), s)
        at += (col < last).to(tl.int64)
        col = tl.load(cols + at, mask=at < end, other=last)
    return s


@triton.jit
def only_negatives(s, i0, j0, N, M, negatives, positive_score, BN: tl.constexpr, BM: tl.constexpr):
    """s [BN, BM] with -inf wherever a score is no negative; a tile without such scores skips the masks."""
    PAIRED: tl.constexpr = negatives[0]
    a_ids, b_ids, listed = negatives[1]
    i = i0 + tl.arange(0, BN)
    j = j0 + tl.arange(0, BM)
    if listed is not None:
        s = without_pairs(s, i, j, N, listed, positive_score, (j0 + BM).to(tl.int64))
    if PAIRED and (i0 < j0 + BM) & (j0 < i0 + BN):
        positive = i[:, None] == j[None, :]
        if positive_score is not None:
            p = tl.sum(tl.where(positive, s, 0.0), 1)
            tl.store(positive_score + i, p, mask=(i >= j0) & (i < j0 + BM) & (i < N))
        s = tl.where(positive, float("-inf"), s)
    if (i0 + BN > N) | (j0 + BM > M):
        s = tl.where((i < N)[:, None] & (j < M)[None, :], s, float("-inf"))
    if a_ids is not None:
        x = tl.load(a_ids + tl.minimum(i, N - 1))
        y = tl.load(b_ids + tl.minimum(j, M - 1))
        if (tl.min(x, 0) <= tl.max(y, 0)) & (tl.min(y, 0) <= tl.max(x, 0)):  # else the two ranges are disjoint
            s = tl.where(x[:, None] == y[None, :], float("-inf"), s)
    return s


@triton.jit
def within(s, limit, anchor, count, axis: tl.constexpr):
    """s with -inf where a score is greater than the limit of its anchor, along the other axis; None: no limit."""
    if limit is not None:
        most = tl.load(limit + anchor, mask=anchor < count, other=float("inf"))
        s = tl.where(s > tl.expand_dims(most, axis), float("-inf"), s)
    return s


@triton.jit
def partial_offsets(tile_i, tile_j, blocks, M, BN: tl.constexpr, BM: tl.constexpr):
    """Offsets of a tile's row partials [BN] and column partials [BM] in a slab's, and which of its columns exist."""
    row_at = tile_j.to(tl.int64) * blocks * BN + tile_i * BN + tl.arange(0, BN)  # [column block, row of the slab]
    j = tile_j * BM + tl.arange(0, BM)
    col_at = tile_i.to(tl.int64) * M + j  # [row block, column]
    return row_at, col_at, j < M
