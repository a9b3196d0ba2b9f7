"""What epilogues of the sweep share: which scores of a tile are negatives, and where its partials go.

See :mod:`gssf_kernels.triton.sweep` for what an epilogue is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def only_negatives(s, i0, j0, N, M, a_ids, b_ids, positive_score, BN: tl.constexpr, BM: tl.constexpr):
    """s [BN, BM] with -inf wherever a score is no negative; a tile without such scores skips the masks."""
    i = i0 + tl.arange(0, BN)
    j = j0 + tl.arange(0, BM)
    if (i0 < j0 + BM) & (j0 < i0 + BN):
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
def partial_offsets(tile_i, tile_j, blocks, M, BN: tl.constexpr, BM: tl.constexpr):
    """Offsets of a tile's row partials [BN] and column partials [BM] in a slab's, and which of its columns exist."""
    row_at = tile_j.to(tl.int64) * blocks * BN + tile_i * BN + tl.arange(0, BN)  # [column block, row of the slab]
    j = tile_j * BM + tl.arange(0, BM)
    col_at = tile_i.to(tl.int64) * M + j  # [row block, column]
    return row_at, col_at, j < M
