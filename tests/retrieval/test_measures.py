"""Measures from ranks, against figures worked out by hand; their means, folds and table."""

import math
import re

import pytest
import retrieval_loops
import torch

from gssf_kernels.reference import RankSegments
from gssf_kernels.retrieval.measures import (
    RetrievalResult,
    joined,
    mean_over_folds,
    means,
    measures_of,
    of_queries,
    result_of,
)

LOG3, LOG4, LOG5 = (math.log2(t) for t in (3, 4, 5))


def segments(pessimistic, optimistic=None):
    """Of the ranks of each query's positives."""
    counts = torch.tensor([0, *map(len, pessimistic)])
    flat = torch.tensor([rank for ranks in pessimistic for rank in ranks], dtype=torch.int64)
    other = flat if optimistic is None else torch.tensor([rank for ranks in optimistic for rank in ranks])
    return RankSegments(counts.cumsum(0), torch.zeros_like(flat), flat, other)


# Four queries with ranks 3 and 1; none; 4; 2, 6 and 5. Those of optimistic ranks: 2 and 1; none; 1; 2, 4 and 3.
HAND = segments([[3, 1], [], [4], [2, 6, 5]], [[2, 1], [], [1], [2, 4, 3]])
EXPECTED = {
    "recall@1": 1 / 3,
    "recall@3": 2 / 3,
    "median_rank": 2,
    "mean_rank": 7 / 3,
    "mrr": (1 + 1 / 4 + 1 / 2) / 3,
    "map": ((1 + 2 / 3) / 2 + 1 / 4 + (1 / 2 + 2 / 5 + 3 / 6) / 3) / 3,
    "r_precision": (1 / 2 + 0 + 1 / 3) / 3,
    "ndcg@1": (1 + 0 + 0) / 3,
    "ndcg@3": ((1 + 1 / LOG4) / (1 + 1 / LOG3) + 0 + (1 / LOG3) / (1 + 1 / LOG3 + 1 / LOG4)) / 3,
    "optimistic.recall@1": 2 / 3,
    "optimistic.recall@3": 1,
    "optimistic.median_rank": 1,
    "optimistic.mean_rank": 4 / 3,
    "optimistic.mrr": (1 + 1 + 1 / 2) / 3,
    "optimistic.map": (1 + 1 + (1 / 2 + 2 / 3 + 3 / 4) / 3) / 3,
    "optimistic.r_precision": (1 + 1 + 2 / 3) / 3,
    "optimistic.ndcg@1": (1 + 1 + 0) / 3,
    "optimistic.ndcg@3": (1 + 1 + (1 / LOG3 + 1 / LOG4) / (1 + 1 / LOG3 + 1 / LOG4)) / 3,
    "queries": 4,
    "without_positive": 1,
}


def test_by_hand():
    got = measures_of(HAND, (1, 3))
    assert got == pytest.approx(EXPECTED, rel=1e-14)
    assert {name: type(value) for name, value in got.items()} == {
        name: int if name in ("queries", "without_positive") else float for name in EXPECTED
    }


def test_the_loops_that_other_tests_compare_with_by_hand():
    """Scores that give the first, second and fourth query of HAND, and the pessimistic ranks of a tie."""
    s = torch.tensor([[5.0, 9, 7, 1, 0, 0], [0, 0, 0, 0, 0, 0], [8, 9, 3, 1, 6, 2], [8, 9, 2, 1, 3, 7]]).numpy()
    positive = torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6, [0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0]]).bool().numpy()
    assert [retrieval_loops.sorted_ranks(s[i], positive[i], positive[i] | True, False) for i in (0, 3)] == [
        [1, 3],
        [2, 5, 6],
    ]
    tied, one = torch.tensor([4.0, 4, 4, 9]).numpy(), torch.tensor([0, 1, 0, 0]).bool().numpy()
    assert [retrieval_loops.sorted_ranks(tied, one, one | True, tie) for tie in (False, True)] == [[4], [2]]


def test_median_of_an_even_count_is_the_lower():
    assert measures_of(segments([[7], [2], [3], [9]]), (1,))["median_rank"] == 3


def test_ndcg_at_more_than_there_are_positives_and_ranks():
    got = measures_of(segments([[2, 5]]), (1, 10**12))
    assert got[f"ndcg@{10**12}"] == pytest.approx((1 / LOG3 + 1 / math.log2(6)) / (1 + 1 / LOG3), rel=1e-14)
    assert measures_of(segments([[1, 4]]), (4,))["ndcg@4"] == pytest.approx((1 + 1 / LOG5) / (1 + 1 / LOG3), rel=1e-14)


