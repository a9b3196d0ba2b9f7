"""Hard negatives of every query: the best candidates of a corpus that are no positive and score low enough.

    limit_i = min(max_score,  p_i − margin_to_positive,  p_i (1 − relative_margin))
    negatives of i = the best j with  s_ij <= limit_i  and  s_ij >= min_score,  without the first skip_top

p_i is the lowest score of i's positives. The arguments follow ``mine_hard_negatives`` of sentence-transformers, whose
range_min is skip_top, absolute_margin margin_to_positive and range_max skip_top + pool. It takes the best range_max
candidates first and then removes those that score too high, so that a query may keep too few or none. Here the limit is
part of the search: a query has fewer than k negatives only if fewer than k pass.
"""

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels.ops.score_counts import swept_scores
from gssf_kernels.ops.top_scores import MOST
from gssf_kernels.retrieval.blocks import Pairs, Sweep
from gssf_kernels.retrieval.sources import open_rows
from gssf_kernels.retrieval.streaming import keep_best, pairs_by_id, top_of_chunk
from gssf_kernels.similarity import StructuredSimilarity

POOL = 10  # times k: of how many of the best candidates "random" draws
LIMITS = ("max_score", "margin_to_positive", "relative_margin")
# Why a query has fewer than k negatives: the first step that leaves too few.
REASONS = {
    "not_finite": "their row is not finite",
    "no_positive": "no positive to keep a margin to",
    "few_candidates": "too few candidates that are no positive",
    "max_score": "greater than max_score",
    "margin_to_positive": "within margin_to_positive",
    "relative_margin": "within relative_margin",
    "min_score": "less than min_score",
    "skip_top": "skipped by skip_top",
}


@dataclass(frozen=True)
class MiningReport:
    """How many queries have k negatives, and why others have not. ``print`` it."""

    queries: int
    k: int
    complete: int  # queries with k negatives
    missing: int  # negatives that the others lack
    fewer: dict[str, int] = field(default_factory=dict)  # queries by the first of `REASONS`; sum: queries - complete
    query_rows_not_finite: int = 0  # such a query has no negatives
    corpus_rows_not_finite: int = 0  # such a row is never a negative

    def __str__(self) -> str:
        text = [f"{self.complete:,} of {self.queries:,} queries have {self.k} negatives"]
        if self.complete < self.queries:
            text[0] += f", {self.queries - self.complete:,} have fewer ({self.missing:,} negatives are missing):"
            text += [f"  {count:,}: {REASONS[reason]}" for reason, count in self.fewer.items()]
        if self.query_rows_not_finite or self.corpus_rows_not_finite:
            text.append(
                f"rows that are not finite, left out: {self.query_rows_not_finite:,} of queries, "
                f"{self.corpus_rows_not_finite:,} of corpus"
            )
        return "\n".join(text)


class HardNegatives(NamedTuple):
    indices: Tensor  # [N, k] int64, rows of corpus, best first; -1 where there are fewer
    scores: Tensor  # [N, k]; -inf where there are fewer
    positive_scores: Tensor  # [N], the lowest of each query's positives; NaN without a positive
    report: MiningReport


