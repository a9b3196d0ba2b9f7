"""Which scores of ``s = a bᵀ`` are negatives, and whose: what the ops for hardest negatives have in common.

A score (i, j) is no negative of row i or of column j where the ids are equal, and where (i, j) is a pair: i = j
("paired"), or one of a list. With a limit, a score is a negative of an anchor only if it is at most the anchor's limit.
With K limits for each anchor there are K results for each, from the same scores.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels.plan import accumulation_dtype


class Negatives(NamedTuple):
    """``Negatives()``: the pairs are (i, i), and columns are anchors too."""

    paired: bool = True  # (i, i) is a pair
    columns: bool = True  # columns are anchors too; else they have no statistics
    # Pairs (i, pair_cols[e]), pair_starts[i] <= e < pair_starts[i + 1], by column; only without `paired`.
    pair_starts: Tensor | None = None  # [N + 1] int64
    pair_cols: Tensor | None = None  # [P] int64
    row_limit: Tensor | None = None  # [N] or [K, N], of the scores' dtype
    col_limit: Tensor | None = None  # [M] or [K, M]

    @property
    def plain(self) -> bool:
        """Whether there are neither listed pairs nor limits."""
        return self.pair_starts is None and self.row_limit is None and self.col_limit is None

    @property
    def several_limits(self) -> bool:
        """Whether limits are [K, N] and [K, M]. Only the route "sweep" of hardest negatives takes them."""
        return any(limit is not None and limit.dim() == 2 for limit in (self.row_limit, self.col_limit))

    def pair_rows(self) -> Tensor:
        """The row of each listed pair [P]."""
        assert self.pair_starts is not None
        assert self.pair_cols is not None
        places = torch.arange(self.pair_cols.shape[0], device=self.pair_cols.device)
        return torch.searchsorted(self.pair_starts, places, right=True) - 1

    def positives(self, n: int) -> int:
        """How many pairs have a score among the op's results, for n rows."""
        return n if self.paired else 0 if self.pair_cols is None else self.pair_cols.shape[0]


def statistics(a: Tensor, b: Tensor, a_ids: Tensor | None, b_ids: Tensor | None, negatives: Negatives):
    """The definition: ``(positive_score, scores of each row's negatives [N, M], of each column's [M, N] or None)``.

    A score that is no negative is -inf. With K limits [K, N, M] and [K, M, N].
    """
    s = reference.scores(a, b)
    pairs: Tensor | str | None = None if negatives.paired else "ids"
    if negatives.pair_starts is not None:
        pairs = torch.stack((negatives.pair_rows(), negatives.pair_cols), 1)  # type: ignore[arg-type]
    masked = s.masked_fill(reference.positives(a, b, a_ids, b_ids, pairs), -torch.inf)
    if isinstance(pairs, Tensor):
        positive_score = s[pairs[:, 0], pairs[:, 1]]
    else:
        positive_score = reference.pair_scores(a, b) if negatives.paired else s.new_empty(0)

    def limited(limit, masked):
        return masked if limit is None else torch.where(masked > limit[..., None], -torch.inf, masked)

    cols = limited(negatives.col_limit, masked.mT) if negatives.columns else None
    return positive_score, limited(negatives.row_limit, masked), cols


def fake_results(a: Tensor, b: Tensor, negatives: Negatives | None = None) -> tuple[Tensor, ...]:
    """Empty positive_score, row_score, row_index [N], col_score and col_index [M]; with K limits [K, N] and [K, M]."""
    negatives = Negatives() if negatives is None else negatives
    score, index = accumulation_dtype(a.dtype), torch.int64
    rows = a.shape[:1] if negatives.row_limit is None else negatives.row_limit.shape
    cols: tuple[int, ...] = b.shape[:1] if negatives.col_limit is None else negatives.col_limit.shape
    cols = cols if negatives.columns else (0,)
    pairs = (negatives.positives(a.shape[0]),)
    shapes = (pairs, score), (rows, score), (rows, index), (cols, score), (cols, index)
    return tuple(a.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