def test_no_query_with_a_positive():
    with pytest.raises(ValueError, match="queries: expected at least one with a positive, got none"):
        measures_of(segments([[], []]), (1,))


def test_chunks_of_queries_give_the_same_bits():
    torch.manual_seed(1)
    ranks = [(torch.randperm(40)[: int(count)] + 1).tolist() for count in torch.randint(0, 6, (101,))]
    whole = measures_of(segments(ranks), (1, 5, 10))
    parts = [of_queries(segments(ranks[first : first + 7]), (1, 5, 10)) for first in range(0, 101, 7)]
    assert means(joined(parts), (1, 5, 10)) == whole
    assert measures_of(segments(ranks[::-1]), (1, 5, 10)) == whole


def result(ranks, ks=(1, 5, 10), nan_scores=0):
    return result_of({"x_to_y": of_queries(segments(ranks), ks), "y_to_x": of_queries(HAND, ks)}, ks, nan_scores)


def test_result_is_a_mapping_with_rsum_and_best_ranks():
    got = result([[1], [6], [], [11]], nan_scores=3)
    assert got["rsum"] == pytest.approx(100 * ((1 + 1 + 2) / 3 + (1 + 3 + 3) / 3))
    assert got["optimistic.rsum"] == pytest.approx(100 * ((1 + 1 + 2) / 3 + (2 + 3 + 3) / 3))
    assert got["nan_scores"] == 3
    assert got["folds"] == 1
    assert got["y_to_x.map"] == measures_of(HAND, (1,))["map"]
    assert dict(got) == got.to_dict()
    assert got.best_ranks["x_to_y"].tolist() == [[1, 6, 0, 11]] * 2
    assert got.best_ranks["y_to_x"].tolist() == [[1, 0, 4, 2], [1, 0, 1, 2]]
    assert "rsum" not in result([[1]], (1, 5))


def test_means_over_folds_and_added_counts():
    got = mean_over_folds([result([[1], [], [7]]), result([[3]], nan_scores=4)])
    assert got["x_to_y.recall@1"] == 1 / 4
    assert got["x_to_y.mean_rank"] == (4 + 3) / 2
    assert got["x_to_y.median_rank"] == (1 + 3) / 2
    assert [got[f"x_to_y.{name}"] for name in ("queries", "without_positive")] == [4, 1]
    assert (got["nan_scores"], got["folds"]) == (4, 2)
    assert got["rsum"] == pytest.approx(100 * ((1 / 2 + 1 / 2 + 1 + 0 + 1 + 1) / 2 + 7 / 3))
    assert got.best_ranks["x_to_y"].tolist() == [[1, 0, 7, 3]] * 2
    assert type(got["x_to_y.queries"]) is int


def cells(text):
    return {row[0]: row[1:] for row in (re.split(r"\s{2,}", line) for line in text.splitlines())}


def test_table():
    text = str(result([[1], [6], [], [11]], nan_scores=1234))
    rows = cells(text)
    assert rows[""] == ["x → y", "y → x", "x → y, optimistic", "y → x, optimistic"]
    assert rows["R@1, %"] == ["33.33", "33.33", "33.33", "66.67"]
    assert rows["R@5, %"] == ["33.33", "100.00", "33.33", "100.00"]
    assert rows["median rank"] == ["6", "2", "6", "1"]
    assert rows["mean rank"] == ["6.00", "2.33", "6.00", "1.33"]
    assert rows["mAP"] == ["0.4192", f"{EXPECTED['map']:.4f}", "0.4192", f"{EXPECTED['optimistic.map']:.4f}"]
    assert rows["queries"] == ["4", "4"]
    assert rows["without a positive"] == ["1", "1"]
    assert "RSUM 366.67 (optimistic 400.00)" in text
    assert "1,234 scores are NaN, and count as mistakes" in text
    assert len({len(line) for line in text.splitlines()[:12]}) == 1


def test_table_without_ties_names_two_directions_once():
    ks = (1, 5, 10)
    got = result_of({way: of_queries(segments([[2]]), ks) for way in ("x_to_y", "y_to_x")}, ks, 0)
    assert cells(got.table("image", "caption"))[""] == ["image → caption", "caption → image"]
    assert "optimistic" not in str(got)
    assert "folds" not in str(got)
    assert "NaN" not in str(got)
    assert "means over 2 folds" in str(mean_over_folds([got, got]))
    assert isinstance(got, RetrievalResult)
