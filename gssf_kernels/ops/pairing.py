"""Which rows of x and y are pairs: the positives of the two-sided losses.

    pairs=None      (i, i): row i of x and row i of y, M >= N
    pairs="ids"     every (i, j) of equal id; (i, i) is nothing special
    pairs=[P, 2]    exactly those listed; one listed twice counts once

A pair is never a negative, and neither is a score of equal id. A pair that is listed again keeps its place in the list,
marked with -1, so that the list's length depends on no value: only `as_list` and `levels_of` synchronise.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels.ops.negatives import Negatives
from gssf_kernels.ops.segments import gather


class ListedPairs(NamedTuple):
    """P pairs, sorted by row and then by column."""

    rows: Tensor  # [P] int64; -1 for a pair that was listed before
    cols: Tensor  # [P]
    starts: Tensor  # [N + 1], where the pairs of each row begin
    sorted_cols: Tensor  # [P], cols with no -1
    order: Tensor  # [P], the place of each in the user's list
    total: Tensor  # scalar, how many pairs are different

    @property
    def counted(self) -> Tensor:
        """Which pairs count [P]."""
        return self.rows >= 0


class Pairing(NamedTuple):
    """The pairs of x [N, D] and y [M, D], and their ids."""

    kind: str  # "rows", "ids" or "listed"
    x_ids: Tensor | None  # [N] int64
    y_ids: Tensor | None  # [M] int64
    listed: ListedPairs | None = None

    def negatives(
        self, columns: bool = True, row_limit: Tensor | None = None, col_limit: Tensor | None = None
    ) -> Negatives:
        """What this means for the ops for hardest negatives."""
        starts, cols = (None, None) if self.listed is None else (self.listed.starts, self.listed.sorted_cols)
        return Negatives(self.kind == "rows", columns, starts, cols, row_limit, col_limit)


def pairing_of(pairs, x_ids, y_ids, x: Tensor, y: Tensor, names: tuple[str, str, str, str]) -> Pairing:
    """The argument ``pairs`` and the ids of a loss, checked; names: those of x, y and the ids, for errors."""
    if pairs is not None and not (isinstance(pairs, str) and pairs == "ids") and not isinstance(pairs, Tensor):
        got = repr(pairs) if isinstance(pairs, str) else type(pairs).__name__
        raise (ValueError if isinstance(pairs, str) else TypeError)(
            f'pairs: expected None, "ids" or a tensor [P, 2] of integers, got {got}'
        )
    _checks.embeddings(x, y, *names[:2], paired=pairs is None)
    if pairs is None:
        return Pairing("rows", *_checks.ids_of_pairs(x_ids, y_ids, x, y, *names[2:]))
    x_ids, y_ids = _checks.ids(x_ids, y_ids, x, y, *names[2:])
    if isinstance(pairs, str):
        if x_ids is None:
            raise ValueError(f'{names[2]}: expected ids with pairs="ids", got None')
        return Pairing("ids", x_ids, y_ids)
    return Pairing("listed", x_ids, y_ids, _listed(pairs, x, y))


def _listed(pairs: Tensor, x: Tensor, y: Tensor) -> ListedPairs:
    n, m = x.shape[0], y.shape[0]
    _checks.index_pairs(pairs, "pairs", "P")
    if pairs.device != x.device:
        raise ValueError(f"pairs: expected device {x.device}, got {pairs.device}")
    rows, cols = pairs.to(torch.int64).unbind(1)
    inside = (rows >= 0) & (rows < n) & (cols >= 0) & (cols < m)
    if _checks.readable(pairs):
        if not bool(inside.all()):
            place = int((~inside).nonzero()[0])
            raise ValueError(
                f"pairs: expected (row of x, row of y) within 0..{n - 1} and 0..{m - 1}, got "
                f"({int(rows[place])}, {int(cols[place])}) at place {place}"
            )
    elif pairs.device.type == "cuda":
        torch._assert_async(inside.all(), "pairs: expected (row of x, row of y), got one out of range")
        rows, cols = rows.clamp(0, max(n - 1, 0)), cols.clamp(0, max(m - 1, 0))
    key, order = (rows * m + cols).sort(stable=True)
    again = torch.zeros_like(key, dtype=torch.bool)
    again[1:] = key[1:] == key[:-1]
    rows, cols = rows[order].contiguous(), cols[order].contiguous()
    starts = torch.searchsorted(rows, torch.arange(n + 1, device=rows.device))
    marked_rows, marked_cols = (torch.where(again, -1, t) for t in (rows, cols))
    return ListedPairs(marked_rows, marked_cols, starts, cols, order, (~again).sum())


def in_order(scores: Tensor, listed: ListedPairs) -> Tensor:
    """scores [P] in the user's order; a pair listed again has the score of its first place."""
    places = torch.arange(scores.shape[0], device=scores.device)
    first = torch.where(listed.counted, places, 0).cummax(0).values if scores.shape[0] else places
    index = torch.empty_like(places).index_copy_(0, listed.order, first)
    return gather(scores, index)


