"""Multi-similarity loss: number by number, with and without its mining, alone, between two sides and by a metric.

Its log-sums by Triton are those of `test_circle.py`.
"""

import math
from functools import partial

import label_losses
import pytest
import torch

import gssf_kernels as gk
from gssf_kernels import plan


@pytest.fixture(params=["listed positives", "two sweeps"])
def mining(request, monkeypatch):
    """Both ways to the bounds of the mining."""
    monkeypatch.setattr(plan, "LISTED_PAIRS", 100 if request.param == "listed positives" else 0)


def by_number(alpha=2.0, beta=50.0, base=0.5, epsilon=None, reduction="mean", **inputs):
    """The formula of the paper (CVPR 2019) and its mining, one score at a time."""
    tensors = {k: t for k, t in inputs.items() if t.is_floating_point()}
    terms = []
    for positives, negatives in label_losses.of_each_anchor(tensors, inputs):
        if epsilon is not None:
            least = min((s.item() for s in positives), default=math.inf)
            largest = max((s.item() for s in negatives), default=-math.inf)
            positives = [s for s in positives if s.item() < largest + epsilon]
            negatives = [s for s in negatives if s.item() > least - epsilon]
        term = inputs["x"].new_zeros(())
        if positives:
            term = term + torch.log(1 + sum(torch.exp(-alpha * (s - base)) for s in positives)) / alpha
        if negatives:
            term = term + torch.log(1 + sum(torch.exp(beta * (s - base)) for s in negatives)) / beta
        terms.append(term)
    terms = torch.stack(terms)
    return terms.mean() if reduction == "mean" else terms.sum() if reduction == "sum" else terms


def ours(**settings):
    return lambda x, labels, **sides: gk.multi_similarity_loss(x, labels, **sides, **settings)


