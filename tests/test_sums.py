"""Sums of functions of every score: sum_scores, sigmoid_loss and triplet_loss over every negative."""

import math

import pytest
import torch
import torch.nn.functional as F
from dense_cases import INF, NAN, X, Y, assert_same, leaves, normal, value_and_gradients

import gssf_kernels as gk

FUNCTIONS = {
    "hinge": lambda t: max(t, 0.0),
    "softplus": lambda t: max(t, 0.0) + math.log1p(math.exp(-abs(t))),
    "abs": abs,
    "square": lambda t: t * t,
}


@pytest.mark.parametrize("positives", ["include", "exclude", "negate"])
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 5), (35, 20), (20, 35)])
def test_sums_number_by_number(chunked, kind, positives, n, m):
    a, b = normal(n, 4), normal(m, 4)
    a_ids, b_ids = torch.arange(n) % 5, torch.arange(m) % 7
    rows = []
    for i in range(n):
        row = 0.0
        for j in range(m):
            t = 1.3 * float(a[i] @ b[j]) - 0.4
            positive = positives != "include" and (i == j or int(a_ids[i]) == int(b_ids[j]))
            if not (positive and positives == "exclude"):
                row += FUNCTIONS[kind](-t if positive else t)
        rows.append(row)
    options = {"scale": 1.3, "bias": -0.4, "positives": positives, "a_ids": a_ids, "b_ids": b_ids}
    torch.testing.assert_close(gk.sum_scores(a, b, kind, reduction="none", **options).tolist(), rows)
    torch.testing.assert_close(float(gk.sum_scores(a, b, kind, **options)), sum(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_exact_at_every_size(dtype):
    """From far below to far above zero, the derivative too; a sum of one term each."""
    t = torch.cat([torch.linspace(-100, 100, 1001, dtype=dtype), torch.logspace(-30, 4, 600, dtype=dtype)])
    t = torch.cat([t, -t, torch.zeros(1, dtype=dtype)]).requires_grad_()
    ours = gk.sum_scores(t[:, None], torch.ones(1, 1, dtype=dtype), "softplus", reduction="none")
    (slope,) = torch.autograd.grad(ours.sum(), t)
    exact, normal_range = t.detach().double(), 80 if dtype == torch.float32 else 700
    expected = torch.where(exact > 0, exact, 0) + torch.log1p(torch.exp(-exact.abs()))
    seen = exact > -normal_range
    for got, truth in ((ours, expected), (slope, torch.sigmoid(exact))):
        error = ((got.detach().double() - truth) / truth)[seen].abs().max()
        assert error <= 4 * torch.finfo(dtype).eps


def test_abs_has_no_slope_at_zero():
    a = torch.zeros(5, 3, requires_grad=True)
    gk.sum_scores(a, torch.ones(4, 3), "abs").backward()
    assert not a.grad.any()
    (value,) = torch.autograd.grad(gk.sum_scores(a, torch.ones(4, 3), "abs", bias=-1e-30), a)
    assert value.tolist() == [[-4.0] * 3] * 5


@pytest.mark.parametrize("kind", ["hinge", "softplus", "abs", "square"])
def test_nan_and_infinity_reach_the_sums(kind):
    a, b = torch.ones(40, 2), torch.ones(50, 2)
    b[7] = NAN
    assert gk.sum_scores(a, b, kind).isnan()
    b[7] = INF
    assert gk.sum_scores(a, b, kind) == INF
    b[7] = -INF
    expected = gk.reference.sum_scores(a, b, kind)
    torch.testing.assert_close(gk.sum_scores(a, b, kind), expected)


@pytest.mark.parametrize("how", ["mean", "sum", "none"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (37, 60)])
def test_sigmoid_loss_is_binary_cross_entropy(chunked, n, m, ids, how):
    x, y = normal(n, 6), normal(m, 6)
    scale, bias = torch.tensor(1.4, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    options = {"x_ids": torch.arange(n) % 6, "y_ids": torch.arange(m) % 5} if ids else {}
    targets = torch.eye(n, m, dtype=torch.float64)
    if ids:
        targets = (targets + (options["x_ids"][:, None] == options["y_ids"])).clamp(max=1)
    upstream = normal(n) if how == "none" else torch.tensor(0.7, dtype=torch.float64)

    def ours(x, y, scale, bias):
        return (gk.sigmoid_loss(x, y, scale=scale, bias=bias, reduction=how, **options) * upstream).sum()

    def plain(x, y, scale, bias):
        logits = torch.einsum("id,jd->ij", x, y) * scale + bias
        rows = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        return ((rows if how == "none" else rows.sum() if how == "sum" else rows.mean()) * upstream).sum()

    tensors = (x, y, scale, bias)
    assert_same(value_and_gradients(ours, tensors), value_and_gradients(plain, tensors), 1e-9, 1e-11)


def test_sigmoid_loss_at_large_logits():
    x, y = torch.randn(40, 8), torch.randn(40, 8)
    tensors = (x, y)
    for scale, bias in ((1e3, -1e4), (1e3, 1e4), (10.0, -10.0)):
        got = value_and_gradients(lambda x, y: gk.sigmoid_loss(x, y, scale=scale, bias=bias), tensors)  # noqa: B023
        wide = [t.double() for t in tensors]
        truth = value_and_gradients(lambda x, y: gk.reference.sigmoid_loss(x, y, scale=scale, bias=bias), wide)  # noqa: B023
        for g, t in zip(got, truth, strict=True):
            torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=1e-4 * float(t.abs().max()))


def test_sigmoid_module_learns_scale_and_bias():
    x = F.normalize(torch.randn(64, 16), dim=1)
    criterion = gk.SigmoidLoss()
    assert criterion.log_scale.exp().item() == pytest.approx(10.0)
    assert criterion.bias.item() == -10.0
    torch.testing.assert_close(criterion(x, x), gk.sigmoid_loss(x, x, scale=10.0, bias=-10.0))
    criterion(x, x).backward()
    assert criterion.log_scale.grad.isfinite()
    assert criterion.bias.grad < 0  # 64 positives at 0 weigh more than the negatives far below
    fixed = gk.SigmoidLoss(learnable=False)
    assert not list(fixed.parameters())
    metric = gk.StructuredSimilarity(16, 4)
    got = gk.SigmoidLoss(metric=metric)(x, x.flip(0))
    torch.testing.assert_close(got, gk.reference.sigmoid_loss(x, x.flip(0), scale=10.0, bias=-10.0, metric=metric))


@pytest.mark.parametrize("ids", [False, True])
def test_triplet_over_every_negative_number_by_number(chunked, ids):
    n, m, margin = 19, 33, 0.8
    x, y = normal(n, 4), normal(m, 4)
    x_ids, y_ids = torch.arange(n) % 6, torch.arange(m) % 6
    expected = [0.0] * n
    for i in range(n):
        for j in range(m):
            if i == j or (ids and int(x_ids[i]) == int(y_ids[j])):
                continue
            s = float(x[i] @ y[j])
            expected[i] += max(margin + s - float(x[i] @ y[i]), 0.0)
            if j < n:
                expected[j] += max(margin + s - float(x[j] @ y[j]), 0.0)
    options = {"negatives": "all", "margin": margin, **({"x_ids": x_ids, "y_ids": y_ids} if ids else {})}
    torch.testing.assert_close(gk.triplet_loss(x, y, reduction="none", **options).tolist(), expected)
    torch.testing.assert_close(float(gk.triplet_loss(x, y, **options)), sum(expected))


def test_gradients_of_a_sum_survive_a_second_backward():
    x, y = leaves(normal(9, 4), normal(12, 4))
    loss = gk.sigmoid_loss(x, y, scale=1.0, bias=0.0)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(x.grad, 4 * once)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"scale": 0.0}, ValueError, "scale: .*> 0, got 0.0"),
        ({"scale": torch.ones(3)}, ValueError, "scale: .*one element"),
        ({"bias": NAN}, ValueError, "bias: .*got nan"),
        ({"bias": "0"}, TypeError, "bias: .*got str"),
        ({"bias": torch.ones(2)}, ValueError, "bias: .*one element"),
        ({"reduction": "rows"}, ValueError, "reduction: .*got 'rows'"),
        ({"y_ids": torch.arange(6)}, ValueError, "x_ids: .*4 and 6 rows"),
        ({"metric": 3}, TypeError, "metric: .*got int"),
    ],
)
def test_bad_options_of_sigmoid(options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.sigmoid_loss(X, Y, **{"scale": 1.0, "bias": 0.0, **options})
    settings = {k: v for k, v in options.items() if k != "y_ids" and not isinstance(v, torch.Tensor)}
    if settings:
        with pytest.raises(kind, match=f"^{message}"):
            gk.SigmoidLoss(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "relu"}, "kind: .*'hinge', 'softplus', 'abs', 'square', got 'relu'"),
        ({"positives": "drop"}, "positives: .*'include', 'exclude', 'negate', got 'drop'"),
        ({"reduction": "mean"}, "reduction: .*'sum', 'none', got 'mean'"),
        ({"scale": -2}, "scale: .*> 0, got -2"),
        ({"bias": INF}, "bias: .*got inf"),
        ({"a_ids": torch.arange(4)}, "b_ids: .*4 and 6 rows"),
    ],
)
def test_bad_options_of_sums(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        gk.sum_scores(X, Y, **{"kind": "abs", **options})
