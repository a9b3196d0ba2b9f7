"""NT-Xent and supervised contrastive loss, and log-sums without the diagonal or without scores of equal id."""

import math

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk
from gssf_kernels import plan

FP64 = torch.float64


def rows(n, d=6, seed=0):
    return F.normalize(torch.randn(n, d, dtype=FP64, generator=torch.Generator().manual_seed(n + seed)), dim=1)


@pytest.fixture(params=["one chunk", "chunks"])
def chunked(request, monkeypatch):
    if request.param == "chunks":
        monkeypatch.setattr(plan, "CHUNK_SCORES", {"cpu": 16 * 24})
        monkeypatch.setattr(plan, "KEPT_SCORES", {"cpu": 0})


def loop(x, labels, scale, y=None, y_labels=None):
    """The terms, number by number, and which anchors have a positive."""
    others, other_labels = (x, labels) if y is None else (y, y_labels)
    terms, present = [], []
    for i in range(len(x)):
        candidates = [j for j in range(len(others)) if y is not None or j != i]
        t = {j: scale * float(x[i] @ others[j]) for j in candidates}
        positives = [t[j] for j in candidates if labels[i] == other_labels[j]]
        present.append(bool(positives))
        top = max(t.values(), default=0.0)
        log_sum = top + math.log(sum(math.exp(v - top) for v in t.values())) if t else 0.0
        terms.append(log_sum - sum(positives) / len(positives) if positives else 0.0)
    return terms, present


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("scale", [2.0, 1 / 0.07, 100.0])
@pytest.mark.parametrize("n", [2, 3, 40, 70])
@pytest.mark.parametrize("two_sides", [False, True])
def test_number_by_number(n, scale, two_sides):
    x, labels = rows(n), torch.arange(n) % max(n // 3, 1)
    labels[0] = 99  # without a positive
    other = (rows(n + 5, seed=9), torch.arange(n + 5) % 7) if two_sides else (None, None)
    terms, present = loop(x, labels, scale, *other)
    options = {"scale": scale, "y": other[0], "y_labels": other[1]}
    for module in (gk, gk.reference):
        each = module.nt_xent_loss(x, labels, reduction="none", **options)
        torch.testing.assert_close(each, torch.tensor(terms, dtype=FP64))
        torch.testing.assert_close(float(module.nt_xent_loss(x, labels, reduction="sum", **options)), sum(terms))
        mean = sum(terms) / max(sum(present), 1)
        torch.testing.assert_close(float(module.nt_xent_loss(x, labels, **options)), mean)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("two_sides", [False, True])
@pytest.mark.parametrize("metric", [False, True])
def test_gradients(two_sides, metric):
    x, labels = rows(30).requires_grad_(), torch.arange(30) % 8
    scale = torch.tensor(5.0, dtype=FP64, requires_grad=True)
    y, y_labels = (rows(21, seed=3).requires_grad_(), torch.arange(21) % 8) if two_sides else (None, None)
    similarity = gk.StructuredSimilarity(6, 3, dtype=FP64) if metric else None

    def value(x, scale, *y):
        options = {"y": y[0], "y_labels": y_labels} if y else {}
        return gk.nt_xent_loss(x, labels, scale=scale, metric=similarity, **options)

    torch.autograd.gradcheck(value, (x, scale, *([y] if two_sides else [])))
    assert torch.isclose(
        value(x, scale, *([y] if two_sides else [])),
        gk.reference.nt_xent_loss(x, labels, scale=scale, metric=similarity, y=y, y_labels=y_labels),
    )


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02, 0.01])
def test_two_views_in_fp32_are_exact_at_every_temperature(temperature):
    """Two views so close that their scores hold nearly all of the softmax, as late in training."""
    views = F.normalize(torch.cat((rows(64, 32), rows(64, 32) + 0.02 * rows(64, 32, 5))), dim=1)
    samples = torch.arange(64).repeat(2)
    right = gk.reference.nt_xent_loss(views, samples, scale=1 / temperature)
    single = views.float()
    loss = gk.nt_xent_loss(single, samples, scale=1 / temperature)
    plain = gk.reference.nt_xent_loss(single, samples, scale=1 / temperature)
    assert abs(loss - right) <= 2 * abs(plain - right) + 2e-6 * right + 1e-7
    assert torch.equal(
        gk.NTXentLoss(1 / temperature)(single, samples),
        gk.nt_xent_loss(single, samples, scale=gk.NTXentLoss(1 / temperature).log_scale.exp()),
    )


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("one_side", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_log_sums_of_scores_that_take_part(same_id, exclude_self, one_side, ids):
    a = rows(40).requires_grad_()
    b = a if one_side else rows(40 if exclude_self else 51, seed=1).requires_grad_()
    a_ids, b_ids = (torch.arange(40) % 9, torch.arange(len(b)) % 9) if ids else (None, None)
    options = {"scale": 3.0, "exclude_self": exclude_self, "same_id": same_id, "a_ids": a_ids, "b_ids": b_ids}
    results = []
    for module in (gk, gk.reference):
        sums = module.logsumexp_scores(a, b, **options)
        weighted = sum((t * torch.linspace(0.5, 1, len(t), dtype=FP64)).sum() for t in sums)
        results.append((*sums, *torch.autograd.grad(weighted, {a, b})))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right)


def test_no_positive_gives_a_differentiable_zero():
    for n in (0, 1, 4):
        x = rows(max(n, 1))[:n].clone().requires_grad_()
        loss = gk.nt_xent_loss(x, torch.arange(n), scale=3.0)
        loss.backward()
        assert loss == 0
        assert not x.grad.any()


BAD = [
    ({"labels": torch.zeros(3)}, TypeError, "labels: .*got torch.float32"),
    ({"labels": torch.arange(4)}, ValueError, r"labels: .*\[3\], got \[4\]"),
    ({"scale": -1.0}, ValueError, "scale: .*> 0"),
    ({"y": rows(4)}, ValueError, "y_labels: expected it too"),
    ({"reduction": "max"}, ValueError, "reduction: .*got 'max'"),
    ({"metric": 3}, TypeError, "metric: .*got int"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_arguments(change, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.nt_xent_loss(**{"x": rows(3), "labels": torch.arange(3), "scale": 2.0, **change})


def test_the_module_refuses_a_scale_above_its_largest():
    with pytest.raises(ValueError, match=r"^scale: expected at most max_scale=10.0, got 20"):
        gk.NTXentLoss(20.0, max_scale=10.0)
