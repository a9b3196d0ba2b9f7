"""Hard negatives against loops over single scores in fp64: limits, ties, borders of chunks, and what the report says.

Embeddings are small integers and margins multiples of 1/4, so that every score and limit is exact.
"""

import collections
import itertools
import math

import numpy as np
import pytest
import torch

import gssf_kernels as gk
from gssf_kernels.retrieval import checkpoint, mining, streaming

N, M, D = 17, 61, 3
KS = (1, 6, 40, 58)
SIZES = ((None, None), (5, 7), (17, 1), (1, 61))  # rows of a block and of a chunk


@pytest.fixture(autouse=True)
def _no_warning_of_norms(monkeypatch):
    monkeypatch.setattr("gssf_kernels._checks._MEASURED", {"mine_hard_negatives"})


def problem(bad_rows=False):
    """Queries and corpus with many ties; with bad_rows a NaN, infinities and a row that could overflow."""
    q, c = torch.randint(-2, 4, (N, D)).float(), torch.randint(-2, 4, (M, D)).float()
    if bad_rows:
        q[4, 1], c[3, 0], c[20, 2], c[60, 1] = torch.nan, torch.inf, torch.nan, 3e38
    return q, c


def finite(rows):
    return [all(abs(float(v)) < 1e18 for v in row) for row in rows]


class Loops:
    """The definition, query by query."""

    def __init__(self, q, c, positives, same_id=lambda i, j: False):
        self.ok_q, self.ok_c = finite(q), finite(c)
        self.s = [[sum(float(x) * float(y) for x, y in zip(u, v, strict=True)) for v in c] for u in q]
        self.positives, self.same_id = positives, same_id

    def lowest_positive(self, i):
        scores = [self.s[i][j] for a, j in self.positives if a == i and self.ok_q[i] and self.ok_c[j]]
        return min(scores, default=None)

    def negatives(self, i, k, *, skip_top=0, max_score=None, min_score=None, margin=None, relative=None):
        """([(score, candidate) ...] that pass, best first and without the first, the reason why they are fewer)."""
        if not self.ok_q[i]:
            return [], "not_finite"
        p = self.lowest_positive(i)
        left = [(self.s[i][j], j) for j in range(len(self.ok_c)) if self.ok_c[j]]
        left = [(s, j) for s, j in left if (i, j) not in self.positives and not self.same_id(i, j)]
        left.sort(key=lambda t: (-t[0], t[1]))
        reason = None if len(left) >= k else "few_candidates"
        if p is None and (margin is not None or relative is not None):
            return [], "no_positive"
        limits = [("max_score", max_score)]
        limits += [("margin_to_positive", None if margin is None else p - margin)]
        limits += [("relative_margin", None if relative is None else p * (1 - relative))]
        limits = [(limit, place, name) for place, (name, limit) in enumerate(limits) if limit is not None]
        if limits:
            limit, _, name = min(limits)
            left = [(s, j) for s, j in left if s <= limit]
            reason = reason or (name if len(left) < k else None)
        if min_score is not None:
            left = [(s, j) for s, j in left if s >= min_score]
            reason = reason or ("min_score" if len(left) < k else None)
        left = left[skip_top:]
        return left, reason or ("skip_top" if len(left) < k else None)


ARGUMENTS = {"margin_to_positive": "margin", "relative_margin": "relative"}
SETTINGS = [
    {},
    {"skip_top": 3},
    {"max_score": 2.0},
    {"min_score": 3.0},
    {"margin_to_positive": 1.0},
    {"relative_margin": 0.25},
    {"max_score": 4.0, "margin_to_positive": 2.0, "relative_margin": 0.5, "min_score": -1.0, "skip_top": 2},
]


def pairings():
    """(arguments, positives, whether a query and a candidate have one id) of every way to say which are positives."""
    query_ids, corpus_ids = torch.arange(N) % 9, torch.arange(M) % 13
    listed = [(i, (7 * i + t) % M) for i in range(0, N, 2) for t in range(i % 4 + 1)]
    by_id = {(i, j) for i in range(N) for j in range(M) if i % 9 == j % 13}
    ids = {"query_ids": query_ids, "corpus_ids": corpus_ids}
    return {
        "row i and row i": ({}, {(i, i) for i in range(N)}, lambda i, j: False),
        "ids": (ids, by_id, lambda i, j: False),
        "listed": ({"positives": torch.tensor(listed + listed[:3])}, set(listed), lambda i, j: False),
        "listed and ids": ({"positives": np.array(listed, np.int32)} | ids, set(listed), lambda i, j: i % 9 == j % 13),
    }


