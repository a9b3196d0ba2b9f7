"""Triplet loss of a matrix of scores: pair by pair, and equal to that of embeddings where the scores are a product."""

import pytest
import torch

import gssf_kernels as gk


def matrix(n, m, seed=0):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def pair_by_pair(s, margin, negatives, x_ids, y_ids, symmetric):
    n, m = s.shape
    same = [[i == j or (x_ids is not None and x_ids[i] == y_ids[j]) for j in range(m)] for i in range(n)]
    terms = []
    for i in range(n):
        rows = [s[i, j] for j in range(m) if not same[i][j]]
        cols = [s[k, i] for k in range(n) if not same[k][i]]
        term = 0 * s[i, i]
        for scores in (rows, cols)[: 1 + symmetric]:
            if negatives == "all":
                chosen = scores
            else:
                below = [t for t in scores if t < s[i, i]]
                pool = below if negatives == "semihard" and below else scores
                chosen = [max(pool)] if pool else []
            for t in chosen:
                term = term + (margin + t - s[i, i]).clamp(min=0)
        terms.append(term)
    return torch.stack(terms) if terms else s.new_zeros(0) + s.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("negatives", ["hardest", "semihard", "all"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (6, 6), (5, 9)])
def test_pair_by_pair(n, m, negatives, ids, symmetric):
    s = matrix(n, m)
    x_ids, y_ids = (torch.arange(n) // 2, torch.arange(m) // 2) if ids else (None, None)
    options = {"margin": 0.4, "negatives": negatives, "symmetric": symmetric}
    terms = pair_by_pair(s, **options, x_ids=x_ids, y_ids=y_ids)
    for reduction in ("none", "sum", "mean"):
        right = terms if reduction == "none" else terms.sum() if reduction == "sum" else terms.mean()
        weight = torch.linspace(0.5, 1.5, right.numel(), dtype=s.dtype).view(right.shape)
        for module in (gk, gk.reference):
            ours = module.triplet_from_scores(s, **options, x_ids=x_ids, y_ids=y_ids, reduction=reduction)
            torch.testing.assert_close(ours, right)
            got, expected = (
                torch.autograd.grad((t * weight).sum(), s, retain_graph=True, allow_unused=True)[0]
                for t in (ours, right)
            )
            torch.testing.assert_close(got, torch.zeros_like(s) if expected is None else expected)


@pytest.mark.parametrize("negatives", ["hardest", "semihard", "all"])
def test_scores_of_a_product_give_the_loss_of_its_factors(negatives):
    x, y = matrix(7, 4, 1), matrix(10, 4, 2)
    ours = gk.triplet_from_scores(x @ y.mT, negatives=negatives)
    right = gk.triplet_loss(x, y, negatives=negatives)
    torch.testing.assert_close(ours, right)
    for got, expected in zip(torch.autograd.grad(ours, (x, y)), torch.autograd.grad(right, (x, y)), strict=True):
        torch.testing.assert_close(got, expected)


def test_gradcheck_ties_and_nan():
    assert torch.autograd.gradcheck(lambda s: gk.triplet_from_scores(s, margin=0.5), (matrix(4, 6),))
    tied = torch.tensor([[1.0, 1.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the tie is no semi-hard negative
    assert gk.triplet_from_scores(tied, negatives="semihard", margin=0.75, symmetric=False) == 0.25
    s = matrix(4, 4).detach().clone()
    s[1, 2] = torch.nan
    terms = gk.triplet_from_scores(s, reduction="none")
    assert terms.isnan().tolist() == [False, True, True, False]
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = gk.triplet_from_scores(empty)
    loss.backward()
    assert loss == 0


BAD = [
    ({"scores": torch.ones(3)}, ValueError, r"scores: expected shape \[N, M\]"),
    ({"scores": torch.ones(3, 3).long()}, TypeError, "scores: .*got torch.int64"),
    ({"scores": torch.ones(4, 3)}, ValueError, "scores: expected at least as many columns"),
    ({"margin": -1.0}, ValueError, "margin: .*got -1.0"),
    ({"negatives": "hard"}, ValueError, "negatives: .*got 'hard'"),
    ({"x_ids": torch.ones(2, dtype=torch.int64)}, ValueError, r"x_ids: .*got \[2\]"),
    ({"symmetric": 1}, TypeError, "symmetric: .*got int"),
    ({"reduction": "max"}, ValueError, "reduction: .*got 'max'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_arguments(change, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.triplet_from_scores(**{"scores": torch.ones(3, 3), **change})
