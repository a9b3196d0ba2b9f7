"""The gradient sweep and its losses: against formulas written otherwise, over chunks, at extremes, in memory."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk
from gssf_kernels import dense

INF, NAN = math.inf, math.nan
X, Y = torch.randn(4, 8), torch.randn(6, 8)


@pytest.fixture(params=[1, 700, 1 << 22], ids=["chunks of 16 rows", "ragged chunks", "one chunk"])
def chunked(request, monkeypatch):
    """Every number of rows to a chunk gives the same results."""
    monkeypatch.setitem(dense.CHUNK_SCORES, "cpu", request.param)
    monkeypatch.setattr(dense, "MIN_ROWS", 16)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def value_and_gradients(loss, tensors):
    tensors = leaves(*tensors)
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def assert_same(got, expected, rtol=1e-11, atol=1e-12):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=rtol, atol=atol)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


# logsumexp_scores


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (40, 33), (70, 1100), (130, 64)])
def test_logsumexp_over_any_chunks(chunked, n, m):
    a, b, scale = normal(n, 9), normal(m, 9), torch.tensor(1.7, dtype=torch.float64)

    def ours(a, b, scale):
        rows, cols = gk.logsumexp_scores(a, b, scale=scale)
        return (rows.sin().sum() + (cols * cols).sum()).tanh()

    def plain(a, b, scale):
        t = torch.einsum("id,jd->ij", a, b) * scale
        return (torch.logsumexp(t, 1).sin().sum() + torch.logsumexp(t, 0).square().sum()).tanh()

    assert_same(value_and_gradients(ours, (a, b, scale)), value_and_gradients(plain, (a, b, scale)), 1e-9, 1e-11)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand(chunked, size):
    a, b = torch.randn(50, 8), torch.randn(90, 8)
    a[:, 0], b[:, 0] = 1, size  # beside ordinary differences
    b[7, 0], a[3, 0] = -size, 5
    got = value_and_gradients(lambda a, b: torch.cat(gk.logsumexp_scores(a, b)).sum(), (a, b))
    t64 = (a.double(), b.double())
    truth = value_and_gradients(lambda a, b: torch.cat(gk.reference.logsumexp_scores(a, b)).sum(), t64)
    plain = value_and_gradients(lambda a, b: torch.cat(gk.reference.logsumexp_scores(a, b)).sum(), (a, b))
    for g, p, t in zip(got, plain, truth, strict=True):
        assert g.isfinite().all()
        assert (g.double() - t).norm() <= 2 * (p.double() - t).norm() + 1.2e-7 * t.norm()


@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_infinities_and_nan_are_those_of_torch(chunked, special):
    """Alone and in whole rows and columns; then by way of the inputs, where 0 · ∞ spreads NaN."""
    t = torch.randn(80, 600)
    t[torch.tensor([0, 17, 79]), 5] = special
    t[20:40, 9] = special
    t[33] = special
    t[:, 30] = special
    t[:, 550] = special
    for got, expected in zip(run_logsumexp_pass(t), (t.logsumexp(1), t.logsumexp(0)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    a, b = torch.randn(80, 3), torch.randn(40, 3)
    a[0, 0] = special
    for got, expected in zip(gk.logsumexp_scores(a, b), gk.reference.logsumexp_scores(a, b), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def run_logsumexp_pass(t, rows=dense.MIN_ROWS):
    """Log-sums of t by its rows chunk by chunk, on whatever backend t's device has."""
    n, m = t.shape
    row_max, row_sum, col_max, col_sum = (t.new_full((size,), fill) for size in (n, m) for fill in (-INF, 0))
    for k in range(0, n, rows):
        part = slice(k, k + rows)
        torch.ops.gssf.logsumexp_pass(t[part], t.new_ones(()), row_max[part], row_sum[part], col_max, col_sum)
    return row_max + row_sum.log(), col_max + col_sum.log()


def test_nothing_to_sum():
    rows, cols = gk.logsumexp_scores(torch.randn(0, 3), torch.randn(4, 3))
    assert rows.shape == (0,)
    assert cols.tolist() == [-INF] * 4
    a = torch.randn(3, 2, requires_grad=True)
    rows, cols = gk.logsumexp_scores(a, torch.randn(0, 2))
    assert rows.tolist() == [-INF] * 3
    rows.sum().backward()
    assert not a.grad.any()


# InfoNCE


