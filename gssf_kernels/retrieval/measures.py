"""Measures of retrieval, from the ranks r₁ < r₂ < … < r_R of a query's R positives.

    R@K = [r₁ <= K],      reciprocal rank = 1 / r₁,      R-precision = |{p: r_p <= R}| / R
    AP = 1/R Σ_p p / r_p,      NDCG@K = Σ_{p: r_p <= K} 1 / log₂(1 + r_p)  /  Σ_{p <= min(R, K)} 1 / log₂(1 + p)

A measure is the mean over the queries that have a positive; of the best rank r₁ also the median, of an even count the
lower. Pessimistic ranks count ties as mistakes. Beside them, under "optimistic.", stand the measures of optimistic
ranks, which count ties as hits. Sums over queries are rounded once, so that their order changes no bit.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels.reference import RankSegments

TIES = ("", "optimistic.")  # the prefixes of measures, in the order of `QueryMeasures`
COUNTS = ("queries", "without_positive", "nan_scores")  # which folds add up
RSUM = (1, 5, 10)  # the K of R@K that RSUM adds up


class QueryMeasures(NamedTuple):
    """Measures of single queries; 0 where a query has no positive. First index: 0 pessimistic, 1 optimistic."""

    positives: Tensor  # [Q] int64, how many each query has
    best_rank: Tensor  # [2, Q] int64, r₁
    average_precision: Tensor  # [2, Q] fp64
    r_precision: Tensor  # [2, Q] fp64
    ndcg: Tensor  # [2, K, Q] fp64


def of_queries(segments: RankSegments, ks: Sequence[int]) -> QueryMeasures:
    """The measures of every query, from the ranks of its positives. Memory: O(P) for P positives."""
    starts = segments.starts
    positives = starts.diff()
    most, total = (int(positives.max()) if positives.shape[0] else 0), segments.pessimistic.shape[0]
    query = torch.repeat_interleave(positives)  # [P]
    place = torch.arange(total, device=starts.device) - starts[query]
    # A positive that is before another one pessimistically is so optimistically too: one order serves both.
    key = query * (int(segments.pessimistic.max()) + 1) + segments.pessimistic if total else query
    ranks = torch.stack((segments.pessimistic, segments.optimistic))[:, key.argsort()]  # [2, P]

    best = torch.zeros(2, positives.shape[0], dtype=torch.int64, device=starts.device)
    has = positives > 0
    best[:, has] = ranks[:, starts[:-1][has]]
    gains = 1 / torch.log2(1 + ranks.double())
    ideal = torch.zeros(most + 1, dtype=torch.float64, device=starts.device)  # of 0, 1, … positives
    ideal[1:] = (1 / torch.log2(torch.arange(2, most + 2, device=starts.device).double())).cumsum(0)
    return QueryMeasures(
        positives,
        best,
        _sums((place + 1) / ranks.double(), starts) / positives.clamp_min(1),
        _sums((ranks <= positives[query]).double(), starts) / positives.clamp_min(1),
        torch.stack(
            [_sums(torch.where(ranks <= k, gains, 0), starts) / ideal[positives.clamp_max(k)].clamp_min(1) for k in ks],
            1,
        ),
    )


def _sums(values: Tensor, starts: Tensor) -> Tensor:
    """The sums of values [2, P] over segments [2, Q], each in the order of its values."""
    return torch.stack([torch.segment_reduce(v, "sum", offsets=starts, initial=0.0) for v in values])


def joined(parts: Sequence[QueryMeasures]) -> QueryMeasures:
    """The measures of all queries, from those of successive ranges of queries."""
    return QueryMeasures(*(torch.cat(tensors, -1) for tensors in zip(*parts, strict=True)))


def means(queries: QueryMeasures, ks: Sequence[int]) -> dict[str, float | int]:
    """The measures of one direction.

    Keys: recall@K, median_rank, mean_rank, mrr, map, r_precision, ndcg@K, the same after "optimistic.", and the counts
    queries (all) and without_positive.
    """
    has = queries.positives > 0
    count = int(has.sum())
    if count == 0:
        raise ValueError("queries: expected at least one with a positive, got none")
    result: dict[str, float | int] = {}
    for tie, prefix in enumerate(TIES):
        rank = queries.best_rank[tie, has]
        result |= {f"{prefix}recall@{k}": int((rank <= k).sum()) / count for k in ks}
        result[f"{prefix}median_rank"] = float(rank.median())
        result[f"{prefix}mean_rank"] = int(rank.sum()) / count
        result[f"{prefix}mrr"] = _mean(1 / rank.double())
        result[f"{prefix}map"] = _mean(queries.average_precision[tie, has])
        result[f"{prefix}r_precision"] = _mean(queries.r_precision[tie, has])
        result |= {f"{prefix}ndcg@{k}": _mean(queries.ndcg[tie, place, has]) for place, k in enumerate(ks)}
    return result | {"queries": has.shape[0], "without_positive": has.shape[0] - count}


def _mean(values: Tensor) -> float:
    return math.fsum(values.tolist()) / values.shape[0]


def measures_of(segments: RankSegments, ks: Sequence[int]) -> dict[str, float | int]:
    """The measures of one direction from the ranks of every positive: `means` of `of_queries`."""
    return means(of_queries(segments, ks), ks)


class RetrievalResult(Mapping[str, float | int]):
    """Measures by name, such as ``result["x_to_y.recall@1"]``; ``print(result)`` gives a table.

    Names: ``<direction>.<measure>`` and ``<direction>.optimistic.<measure>``, with the direction ``x_to_y``, ``y_to_x``
    or, of one modality, ``x_to_x``, and the measure ``recall@K``, ``median_rank``, ``mean_rank``, ``mrr``, ``map``,
    ``r_precision`` or ``ndcg@K``; ``<direction>.queries`` and ``<direction>.without_positive``; ``rsum`` and
    ``optimistic.rsum`` in percent, of two directions and ks that contain 1, 5 and 10; ``nan_scores``; ``folds``.
    Measures are fractions, ranks 1-based.

    Attributes:
        best_ranks: for each direction [2, Q] int64 on the CPU, the pessimistic and the optimistic rank of each query's
            best positive; 0 without a positive. Of folds one after the other.
        ks: the K of R@K and NDCG@K.
    """

    def __init__(self, measures: Mapping[str, float | int], best_ranks: dict[str, Tensor], ks: Sequence[int]):
        self._measures, self.best_ranks, self.ks = dict(measures), best_ranks, tuple(ks)

    def __getitem__(self, name: str) -> float | int:
        return self._measures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._measures)

    def __len__(self) -> int:
        return len(self._measures)

    def to_dict(self) -> dict[str, float | int]:
        """Names and plain numbers: fractions, and whole numbers for counts."""
        return dict(self._measures)

    def table(self, x: str = "x", y: str = "y") -> str:
        """A table of all measures; x, y: what the rows of x and of y are called."""
        names = {"x": x, "y": y}
        heads = {way: f"{names[way[0]]} → {names[way[-1]]}" for way in self.best_ranks}
        columns = [(head, f"{way}.") for way, head in heads.items()]
        measures = [name for name, _, _ in self._rows()]
        ties = any(self[f"{way}.{name}"] != self[f"{way}.optimistic.{name}"] for way in heads for name in measures)
        if ties:
            columns += [(f"{head}, optimistic", f"{way}.optimistic.") for way, head in heads.items()]
        body = [[label, *(form(self[prefix + name]) for _, prefix in columns)] for name, label, form in self._rows()]
        for name, label in (("queries", "queries"), ("without_positive", "without a positive")):
            counts = [f"{self[f'{way}.{name}']:,}" for way in heads]
            body.append([label, *counts, *[""] * (len(columns) - len(counts))])
        body.insert(0, ["", *(head for head, _ in columns)])
        widths = [max(map(len, column)) for column in zip(*body, strict=True)]
        text = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in body
        ]
        if "rsum" in self:
            optimistic = f" (optimistic {self['optimistic.rsum']:.2f})" if ties else ""
            text.append(f"RSUM {self['rsum']:.2f}{optimistic}")
        if self["folds"] > 1:
            text.append(f"means over {self['folds']} folds")
        if self["nan_scores"]:
            text.append(f"{self['nan_scores']:,} scores are NaN, and count as mistakes")
        return "\n".join(line.rstrip() for line in text)

    def _rows(self) -> list:
        """(measure, label, how its value is written)."""
        percent, rank, fraction = (lambda v: f"{100 * v:.2f}"), (lambda v: f"{v:,.2f}"), (lambda v: f"{v:.4f}")
        return [
            *((f"recall@{k}", f"R@{k}, %", percent) for k in self.ks),
            ("median_rank", "median rank", lambda v: f"{v:,g}"),
            ("mean_rank", "mean rank", rank),
            ("mrr", "MRR", fraction),
            ("map", "mAP", fraction),
            ("r_precision", "R-precision", fraction),
            *((f"ndcg@{k}", f"NDCG@{k}", fraction) for k in self.ks),
        ]

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__


def result_of(directions: Mapping[str, QueryMeasures], ks: Sequence[int], nan_scores: int) -> RetrievalResult:
    """The result of one fold, or of all rows; directions: "x_to_y" and "y_to_x", or "x_to_x"."""
    of_ways = {way: means(queries, ks) for way, queries in directions.items()}
    measures = {f"{way}.{name}": value for way, one in of_ways.items() for name, value in one.items()}
    if len(of_ways) == 2 and set(RSUM) <= set(ks):
        for tie in TIES:
            recalls = [one[f"{tie}recall@{k}"] for one in of_ways.values() for k in RSUM]
            measures[f"{tie}rsum"] = 100 * math.fsum(recalls)
    measures |= {"nan_scores": nan_scores, "folds": 1}
    return RetrievalResult(measures, {way: queries.best_rank.cpu() for way, queries in directions.items()}, ks)


def mean_over_folds(results: Sequence[RetrievalResult]) -> RetrievalResult:
    """Measures averaged over folds; counts are added up."""
    first = results[0]
    measures: dict[str, float | int] = {}
    for name in first:
        total = [result[name] for result in results]
        measures[name] = sum(total) if name.rpartition(".")[2] in COUNTS else math.fsum(total) / len(results)
    measures["folds"] = len(results)
    best_ranks = {way: torch.cat([result.best_ranks[way] for result in results], 1) for way in first.best_ranks}
    return RetrievalResult(measures, best_ranks, first.ks)


def warn_of_nan(nan_scores: int, name: str, stacklevel: int = 3) -> None:
    """Warn if scores are NaN; name: the function that was called."""
    if nan_scores:
        warnings.warn(
            f"{name}: {nan_scores} scores are NaN. As a positive's score a NaN is behind all others, as a negative's "
            "ahead of them.",
            UserWarning,
            stacklevel=stacklevel,
        )


__all__ = ["QueryMeasures", "RetrievalResult", "measures_of"]
