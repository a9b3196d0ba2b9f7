"""SigLIP's loss: against binary cross-entropy, at extremes, and how many kernels a step launches.

Its sums by Triton are those of `ops/test_sums.py`.
"""

import pytest
import torch
import torch.nn.functional as F
from dense_cases import NAN, X, Y, assert_same, check_learnt_scale, leaves, normal, value_and_gradients
from kernel_modules import tiles
from launch_counts import (
    REDUCTIONS,
    check_count,
    check_count_by_a_metric,
    check_learnt_logarithm,
    check_one_side_twice_by_a_metric,
    counted,
    every_reduction_by_a_metric,
    every_small_batch,
    ids_of,
    launches,
    metric_of,
)

import gssf_kernels as gk


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_module_learns_the_logarithm_of_its_scale(reduction):
    """As autograd would through the exponential."""
    check_learnt_scale(gk.SigmoidLoss, gk.reference.sigmoid_loss, reduction)


# How many kernels a step launches: (forward, backward); t is learned too


def by_scale(x, y, t, **options):
    return gk.sigmoid_loss(x, y, scale=t, bias=-1.0, **options)


def by_bias(x, y, t, **options):
    return gk.sigmoid_loss(x, y, scale=10.0, bias=t, **options)


STEPS = {
    "numbers": (lambda x, y, t: gk.sigmoid_loss(x, y, scale=10.0, bias=-1.0), (2, 1)),
    "learnable": (by_scale, (2, 1)),
    "bias": (lambda x, y, t: by_bias(x, y, t, reduction="sum"), (2, 1)),
    "one side twice": (lambda x, y, t: by_scale(x, x, t), (2, 1)),
    "with ids": (lambda x, y, t: by_scale(x, y, t, x_ids=ids_of(x)), (2, 1)),
    "none": (lambda x, y, t: by_scale(x, y, t, reduction="none"), (2, 2)),
    "none bias": (lambda x, y, t: by_bias(x, y, t, reduction="none"), (2, 2)),
    "none with ids": (lambda x, y, t: by_scale(x, y, t, x_ids=ids_of(x), reduction="none"), (2, 2)),
    "none of one side twice": (lambda x, y, t: by_scale(x, x, t, reduction="none"), (2, 2)),
}
BY_A_METRIC = {"learnable": (by_scale, (3, 2)), "bias": (by_bias, (3, 2))}


@every_small_batch(STEPS)
def test_launches(loss, expected, n, dtype):
    check_count(loss, expected, n, dtype)


@every_reduction_by_a_metric(BY_A_METRIC)
def test_launches_by_a_metric(loss, expected, reduction, dtype):
    check_count_by_a_metric(loss, expected, reduction, dtype)


@counted
def test_what_it_launches():
    for extra in (0, 37):
        assert launches(by_scale, 128, extra=extra) == (["sweep_kernel", "gradients_kernel"], ["scaled_kernel"])
        assert launches(by_scale, 128, extra=extra, reduction="none") == (
            ["sweep_kernel", "merge_terms_kernel"],
            ["sweep_kernel", "gradients_kernel"],
        )


@counted
def test_what_a_metric_launches():
    kernels = launches(by_scale, 128, metric=metric_of(torch.float32), reduction="none")
    assert kernels[0] == ["sides_kernel", "sweep_kernel", "merge_terms_kernel"]
    assert kernels[1] == ["sweep_kernel", "gradients_kernel", "sides_kernel"]


@counted
@REDUCTIONS
def test_launches_of_a_module_that_learns_a_logarithm(reduction):
    check_learnt_logarithm(gk.SigmoidLoss(reduction=reduction))


@counted
@REDUCTIONS
def test_one_side_twice_by_a_metric(reduction):
    check_one_side_twice_by_a_metric(lambda x, y, t, **options: by_scale(x, x, t, **options), reduction)


@counted
def test_what_many_bf16_scores_launch(monkeypatch):
    """A row panel takes one sweep and two products; the backward scales what the forward has made."""
    sweeps = []
    for scores in (2**26, 2**21):  # one, and two of 3,072 x 4,096
        monkeypatch.setattr(tiles, "ROW_PANEL_SCORES", scores)
        monkeypatch.setattr(tiles, "SLAB_ENTRIES", scores // 64)
        forward, backward = launches(by_scale, 3072, torch.bfloat16, 1024)
        sweeps.append((forward.count("sweep_kernel"), backward.count("sweep_kernel")))
        assert not {"chunk_kernel"} & {*forward, *backward}
    assert sweeps[0] == (1, 0)
    assert sweeps[1][0] == 6