def soft_cross_entropy(x, y, scale, targets, smoothing=0.0):
    """Both directions by torch's cross-entropy; targets [N, M] 0/1."""
    count = x.shape[0]
    t = scale * x @ y.mT
    rows = targets / targets.sum(1, keepdim=True)
    cols = targets[:, :count].mT / targets[:, :count].mT.sum(1, keepdim=True)
    loss = F.cross_entropy(t, rows, label_smoothing=smoothing)
    return (loss + F.cross_entropy(t[:, :count].mT, cols, label_smoothing=smoothing)) / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("which", ["none", "groups", "own id differs", "no id in common"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (2, 5), (40, 40), (61, 90)])
def test_info_nce_is_cross_entropy(chunked, n, m, which, smoothing):
    x, y, scale = normal(n, 6), normal(m, 6), torch.tensor(1.3, dtype=torch.float64)
    x_ids, y_ids = torch.randint(0, 9, (n,)), torch.randint(0, 9, (m,))
    if which == "groups":
        y_ids[:n] = x_ids
    if which == "no id in common":
        y_ids += 100
    ids = {} if which == "none" else {"x_ids": x_ids, "y_ids": y_ids}
    targets = torch.zeros(n, m, dtype=torch.float64)
    for i in range(n):
        for j in range(m):
            targets[i, j] = i == j or (which != "none" and x_ids[i] == y_ids[j])

    def ours(x, y, scale):
        return gk.info_nce_loss(x, y, scale=scale, label_smoothing=smoothing, **ids)

    def plain(x, y, scale):
        return soft_cross_entropy(x, y, scale, targets, smoothing)

    assert_same(value_and_gradients(ours, (x, y, scale)), value_and_gradients(plain, (x, y, scale)), 1e-9, 1e-11)


def test_info_nce_of_a_trained_model_is_as_exact_as_cross_entropy():
    """A small difference of large logits: taken from lse as one number it would keep one digit."""
    x = F.normalize(torch.randn(200, 64), dim=1)
    y = F.normalize(x + 0.02 * torch.randn(200, 64), dim=1)
    truth = soft_cross_entropy(x.double(), y.double(), 40.0, torch.eye(200, dtype=torch.float64))
    plain = soft_cross_entropy(x, y, 40.0, torch.eye(200))
    assert 0 < truth < 1e-6
    for options in ({}, {"x_ids": torch.arange(200)}):
        ours = gk.info_nce_loss(x, y, scale=40.0, **options)
        assert abs(ours.double() - truth) <= 2 * abs(plain.double() - truth) + 1e-7 * truth


def test_info_nce_by_a_metric():
    x, y = normal(30, 16), normal(44, 16)
    metric = gk.StructuredSimilarity(16, 4, dtype=torch.float64)
    with torch.no_grad():
        metric.blocks.normal_()
    results = []
    for module, way in ((gk, "function"), (gk.reference, "function"), (gk, "module")):
        tensors = [*leaves(x, y), metric.diag, metric.blocks]
        if way == "module":
            loss = gk.InfoNCELoss(scale=5.0, metric=metric, dtype=torch.float64)(*tensors[:2])
        else:
            loss = module.info_nce_loss(*tensors[:2], scale=5.0, metric=metric)
        results.append([loss.detach(), *torch.autograd.grad(loss, tensors)])
    assert_same(results[0], results[1], 1e-9)
    assert_same(results[2], results[1], 1e-9)


def test_info_nce_module_learns_its_scale():
    x = F.normalize(torch.randn(64, 16), dim=1)
    criterion = gk.InfoNCELoss()
    assert criterion.log_scale.exp().item() == pytest.approx(1 / 0.07)
    assert "learnable=True" in repr(criterion)
    criterion(x, x).backward()
    assert criterion.log_scale.grad < 0  # every pair is right: a sharper softmax is better
    fixed = gk.InfoNCELoss(scale=10.0, learnable=False)
    assert not list(fixed.parameters())
    assert list(fixed.state_dict()) == ["log_scale"]
    torch.testing.assert_close(fixed(x, x), gk.info_nce_loss(x, x, scale=10.0))


def test_info_nce_scale_gradient_with_both_sides_frozen():
    x, y = normal(20, 5), normal(25, 5)
    for frozen in ((), (0,), (1,), (0, 1)):
        tensors = leaves(x, y, torch.tensor(2.0, dtype=torch.float64))
        for k in frozen:
            tensors[k].requires_grad_(False)
        twins = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        gk.info_nce_loss(tensors[0], tensors[1], scale=tensors[2]).backward()
        gk.reference.info_nce_loss(twins[0], twins[1], scale=twins[2]).backward()
        for t, twin in zip(tensors, twins, strict=True):
            assert (t.grad is None) == (twin.grad is None)
            if t.grad is not None:
                torch.testing.assert_close(t.grad, twin.grad)


