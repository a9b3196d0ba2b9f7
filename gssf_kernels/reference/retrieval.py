"""The definitions of search and ranks, on the matrix of all scores. Formulas: :mod:`gssf_kernels.retrieval`."""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels.reference.statistics import paired, positives, scores
from gssf_kernels.reference.triplet import factors


class TopScores(NamedTuple):
    values: Tensor  # [N, k], the k best scores of each row, best first; -inf where there are fewer
    indices: Tensor  # [N, k] int64, their columns; -1 where there are fewer


class TwoSidedTopScores(NamedTuple):
    """`TopScores` of rows and of columns."""

    values: Tensor
    indices: Tensor
    col_values: Tensor  # [M, k], of each column
    col_indices: Tensor  # [M, k] int64, their rows


class Ranks(NamedTuple):
    """1-based ranks of the best positive; 0 where there is no positive. int64."""

    row_pessimistic: Tensor  # [N], negatives of equal score count as ahead
    row_optimistic: Tensor  # [N], they count as behind
    col_pessimistic: Tensor  # [M]
    col_optimistic: Tensor  # [M]


class RankSegments(NamedTuple):
    """1-based ranks of every positive of every anchor, among the anchor's negatives and its other positives."""

    starts: Tensor  # [anchors + 1]: those of anchor i are at starts[i] .. starts[i + 1] - 1
    positives: Tensor  # [P], the candidate of each, ascending within an anchor
    pessimistic: Tensor  # [P]
    optimistic: Tensor  # [P]


class PositiveRanks(NamedTuple):
    rows: RankSegments
    cols: RankSegments


def top_scores(
    a: Tensor,
    b: Tensor,
    k: int,
    *,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    exclude_same_id: bool = False,
    exclude_self: bool = False,
    max_score: float | Tensor | None = None,
    columns: bool = False,
    metric=None,
    normalize: bool = False,
) -> TopScores | TwoSidedTopScores:
    """The k largest scores of each row, ties by lowest index; see :func:`gssf_kernels.top_scores`."""
    a, b = factors(a, b, metric, normalize)
    s = scores(a, b)
    s = s.masked_fill(left_out(a, b, a_ids, b_ids, exclude_same_id, exclude_self), -torch.inf)
    if max_score is not None:
        limit = torch.as_tensor(max_score, dtype=s.dtype, device=s.device)
        s = torch.where(s > limit.expand(s.shape[0])[:, None], -torch.inf, s)
    rows = best(s, k)
    return TwoSidedTopScores(*rows, *best(s.mT, k)) if columns else TopScores(*rows)


def left_out(a: Tensor, b: Tensor, a_ids, b_ids, exclude_same_id: bool, exclude_self: bool) -> Tensor:
    """[N, M] bool: which scores are no candidates."""
    if not exclude_same_id:
        a_ids = b_ids = None
    return positives(a, b, a_ids, b_ids, None if exclude_self else "ids")


def best(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) [N, k] of the largest of each row; NaN before all, ties by lowest index, -inf is none."""
    s = torch.nn.functional.pad(s, (0, max(k - s.shape[1], 0)), value=-torch.inf)
    values, indices = (t[:, :k] for t in s.sort(dim=1, descending=True, stable=True))
    return values, torch.where(values == -torch.inf, -1, indices)


def ranks(
    x: Tensor,
    y: Tensor,
    *,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    pairs: Tensor | str | None = None,
    every_positive: bool = False,
    exclude_self: bool = False,
    metric=None,
    normalize: bool = False,
) -> Ranks | PositiveRanks:
    """One plus how many negatives score higher, or as high, than a positive; see :func:`gssf_kernels.ranks`."""
    a, b = factors(x, y, metric, normalize)
    s = scores(a, b)
    pairs = "ids" if pairs is None and not (x_ids is None and y_ids is None) else pairs
    positive, not_negative = paired(a, b, x_ids, y_ids, pairs), positives(a, b, x_ids, y_ids, pairs)
    if exclude_self:
        itself = torch.eye(*s.shape, dtype=torch.bool, device=s.device)
        positive, not_negative = positive & ~itself, not_negative | itself
    both = (s, positive, not_negative), (s.mT, positive.mT, not_negative.mT)
    if every_positive:
        return PositiveRanks(*(_every_rank(*t) for t in both))
    return Ranks(*(rank for t in both for rank in _best_rank(*t)))


def _ahead(s: Tensor, not_negative: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(how many negatives are not below the level of their row, how many greater). NaN is ahead of everything."""
    s = torch.where(s.isnan(), torch.inf, s)
    return (~not_negative & (s >= level[:, None])).sum(1), (~not_negative & (s > level[:, None])).sum(1)


def _of_positives(s: Tensor, positive: Tensor) -> Tensor:
    """Scores of positives, -inf elsewhere; a NaN is behind everything."""
    return torch.where(positive & ~s.isnan(), s, -torch.inf)


def _best_rank(s: Tensor, positive: Tensor, not_negative: Tensor) -> tuple[Tensor, Tensor]:
    if s.shape[1] == 0:
        none = s.new_zeros(s.shape[0], dtype=torch.int64)
        return none, none.clone()
    level = _of_positives(s, positive).amax(1)
    pessimistic, optimistic = (torch.where(positive.any(1), 1 + t, 0) for t in _ahead(s, not_negative, level))
    return pessimistic, optimistic


def _every_rank(s: Tensor, positive: Tensor, not_negative: Tensor) -> RankSegments:
    rows, cols = positive.nonzero(as_tuple=True)
    starts = torch.nn.functional.pad(positive.sum(1).cumsum(0), (1, 0))
    of_positives = _of_positives(s, positive)
    level = of_positives[rows, cols]
    # How many positives of the row are before it: greater, or as great and of lower index.
    of_row = of_positives[rows]  # [P, M]
    index = torch.arange(s.shape[1], device=s.device)
    before = (of_row > level[:, None]) | ((of_row == level[:, None]) & (index < cols[:, None]))
    place = (before & positive[rows]).sum(1)
    pessimistic, optimistic = (1 + place + t for t in _ahead(s[rows], not_negative[rows], level))
    return RankSegments(starts, cols, pessimistic, optimistic)