def expected_of(loops, k, settings):
    options = {ARGUMENTS.get(name, name): value for name, value in settings.items()}
    rows, reasons = [], collections.Counter()
    for i in range(N):
        left, reason = loops.negatives(i, k, **options)
        rows.append(left)
        if len(left) < k:
            reasons[reason] += 1
    return rows, reasons


def padded(rows, k):
    rows = [row[:k] + [(-math.inf, -1)] * (k - len(row)) for row in rows]
    return [[j for _, j in row] for row in rows], [[s for s, _ in row] for row in rows]


@pytest.mark.parametrize("bad_rows", [False, True], ids=["finite", "rows that are not finite"])
@pytest.mark.parametrize("pairing", pairings())
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ", ".join(s) or "no limit")
def test_negatives_and_report(settings, pairing, bad_rows):
    arguments, positives, same_id = pairings()[pairing]
    q, c = problem(bad_rows)
    loops = Loops(q, c, positives, same_id)
    for k, (block_rows, chunk_rows) in zip(KS, SIZES, strict=True):
        rows, reasons = expected_of(loops, k, settings)
        sizes = {"block_rows": block_rows, "chunk_rows": chunk_rows}
        result = gk.mine_hard_negatives(q, c, k=k, **arguments, **settings, **sizes)
        indices, scores = padded(rows, k)
        assert result.indices.tolist() == indices
        assert result.scores.tolist() == scores
        lowest = [math.nan if (p := loops.lowest_positive(i)) is None else p for i in range(N)]
        np.testing.assert_array_equal(result.positive_scores.numpy(), lowest)
        report = result.report
        assert report.fewer == dict(reasons)
        assert report.complete + sum(report.fewer.values()) == report.queries == N
        assert report.missing == sum(row.count(-1) for row in indices)
        bad = loops.ok_q.count(False), loops.ok_c.count(False)
        assert (report.query_rows_not_finite, report.corpus_rows_not_finite) == bad


def test_every_reason_occurs():
    """In the cases of `test_negatives_and_report`, so that each reason is tested."""
    seen = set()
    for settings, (_, positives, same_id), bad in itertools.product(SETTINGS, pairings().values(), (False, True)):
        torch.manual_seed(0)
        loops = Loops(*problem(bad), positives, same_id)
        for k in KS:
            seen |= expected_of(loops, k, settings)[1].keys()
    assert seen == mining.REASONS.keys()


def test_a_listed_positive_of_equal_id_is_left_out_once():
    """Four candidates remain, enough for k; it is max_score that leaves fewer."""
    q, c = torch.ones(1, 1), torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]])
    ids = {"query_ids": torch.tensor([7]), "corpus_ids": torch.tensor([7, 1, 2, 3, 4])}
    result = gk.mine_hard_negatives(q, c, k=4, positives=torch.tensor([[0, 0]]), max_score=3.0, **ids)
    assert result.indices.tolist() == [[2, 3, 4, -1]]
    assert result.report.fewer == {"max_score": 1}


def test_more_positives_than_can_be_asked_for_in_addition(monkeypatch):
    """The corpus is halved until k and the positives of a row fit into the most scores of a search."""
    monkeypatch.setattr(streaming, "MOST", 9)
    q, c = problem()
    listed = [(i, j) for i in range(0, N, 3) for j in range(M) if (i + j) % 3]
    rows, _ = expected_of(Loops(q, c, set(listed)), 7, {})
    result = gk.mine_hard_negatives(q, c, k=7, positives=torch.tensor(listed))
    assert (result.indices.tolist(), result.scores.tolist()) == padded(rows, 7)


def test_what_sentence_transformers_loses():
    """Its candidates are the best 10 k + 1 before the limit: here all of those score too high, and k others do not."""
    q = torch.ones(1, 1)
    c = torch.cat((torch.tensor([[5.0]]), torch.full((200, 1), 4.5), torch.full((3, 1), 2.0), torch.full((9, 1), 1.0)))
    result = gk.mine_hard_negatives(q, c, k=4, margin_to_positive=1.0)
    assert result.indices.tolist() == [[201, 202, 203, 204]]
    assert result.report.fewer == {}


