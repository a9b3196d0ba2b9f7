"""Measures of retrieval written out: one query at a time, its candidates sorted, in Python's floats."""

import math

import numpy as np


def sorted_ranks(scores, positive, candidate, optimistic):
    """1-based ranks of the positives in one row of scores: candidates sorted, ties with positives last or first.

    A NaN never helps: as a negative's score it is the highest, as a positive's the lowest.
    """
    keys = []
    for j in np.flatnonzero(candidate):
        score = float(scores[j])
        if math.isnan(score):
            score = -math.inf if positive[j] else math.inf
        keys.append((-score, positive[j] != optimistic, j))
    keys.sort()
    return [rank for rank, (_, _, j) in enumerate(keys, 1) if positive[j]]


def measures(s, positive, ks, candidate=None, optimistic=False):
    """The measures of the rows of s [Q, C], and the number of queries without a positive."""
    candidate = np.ones_like(positive) if candidate is None else candidate
    of_queries = [sorted_ranks(*row, optimistic) for row in zip(s, positive & candidate, candidate, strict=True)]
    queries = [ranks for ranks in of_queries if ranks]
    best = sorted(ranks[0] for ranks in queries)
    result = {f"recall@{k}": sum(rank <= k for rank in best) / len(best) for k in ks}
    result["median_rank"] = best[(len(best) - 1) // 2]
    result["mean_rank"] = sum(best) / len(best)
    result["mrr"] = sum(1 / rank for rank in best) / len(best)
    result["map"] = sum(sum(p / r for p, r in enumerate(ranks, 1)) / len(ranks) for ranks in queries) / len(queries)
    result["r_precision"] = sum(sum(r <= len(ranks) for r in ranks) / len(ranks) for ranks in queries) / len(queries)
    for k in ks:
        gains = [sum(1 / math.log2(1 + r) for r in ranks if r <= k) for ranks in queries]
        ideals = [sum(1 / math.log2(1 + p) for p in range(1, min(k, len(ranks)) + 1)) for ranks in queries]
        result[f"ndcg@{k}"] = sum(gain / ideal for gain, ideal in zip(gains, ideals, strict=True)) / len(queries)
    return result | {"queries": len(of_queries), "without_positive": len(of_queries) - len(queries)}


def both_ties(s, positive, ks, candidate=None):
    """`measures` of pessimistic ranks, and of optimistic ones with the prefix that `evaluate` gives them."""
    pessimistic, optimistic = (measures(s, positive, ks, candidate, tie) for tie in (False, True))
    counts = ("queries", "without_positive")
    return pessimistic | {f"optimistic.{name}": v for name, v in optimistic.items() if name not in counts}


def evaluation(s, positive, ks, candidate=None):
    """What `evaluate` gives of scores s [N, M], but for `nan_scores` and `folds`."""
    result = {}
    ways = {
        "x_to_y": both_ties(s, positive, ks, candidate),
        "y_to_x": both_ties(s.T, positive.T, ks, None if candidate is None else candidate.T),
    }
    for way, values in ways.items():
        result |= {f"{way}.{name}": value for name, value in values.items()}
    if {1, 5, 10} <= set(ks):
        for tie in ("", "optimistic."):
            result[f"{tie}rsum"] = 100 * sum(values[f"{tie}recall@{k}"] for values in ways.values() for k in (1, 5, 10))
    return result
