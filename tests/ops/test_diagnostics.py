"""Diagnostics beside a loss: their values, and that they cost no sweep."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import IDS, randn

import gssf_kernels as gk


def problem(n=10, m=14, ids="five"):
    g = torch.Generator().manual_seed(0)
    return randn(g, n, 5), randn(g, m, 5), *IDS[ids](g, n, m)


def loop_diagnostics(x, y, x_ids, y_ids, margin):
    rows, cols = x.tolist(), y.tolist()
    s = [[math.fsum(p * q for p, q in zip(u, v, strict=True)) for v in cols] for u in rows]
    n, m = len(rows), len(cols)
    hardest = []
    for k in range(n):
        row = [s[k][j] for j in range(m) if j != k and (x_ids is None or x_ids[k] != y_ids[j])]
        col = [s[i][k] for i in range(n) if i != k and (x_ids is None or x_ids[i] != y_ids[k])]
        hardest += [(k, max(results)) for results in (row, col) if results]
    centre = [math.fsum(p[d] / math.sqrt(math.fsum(q * q for q in p)) for p in rows + cols) for d in range(x.shape[1])]
    return (
        sum(margin + results - s[k][k] > 0 for k, results in hardest) / (2 * n),
        math.fsum(s[k][k] for k in range(n)) / n,
        math.fsum(results for _, results in hardest) / len(hardest) if hardest else 0.0,
        1 - math.fsum((c / (n + m)) ** 2 for c in centre),
    )


def calls(module, margin=0.2):
    return {
        "triplet": (lambda *t, **o: module.triplet_loss(*t, margin=margin, **o), margin),
        "all": (lambda *t, **o: module.triplet_loss(*t, margin=margin, negatives="all", **o), margin),
        "semihard": (lambda *t, **o: module.triplet_loss(*t, margin=margin, negatives="semihard", **o), margin),
        "goal": (lambda *t, **o: module.goal_loss(*t, **o), 0.0),
        "goal relative": (lambda *t, **o: module.goal_loss(*t, pair="sig_ms", **o), 0.0),
    }


@pytest.mark.parametrize("module", [gk, gk.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("ids", ["none", "five", "random", "equal"])
@pytest.mark.parametrize("name", sorted(calls(gk)))
def test_values(name, ids, module):
    call, margin = calls(module)[name]
    x, y, x_ids, y_ids = problem(ids=ids)
    loss, results = call(x, y, x_ids=x_ids, y_ids=y_ids, diagnostics=True)
    torch.testing.assert_close(loss, call(x, y, x_ids=x_ids, y_ids=y_ids), rtol=0, atol=0)
    lists = [None if t is None else t.tolist() for t in (x_ids, y_ids)]
    expected = loop_diagnostics(x, y, *lists, margin)
    assert results._fields == ("active", "positive", "negative", "spread")
    for got, value in zip(results, expected, strict=True):
        assert got.shape == ()
        assert got.dtype == torch.float64
        assert float(got) == pytest.approx(value, rel=1e-12, abs=1e-13)


def test_of_a_metric_are_its_scores_and_the_embeddings_spread():
    x, y, x_ids, y_ids = problem()
    metric = gk.StructuredSimilarity(5, None, dtype=torch.float64)
    with torch.no_grad():
        metric.diag.copy_(torch.tensor([2.0, 0.5, 1.0, -1.0, 3.0]))
    ids = {"x_ids": x_ids, "y_ids": y_ids}
    a, b = metric.factors(x, y)
    expected = loop_diagnostics(a.detach(), b.detach(), x_ids.tolist(), y_ids.tolist(), 0.2)
    spread = loop_diagnostics(x, y, None, None, 0.2)[3]
    for which in ("hardest", "all"):
        for module in (gk, gk.reference):
            _, results = module.triplet_loss(x, y, metric=metric, negatives=which, diagnostics=True, **ids)
            assert [float(t) for t in results] == pytest.approx([*expected[:3], spread], rel=1e-12)
    _, results = gk.TripletLoss(metric=metric, diagnostics=True, warmup=3)(x, y, x_ids, y_ids)
    assert [float(t) for t in results] == pytest.approx([*expected[:3], spread], rel=1e-12)


def test_a_collapse_shows():
    point = F.normalize(torch.randn(1, 8), dim=1)
    apart = F.normalize(torch.randn(64, 8), dim=1)
    _, collapsed = gk.triplet_loss(point.expand(64, 8), point.expand(64, 8), diagnostics=True)
    _, healthy = gk.triplet_loss(apart, apart, diagnostics=True)
    assert float(collapsed.spread) == pytest.approx(0, abs=1e-6)
    assert float(collapsed.active) == 1
    assert float(collapsed.negative) == pytest.approx(float(collapsed.positive), abs=1e-6)
    assert float(healthy.spread) > 0.8
    # a margin is not part of GOAL's: a negative that only equals its positive is not above it
    whole = torch.ones(6, 4)
    assert float(gk.goal_loss(whole, whole, diagnostics=True)[1].active) == 0
    # scaling an embedding is no collapse, and no spread
    scaled = apart * torch.logspace(-3, 3, 64)[:, None]
    assert float(gk.triplet_loss(scaled, scaled, diagnostics=True)[1].spread) == pytest.approx(float(healthy.spread))


def test_the_spread_is_never_below_zero():
    """Of equal rows it is 0 but for rounding, which goes either way."""
    for module in (gk, gk.reference):
        results = []
        for seed in range(20):
            point = torch.randn(1, 24, generator=torch.Generator().manual_seed(seed)).expand(40, 24)
            results.append(float(module.triplet_loss(point, point, diagnostics=True)[1].spread))
        assert min(results) == 0
        assert 0 < max(results) < 1e-6
    point = torch.full((4, 3), torch.nan)
    assert gk.triplet_loss(point, point, diagnostics=True)[1].spread.isnan()


@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("name", sorted(calls(gk)))
def test_none_at_all(name, m):
    for module in (gk, gk.reference):
        loss, results = calls(module)[name][0](torch.randn(0, 4), torch.randn(m, 4), diagnostics=True)
        assert float(loss) == 0
        assert [float(t) for t in results[:3]] == [0, 0, 0]
        assert not any(t.isnan() for t in results)


SWEEPS = ("hardest_negatives", "hardest_terms", "relative_negatives")


def test_they_carry_no_gradient_and_cost_no_sweep():
    x, y = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    swept = []
    sweeps = {getattr(torch.ops.gssf, name).default for name in SWEEPS}

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in sweeps:
                swept.append(function)
            return function(*args, **(kwargs or {}))

    for criterion in (gk.TripletLoss(diagnostics=True), gk.GoalLoss(pair="sig_ms", diagnostics=True)):
        swept.clear()
        with Counting():
            loss, results = criterion(x, y)
        assert len(swept) == 1
        assert not any(t.requires_grad for t in results)
        with_them = torch.autograd.grad(loss, (x, y))
        without = type(criterion)(**({"pair": "sig_ms"} if isinstance(criterion, gk.GoalLoss) else {}))
        for got, expected in zip(with_them, torch.autograd.grad(without(x, y), (x, y)), strict=True):
            assert torch.equal(got, expected)


def test_compile():
    torch._dynamo.reset()
    x, y = torch.randn(12, 8), torch.randn(15, 8)
    for call, _ in calls(gk).values():
        loss, results = torch.compile(lambda x, y, call=call: call(x, y, diagnostics=True), fullgraph=True)(x, y)
        expected = call(x, y, diagnostics=True)
        torch.testing.assert_close(loss, expected[0])
        for got, t in zip(results, expected[1], strict=True):
            torch.testing.assert_close(got, t)