def test_random_draws_are_of_the_pool_and_each_as_likely():
    q, c = problem()
    q = q[:1].repeat(4000, 1)  # 4,000 queries that are equal, each with another draw
    positives = torch.tensor([[0, 0]])
    rows, _ = Loops(q[:1], c, {(0, 0)}).negatives(0, 3, skip_top=2, max_score=8.0)
    pool = [j for _, j in rows[:12]]
    result = gk.mine_hard_negatives(
        q, c, k=3, positives=positives, sampling="random", pool=12, skip_top=2, max_score=8.0, seed=5
    )
    drawn = result.indices[1:]  # of query 0, row 0 is a positive
    first = [j for _, j in Loops(q[:1], c, set()).negatives(0, 3, skip_top=2, max_score=8.0)[0][:12]]
    assert set(drawn.flatten().tolist()) == set(first)
    assert set(result.indices[0].tolist()) <= set(pool)
    places = torch.tensor([[first.index(j) for j in row] for row in drawn.tolist()])
    assert bool((places.diff(dim=1) > 0).all()), "each drawn once, best first"
    counts = places.flatten().bincount(minlength=12)
    assert bool(((counts - 1000).abs() < 150).all()), counts  # 3 of 12, 4,000 times; 150 is five deviations


def test_random_draws_depend_on_the_seed_and_not_on_chunks():
    q, c = problem(True)
    draws = {}
    for seed in (0, 1, 2**63 + 1):
        options = {"k": 3, "sampling": "random", "seed": seed, "min_score": 0.0}
        first = gk.mine_hard_negatives(q, c, **options)
        for block_rows, chunk_rows in SIZES[1:]:
            again = gk.mine_hard_negatives(q, c, block_rows=block_rows, chunk_rows=chunk_rows, **options)
            assert torch.equal(again.indices, first.indices)
            assert torch.equal(again.scores, first.scores)
        draws[seed] = first.indices
    assert not any(torch.equal(*pair) for pair in itertools.combinations(draws.values(), 2))


def test_random_of_fewer_than_k_gives_them_all():
    q, c = problem()
    rows, reasons = expected_of(Loops(q, c, {(i, i) for i in range(N)}), 5, {"max_score": -1.0, "min_score": -3.0})
    result = gk.mine_hard_negatives(q, c, k=5, sampling="random", pool=5, max_score=-1.0, min_score=-3.0)
    assert (result.indices.tolist(), result.scores.tolist()) == padded([row[:5] for row in rows], 5)
    assert result.report.fewer == dict(reasons)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    q, c = problem()
    expected = gk.mine_hard_negatives(q, c, k=4, margin_to_positive=1.0)
    result = gk.mine_hard_negatives(q.to(dtype), c.to(dtype), k=4, margin_to_positive=1.0)
    assert result.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(result.indices, expected.indices)


def test_cosines_and_a_metric():
    q, c = torch.randn(N, 8), torch.randn(M, 8)
    metric = gk.StructuredSimilarity(8, block_size=2, normalize=True)
    torch.nn.init.normal_(metric.blocks, std=0.1)
    unit = torch.nn.functional.normalize
    same = torch.eye(N, M, dtype=torch.bool)
    for options, s in (
        ({"normalize": True}, unit(q.double()) @ unit(c.double()).T),
        ({"metric": metric}, metric.double()(q.double(), c.double()).detach()),
    ):
        values, indices = (
            s.masked_fill(same, -torch.inf).masked_fill(s > s.diagonal()[:, None] - 0.1, -torch.inf).topk(4)
        )
        metric.float()
        result = gk.mine_hard_negatives(q, c, k=4, margin_to_positive=0.1, chunk_rows=9, **options)
        assert torch.equal(result.indices, indices.masked_fill(values == -torch.inf, -1))
        torch.testing.assert_close(result.scores.double(), values, rtol=0, atol=1e-6)
        torch.testing.assert_close(result.positive_scores.double(), s.diagonal(), rtol=0, atol=1e-6)


def test_a_run_goes_on_from_every_checkpoint(tmp_path, monkeypatch):
    """Positives are scored in 2 chunks of 4, negatives searched in all of them, by both blocks of queries."""
    q, c = problem(True)
    np.save(tmp_path / "q.npy", q.numpy())
    np.save(tmp_path / "c.npy", c.numpy())
    state = tmp_path / "state"
    step, units, stop = checkpoint.Checkpoint.step, [0], [0]
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0)

    def counted(self, *arguments):
        step(self, *arguments)
        units[0] += 1
        if units[0] == stop[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "step", counted)

    def run(stop_after):
        units[0], stop[0] = 0, stop_after
        sizes = {"block_rows": 10, "chunk_rows": 16, "checkpoint": state}
        return gk.mine_hard_negatives(
            tmp_path / "q.npy", tmp_path / "c.npy", k=3, min_score=-2.0, relative_margin=0.25, **sizes
        )

    expected = run(0)
    total = units[0]
    assert total == 3 + 2 * 4
    for stopped in range(1, total + 1):
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
        result = run(0)
        assert stopped + units[0] == total
        assert not state.exists()
        for one, other in zip(result, expected, strict=True):
            assert one == other if one is result.report else torch.equal(one.nan_to_num(9), other.nan_to_num(9))
    with pytest.raises(KeyboardInterrupt):
        run(3)
    with pytest.raises(ValueError, match="got one with another positives in "):
        gk.mine_hard_negatives(
            tmp_path / "q.npy",
            tmp_path / "c.npy",
            k=3,
            min_score=-2.0,
            relative_margin=0.25,
            block_rows=10,
            chunk_rows=16,
            checkpoint=state,
            positives=torch.tensor([[0, 1]]),
        )


