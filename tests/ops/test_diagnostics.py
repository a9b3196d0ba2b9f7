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
    hardest, first = [], [[], []]
    for k in range(n):
        row = [s[k][j] for j in range(m) if j != k and (x_ids is None or x_ids[k] != y_ids[j])]
        col = [s[i][k] for i in range(n) if i != k and (x_ids is None or x_ids[i] != y_ids[k])]
        hardest += [(k, max(results)) for results in (row, col) if results]
        for of_direction, results in zip(first, (row, col), strict=True):
            of_direction.append(all(s[k][k] > score for score in results))
    centre = [math.fsum(p[d] / math.sqrt(math.fsum(q * q for q in p)) for p in rows + cols) for d in range(x.shape[1])]
    return (
        sum(margin + results - s[k][k] > 0 for k, results in hardest) / (2 * n),
        math.fsum(s[k][k] for k in range(n)) / n,
        math.fsum(results for _, results in hardest) / len(hardest) if hardest else 0.0,
        1 - math.fsum((c / (n + m)) ** 2 for c in centre),
        *(sum(of_direction) / n for of_direction in first),
    )


FIELDS = ["active", "positive", "negative", "spread", "row_accuracy", "col_accuracy"]


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
    assert list(results._asdict()) == FIELDS
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
            assert [float(t) for t in results] == pytest.approx([*expected[:3], spread, *expected[4:]], rel=1e-12)
    _, results = gk.TripletLoss(metric=metric, diagnostics=True, warmup=3)(x, y, x_ids, y_ids)
    assert [float(t) for t in results] == pytest.approx([*expected[:3], spread, *expected[4:]], rel=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["ids", "listed"])
@pytest.mark.parametrize("loss", ["triplet_loss", "goal_loss", "gradient_space_loss"])
def test_of_pairs_of_any_kind(loss, kind, symmetric):
    """As the definition's, whose matrix is stored; and its accuracies pair by pair."""
    x, y, x_ids, y_ids = problem(n=12, m=9, ids="random")
    listed = torch.tensor([[0, 1], [3, 3], [0, 1], [5, 8], [5, 2]])
    options = {"pairs": "ids" if kind == "ids" else listed, "x_ids": x_ids, "y_ids": y_ids, "symmetric": symmetric}
    if loss == "gradient_space_loss":
        options |= {"weights": lambda s: (s.positive * 0 + 1, s.negative * 0 + 1)}
    _, results = getattr(gk, loss)(x, y, diagnostics=True, **options)
    options.pop("weights", None)
    name = "triplet_loss" if loss == "triplet_loss" else "goal_loss"
    _, expected = getattr(gk.reference, name)(x, y, diagnostics=True, **options)
    assert list(results._asdict()) == FIELDS[: 5 + symmetric]
    for got, value in zip(results._asdict().values(), expected._asdict().values(), strict=True):
        torch.testing.assert_close(got, value)
    s, same = x @ y.mT, x_ids[:, None] == y_ids
    pairs = same.nonzero().tolist() if kind == "ids" else sorted({(i, j) for i, j in listed.tolist()})
    no_negative = same.clone()
    no_negative[[i for i, _ in pairs], [j for _, j in pairs]] = True
    s_of_negatives = s.masked_fill(no_negative, -torch.inf)
    rows = [s[i, j] > s_of_negatives[i].max() for i, j in pairs]
    first = [rows, [s[i, j] > s_of_negatives[:, j].max() for i, j in pairs]]
    for got, of_direction in zip(results[4 : 5 + symmetric], first, strict=False):
        assert float(got) == pytest.approx(sum(map(float, of_direction)) / len(pairs))