def test_half_precision_gradients_of_large_batches_do_not_vanish():
    """1/N of a mean times a probability of 1/N is below fp16's smallest number."""
    x, y = torch.randn(300, 8).half() / 4, torch.randn(300, 8).half() / 4
    got = value_and_gradients(lambda x, y: gk.info_nce_loss(x, y, scale=1e-3) * 1e3, (x, y))
    truth = value_and_gradients(lambda x, y: gk.info_nce_loss(x, y, scale=1e-3) * 1e3, (x.double(), y.double()))
    for g, t in zip(got, truth, strict=True):
        assert (g.double() - t).norm() <= 2e-3 * t.norm()


# sum_scores, sigmoid_loss, triplet_loss over every negative


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


# relational distillation


def unit_rows(n, d):
    return F.normalize(normal(n, d), dim=1)


@pytest.mark.parametrize("kind", ["mae", "mse"])
@pytest.mark.parametrize("n", [2, 3, 40])
def test_distillation_number_by_number(chunked, n, kind):
    h, u, t = unit_rows(n, 6), unit_rows(n, 5), unit_rows(n, 9)
    lam, tau = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)

    def ours(h, lam, tau):
        return gk.relational_distillation_loss(h, u, t, lam=lam, tau=tau, kind=kind)

    def plain(h, lam, tau):
        total = 0.0
        for i in range(n):
            for j in range(n):
                if i == j:
                    continue
                student, image, text = ((x[i] * x[j]).sum() / tau for x in (h, u, t))
                mixture = lam * text + (1 - lam) * image
                for weight, relation in zip((2.0, 1.0, 1.0), (student, image, text), strict=True):
                    gap = relation - mixture
                    total = total + weight * (gap.abs() if kind == "mae" else gap * gap)
        return total / (n * (n - 1))

    assert_same(value_and_gradients(ours, (h, lam, tau)), value_and_gradients(plain, (h, lam, tau)), 1e-10, 1e-12)


@pytest.mark.parametrize("kind", ["mae", "mse"])
def test_a_student_equal_to_the_mixture_gets_no_gradient(kind):
    h = torch.randint(-2, 3, (90, 4)).float()  # exact scores: every difference is 0
    student = h.clone().requires_grad_()
    gk.relational_distillation_loss(student, h, h, lam=0.5, tau=0.07, kind=kind).backward()
    assert not student.grad.any()


@pytest.mark.parametrize("n", [0, 1])
def test_distillation_of_no_pair_is_zero(n):
    h = torch.randn(n, 4, requires_grad=True)
    loss = gk.relational_distillation_loss(h, torch.randn(n, 3), torch.randn(n, 5), lam=0.5, tau=0.1)
    assert loss == 0
    loss.backward()
    assert not h.grad.any()


def test_distillation_module_learns_lam_and_tau():
    criterion = gk.RelationalDistillationLoss(kind="mse")
    assert (criterion.lam.item(), criterion.tau.item()) == (0.5, pytest.approx(0.07))
    assert "kind='mse'" in repr(criterion)
    sides = [F.normalize(torch.randn(30, 8), dim=1) for _ in range(3)]
    loss = criterion(*sides)
    torch.testing.assert_close(loss, gk.relational_distillation_loss(*sides, lam=0.5, tau=0.07, kind="mse"))
    loss.backward()
    torch.testing.assert_close(criterion.tau.grad, -2 * loss.detach() / 0.07)  # the loss goes as 1/tau²
    assert criterion.lam.grad.isfinite()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"image_teacher": torch.randn(5, 8)}, ValueError, r"image_teacher: expected the 4 rows.*\[5, 8\]"),
        ({"text_teacher": torch.randn(3, 8)}, ValueError, r"text_teacher: expected the 4 rows.*\[3, 8\]"),
        ({"text_teacher": torch.randn(4, 8).double()}, TypeError, r"text_teacher: .*torch.float64"),
        ({"student": torch.randn(4)}, ValueError, r"student: .*got \[4\]"),
        ({"lam": torch.ones(2)}, ValueError, r"lam: .*one element, got \[2\]"),
        ({"lam": "half"}, TypeError, r"lam: .*got str"),
        ({"tau": 0.0}, ValueError, r"tau: .*> 0, got 0.0"),
        ({"weights": (1.0, 2.0)}, TypeError, r"weights: expected three numbers"),
        ({"weights": (1.0, -2.0, 0.0)}, ValueError, r"weights\[1\]: .*got -2.0"),
        ({"kind": "huber"}, ValueError, r"kind: .*'mae', 'mse', got 'huber'"),
    ],
)
def test_bad_distillation(change, kind, message):
    given = {"student": X, "image_teacher": X, "text_teacher": X, "lam": 0.5, "tau": 0.1, **change}
    with pytest.raises(kind, match=f"^{message}"):
        gk.relational_distillation_loss(**given)


