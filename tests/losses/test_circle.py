"""Circle loss: number by number, in chunks and sweeps, alone, between two sides and by a metric."""

import math

import device_ops
import label_losses
import pytest
import torch
from interpreted import DEVICE, every_dtype
from triton_checks import both_passes, close, few

import gssf_kernels as gk
from gssf_kernels import plan
from gssf_kernels.ops.score_functions import LOGITS

NAN, INF = math.nan, math.inf


def by_number(margin=0.4, scale=80.0, reduction="mean", **inputs):
    """The formula of arXiv 2002.10857, one score at a time."""
    tensors = {k: t for k, t in inputs.items() if t.is_floating_point()}
    terms = []
    for positives, negatives in label_losses.of_each_anchor(tensors, inputs):
        if not positives or not negatives:
            terms.append(inputs["x"].new_zeros(()))
            continue
        pull = sum(torch.exp(-scale * max(1 + margin - s.item(), 0.0) * (s - (1 - margin))) for s in positives)
        push = sum(torch.exp(scale * max(s.item() + margin, 0.0) * (s - margin)) for s in negatives)
        terms.append(torch.log(1 + pull * push))
    terms = torch.stack(terms)
    return terms.mean() if reduction == "mean" else terms.sum() if reduction == "sum" else terms


def ours(**settings):
    return lambda x, labels, **sides: gk.circle_loss(x, labels, **sides, **settings)