def mine_hard_negatives(
    queries: Any,
    corpus: Any,
    *,
    k: int,
    query_ids: Any = None,
    corpus_ids: Any = None,
    positives: Any = None,
    skip_top: int = 0,
    max_score: float | None = None,
    min_score: float | None = None,
    margin_to_positive: float | None = None,
    relative_margin: float | None = None,
    sampling: str = "top",
    pool: int | None = None,
    seed: int = 0,
    metric: StructuredSimilarity | None = None,
    normalize: bool = False,
    block_rows: int | None = None,
    chunk_rows: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> HardNegatives:
    """k hard negatives of every query, from a corpus that need not fit into memory.

    Positives, and rows of equal id, are never negatives. Ties go to the lowest index.

    Args:
        queries: [N, D] float: a tensor, a NumPy array or memory map, a file ``.npy`` or ``.safetensors``
            (``"file.safetensors::name"`` if it holds several tensors), or a directory of such files.
        corpus: [M, D] of the same dtype, likewise.
        k: how many negatives, >= 1.
        query_ids, corpus_ids: [N], [M] integers, likewise.
        positives: [P, 2] integers, (row of queries, row of corpus), likewise. None: those of equal id, or (i, i)
            without ids.
        skip_top: leave out that many of the best that pass all limits, which may be unlabelled positives.
        max_score: leave out greater scores.
        min_score: leave out smaller scores.
        margin_to_positive: leave out scores greater than p - margin_to_positive, p being the lowest score of the
            query's positives, so that a negative keeps the margin to each. (sentence-transformers compares with one
            positive at a time.) A query without a positive then has no negatives.
        relative_margin: leave out scores greater than p (1 - relative_margin), in [0, 1); it is meant for p > 0.
        sampling: "top": the k best. "random": k of the ``pool`` best, each as likely.
        pool: with "random", of how many; 10 k by default.
        seed: of "random". A query's draw depends on the seed, its row and its candidates only.
        metric: a :class:`~gssf_kernels.StructuredSimilarity`, which gives the scores.
        normalize: scores are cosines.
        block_rows, chunk_rows: how many queries, and rows of corpus, are in memory at a time; by default 64 MiB.
        checkpoint: a file to write every few seconds. The same call goes on from it after a crash. It is removed at the
            end. That of other inputs or settings is refused.
        progress: draw a bar on stderr, if tqdm is installed.
        device: where scores are computed; by default where the queries, or else the corpus, are.

    Returns:
        :class:`HardNegatives` ``(indices [N, k], scores [N, k], positive_scores [N], report)``; the report says how
        many queries have fewer than k negatives, and why. Limits and scores are fp32 (fp64 for fp64).

    Rows with NaN or Inf, or so large that scores could overflow, are left out and reported.

    Raises:
        FileNotFoundError, TypeError, ValueError: the argument, the file that is wrong, what was expected and what came.
        ``k + skip_top``, or ``pool + skip_top``, is at most 1024. There is no positive at all.

    Time: one N x M x D product; the corpus is read twice for each block of queries. Memory: a block, two chunks, the
    ids, the results and 40 bytes for each positive.
    """
    _checks.positive_int(k, "k")
    _checks.whole(skip_top, "skip_top", 0)
    _checks.whole(seed, "seed", 0)
    _checks.choice(sampling, "sampling", ("top", "random"))
    if pool is not None:
        if sampling == "top":
            raise ValueError(f'pool: expected None with sampling="top", got {pool!r}')
        _checks.whole(pool, "pool", k)
    pool_size = k if sampling == "top" else POOL * k if pool is None else pool
    if pool_size + skip_top > MOST:
        terms = {"top": "k + skip_top", "random": "pool + skip_top"}[sampling]
        default = f" (pool is {POOL} k by default)" if sampling == "random" and pool is None else ""
        raise ValueError(f"{terms}: expected at most {MOST}, got {pool_size + skip_top}{default}")
    limits = Limits(
        None if max_score is None else _checks.finite(max_score, "max_score"),
        None if margin_to_positive is None else _checks.finite(margin_to_positive, "margin_to_positive"),
        None if relative_margin is None else _checks.fraction(relative_margin, "relative_margin"),
    )
    if min_score is not None:
        min_score = _checks.finite(min_score, "min_score")
        if limits.max_score is not None and min_score > limits.max_score:
            raise ValueError(f"min_score: expected at most max_score {max_score}, got {min_score}")
    sweep = Sweep(
        (queries, corpus),
        ("queries", "corpus"),
        (query_ids, corpus_ids),
        ("query_ids", "corpus_ids"),
        k=pool_size + skip_top,
        metric=metric,
        normalize=normalize,
        block_rows=block_rows,
        chunk_rows=chunk_rows,
        device=device,
        function="mine_hard_negatives",
    )
    with sweep, torch.no_grad():
        choice = Choice(k, skip_top, pool_size, min_score, seed if sampling == "random" else None)
        mining = Mining(sweep, positives, limits, choice)
        settings = {"positives": mining.positives.cols, "positive_rows": mining.positives.rows}
        sweep.keep(checkpoint, progress, settings | limits._asdict() | choice._asdict(), "top_scores")
        mining.score_positives()
        mining.search()
        result = mining.result()
        sweep.finish()
        return result


class Limits(NamedTuple):
    """The greatest score of a negative."""

    max_score: float | None
    margin_to_positive: float | None
    relative_margin: float | None

    def of(self, positive_scores: Tensor) -> Tensor:
        """[3, N]: each limit of each query, inf without one; -inf for a margin to no positive."""
        p = torch.where(positive_scores.isnan(), -torch.inf, positive_scores)
        none = torch.full_like(p, torch.inf)
        score, margin, relative = self
        return torch.stack(
            (
                none if score is None else torch.full_like(p, score),
                none if margin is None else p - margin,
                none if relative is None else p * (1 - relative),
            )
        )

    @property
    def margins(self) -> bool:
        """Whether a query needs a positive."""
        return self.margin_to_positive is not None or self.relative_margin is not None


class Choice(NamedTuple):
    """Which of the candidates that score at most the limit, best first, are a query's negatives."""

    k: int
    skip_top: int
    pool: int  # how many of the best are looked at after skip_top
    min_score: float | None
    seed: int | None  # None: the k best

    def passing(self, values: Tensor, indices: Tensor) -> Tensor:
        """How many of the candidates [N, skip_top + pool] reach min_score [N]."""
        passes = indices >= 0
        if self.min_score is not None:
            passes &= values >= self.min_score
        return passes.sum(1)

    def places(self, passing: Tensor, first_row: int) -> Tensor:
        """[N, k] the chosen places, ascending; those that are not below ``passing`` are none."""
        places = torch.arange(self.skip_top, self.skip_top + self.pool, device=passing.device)
        if self.seed is None:
            return places.expand(passing.shape[0], -1)
        rows = torch.arange(first_row, first_row + passing.shape[0], device=passing.device)[:, None]
        keys = mixed(mixed(mixed(torch.full_like(rows, _signed(self.seed))) + rows) + places) >> 1
        keys = torch.where(places < passing[:, None], keys, torch.iinfo(torch.int64).max)
        return places[keys.argsort(dim=1, stable=True)[:, : self.k].sort(dim=1).values]


def mixed(x: Tensor) -> Tensor:
    """A random number of 64 bits for each of x: a step of SplitMix64, so that a draw depends on no order."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the lowest 64 bits of a number."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


class Mining:
    """The two passes: scores of positives, and the search under the limits that follow from them.

    state: of each query the lowest score of its positives, how many candidates score at most the limit, and how many of
    these reach min_score (up to skip_top + pool), its negatives; the best so far of the queries of a block; which rows
    are finite.
    """

    def __init__(self, sweep: Sweep, positives: Any, limits: Limits, choice: Choice) -> None:
        self.sweep, self.limits, self.choice = sweep, limits, choice
        n, m = sweep.shape
        by_id = sweep.query_ids is not None
        none = torch.empty(0, dtype=torch.int64, device=sweep.device)
        if positives is not None:
            self.positives = listed_positives(positives, sweep)
        elif by_id:
            self.positives = pairs_by_id(sweep)
        else:
            if m < n:
                raise ValueError(f"corpus: expected at least the {n} rows of queries (row i pairs with row i), got {m}")
            both = torch.arange(n, device=sweep.device)
            self.positives = Pairs(both, both, n)
        if self.positives.rows.shape[0] == 0:
            name = "positives" if positives is not None else "query_ids" if by_id else "queries"
            raise ValueError(f"{name}: expected at least one positive, got none among {n} queries and {m} corpus rows")
        # Those of equal id are left out by their ids.
        self.left_out = Pairs(none, none, n) if by_id and positives is None else self.positives
        block, looked_at = min(sweep.block_rows, n), choice.skip_top + choice.pool
        of_scores: dict[str, Any] = {"dtype": sweep.dtype, "device": sweep.device}
        self.state = {
            "positive_scores": torch.full((n,), torch.inf, **of_scores),
            "scores": torch.full((n, choice.k), -torch.inf, **of_scores),
            "negatives": torch.full((n, choice.k), -1, device=sweep.device),
            "values": torch.full((block, looked_at), -torch.inf, **of_scores),
            "indices": torch.full((block, looked_at), -1, device=sweep.device),
            "below_limit": torch.zeros(n, dtype=torch.int64, device=sweep.device),
            "passing": torch.zeros(n, dtype=torch.int64, device=sweep.device),
            "usable_queries": torch.ones(n, dtype=torch.bool, device=sweep.device),
            "usable_corpus": torch.ones(m, dtype=torch.bool, device=sweep.device),
        }

    def score_positives(self) -> None:
        """The lowest score of each query's positives; those of rows that are not finite are none."""
        state = self.state
        for rows, a, cols, b in self.sweep.units(0, state, "positives", needs=self.positives):
            _, pair_rows, pair_cols = self.positives.within(rows, cols)
            scores = swept_scores(a, b, pair_rows, pair_cols)
            scores = torch.where(usable(a)[pair_rows] & usable(b)[pair_cols], scores, torch.inf)
            state["positive_scores"][rows].scatter_reduce_(0, pair_rows, scores, "amin")

    def search(self) -> None:
        """The negatives of each query."""
        state, sweep, m = self.state, self.sweep, self.sweep.shape[1]
        for rows, a, cols, b in sweep.units(1, state, "negatives"):
            block = {name: state[name][: rows.stop - rows.start] for name in ("values", "indices")}
            if cols.start == 0:
                block["values"].fill_(-torch.inf)
                block["indices"].fill_(-1)
                state["usable_queries"][rows] = usable(a)
            if rows.start == 0:
                state["usable_corpus"][cols] = usable(b)
            query_usable = state["usable_queries"][rows]
            limit = self.limit(rows).amin(0)
            if not bool(query_usable.all()):
                a = torch.where(query_usable[:, None], a, 0)
                limit = torch.where(query_usable, limit, -torch.inf)
            row_limit = None if bool((limit == torch.inf).all()) else limit
            looked_at = self.choice.skip_top + self.choice.pool
            usable_cols = state["usable_corpus"][cols]
            best = top_of_chunk(sweep, rows, a, cols, b, looked_at, row_limit, self.left_out, usable_cols)
            keep_best(block, slice(None), *best)
            if cols.stop == m:
                self.choose(rows, **block)

    def limit(self, rows: slice) -> Tensor:
        """[3, rows] the limits of queries."""
        p = self.state["positive_scores"][rows]
        return self.limits.of(torch.where(p == torch.inf, torch.nan, p))

    def choose(self, rows: slice, values: Tensor, indices: Tensor) -> None:
        """The negatives of the queries of a block, of their best candidates."""
        passing = self.choice.passing(values, indices)
        places = self.choice.places(passing, rows.start)
        chosen = places < passing[:, None]
        state = self.state
        state["scores"][rows] = torch.where(chosen, values.gather(1, places), -torch.inf)
        state["negatives"][rows] = torch.where(chosen, indices.gather(1, places), -1)
        state["passing"][rows], state["below_limit"][rows] = passing, (indices >= 0).sum(1)

    def result(self) -> HardNegatives:
        p = self.state["positive_scores"]
        positive_scores = torch.where(p == torch.inf, torch.nan, p)
        return HardNegatives(self.state["negatives"], self.state["scores"], positive_scores, self.report())

    def candidates(self) -> Tensor:
        """How many finite rows of the corpus are no positive of each query and not of its id [N]."""
        sweep, usable_corpus = self.sweep, self.state["usable_corpus"]
        rows, cols = self.positives.rows, self.positives.cols
        ids, other_ids = sweep.query_ids, sweep.candidate_ids
        listed = usable_corpus[cols]
        left_out = torch.zeros(sweep.shape[0], dtype=torch.int64, device=sweep.device)
        if ids is not None and other_ids is not None:
            ordered = other_ids[usable_corpus].sort().values
            left_out += torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
            listed = listed & (ids[rows] != other_ids[cols])
        return int(usable_corpus.sum()) - left_out - torch.bincount(rows[listed], minlength=sweep.shape[0])

    def report(self) -> MiningReport:
        """Each query with fewer than k negatives counts for the first step that left fewer than k."""
        state, k = self.state, self.choice.k
        count = (state["negatives"] >= 0).sum(1)
        tightest = self.limit(slice(None)).argmin(0)  # of equal limits the first
        steps = {
            "not_finite": ~state["usable_queries"],
            "no_positive": (state["positive_scores"] == torch.inf) & self.limits.margins,
            "few_candidates": self.candidates() < k,
        }
        steps |= {name: (state["below_limit"] < k) & (tightest == place) for place, name in enumerate(LIMITS)}
        steps |= {"min_score": state["passing"] < k, "skip_top": count < k}
        rest, fewer = count < k, {}
        for reason, step in steps.items():
            if number := int((rest & step).sum()):
                fewer[reason] = number
            rest = rest & ~step
        return MiningReport(
            queries=count.shape[0],
            k=k,
            complete=int((count == k).sum()),
            missing=int((k - count).sum()),
            fewer=fewer,
            query_rows_not_finite=int((~state["usable_queries"]).sum()),
            corpus_rows_not_finite=int((~state["usable_corpus"]).sum()),
        )


def listed_positives(positives: Any, sweep: Sweep) -> Pairs:
    """[P, 2] as pairs sorted by row and column, each once."""
    n, m = sweep.shape
    with open_rows(positives, "positives", "pairs") as listed:
        pairs = listed.read(0, len(listed)).to(sweep.device, torch.int64)
    rows, cols = pairs.unbind(1)
    outside = ((rows < 0) | (rows >= n) | (cols < 0) | (cols >= m)).nonzero()
    if outside.shape[0]:
        place = int(outside[0])
        raise ValueError(
            f"positives: expected (row of queries, row of corpus) within 0..{n - 1} and 0..{m - 1}, got "
            f"({int(rows[place])}, {int(cols[place])}) at place {place}"
        )
    keys = (rows * m + cols).unique()
    return Pairs(keys // max(m, 1), keys % max(m, 1), n)


def usable(t: Tensor) -> Tensor:
    """Which rows are finite, and small enough that no sum of products of two of them overflows [N]."""
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(t, dim=1, dtype=dtype) < torch.finfo(dtype).max ** 0.5 / 2


__all__ = ["HardNegatives", "MiningReport", "mine_hard_negatives"]