# What every function here promises


def _with_ids(x, y, scale, module=gk):
    return module.info_nce_loss(x, y, scale=scale, x_ids=_ids(x), y_ids=_ids(y), label_smoothing=0.1)


# of x, y and scalar parameters, in gk or gk.reference
LOSSES = {
    "logsumexp": lambda x, y, scale, module=gk: torch.cat(module.logsumexp_scores(x, y, scale=scale)).square().sum(),
    "info_nce": lambda x, y, scale, module=gk: module.info_nce_loss(x, y, scale=scale),
    "info_nce ids": _with_ids,
    "sums": lambda x, y, scale, bias, module=gk: module.sum_scores(x, y, "softplus", scale=scale, bias=bias),
    "rows' sums": lambda x, y, scale, bias, module=gk: _weighted(
        module.sum_scores(x, y, "square", scale=scale, bias=bias, positives="negate", reduction="none")
    ),
    "sigmoid": lambda x, y, scale, bias, module=gk: module.sigmoid_loss(x, y, scale=scale, bias=bias),
    "sigmoid ids": lambda x, y, scale, bias, module=gk: module.sigmoid_loss(
        x, y, scale=scale, bias=bias, x_ids=_ids(x), y_ids=_ids(y)
    ),
    "distillation": lambda x, y, lam, tau, module=gk: _distil(x, y, lam, tau, "mse", module),
    "triplet": lambda x, y, module=gk: module.triplet_loss(x, y, negatives="all", x_ids=_ids(x), y_ids=_ids(y)),
}
SCALARS = {"logsumexp": (0.7,), "info_nce": (0.7,), "info_nce ids": (0.7,), "sums": (0.7, -1.0)}
SCALARS |= {"rows' sums": (0.7, -1.0), "sigmoid": (0.7, -1.0), "sigmoid ids": (0.7, -1.0), "triplet": ()}
SCALARS |= {"distillation": (0.3, 0.5)}


def _distil(x, y, lam, tau, kind, module):
    """y gets no gradient: the teachers are constants, rows that follow from the place alone."""
    places = torch.arange(1, x.shape[0] * x.shape[1] + 1, device=x.device).to(x).view(x.shape)
    teachers = places.cos(), places.sqrt().sin()
    return module.relational_distillation_loss(x, *teachers, lam=lam, tau=tau, kind=kind) + 0 * y.sum()


def _weighted(t):
    return (t * torch.arange(1, t.shape[0] + 1).to(t)).sum()


