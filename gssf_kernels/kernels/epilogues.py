"""What epilogues of the sweep share: which scores of a tile are negatives, each line's best, and where it is stored.

See :mod:`gssf_kernels.kernels.sweep` for what an epilogue is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def larger(x, y):
    """max(x, y), NaN above all."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def best(s, position, axis: tl.constexpr):
    """The largest score along axis and the lowest position that holds it."""
    score = tl.reduce(s, axis, larger)
    top = tl.expand_dims(score, axis)
    hit = tl.where(top != top, s != s, s == top)  # in this form nothing is kept for the other axis: no spills
    return score, tl.min(tl.where(hit, position, 0x7FFFFFFF), axis)


@triton.jit
def only_negatives(s, i0, j0, N, M, a_ids, b_ids, pair_score, BN: tl.constexpr, BM: tl.constexpr):
    """s [BN, BM] with -inf at all that is no negative; each mask costs only the tiles that meet it."""
    i = i0 + tl.arange(0, BN)
    j = j0 + tl.arange(0, BM)
    if (i0 < j0 + BM) & (j0 < i0 + BN):
        pair = i[:, None] == j[None, :]
        if pair_score is not None:
            tl.store(pair_score + i, tl.sum(tl.where(pair, s, 0.0), 1), mask=(i >= j0) & (i < j0 + BM) & (i < N))
        s = tl.where(pair, float("-inf"), s)
    if (i0 + BN > N) | (j0 + BM > M):
        s = tl.where((i < N)[:, None] & (j < M)[None, :], s, float("-inf"))
    if a_ids is not None:
        x = tl.load(a_ids + tl.minimum(i, N - 1))
        y = tl.load(b_ids + tl.minimum(j, M - 1))
        if (tl.min(x, 0) <= tl.max(y, 0)) & (tl.min(y, 0) <= tl.max(x, 0)):  # else the two ranges are disjoint
            s = tl.where(x[:, None] == y[None, :], float("-inf"), s)
    return s


@triton.jit
def tile_lines(tile_i, tile_j, blocks, M, BN: tl.constexpr, BM: tl.constexpr):
    """Where the partial results of a tile's rows [BN] and columns [BM] belong, and which columns there are."""
    row_at = tile_j.to(tl.int64) * blocks * BN + tile_i * BN + tl.arange(0, BN)  # [column block, row of the slab]
    j = tile_j * BM + tl.arange(0, BM)
    col_at = tile_i.to(tl.int64) * M + j  # [row block, column]
    return row_at, col_at, j < M