@pytest.mark.parametrize("between", [False, True], ids=["alone", "between two sides"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "settings", [{}, {"epsilon": 0.1}, {"epsilon": 0.0, "beta": 5.0}, {"alpha": 0.5, "base": -0.25}]
)
def test_number_by_number(chunked, mining, settings, reduction, between):
    inputs = label_losses.sides(23, 31, 6, between)
    settings = {**settings, "reduction": reduction}
    got = label_losses.value_and_gradients(ours(**settings), *inputs)
    expected = label_losses.value_and_gradients(lambda **arguments: by_number(**arguments, **settings), *inputs)
    label_losses.assert_equal(got, expected, 1e-11)


@pytest.mark.parametrize("between", [False, True], ids=["alone", "between two sides"])
def test_mining_keeps_what_the_paper_keeps(mining, between):
    """How many of each, by the gradient that reaches them: alpha and beta so small that none underflows."""
    tensors, options = label_losses.sides(40, 31, 6, between)
    x = tensors["x"]
    for epsilon in (0.0, 0.1, 0.5):
        expected = by_number(alpha=0.01, beta=0.01, epsilon=epsilon, reduction="none", **tensors, **options)
        got = gk.multi_similarity_loss(**tensors, **options, alpha=0.01, beta=0.01, epsilon=epsilon, reduction="none")
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
        every = gk.multi_similarity_loss(**tensors, **options, alpha=0.01, beta=0.01, reduction="none")
        assert (got <= every + 1e-12).all()
        assert x.shape[0] == 40
        assert (got < every - 1e-3).any()


@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("between", [False, True], ids=["alone", "between two sides"])
def test_fp32_is_as_good_as_plain(chunked, mining, between, epsilon):
    tensors, options = label_losses.sides(300, 170, 40, between, torch.float32)
    options = {**options, "epsilon": epsilon}
    truth = label_losses.value_and_gradients(
        lambda **inputs: gk.reference.multi_similarity_loss(**inputs),
        {k: t.double() for k, t in tensors.items()},
        options,
    )
    plain = label_losses.value_and_gradients(
        lambda **inputs: gk.reference.multi_similarity_loss(**inputs), tensors, options
    )
    got = label_losses.value_and_gradients(lambda **inputs: gk.multi_similarity_loss(**inputs), tensors, options)
    for g, p, t in zip(got, plain, truth, strict=True):
        assert (g.double() - t).norm() <= 2 * (p.double() - t).norm() + 1.2e-7 * t.norm()


def test_a_metric_compares_by_its_factors():
    metric = gk.StructuredSimilarity(8, block_size=4, dtype=torch.float64)
    with torch.no_grad():
        metric.diag.normal_()
        metric.blocks.normal_()
    x, labels = torch.randn(17, 8, dtype=torch.float64), torch.arange(17) % 5
    module = gk.MultiSimilarityLoss(beta=5.0, epsilon=0.1, metric=metric)
    loss = module(x, labels)
    got = torch.autograd.grad(loss, (metric.diag, metric.blocks))
    expected = gk.reference.multi_similarity_loss(x, labels, beta=5.0, epsilon=0.1, metric=metric)
    torch.testing.assert_close(loss, expected)
    for ours, right in zip(got, torch.autograd.grad(expected, (metric.diag, metric.blocks)), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("between", [False, True], ids=["alone", "between two sides"])
def test_ties_with_the_bounds_do_not_count(mining, between):
    """Whole numbers, so that scores are exact, and many positives lie on their bound; the largest logit is rounded."""
    random = torch.Generator().manual_seed(5)
    x, y = (torch.randint(-2, 3, (n, 5), generator=random).float() for n in (100, 80))
    labels, y_labels = (torch.randint(0, 30, (n,), generator=random) for n in (100, 80))
    sides = {"y": y, "y_labels": y_labels} if between else {}
    for epsilon, base in ((1.0, 0.3), (0.0, 0.3), (2.0, 33.3)):
        settings = {"alpha": 0.07, "beta": 0.013, "base": base, "epsilon": epsilon}
        got = label_losses.value_and_gradients(ours(**settings), {"x": x}, {"labels": labels, **sides})
        wide = {name: t.double() if t.is_floating_point() else t for name, t in sides.items()}
        inputs = {"x": x.double()}, {"labels": labels, **wide}
        expected = label_losses.value_and_gradients(partial(by_number, **settings), *inputs)
        for ours_, right in zip(got, expected, strict=True):
            torch.testing.assert_close(ours_.double(), right, rtol=2e-5, atol=2e-5)


def test_nothing_to_compare_is_zero(mining):
    for n, labels in ((0, torch.zeros(0, dtype=torch.int64)), (1, torch.zeros(1, dtype=torch.int64))):
        x = torch.randn(n, 4, requires_grad=True)
        for epsilon in (None, 0.1):
            loss = gk.multi_similarity_loss(x, labels, epsilon=epsilon)
            assert loss == 0
    x = torch.randn(3, 4, requires_grad=True)
    y, y_labels = torch.randn(0, 4), torch.zeros(0, dtype=torch.int64)
    loss = gk.multi_similarity_loss(x, torch.arange(3), y=y, y_labels=y_labels, epsilon=0.1)
    assert loss == 0
    loss.backward()
    assert not x.grad.any()


def test_without_negatives_mining_keeps_no_positive(mining):
    x = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.zeros(5, dtype=torch.int64)
    assert gk.multi_similarity_loss(x, labels) > 0
    assert gk.multi_similarity_loss(x, labels, epsilon=0.1) == 0


@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_nan_propagates(mining, epsilon):
    tensors, options = label_losses.sides(23, 31, 6, True, torch.float32)
    tensors["x"][3, 0] = math.nan
    terms = gk.multi_similarity_loss(**tensors, **options, epsilon=epsilon, reduction="none")
    assert terms[3].isnan()
    assert terms.isfinite().sum() == 22
    tensors["y"][0, 0] = math.nan
    terms = gk.multi_similarity_loss(**tensors, **options, epsilon=epsilon, reduction="none")
    assert terms.isnan().all()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"alpha": 0.0}, ValueError, "alpha: .*> 0, got 0.0"),
        ({"beta": -1.0}, ValueError, "beta: .*> 0, got -1.0"),
        ({"base": math.inf}, ValueError, "base: .*got inf"),
        ({"epsilon": -0.1}, ValueError, "epsilon: .*>= 0, got -0.1"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: .*got torch.float32"),
        ({"reduction": "avg"}, ValueError, "reduction: .*got 'avg'"),
    ],
)
def test_bad_arguments(change, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.multi_similarity_loss(**{"x": torch.randn(4, 5), "labels": torch.arange(4), **change})
