"""Ranks of positives, counted in one sweep for both directions: no sort, no matrix.

    pessimistic = 1 + |{negatives j: s_ij >= p}|,    optimistic = 1 + |{negatives j: s_ij > p}|

with p the score of the best positive of i; of every positive, p's own rank also counts the positives before it. Where
the two differ there are ties. A NaN never helps: as a negative's score it is ahead of everything, as a positive's
behind everything.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels.ops.pairing import Pairing, listed_pairs, pairing_of
from gssf_kernels.ops.score_counts import ScoreCountsCall, swept_scores
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.reference import PositiveRanks, Ranks, RankSegments
from gssf_kernels.similarity import StructuredSimilarity, metric_of

NAMES = ("x", "y", "x_ids", "y_ids")


def ranks(
    x: Tensor,
    y: Tensor,
    *,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    pairs: Tensor | str | None = None,
    every_positive: bool = False,
    exclude_self: bool = False,
    metric: StructuredSimilarity | None = None,
    normalize: bool = False,
) -> Ranks | PositiveRanks:
    """1-based ranks of each row's best positive among the rows of y, and of each column's among those of x.

    A pessimistic rank counts negatives of the same score as ahead, an optimistic one as behind. Without a positive the
    rank is 0. The score of a positive and that of an equal row are the same bits, so that ties are ties.

    Args:
        x: [N, D] float.
        y: [M, D] of x's dtype and device.
        x_ids, y_ids: [N], [M] integers. Equal ids are positives; with listed pairs those that are no pair are left out.
        pairs: which are positives. None: those of equal id, or (i, i) without ids; "ids": those of equal id; or [P, 2]
            integers, (row of x, row of y).
        every_positive: give the ranks of every positive instead of the best one's.
        exclude_self: leave out (i, i), as where y is x.
        metric: a :class:`~gssf_kernels.StructuredSimilarity`, whose scores are taken.
        normalize: scores are cosines.

    Returns:
        :class:`Ranks` ``(row_pessimistic [N], row_optimistic [N], col_pessimistic [M], col_optimistic [M])``, int64.
        With ``every_positive`` :class:`PositiveRanks` ``(rows, cols)``, each :class:`RankSegments` ``(starts,
        positives, pessimistic, optimistic)``. Nothing is differentiable.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one N x M x D product, on a GPU two; it synchronises there. Memory: O(N + M) and the listed positives, at most
    4 million at a time, with ``every_positive`` all.
    """
    for value, name in ((every_positive, "every_positive"), (exclude_self, "exclude_self")):
        _checks.flag(value, name)
    x, y = _checks.autocast(x, y)
    by_ids = pairs is None and not (x_ids is None and y_ids is None)
    pairing = pairing_of("ids" if by_ids else pairs, x_ids, y_ids, x, y, NAMES)
    of = metric_of(metric, normalize, "ranks", x, y)
    a, b = x.detach(), y.detach()
    with torch.no_grad():
        if of is not None:
            _checks.metric_weights(a, *of.weights, of.permutation)
            a, b = _checks.autocast(*of.factors(a, b))
        count = every_rank if every_positive else best_rank
        return count(a, b, pairing, exclude_self)


def scored_positives(
    a: Tensor, b: Tensor, pairing: Pairing, exclude_self: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, columns, scores) of all positives, ascending, in lists of bounded length; NaN scores as -inf."""
    for rows, cols in listed_pairs(pairing, a.shape[0], a.device):
        if exclude_self:
            keep = rows != cols
            rows, cols = rows[keep], cols[keep]
        scores = swept_scores(a, b, rows, cols)
        yield rows, cols, torch.where(scores.isnan(), -torch.inf, scores)


def counts(
    a: Tensor, b: Tensor, pairing: Pairing, exclude_self: bool, rows: tuple, cols: tuple
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((greater, reaching) of rows, of columns) over negatives; rows, cols: (levels, starts or None)."""
    call = ScoreCountsCall(a, b, *rows)._replace(col_levels=cols[0], col_starts=cols[1])
    call = call._replace(a_ids=pairing.x_ids, b_ids=pairing.y_ids, exclude_self=exclude_self or pairing.kind == "rows")
    if pairing.listed is not None:
        call = call._replace(pair_starts=pairing.listed.starts, pair_cols=pairing.listed.sorted_cols)
    row_greater, row_reaching, col_greater, col_reaching = torch.ops.gssf.score_counts(*call)
    return (row_greater, row_reaching), (col_greater, col_reaching)


def best_rank(a: Tensor, b: Tensor, pairing: Pairing, exclude_self: bool) -> Ranks:
    """The ranks of best positives of factors a and b."""
    dtype = accumulation_dtype(a.dtype)
    levels = [torch.full(t.shape[:1], -torch.inf, dtype=dtype, device=a.device) for t in (a, b)]
    has = [torch.zeros(t.shape[:1], dtype=torch.bool, device=a.device) for t in (a, b)]
    for *anchors, scores in scored_positives(a, b, pairing, exclude_self):
        for level, one, anchor in zip(levels, has, anchors, strict=True):
            level.scatter_reduce_(0, anchor, scores, "amax")
            one[anchor] = True
    results = counts(a, b, pairing, exclude_self, *((level, None) for level in levels))
    return Ranks(
        *(
            torch.where(one, 1 + count, 0)
            for (greater, reaching), one in zip(results, has, strict=True)
            for count in (reaching, greater)
        )
    )


def every_rank(a: Tensor, b: Tensor, pairing: Pairing, exclude_self: bool) -> PositiveRanks:
    """The ranks of every positive of factors a and b."""
    lists = list(scored_positives(a, b, pairing, exclude_self))
    empty = torch.empty(0, dtype=torch.int64, device=a.device)
    lists.append((empty, empty, empty.to(accumulation_dtype(a.dtype))))
    rows, cols, scores = (torch.cat(t) for t in zip(*lists, strict=True))
    by_col = cols.argsort(stable=True)
    sides = (rows, cols, scores, a.shape[0]), (cols[by_col], rows[by_col], scores[by_col], b.shape[0])
    sorted_sides = [ByLevel(*side) for side in sides]
    results = counts(a, b, pairing, exclude_self, *((side.levels, side.starts) for side in sorted_sides))
    return PositiveRanks(
        *(
            RankSegments(side.starts, positives, *(side.ranks(count) for count in (reaching, greater)))
            for side, (_, positives, *_), (greater, reaching) in zip(sorted_sides, sides, results, strict=True)
        )
    )


class ByLevel:
    """Levels of positives, ascending within their anchor, and the way back."""

    def __init__(self, anchors: Tensor, positives: Tensor, scores: Tensor, count: int) -> None:
        # Of equal scores the lower index is ahead: in ascending order it comes later.
        order = torch.arange(anchors.shape[0], device=anchors.device).flip(0)
        order = order[scores[order].argsort(stable=True)]
        self.order = order[anchors[order].argsort(stable=True)]
        self.levels = scores[self.order]
        self.starts = torch.searchsorted(anchors, torch.arange(count + 1, device=anchors.device))
        places = torch.arange(anchors.shape[0], device=anchors.device)
        self.before = self.starts[anchors + 1] - 1 - places  # how many positives of the anchor have a higher level

    def ranks(self, count: Tensor) -> Tensor:
        """1 + count + how many positives are before, of each positive in the order of the list."""
        return torch.empty_like(count).index_copy_(0, self.order, 1 + count + self.before)