def test_the_report_reads_well():
    report = gk.MiningReport(12000, 30, 11990, 157, {"no_positive": 4, "max_score": 6}, 0, 2)
    assert str(report).splitlines() == [
        "11,990 of 12,000 queries have 30 negatives, 10 have fewer (157 negatives are missing):",
        "  4: no positive to keep a margin to",
        "  6: greater than max_score",
        "rows that are not finite, left out: 0 of queries, 2 of corpus",
    ]
    assert str(gk.MiningReport(3, 2, 3, 0)) == "3 of 3 queries have 2 negatives"


Q, C = torch.eye(3), torch.eye(5, 3)
BAD = [
    ({"k": 0}, ValueError, "k: expected a whole number >= 1, got 0"),
    ({"k": 2.0}, TypeError, "k: expected a whole number >= 1, got float"),
    ({"k": 1025}, ValueError, "k + skip_top: expected at most 1024, got 1025"),
    ({"k": 1000, "skip_top": 30}, ValueError, "k + skip_top: expected at most 1024, got 1030"),
    (
        {"k": 103, "sampling": "random"},
        ValueError,
        "pool + skip_top: expected at most 1024, got 1030 (pool is 10 k by default)",
    ),
    (
        {"k": 9, "sampling": "random", "pool": 1020, "skip_top": 5},
        ValueError,
        "pool + skip_top: expected at most 1024, got",
    ),
    ({"k": 9, "sampling": "random", "pool": 8}, ValueError, "pool: expected a whole number >= 9, got 8"),
    ({"pool": 8}, ValueError, 'pool: expected None with sampling="top", got 8'),
    ({"skip_top": -1}, ValueError, "skip_top: expected a whole number >= 0, got -1"),
    ({"sampling": "best"}, ValueError, "sampling: expected one of 'top', 'random', got 'best'"),
    ({"seed": -1}, ValueError, "seed: expected a whole number >= 0, got -1"),
    ({"max_score": math.nan}, ValueError, "max_score: expected a finite number, got nan"),
    ({"min_score": "0"}, TypeError, "min_score: expected a number, got str"),
    ({"min_score": 2.0, "max_score": 1.0}, ValueError, "min_score: expected at most max_score 1.0, got 2.0"),
    ({"margin_to_positive": math.inf}, ValueError, "margin_to_positive: expected a finite number, got inf"),
    ({"relative_margin": 1.0}, ValueError, "relative_margin: expected a number in [0, 1), got 1.0"),
    ({"corpus": C[:2]}, ValueError, "corpus: expected at least the 3 rows of queries (row i pairs with row i), got 2"),
    ({"corpus": C.half()}, TypeError, "corpus: expected torch.float32 as in queries, got torch.float16"),
    ({"corpus": C.long()}, TypeError, "corpus: expected a float dtype, got torch.int64"),
    (
        {"positives": torch.zeros(0, 2, dtype=torch.int64)},
        ValueError,
        "positives: expected at least one positive, got none",
    ),
    (
        {"positives": torch.tensor([[0, 0], [1, 5]])},
        ValueError,
        "positives: expected (row of queries, row of corpus) within",
    ),
    ({"positives": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, "positives: expected shape [P, 2], got [4, 3]"),
    ({"positives": torch.zeros(4, 2)}, TypeError, "positives: expected an integer dtype, got torch.float32"),
    (
        {"query_ids": torch.arange(3)},
        ValueError,
        "corpus_ids: expected ids too, because queries and corpus have 3 and 5",
    ),
    (
        {"query_ids": torch.arange(3), "corpus_ids": torch.arange(4)},
        ValueError,
        "corpus_ids: expected 5 ids, one for each row of corpus, got 4 in a tensor",
    ),
    (
        {"query_ids": torch.arange(3), "corpus_ids": torch.arange(5) + 9},
        ValueError,
        "query_ids: expected at least one positive, got none among 3 queries and 5 corpus rows",
    ),
    ({"queries": Q[:0]}, ValueError, "queries: expected at least one positive, got none among 0 queries"),
    ({"normalize": 1}, TypeError, "normalize: expected True or False, got int"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind) as error:
        gk.mine_hard_negatives(**({"queries": Q, "corpus": C, "k": 1} | arguments))
    assert str(error.value).startswith(message)