def test_a_collapse_shows():
    point = F.normalize(torch.randn(1, 8), dim=1)
    apart = F.normalize(torch.randn(64, 8), dim=1)
    _, collapsed = gk.triplet_loss(point.expand(64, 8), point.expand(64, 8), diagnostics=True)
    _, healthy = gk.triplet_loss(apart, apart, diagnostics=True)
    assert float(collapsed.spread) == pytest.approx(0, abs=1e-6)
    assert float(collapsed.active) == 1
    assert float(collapsed.negative) == pytest.approx(float(collapsed.positive), abs=1e-6)
    assert float(healthy.spread) > 0.8
    assert float(collapsed.row_accuracy) == float(collapsed.col_accuracy) == 0  # a tie is not first
    assert float(healthy.row_accuracy) == 1
    listed = torch.stack((torch.arange(64), torch.arange(64)), 1)
    ids = torch.arange(64)
    for pairs in ({"pairs": listed}, {"pairs": "ids", "x_ids": ids, "y_ids": ids}):
        _, results = gk.triplet_loss(point.expand(64, 8), point.expand(64, 8), diagnostics=True, **pairs)
        assert float(results.row_accuracy) == float(results.col_accuracy) == 0
    _, contrast = gk.info_nce_loss(point.expand(64, 8), point.expand(64, 8), scale=1.0, diagnostics=True)
    assert float(contrast.row_accuracy) == 1  # a maximum, as its ties are
    assert float(contrast.spread) == pytest.approx(0, abs=1e-6)
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


def contrasts():
    """(name, call, whether accuracies are known, the positives of each row); each has the same x and y."""
    *_, x_ids, y_ids = problem(n=10, m=14, ids="random")
    pairs, same = [[i] for i in range(10)], (x_ids[:, None] == y_ids)
    by_id = [row.nonzero().ravel().tolist() for row in same]
    both = [sorted({i, *js}) for i, js in enumerate(by_id)]
    ids = {"x_ids": x_ids, "y_ids": y_ids}
    scalars = {"info_nce_loss": {"scale": 5.0}, "sigmoid_loss": {"scale": 5.0, "bias": -2.0}}
    for loss, numbers in scalars.items():
        nce = loss == "info_nce_loss"
        yield loss, numbers, nce, pairs
        yield loss, numbers | ids, False, both
        yield loss, numbers | ids | {"same_id": "ignore"}, nce, pairs
        yield loss, numbers | ids | {"pairs": "ids"}, False, by_id
        listed = torch.tensor([[1, 2], [1, 3], [4, 0]])
        yield loss, numbers | {"pairs": listed}, False, [listed[listed[:, 0] == i, 1].tolist() for i in range(10)]
    yield "info_nce_loss", {"scale": 5.0, "symmetric": False}, True, pairs
    yield "info_nce_loss", {"scale": 5.0, "y_bias": torch.zeros(14)}, False, pairs


@pytest.mark.parametrize(("loss", "options", "accuracies", "positives"), contrasts())
def test_of_losses_over_all_scores(loss, options, accuracies, positives):
    x, y, x_ids, y_ids = problem(n=10, m=14, ids="random")
    with_them, results = getattr(gk, loss)(x, y, diagnostics=True, **options)
    assert torch.equal(with_them, getattr(gk, loss)(x, y, **options))
    symmetric = options.get("symmetric", True)
    names = ["positive", "spread", "row_accuracy", "col_accuracy"][: 2 + accuracies * (1 + symmetric)]
    assert list(results._asdict()) == names
    s = x @ y.mT
    means = [float(s[i, js].mean()) for i, js in enumerate(positives) if js]
    assert float(results.positive) == pytest.approx(sum(means) / len(means), rel=1e-12)
    assert float(results.spread) == pytest.approx(loop_diagnostics(x, y, None, None, 0.0)[3], rel=1e-12)
    if options.get("same_id") == "ignore":
        left_out = x_ids[:, None] == y_ids
        left_out.fill_diagonal_(False)
        s = s.masked_fill(left_out, -torch.inf)
    i = torch.arange(10)
    shares = [(s.argmax(1) == i).double().mean(), (s.argmax(0)[:10] == i).double().mean()]
    for got, share in zip(results[4:], shares, strict=True):
        assert got is None or float(got) == pytest.approx(float(share))


@pytest.mark.parametrize("two_sides", [False, True])
@pytest.mark.parametrize("loss", ["nt_xent_loss", "circle_loss", "multi_similarity_loss"])
def test_of_labels(loss, two_sides):
    x, y, labels, y_labels = problem(n=10, m=14, ids="random")
    options = {"scale": 5.0} if loss == "nt_xent_loss" else {}
    options |= {"y": y, "y_labels": y_labels} if two_sides else {}
    with_them, results = getattr(gk, loss)(x, labels, diagnostics=True, **options)
    assert torch.equal(with_them, getattr(gk, loss)(x, labels, **options))
    candidates, candidate_labels = (y, y_labels) if two_sides else (x, labels)
    s, same = x @ candidates.mT, labels[:, None] == candidate_labels
    if not two_sides:
        same.fill_diagonal_(False)
    means = [float(row[of_row].mean()) for row, of_row in zip(s, same, strict=True) if of_row.any()]
    assert list(results._asdict()) == ["positive", "spread"]
    assert float(results.positive) == pytest.approx(sum(means) / len(means), rel=1e-12)
    points = F.normalize(torch.cat((x, y)) if two_sides else x, dim=1).mean(0)
    assert float(results.spread) == pytest.approx(1 - float(points @ points), rel=1e-12)


