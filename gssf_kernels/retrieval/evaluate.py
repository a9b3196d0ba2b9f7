"""Evaluation of retrieval, both ways, from ranks that one sweep counts.

Formulas: :mod:`gssf_kernels.retrieval.measures`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels.ops.pairing import Pairing, listed_pairs, pairing_of
from gssf_kernels.ops.score_counts import swept_scores
from gssf_kernels.reference import RankSegments, accumulate
from gssf_kernels.retrieval.measures import (
    QueryMeasures,
    RetrievalResult,
    joined,
    mean_over_folds,
    of_queries,
    result_of,
    warn_of_nan,
)
from gssf_kernels.retrieval.ranks import NAMES, ByLevel, best_rank, counts, every_rank
from gssf_kernels.similarity import StructuredSimilarity, metric_of

MOST_POSITIVES = 1 << 24  # whose ranks are held at a time


class Problem(NamedTuple):
    """Factors a [N, D] and b [M, D], and which of their rows are positives of one another."""

    a: Tensor
    b: Tensor
    x_ids: Tensor | None  # [N] int64
    y_ids: Tensor | None  # [M] int64
    pairs: Tensor | str | None  # None: (i, i), without ids; "ids"; [P, 2] int64, different ones sorted by row
    exclude_self: bool  # b is a, row by row, and (i, i) is left out; pairs by id

    @property
    def pairing(self) -> Pairing:
        return pairing_of(self.pairs, self.x_ids, self.y_ids, self.a, self.b, NAMES)

    def positives(self) -> Tensor:
        """How many positives each row of a has [N]."""
        n, m, device = self.a.shape[0], self.b.shape[0], self.a.device
        if isinstance(self.pairs, Tensor):
            return torch.bincount(self.pairs[:, 0], minlength=n)
        if self.pairs is None:
            return (torch.arange(n, device=device) < m).long()
        assert self.x_ids is not None
        assert self.y_ids is not None
        ids, sought = self.y_ids.sort().values, self.x_ids.contiguous()
        both = torch.searchsorted(ids, sought, right=True) - torch.searchsorted(ids, sought)
        return both - 1 if self.exclude_self else both

    def listed(self) -> "Problem":
        """The same with the pairs (i, i) as a list."""
        if self.pairs is not None:
            return self
        places = torch.arange(min(self.a.shape[0], self.b.shape[0]), device=self.a.device)
        return self._replace(pairs=places[:, None].expand(-1, 2))

    def mirrored(self) -> "Problem":
        """The same with a and b exchanged."""
        pairs = self.listed().pairs
        if isinstance(pairs, Tensor):
            pairs = pairs[pairs[:, 1].argsort(stable=True)].flip(1)
        return Problem(self.b, self.a, self.y_ids, self.x_ids, pairs, self.exclude_self)

    def block(self, first: int, last: int, cols: Tensor | None = None) -> "Problem":
        """Rows first .. last - 1 of a, with all rows of b or those at cols, ascending."""
        rows, b, y_ids, pairs = slice(first, last), self.b, self.y_ids, self.pairs
        if isinstance(pairs, Tensor):
            ends = torch.tensor([first, last], device=pairs.device)
            begin, end = torch.searchsorted(pairs[:, 0].contiguous(), ends).tolist()
            row, col = pairs[begin:end].unbind(1)
            pairs = torch.stack((row - first, col), 1)
        if cols is not None:
            b = b[cols]
            y_ids = None if y_ids is None else y_ids[cols]
            if isinstance(pairs, Tensor):
                pairs[:, 1] = torch.searchsorted(cols, pairs[:, 1].contiguous())
        return Problem(
            self.a[rows], b, None if self.x_ids is None else self.x_ids[rows], y_ids, pairs, self.exclude_self
        )


def problem_of(x, y, x_ids, y_ids, pairs, of: StructuredSimilarity | None, name: str) -> Problem:
    """The arguments of ``name``, checked, of scores by the metric ``of``; y None: x with itself."""
    exclude_self = y is None
    if exclude_self:
        if x_ids is None:
            raise ValueError(f"x_ids: expected the labels of x where y is None, got None ({name} of one modality)")
        for value, argument in ((y_ids, "y_ids"), (pairs, "pairs")):
            if value is not None:
                raise ValueError(f"{argument}: expected None where y is None, got {type(value).__name__}")
        y, y_ids = x, x_ids
    x, y = _checks.autocast(x, y)
    by_ids = pairs is None and not (x_ids is None and y_ids is None)
    pairing = pairing_of("ids" if by_ids else pairs, x_ids, y_ids, x, y, NAMES)
    a, b = x.detach(), y.detach()
    if of is not None:
        _checks.metric_weights(a, *of.weights, of.permutation)
        with torch.no_grad():
            a, b = _checks.autocast(*of.factors(a, b))
    listed: Tensor | str | None = {"rows": None, "ids": "ids"}.get(pairing.kind)
    if pairing.listed is not None:
        counted = pairing.listed.counted
        listed = torch.stack((pairing.listed.rows[counted], pairing.listed.cols[counted]), 1)
    problem = Problem(a, b, pairing.x_ids, pairing.y_ids, listed, exclude_self)
    if not bool(problem.positives().any()):
        expected = {
            "rows": "x: expected at least one row",
            "ids": "x_ids: expected at least one row with a positive",
            "listed": "pairs: expected at least one pair",
        }
        raise ValueError(f"{expected[pairing.kind]}, got none among {a.shape[0]} and {b.shape[0]} rows")
    return problem


def evaluate(
    x: Tensor,
    y: Tensor | None = None,
    *,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    pairs: Tensor | str | None = None,
    metric: StructuredSimilarity | None = None,
    normalize: bool = False,
    ks: Iterable[int] = (1, 5, 10),
    folds: int = 1,
) -> RetrievalResult:
    """R@K, median and mean rank, MRR, mAP, R-precision and NDCG@K, from x to y and from y to x, and RSUM.

    Formulas: :mod:`gssf_kernels.retrieval.measures`. A tie counts as a mistake; measures that count it as a hit stand
    beside the others under "optimistic.". Queries without a positive are counted and left out. Candidates without a
    positive are negatives.

    Args:
        x: [N, D] float, such as pictures.
        y: [M, D] of x's dtype and device, such as captions. None: x is compared with itself, each row with all others.
        x_ids, y_ids: [N], [M] integers. Equal ids are positives; with listed pairs those that are no pair are left out.
            Without y, x_ids are the labels of x.
        pairs: which are positives. None: those of equal id, or (i, i) without ids; "ids": those of equal id; or [P, 2]
            integers, (row of x, row of y).
        metric: a :class:`~gssf_kernels.StructuredSimilarity`, whose scores are taken.
        normalize: scores are cosines.
        ks: the K of R@K and NDCG@K.
        folds: compare within so many contiguous blocks of rows of x, each with its positives, and average the measures
            of the blocks. 5 folds of 5,000 pictures and their captions are the field's "COCO 1K". Block f has the rows
            fN/folds .. (f + 1)N/folds - 1, rounded down. Rows of y without a positive are candidates in every block.

    Returns:
        :class:`RetrievalResult`, a mapping such as ``result["x_to_y.recall@1"]``, that prints as a table.

    Warns if scores are NaN; ``nan_scores`` says how many. As a positive's score a NaN is behind all others, as a
    negative's ahead of them.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came. No row has a positive; the
            positives of a row of y are in two folds.

    Time: one N x M x D product, on a GPU two. Over 16 million positives take two anywhere: their ranks are counted in
    chunks of queries, one direction at a time. Memory: O(N + M), and about 200 bytes for each positive, of 16 million
    at most.
    """
    ks = _checks.cutoffs(ks, "ks")
    _checks.positive_int(folds, "folds")
    of = metric_of(metric, normalize, "evaluate", x, y)
    problem = problem_of(x, y, x_ids, y_ids, pairs, of, "evaluate")
    n = problem.a.shape[0]
    if folds > n:
        raise ValueError(f"folds: expected at most the {n} rows of x, got {folds}")
    with torch.no_grad():
        blocks = split(problem, folds) if folds > 1 else [problem]
        result = mean_over_folds([_evaluate(block, ks) for block in blocks])
        totals = result.to_dict()
        for way, queries in zip(result.best_ranks, (problem, problem.mirrored()), strict=False):
            has = queries.positives() > 0  # a row of y without a positive is in every block, and counts once
            totals |= {f"{way}.queries": has.shape[0], f"{way}.without_positive": int((~has).sum())}
    warn_of_nan(int(totals["nan_scores"]), "evaluate")
    return RetrievalResult(totals, result.best_ranks, ks)


def _evaluate(problem: Problem, ks: tuple[int, ...]) -> RetrievalResult:
    nan = nan_scores(problem.a, problem.b, problem.exclude_self)
    if problem.exclude_self:
        return result_of({"x_to_x": one_way(problem, ks)}, ks, nan)
    if int(problem.positives().sum()) <= MOST_POSITIVES:
        every = every_rank(problem.a, problem.b, problem.pairing, False)
        ways = of_queries(every.rows, ks), of_queries(every.cols, ks)
    else:
        ways = one_way(problem.listed(), ks), one_way(problem.mirrored(), ks)
    return result_of(dict(zip(("x_to_y", "y_to_x"), ways, strict=True)), ks, nan)


def one_way(problem: Problem, ks: tuple[int, ...]) -> QueryMeasures:
    """The measures of the rows of a, in chunks of rows with at most `MOST_POSITIVES` positives, or of one row."""
    ends = problem.positives().cumsum(0)
    parts, first, n = [], 0, problem.a.shape[0]
    while first < n:
        before = int(ends[first - 1]) if first else 0
        last = max(int(torch.searchsorted(ends, before + MOST_POSITIVES, right=True)), first + 1)
        parts.append(of_queries(row_ranks(problem, first, last), ks))
        first = last
    return joined(parts)


def row_ranks(problem: Problem, first: int, last: int) -> RankSegments:
    """The ranks of every positive of rows first .. last - 1 of a. Pairs are listed or by id."""
    a, b, *_ = block = problem.block(first, last)
    pairing = block.pairing
    lists = []
    for rows, cols in listed_pairs(pairing, a.shape[0], a.device):
        if problem.exclude_self:  # of equal id, (i, i) is no negative in any case
            keep = rows + first != cols
            rows, cols = rows[keep], cols[keep]
        scores = swept_scores(a, b, rows, cols)
        lists.append((rows, cols, torch.where(scores.isnan(), -torch.inf, scores)))
    rows, cols, scores = (torch.cat(t) for t in zip(*lists, strict=True))
    levels = ByLevel(rows, cols, scores, a.shape[0])
    (greater, reaching), _ = counts(a, b, pairing, False, (levels.levels, levels.starts), (None, None))
    return RankSegments(levels.starts, cols, levels.ranks(reaching), levels.ranks(greater))


def split(problem: Problem, folds: int) -> Iterator[Problem]:
    """Contiguous blocks of rows of a, each with the rows of b that belong to it, and those that belong to none.

    An error is raised before the first block.
    """
    n, device = problem.a.shape[0], problem.a.device
    bounds = [fold * n // folds for fold in range(folds + 1)]
    row_fold = torch.searchsorted(torch.tensor(bounds[1:], device=device), torch.arange(n, device=device), right=True)
    least, most = folds_of_columns(problem.listed(), row_fold, folds)
    check_folds(least, most, row_fold[problem.positives() > 0], folds, "x" if problem.exclude_self else "y")
    for fold in range(folds):
        cols = ((least == fold) | (least == folds)).nonzero()[:, 0]
        yield problem.block(bounds[fold], bounds[fold + 1], cols)


def folds_of_columns(problem: Problem, row_fold: Tensor, folds: int) -> tuple[Tensor, Tensor]:
    """(least, most) [M], the folds in which each row of b has its positives; (folds, -1) where it has none."""
    m, device = problem.b.shape[0], row_fold.device
    if isinstance(problem.pairs, Tensor):
        rows, cols = problem.pairs.unbind(1)
        return folds_of_listed(cols, row_fold[rows], m, folds)
    assert problem.x_ids is not None
    assert problem.y_ids is not None
    ids, order = problem.x_ids.sort(stable=True)  # within an id, folds ascend
    sought = problem.y_ids.contiguous()
    begin, end = torch.searchsorted(ids, sought), torch.searchsorted(ids, sought, right=True)
    has = end > begin
    least, most = torch.full((m,), folds, device=device), torch.full((m,), -1, device=device)
    least[has], most[has] = row_fold[order[begin[has]]], row_fold[order[end[has] - 1]]
    return least, most


def folds_of_listed(cols: Tensor, fold: Tensor, m: int, folds: int) -> tuple[Tensor, Tensor]:
    """The same of listed positives, at cols [P] and in folds [P]."""
    least, most = torch.full((m,), folds, device=fold.device), torch.full((m,), -1, device=fold.device)
    return least.scatter_reduce(0, cols, fold, "amin"), most.scatter_reduce(0, cols, fold, "amax")


def check_folds(least: Tensor, most: Tensor, fold: Tensor, folds: int, name: str) -> None:
    """Each row of ``name`` has its positives in one fold, least to most, and each fold is that of a positive."""
    if bool((most > least).any()):
        j = int((most > least).nonzero()[0])
        raise ValueError(
            f"folds: expected the positives of a row of {name} in one fold, but row {j} has positives in folds "
            f"{int(least[j])} and {int(most[j])} of 0..{folds - 1}"
        )
    empty = (torch.bincount(fold, minlength=folds) == 0).nonzero()
    if empty.shape[0]:
        raise ValueError(f"folds: expected a positive in each, got none in fold {int(empty[0])} of 0..{folds - 1}")


def nan_scores(a: Tensor, b: Tensor, exclude_self: bool = False) -> int:
    """How many scores are NaN. Computed are only those of infinite rows, and of rows so large that sums overflow."""
    rows, cols = (torch.linalg.vector_norm(t, torch.inf, dim=1) for t in (a, b))  # largest absolute values
    nan_rows, nan_cols, infinite_rows, infinite_cols = rows.isnan(), cols.isnan(), rows.isinf(), cols.isinf()
    finite = torch.where(cols.isfinite(), cols, 0).double()
    bound = rows.double() * (finite.max() if finite.shape[0] else 0) * a.shape[1]
    overflow = rows.isfinite() & (bound >= torch.finfo(accumulate(a[:0]).dtype).max)
    n_rows, n_cols = int(nan_rows.sum()), int(nan_cols.sum())
    total = n_rows * b.shape[0] + n_cols * a.shape[0] - n_rows * n_cols
    # Whether an overflow makes a NaN depends on the order of summation, an infinity makes one in every order.
    total += _computed_nan(a[overflow], b[~nan_cols], _swept)
    total += _computed_nan(a[infinite_rows], b[~nan_cols], _product)
    total += _computed_nan(a[rows.isfinite() & ~overflow], b[infinite_cols], _product)
    if exclude_self and total:
        places = torch.arange(a.shape[0], device=a.device)
        total -= int(swept_scores(a, b, places, places).isnan().sum())
    return total


def _computed_nan(a: Tensor, b: Tensor, scores: Callable[[Tensor, Tensor], Tensor]) -> int:
    if a.shape[0] == 0 or b.shape[0] == 0:
        return 0
    step = max(plan.chunk_scores(_checks.device_type(a)) // b.shape[0], 1)
    return sum(int(scores(rows, b).isnan().sum()) for rows in a.split(step))


def _product(a: Tensor, b: Tensor) -> Tensor:
    return accumulate(a) @ accumulate(b).mT


def _swept(a: Tensor, b: Tensor) -> Tensor:
    """The same, with the bits of the sweep."""
    rows, cols = torch.ones(a.shape[0], b.shape[0], device=a.device).nonzero(as_tuple=True)
    return swept_scores(a, b, rows, cols)


def recall_at_k(
    x: Tensor,
    y: Tensor,
    k: int = 1,
    *,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    pairs: Tensor | str | None = None,
    metric: StructuredSimilarity | None = None,
    normalize: bool = False,
) -> tuple[float, float]:
    """(R@k from x to y, R@k from y to x): the share of queries with a positive among their k best candidates.

    A tie counts as a mistake. Queries without a positive are left out.

    Args:
        x, y, x_ids, y_ids, pairs, metric, normalize: as in :func:`evaluate`.
        k: >= 1.

    Raises:
        TypeError, ValueError: as :func:`evaluate`. Warns if scores are NaN.

    Time: one N x M x D product, on a GPU two. Memory: O(N + M) and the listed positives, at most 4 million at a time.
    """
    _checks.positive_int(k, "k")
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor [M, D], got {type(y).__name__}")
    of = metric_of(metric, normalize, "recall_at_k", x, y)
    problem = problem_of(x, y, x_ids, y_ids, pairs, of, "recall_at_k")
    with torch.no_grad():
        ranks = best_rank(problem.a, problem.b, problem.pairing, False)
        warn_of_nan(nan_scores(problem.a, problem.b), "recall_at_k")
    ways = (rank[rank > 0] for rank in (ranks.row_pessimistic, ranks.col_pessimistic))
    x_to_y, y_to_x = (int((rank <= k).sum()) / rank.shape[0] for rank in ways)
    return x_to_y, y_to_x


__all__ = ["evaluate", "recall_at_k"]
