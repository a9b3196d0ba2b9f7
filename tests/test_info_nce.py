"""logsumexp_scores and InfoNCE: against formulas written otherwise, over chunks and at extremes."""

import pytest
import torch
import torch.nn.functional as F
from dense_cases import INF, NAN, X, Y, assert_same, leaves, normal, value_and_gradients

import gssf_kernels as gk
from gssf_kernels import dense

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


@pytest.mark.parametrize("value", [0, -1.0, NAN, "1"])
def test_bad_start_of_a_learnable_scale(value):
    with pytest.raises((TypeError, ValueError), match=r"^scale: "):
        gk.InfoNCELoss(scale=value)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [gk.InfoNCELoss, gk.SigmoidLoss])
def test_a_module_learns_the_logarithm_of_its_scale(loss, reduction):
    """As autograd would through the exponential."""
    criterion = loss(scale=3.0, reduction=reduction, dtype=torch.float64)
    x, y, weight = normal(20, 5), normal(25, 5), normal(20, 1)[:, 0]
    tensors = [*leaves(x, y), *criterion.parameters()]
    value = criterion(*tensors[:2])
    results = [[value, *torch.autograd.grad((value * weight).sum(), tensors)]]
    twins = [t.detach().clone().requires_grad_() for t in tensors]
    options = {"scale": twins[2].exp(), "reduction": reduction}
    if loss is gk.InfoNCELoss:
        value = gk.reference.info_nce_loss(*twins[:2], **options)
    else:
        value = gk.reference.sigmoid_loss(*twins[:2], bias=twins[3], **options)
    results.append([value, *torch.autograd.grad((value * weight).sum(), twins)])
    assert_same(*results, 1e-9)