@pytest.mark.parametrize("metric", [None, "diag"])
def test_of_batch_hard(metric):
    x, _, labels, _ = problem(n=10, ids="random")
    labels[0] = 99  # without a positive
    metric = None if metric is None else gk.StructuredSimilarity(5, None, dtype=torch.float64)
    loss, results = gk.batch_hard_loss(x, labels, metric=metric, diagnostics=True)
    assert torch.equal(loss, gk.batch_hard_loss(x, labels, metric=metric))
    s, same = x @ x.mT, labels[:, None] == labels
    if metric is not None:
        a, b = metric.factors(x, x)
        s = (a @ b.mT).detach()
    terms = []
    for i in range(10):
        positives = [float(s[i, j]) for j in range(10) if same[i, j] and j != i]
        negatives = [float(s[i, j]) for j in range(10) if not same[i, j]]
        if positives and negatives:
            terms.append((min(positives), max(negatives)))
    assert list(results._asdict()) == FIELDS[:4]
    expected = [sum(0.2 + n - p > 0 for p, n in terms), sum(p for p, _ in terms), sum(n for _, n in terms)]
    assert [float(t) for t in results[:3]] == pytest.approx([t / len(terms) for t in expected], rel=1e-12)


MODULES = [
    gk.InfoNCELoss(diagnostics=True),
    gk.SigmoidLoss(diagnostics=True),
    gk.NTXentLoss(diagnostics=True),
    gk.CircleLoss(diagnostics=True),
    gk.MultiSimilarityLoss(diagnostics=True),
    gk.BatchHardLoss(diagnostics=True),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_of_modules(module):
    x, y = (F.normalize(torch.randn(8, 4), dim=1).requires_grad_() for _ in range(2))
    second = y if isinstance(module, (gk.InfoNCELoss, gk.SigmoidLoss)) else torch.arange(8) // 2
    loss, results = module(x, second)
    loss.backward()
    assert x.grad is not None
    assert not any(t.requires_grad for t in results._asdict().values())
    assert all(isinstance(float(t), float) for t in results._asdict().values())


@pytest.mark.parametrize("kind", ["mae", "mse"])
def test_the_terms_of_distillation(kind):
    student, image, text = (torch.randn(9, d, dtype=torch.float64) for d in (4, 5, 6))
    lam, tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), 0.5
    weights = (2.0, 0.7, 0.4)
    options = {"lam": lam, "tau": tau, "weights": weights, "kind": kind}
    loss, terms = gk.relational_distillation_loss(student, image, text, return_terms=True, **options)
    assert torch.equal(loss, gk.relational_distillation_loss(student, image, text, **options))
    relations = [x @ x.mT / tau for x in (student, image, text)]
    mixture = float(lam) * relations[2] + (1 - float(lam)) * relations[1]
    apart = ~torch.eye(9, dtype=torch.bool)
    for got, relation in zip(terms, relations, strict=True):
        distance = (relation - mixture)[apart]
        torch.testing.assert_close(got, distance.abs().mean() if kind == "mae" else distance.square().mean())
        assert not got.requires_grad
    torch.testing.assert_close(loss, sum(w * t for w, t in zip(weights, terms, strict=True)))
    module = gk.RelationalDistillationLoss(return_terms=True).double()
    loss, terms = module(student, image, text)
    torch.testing.assert_close(loss, 2 * terms.student + terms.image_teacher + terms.text_teacher)


def test_compile():
    torch._dynamo.reset()
    x, y = torch.randn(12, 8), torch.randn(15, 8)
    for call, _ in calls(gk).values():
        loss, results = torch.compile(lambda x, y, call=call: call(x, y, diagnostics=True), fullgraph=True)(x, y)
        expected = call(x, y, diagnostics=True)
        torch.testing.assert_close(loss, expected[0])
        for got, t in zip(results, expected[1], strict=True):
            torch.testing.assert_close(got, t)