@pytest.mark.parametrize("between", [False, True], ids=["alone", "between two sides"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", [{}, {"margin": 0.0, "scale": 1.0}, {"margin": 0.25, "scale": 16.0}])
def test_number_by_number(chunked, settings, reduction, between):
    inputs = label_losses.sides(23, 31, 6, between)
    settings = {**settings, "reduction": reduction}
    got = label_losses.value_and_gradients(ours(**settings), *inputs)
    expected = label_losses.value_and_gradients(lambda **arguments: by_number(**arguments, **settings), *inputs)
    label_losses.assert_equal(got, expected, 1e-11)


@pytest.mark.parametrize("between", [False, True], ids=["alone", "between two sides"])
def test_fp32_is_as_good_as_plain(chunked, between):
    tensors, options = label_losses.sides(300, 170, 40, between, torch.float32)
    truth = label_losses.value_and_gradients(
        lambda **inputs: gk.reference.circle_loss(**inputs), {k: t.double() for k, t in tensors.items()}, options
    )
    plain = label_losses.value_and_gradients(lambda **inputs: gk.reference.circle_loss(**inputs), tensors, options)
    got = label_losses.value_and_gradients(ours(), tensors, options)
    for g, p, t in zip(got, plain, truth, strict=True):
        assert (g.double() - t).norm() <= 2 * (p.double() - t).norm() + 1.2e-7 * t.norm()


def test_a_metric_compares_by_its_factors():
    metric = gk.StructuredSimilarity(8, block_size=4, dtype=torch.float64)
    with torch.no_grad():
        metric.diag.normal_()
        metric.blocks.normal_()
    x, labels = torch.randn(17, 8, dtype=torch.float64), torch.arange(17) % 5
    module = gk.CircleLoss(scale=4.0, metric=metric)
    loss = module(x, labels)
    got = torch.autograd.grad(loss, (metric.diag, metric.blocks))
    expected = gk.reference.circle_loss(x, labels, scale=4.0, metric=metric)
    torch.testing.assert_close(loss, expected)
    for ours, right in zip(got, torch.autograd.grad(expected, (metric.diag, metric.blocks)), strict=True):
        torch.testing.assert_close(ours, right)


def test_anchors_without_a_positive_or_a_negative_contribute_nothing():
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for labels in (torch.arange(5), torch.zeros(5, dtype=torch.int64)):
        loss = gk.circle_loss(x, labels)
        assert loss == 0
        (grad,) = torch.autograd.grad(loss, x)
        assert not grad.any()
    for n in (0, 1):
        y = torch.randn(n, 4, requires_grad=True)
        loss = gk.circle_loss(y, torch.zeros(n, dtype=torch.int64))
        assert loss == 0
        loss.backward()
        assert not y.grad.any()


@pytest.mark.parametrize("special", [NAN, INF])
def test_special_values_propagate(special):
    tensors, options = label_losses.sides(23, 31, 6, True, torch.float32)
    tensors["x"][3, 0] = special
    terms = gk.circle_loss(**tensors, **options, reduction="none")
    expected = gk.reference.circle_loss(**tensors, **options, reduction="none")
    torch.testing.assert_close(terms, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert not terms[3].isfinite()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"margin": -0.1}, ValueError, "margin: .*>= 0, got -0.1"),
        ({"scale": 0.0}, ValueError, "scale: .*> 0, got 0.0"),
        ({"labels": torch.arange(3)}, ValueError, r"labels: expected shape \[4\], got \[3\]"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: .*got torch.float32"),
        ({"y": torch.randn(3, 5)}, ValueError, "y_labels: expected it too, because y is given"),
        ({"y_labels": torch.arange(3)}, ValueError, "y: expected it too, because y_labels is given"),
        ({"y": torch.randn(3, 4), "y_labels": torch.arange(3)}, ValueError, "y: expected 5 columns"),
        ({"y": torch.randn(3, 5), "y_labels": torch.arange(4)}, ValueError, r"y_labels: expected shape \[3\]"),
        ({"metric": "cosine"}, TypeError, "metric: .*got str"),
        ({"reduction": "avg"}, ValueError, "reduction: .*got 'avg'"),
    ],
)
def test_bad_arguments(change, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.circle_loss(**{"x": torch.randn(4, 5), "labels": torch.arange(4), **change})


# By Triton


def on_device(tensors, options):
    return [{k: t.to(DEVICE) for k, t in of.items()} for of in (tensors, options)]


@few
@every_dtype
@pytest.mark.parametrize("bounded", [False, True], ids=["all", "mined"])
@pytest.mark.parametrize("score", ["circle", "multi_similarity"])
@pytest.mark.parametrize("between", [False, True], ids=["alone", "between two sides"])
@pytest.mark.parametrize("route", ["small", "chunks"])
def test_log_sums_by_label(route, between, score, bounded, dtype):
    """Their values and gradients, on each route, against the formula in fp64."""
    tensors, options = label_losses.sides(50, 70, 24, between, dtype)
    a, b = tensors["x"], tensors.get("y")
    labels = options["labels"], options.get("y_labels", options["labels"])
    constants = [0.25, 3.0] if score == "circle" else [2.0, 5.0, 0.5]
    bounds = torch.randn(2, 50) / 3 if bounded else None
    on = [t if t is None else t.to(DEVICE) for t in (a, b, *labels, bounds)]
    call = (*on[:2], None, 1.0, "", score, constants, *on[2:], not between)
    with plan.forced(logsumexp_scores=route, logsumexp_scores_backward=route):
        row_max, row_log, *rest = device_ops.logsumexp_scores(*call)
        assert [t.numel() for t in rest] == [0] * 4
        grad = torch.randn(2, 50)
        drow = torch.where((row_max + row_log).cpu() == -INF, 0, grad).to(DEVICE)
        arguments = (
            drow,
            None,
            None,
            *on[:2],
            None,
            1.0,
            row_max,
            row_log,
            *rest[:2],
            [True, between, False],
            None,
            "",
        )
        da, db, _ = device_ops.logsumexp_scores_backward(*arguments, score, constants, *on[2:], not between)

    leaves = [t.double().requires_grad_() for t in (a, b) if t is not None]
    s = leaves[0] @ leaves[-1].T
    positive = labels[0][:, None] == labels[1]
    inside = torch.ones_like(positive) if between else ~torch.eye(50, dtype=torch.bool)
    if bounded:
        inside &= torch.where(positive, s < bounds[0][:, None].double(), s > bounds[1][:, None].double())
    if score == "circle":
        weight = 3.0 * torch.where(positive, 1.25 - s, s + 0.25).relu().detach()
        t = torch.where(positive, -weight * (s - 0.75), weight * (s - 0.25))
    else:
        t = torch.where(positive, -2.0 * (s - 0.5), 5.0 * (s - 0.5))
    both = torch.stack([t.masked_fill(~(inside & member), -INF).logsumexp(1) for member in (positive, ~positive)])
    eps = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close((row_max + row_log).cpu().double(), both.detach(), rtol=eps, atol=8 * eps)
    torch.where(both == -INF, 0, both * grad.double()).sum().backward()
    for got, leaf in zip((da, db), leaves, strict=False):
        torch.testing.assert_close(
            got.cpu().double(), leaf.grad, rtol=4 * eps, atol=16 * eps * float(leaf.grad.abs().max())
        )


@few
@pytest.mark.parametrize("leave_out", [False, True], ids=["", "leave out"])
@pytest.mark.parametrize("bounded", [False, True], ids=["all", "mined"])
@pytest.mark.parametrize(("score", "constants"), [("circle", [0.25, 3.0]), ("multi_similarity", [2.0, 5.0, 0.5])])
def test_passes_by_label(score, constants, bounded, leave_out):
    """Triton's passes over a chunk of scores in fp32 against plain PyTorch's in fp64."""
    n, m = 17, 70
    s = torch.rand(n, m) * 2 - 1
    labels = torch.arange(n) % 5 - 2**40, torch.arange(m) % 5 - 2**40
    bounds = (torch.randn(2, n) / 3, torch.randn(2, m) / 3) if bounded else (None, None)
    by_label = (s, torch.ones(()), score, constants, *labels, *bounds, 25, leave_out)
    before = torch.randn(2, m), torch.rand(2, m) + 1
    arguments = (*by_label, torch.empty(2, n), torch.empty(2, n), *before)
    results = list(both_passes("logsumexp_pass", arguments, (10, 11, 12, 13)))
    for (top, exact_top), (total, exact_total) in (results[:2], results[2:]):
        close(top + total.log(), exact_top + exact_total.log(), torch.float32, rtol=2e-6)

    row_max, row_sum, col_max, col_sum = (exact.float() for _, exact in results)
    row = row_max, row_sum.log(), torch.where(row_sum == 0, 0, torch.randn(2, n))
    col = col_max, col_sum.log(), torch.randn(2, m)
    for got, expected in both_passes("softmax_pass", (*by_label, *row, *col, torch.empty(n)), (0, 16)):
        close(got, expected, torch.float32, rtol=1e-5)


@pytest.mark.parametrize(("score", "constants"), [("circle", (0.3, 7.1)), ("multi_similarity", (0.01, 0.3, 0.7))])
def test_the_logits_of_the_composite_are_of_the_scores_dtype(score, constants):
    """Constants that fp32 would round, on fp64 scores: number by number."""
    s = torch.linspace(-1, 1, 12, dtype=torch.float64)
    positive = torch.arange(12) % 3 == 0
    t, slope = LOGITS[score](s, positive, *constants)
    for k, number in enumerate(s.tolist()):
        if score == "circle":
            margin, scale = constants
            weight = scale * max((1 + margin - number) if positive[k] else (number + margin), 0)
            derivative, optimum = (-weight, 1 - margin) if positive[k] else (weight, margin)
        else:
            alpha, beta, optimum = constants
            derivative = -alpha if positive[k] else beta
        assert slope[k].item() == pytest.approx(derivative, rel=1e-14, abs=1e-15)
        assert t[k].item() == pytest.approx(derivative * (number - optimum), rel=1e-13, abs=1e-15)