def sample(name, n, m, d, dtype=torch.float64):
    """Inputs of LOSSES[name]."""
    scalars = [torch.tensor(v, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for v in SCALARS[name]]
    return [normal(n, d, dtype=dtype), normal(m, d, dtype=dtype), *scalars]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_scalar_gradients_as_exact_as_plain(name, dtype):
    """Single numbers, whose error is a matter of luck: root mean squares over sixteen inputs."""
    squares = {"ours": 0.0, "plain": 0.0}
    for _ in range(16):
        tensors = sample(name, 60, 90, 24, dtype)
        truth = value_and_gradients(lambda *t: LOSSES[name](*t, module=gk.reference), [t.double() for t in tensors])
        for who, module in (("ours", gk), ("plain", gk.reference)):
            found = value_and_gradients(lambda *t, module=module: LOSSES[name](*t, module=module), tensors)
            pairs = zip((found[0], *found[3:]), (truth[0], *truth[3:]), strict=True)
            errors = torch.stack([(f.double() - t) / t for f, t in pairs])
            squares[who] = squares[who] + errors.square()
    floor = 6e-8  # half a unit in the last place
    assert (squares["ours"].div(16).sqrt() <= 2 * squares["plain"].div(16).sqrt() + floor).all(), squares


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_with_scalars(name):
    torch.autograd.gradcheck(LOSSES[name], leaves(*sample(name, 6, 9, 5)), nondet_tol=0.0)


def _ids(x):
    return torch.arange(x.shape[0], device=x.device) % 7


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_every_time(name, chunked):
    tensors = sample(name, 150, 310, 40, torch.float32)
    first = value_and_gradients(LOSSES[name], tensors)
    for _ in range(3):
        for again, before in zip(value_and_gradients(LOSSES[name], tensors), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_with_shapes_that_change(name):
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True)
    for n, m in ((20, 30), (33, 33), (41, 90)):
        tensors = sample(name, n, m, 8)
        assert_same(value_and_gradients(compiled, tensors), value_and_gradients(LOSSES[name], tensors))


@pytest.mark.parametrize("name", LOSSES)
def test_func_grad_and_one_derivative_only(name):
    x, *rest = tensors = sample(name, 20, 24, 8)
    got = torch.func.grad(LOSSES[name], argnums=tuple(range(len(tensors))))(*tensors)
    assert_same(got, value_and_gradients(LOSSES[name], tensors)[1:])
    # In each, mixed with something twice differentiable. Teachers get no gradient, and what tau gets is plain PyTorch.
    exempt = {1, 3} if name == "distillation" else set()
    for k in set(range(len(tensors))) - exempt:
        leaf = tensors[k].clone().requires_grad_()
        value = LOSSES[name](*tensors[:k], leaf, *tensors[k + 1 :])
        (grad,) = torch.autograd.grad(value + leaf.pow(3).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda x: torch.func.grad(LOSSES[name])(x, *rest).square().sum())(x)


_PEAK = """
import resource, sys, torch, gssf_kernels as gk
sys.path.insert(0, sys.argv[3])
from test_dense import LOSSES, leaves, sample
torch.set_num_threads(2)
loss, n = LOSSES[sys.argv[1]], int(sys.argv[2])
tensors = leaves(*sample(sys.argv[1], n, n, 64, torch.float32))
loss(*leaves(*sample(sys.argv[1], 64, 64, 64, torch.float32))).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(*tensors).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(gk.backends()["logsumexp_scores"]["cpu"] != "cpp", reason="the reference pass copies its chunk")
@pytest.mark.parametrize("name", LOSSES)
def test_no_matrix_is_stored(name):
    """Forward and backward at N = M = 8192 take less than 64 MiB besides the gradients; one matrix is 256 MiB."""
    n = 8192
    command = [sys.executable, "-c", _PEAK, name, str(n), str(dense.__file__).replace("gssf_kernels/dense.py", "tests")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    peak_mib, gradients_mib = int(out.stdout) / 1024, 2 * n * 64 * 4 / 2**20
    assert peak_mib - gradients_mib < 64, f"{peak_mib:.0f} MiB"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"scale": 0}, ValueError, "scale: .*> 0, got 0"),
        ({"scale": -1.0}, ValueError, "scale: .*> 0, got -1.0"),
        ({"scale": NAN}, ValueError, "scale: .*got nan"),
        ({"scale": INF}, ValueError, "scale: .*got inf"),
        ({"scale": "1"}, TypeError, "scale: .*got str"),
        ({"scale": True}, TypeError, "scale: .*got bool"),
        ({"scale": torch.ones(2)}, ValueError, r"scale: .*one element, got \[2\]"),
        ({"scale": torch.tensor(1)}, TypeError, "scale: .*got torch.int64"),
        ({"scale": torch.ones((), device="meta")}, ValueError, "scale: expected device cpu, got meta"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing: .*\[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing: .*got -0.1"),
        ({"label_smoothing": NAN}, ValueError, "label_smoothing: .*got nan"),
        ({"symmetric": 1}, TypeError, "symmetric: .*got int"),
        ({"reduction": "avg"}, ValueError, "reduction: .*got 'avg'"),
        ({"metric": "cosine"}, TypeError, "metric: .*got str"),
        ({"x_ids": torch.arange(4)}, ValueError, "y_ids: .*4 and 6 rows"),
    ],
)
def test_bad_options_of_info_nce(options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.info_nce_loss(X, Y, **{"scale": 1.0, **options})
    settings = {k: v for k, v in options.items() if k not in ("x_ids", "scale")}
    if settings:
        with pytest.raises(kind, match=f"^{message}"):
            gk.InfoNCELoss(**settings)


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


@pytest.mark.parametrize("value", [0, -1.0, NAN, "1"])
def test_bad_start_of_a_learnable_scale(value):
    with pytest.raises((TypeError, ValueError), match=r"^scale: "):
        gk.InfoNCELoss(scale=value)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"distillation"}))
def test_sides_are_checked(name):
    which = "ab" if "sum" in name else "xy"
    with pytest.raises(ValueError, match=rf"^{which[1]}: expected 8 columns"):
        LOSSES[name](X, torch.randn(6, 9), *SCALARS[name])
    with pytest.raises(TypeError, match=rf"^{which[1]}: expected .*torch.float32"):
        LOSSES[name](X, Y.double(), *SCALARS[name])