def as_list(pairing: Pairing) -> Pairing:
    """The same with pairs of equal id as a list: O(P) memory. Their number depends on values, so a GPU synchronises."""
    if pairing.kind != "ids":
        return pairing
    return pairing._replace(kind="listed", listed=_listed_by_ids(*_matches_by_id(pairing)))


def few_as_list(pairing: Pairing) -> ListedPairs | None:
    """The listed pairs; or pairs by id as a list if ids may be read, and there are few; else None."""
    ids = [t for t in (pairing.x_ids, pairing.y_ids) if t is not None]
    if pairing.kind != "ids" or not all(_checks.readable(t) for t in ids):
        return pairing.listed
    order, counts, first = _matches_by_id(pairing)
    few = plan.lists_pairs(int(counts.sum()), counts.shape[0] + order.shape[0])
    return _listed_by_ids(order, counts, first) if few else None


MOST_LISTED = 1 << 22  # pairs of a list of `listed_pairs`


def listed_pairs(pairing: Pairing, n: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, columns) of all pairs of n rows, each once, by row and then by column; a GPU synchronises.

    Those of equal id come in lists of at most `MOST_LISTED`, or of one row's.
    """
    if pairing.kind == "rows":
        places = torch.arange(n, device=device)
        yield places, places
    elif pairing.listed is not None:
        counted = pairing.listed.counted
        yield pairing.listed.rows[counted], pairing.listed.cols[counted]
    else:
        order, counts, first = _matches_by_id(pairing)
        ends = counts.cumsum(0)
        row = 0
        while row < n:
            before = int(ends[row - 1]) if row else 0
            last = int(torch.searchsorted(ends, before + MOST_LISTED, right=True))
            rows = slice(row, max(last, row + 1))
            listed = _listed_by_ids(order, counts[rows], first[rows])
            yield listed.rows + row, listed.cols
            row = rows.stop


class Levels(NamedTuple):
    """The pairs of each anchor numbered: a pair's level is its place among those of its anchor, 0, 1, … below `most`.

    Their table [most, anchors] has a row for each level and a column for each anchor.
    """

    anchor: Tensor  # [P], the anchor of each pair; -1 for one that was listed before
    level: Tensor  # [P]
    anchors: int
    most: int  # the most pairs of an anchor

    def places(self) -> Tensor:
        """The place of each pair in the table, flat [P]; -1 for one that was listed before."""
        return torch.where(self.anchor >= 0, self.level * self.anchors + self.anchor, -1)

    def pairs(self) -> Tensor:
        """The pair at each place of the table [most, anchors]; -1 for none."""
        places, none = self.places(), self.most * self.anchors
        pairs = torch.full((none + 1,), -1, device=places.device)
        pairs.scatter_(0, torch.where(places < 0, none, places), torch.arange(places.shape[0], device=places.device))
        return pairs[:-1].view(self.most, self.anchors)


def levels_of(anchor: Tensor, count: int) -> Levels:
    """The levels of pairs with these anchors [P], -1 for a pair that was listed before. A GPU synchronises."""
    order = anchor.argsort(stable=True)
    starts = torch.searchsorted(anchor[order], torch.arange(count, device=anchor.device))
    places = torch.arange(anchor.shape[0], device=anchor.device)
    level = places - starts[anchor[order].clamp_min(0)] if count else places
    level = torch.empty_like(anchor).index_copy_(0, order, torch.where(anchor[order] >= 0, level, 0))
    return Levels(anchor, level, count, int(level.max()) + 1 if anchor.shape[0] else 0)


def one_level(pairs: int, count: int, device: torch.device) -> Levels:
    """The levels of the pairs (i, i)."""
    anchor = torch.arange(pairs, device=device)
    return Levels(anchor, torch.zeros_like(anchor), count, 1)


def _matches_by_id(pairing: Pairing) -> tuple[Tensor, Tensor, Tensor]:
    """(columns sorted by id [M], how many pairs each row has [N], the place of its first among those columns [N])."""
    assert pairing.x_ids is not None
    assert pairing.y_ids is not None
    x_ids, y_ids = pairing.x_ids.contiguous(), pairing.y_ids.contiguous()
    ids, order = y_ids.sort(stable=True)
    first, last = torch.searchsorted(ids, x_ids), torch.searchsorted(ids, x_ids, right=True)
    return order, last - first, first


def _listed_by_ids(order: Tensor, counts: Tensor, first: Tensor) -> ListedPairs:
    """The arguments are what `_matches_by_id` returns."""
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    rows = torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts)
    places = torch.arange(rows.shape[0], device=counts.device)
    cols = order[first[rows] + places - starts[rows]]
    return ListedPairs(rows, cols, starts, cols, places, starts[-1])
