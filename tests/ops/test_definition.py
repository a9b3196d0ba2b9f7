"""The reference itself against the formulas, written out as loops over single numbers in fp64.

These loops share nothing with the package: sign, mask, margin or direction wrong in the reference (and so
everywhere) shows here.
"""

import math

import pytest
import torch
from cases import IDS, randn

import gssf_kernels as gk


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dot(u, v):
    return math.fsum(p * q for p, q in zip(u, v, strict=True))


def negatives(s, i, j, a_ids, b_ids):
    return i != j and (a_ids is None or a_ids[i] != b_ids[j])


def loop_triplet(x, y, margin, which, x_ids, y_ids):
    """Σ_i [m + n_i − s_ii]₊ + Σ_j [m + n'_j − s_jj]₊, one anchor at a time; per pair."""
    n, m = len(x), len(y)
    s = [[dot(x[i], y[j]) for j in range(m)] for i in range(n)]

    def anchor(candidates, positive):
        if not candidates:
            return 0.0
        if which == "all":
            return math.fsum(max(0.0, margin + c - positive) for c in candidates)
        hardest = max(candidates)
        if which == "semihard":
            hardest = max((c for c in candidates if c < positive), default=hardest)
        return max(0.0, margin + hardest - positive)

    per_pair = []
    for k in range(n):
        row = [s[k][j] for j in range(m) if negatives(s, k, j, x_ids, y_ids)]
        col = [s[i][k] for i in range(n) if negatives(s, i, k, x_ids, y_ids)]
        per_pair.append(anchor(row, s[k][k]) + anchor(col, s[k][k]))
    return per_pair


@pytest.mark.parametrize("implementation", [gk, gk.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("which", ["hardest", "all", "semihard"])
@pytest.mark.parametrize("ids", sorted(IDS))
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (7, 7), (9, 13)])
def test_triplet_is_the_formula(n, m, ids, which, implementation):
    g = _generator(n)
    x, y = randn(g, n, 5), randn(g, m, 5)
    x_ids, y_ids = IDS[ids](g, n, m)
    as_list = [None if t is None else t.tolist() for t in (x_ids, y_ids)]
    for margin in (0.0, 0.2, 3.0):
        expected = loop_triplet(x.tolist(), y.tolist(), margin, which, *as_list)
        options = {"margin": margin, "negatives": which, "x_ids": x_ids, "y_ids": y_ids}
        got = {r: implementation.triplet_loss(x, y, reduction=r, **options) for r in ("none", "sum", "mean")}
        torch.testing.assert_close(got["none"], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)
        assert float(got["sum"]) == pytest.approx(math.fsum(expected), rel=1e-12, abs=1e-13)
        assert float(got["mean"]) == pytest.approx(math.fsum(expected) / n, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("implementation", [gk, gk.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("ids", sorted(IDS))
def test_hardest_negatives_is_the_formula(ids, implementation):
    g = _generator(3)
    n, m = 11, 17
    a, b = randn(g, n, 6), randn(g, m, 6)
    a_ids, b_ids = IDS[ids](g, n, m)
    results = implementation.hardest_negatives(a, b, a_ids=a_ids, b_ids=b_ids)
    lists = [None if t is None else t.tolist() for t in (a_ids, b_ids)]
    s = [[dot(u, v) for v in b.tolist()] for u in a.tolist()]
    for score, index, count, other, at in (
        (results.row_score, results.row_index, n, m, lambda k, c: (k, c)),
        (results.col_score, results.col_index, m, n, lambda k, c: (c, k)),
    ):
        for k in range(count):
            candidates = [c for c in range(other) if negatives(s, *at(k, c), *lists)]
            values = [s[at(k, c)[0]][at(k, c)[1]] for c in candidates]
            if not candidates:
                assert (float(score[k]), int(index[k])) == (-math.inf, -1)
                continue
            assert float(score[k]) == pytest.approx(max(values), rel=1e-13, abs=1e-14)
            assert int(index[k]) == candidates[values.index(max(values))]


@pytest.mark.parametrize("implementation", [gk, gk.reference], ids=["ours", "reference"])
def test_projection_is_the_formula(implementation):
    g = _generator(4)
    n, groups, width = 3, 4, 3
    dim = groups * width
    x, diag, blocks = randn(g, n, dim), randn(g, dim), randn(g, groups, width, width)
    order = torch.randperm(dim, generator=g)
    # W = diag(w) + Pᵀ blockdiag(B) P as a full matrix, entry by entry
    weights = [[0.0] * dim for _ in range(dim)]
    for channel in range(dim):
        weights[channel][channel] += float(diag[channel])
    for group in range(groups):
        for k in range(width):
            for c in range(width):
                source, target = int(order[group * width + k]), int(order[group * width + c])
                weights[source][target] += float(blocks[group, k, c])
    p = implementation.project(x, diag, blocks, permutation=order, normalize=True)
    y = randn(g, 5, dim)
    s = implementation.similarity(x, y, diag, blocks, permutation=order, normalize=True)
    for i in range(n):
        row = x[i].tolist()
        norm = math.sqrt(dot(row, row))
        expected = [dot([v / norm for v in row], [weights[k][c] for k in range(dim)]) for c in range(dim)]
        torch.testing.assert_close(p[i], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)
        for j in range(5):
            other = y[j].tolist()
            assert float(s[i, j]) == pytest.approx(dot(expected, other) / math.sqrt(dot(other, other)), rel=1e-11)


def test_the_metric_starts_at_cosine_similarity():
    x, y = torch.randn(6, 24, dtype=torch.float64), torch.randn(8, 24, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    for options in ({}, {"diagonal": False}, {"block_size": None}, {"diagonal": False, "block_size": None}):
        metric = gk.StructuredSimilarity(24, **{"block_size": 8, **options}, dtype=torch.float64)
        torch.testing.assert_close(metric(x, y), cosine)
        a, b = metric.factors(x, y)
        torch.testing.assert_close(a @ b.T, cosine)
