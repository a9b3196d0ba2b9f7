"""InfoNCE: against formulas written otherwise, over chunks and at extremes, its Triton kernels and launches."""

import device_ops
import pytest
import torch
import torch.nn.functional as F
from dense_cases import INF, NAN, X, Y, assert_same, check_learnt_scale, leaves, normal, value_and_gradients
from interpreted import DEVICE, DTYPES, every_dtype
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
from triton_checks import close, every_reduction, few, log_sum_truth, two_sides

import gssf_kernels as gk
from gssf_kernels import plan, reference


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
def test_a_module_learns_the_logarithm_of_its_scale(reduction):
    """As autograd would through the exponential."""
    check_learnt_scale(gk.InfoNCELoss, gk.reference.info_nce_loss, reduction)


# By Triton

PAIRED = [(1, 1, 1), (1, 40, 3), (16, 32, 16), (17, 33, 17), (50, 97, 24), (70, 70, 40)]


def ids_in_common(n, m, ids):
    """Ids in common and not, one that none of the other side has, and none of the pairs' own."""
    return (torch.arange(n) % 5 - 2**40, (torch.arange(m) + 1) % 7 - 2**40) if ids else (None, None)


class OpCall:
    """A call of `info_nce` and its truth in fp64, by the definition."""

    def __init__(self, n, m, d, dtype, reduction="mean", ids=False, epsilon=0.0, symmetric=True, learnable=True,
                 twice=False):  # fmt: skip
        self.a, self.b = two_sides(n, m, d, dtype, twice)
        self.ids = ids_in_common(n, n if twice else m, ids)
        self.options = epsilon, symmetric, reduction
        self.scale, self.learnable = torch.tensor(0.75), learnable

    def truth(self):
        """(leaves, t, log-sums and targets [N], each of both directions or their sum or mean)"""
        leaves, t, rows, cols, _ = log_sum_truth(self.a, self.b, self.scale)
        epsilon, symmetric, reduction = self.options
        n, m = t.shape
        same = torch.eye(n, m, dtype=torch.bool)
        if self.ids[0] is not None:
            same = same | (self.ids[0][:, None] == self.ids[1])

        def direction(t, same, log_sums):
            same = same.double()
            target = torch.where(same > 0, t * same / same.sum(1, keepdim=True), 0).sum(1) * (1 - epsilon)
            return torch.stack((log_sums, target + epsilon * t.mean(1) if epsilon else target))

        results = direction(t, same, rows)
        if symmetric:
            results = (results + direction(t[:, :n].T, same[:, :n].T, cols[:n])) / 2
        return leaves, t, *(reference.reduce(part, reduction) for part in results)

    def run(self, grad=None, needs=(True, True, True), logarithm=False):
        """(what is found, the gradients)"""
        scale = (self.scale.log() if logarithm else self.scale) if self.learnable else None
        on = [t if t is None else t.to(DEVICE) for t in (self.a, self.b, scale)]
        ids = [t if t is None else t.to(DEVICE) for t in self.ids]
        constant = None if logarithm else 1.0 if self.learnable else float(self.scale)
        inputs = (*on, constant, *ids, *self.options)
        results = device_ops.info_nce(*inputs)
        if grad is None:
            return results, None
        needs = [needs[0], needs[1] and self.b is not None, needs[2] and self.learnable]
        return results, device_ops.info_nce_backward(grad.to(DEVICE), *inputs, *results[1:-2], needs)

    def check(self, needs=(True, True, True), size=1.0, expanded=False, logarithm=False):
        leaves, t, *parts = self.truth()
        loss = parts[0] - parts[1]
        grad = size * (torch.randn(loss.shape) if not expanded else torch.ones(()).expand(loss.shape))
        # the shares and the targets' weights of each score, which may cancel
        weights = sum(torch.autograd.grad(part, t, grad.double(), retain_graph=True)[0].abs() for part in parts)
        loss.backward(grad.double())
        x, y = self.a.double().abs(), (self.a if self.b is None else self.b).double().abs()
        of_a, of_b, of_scale = (w * self.scale for w in (weights @ y, weights.T @ x, weights * t.abs() / self.scale**2))
        likes = (torch.maximum(of_a, of_b) if self.b is None else of_a, of_b, of_scale.detach().sum())
        (got, *_, positive_logit), gradients = self.run(grad, needs, logarithm)
        close(
            positive_logit, t.diagonal().detach(), torch.float32, size=2 * float(t.detach().abs().max()), subnormal=True
        )
        if logarithm:
            leaves[2].grad *= self.scale
        sizes = t.detach().nan_to_num(0, 0, 0).abs().amax() * (len(t) if self.options[2] == "sum" else 1)
        assert got.dtype == torch.float32
        assert got.shape == loss.shape
        close(got, loss.detach(), torch.float32, size=2 * sizes + 4, subnormal=True)
        wanted = (needs[0], needs[1] and self.b is not None, needs[2] and self.learnable)
        for gradient, leaf, need, like in zip(gradients, leaves, wanted, likes, strict=True):
            if not need:
                assert gradient.numel() == 0
                continue
            assert gradient.shape == leaf.shape
            assert gradient.dtype == (self.a.dtype if leaf.dim() else torch.float32)
            close(gradient, leaf.grad, self.a.dtype, size=like.abs().max(), subnormal=True)


@few
@every_dtype
@every_reduction
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "m", "d"), PAIRED)
def test_op(n, m, d, symmetric, reduction, dtype):
    OpCall(n, m, d, dtype, reduction, symmetric=symmetric, learnable=n % 2 == 0).check()


@few
@every_dtype
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("ids", "epsilon"), [(True, 0.0), (False, 0.25), (True, 0.25)])
@pytest.mark.parametrize(("n", "m", "d"), PAIRED)
def test_op_of_soft_targets(n, m, d, ids, epsilon, symmetric, dtype):
    OpCall(n, m, d, dtype, "none" if n == 33 else "mean", ids, epsilon, symmetric, learnable=n % 2 == 1).check()


@few
@every_dtype
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [1, 16, 33, 50])
def test_op_of_one_side_twice(n, symmetric, dtype):
    OpCall(n, n, 24, dtype, symmetric=symmetric, twice=True).check()
    OpCall(n, n, 24, dtype, "none", True, 0.1, symmetric, twice=True).check()


@few
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_what_is_not_wanted_of_the_op_is_empty(needs):
    OpCall(33, 50, 24, torch.float32).check(needs=needs)


@few
def test_op_of_a_logarithm():
    for dtype in DTYPES:
        OpCall(33, 50, 24, dtype, ids=True).check(logarithm=True)


@few
def test_op_takes_expanded_gradients_and_small_ones():
    for dtype in DTYPES:
        OpCall(33, 50, 24, dtype, "none").check(expanded=True)
        call = OpCall(33, 50, 24, dtype)
        call.a, call.b = call.a / 512, call.b * 512
        call.check(needs=(True, False, True), size=1e-6)


@few
@every_reduction
@pytest.mark.parametrize("special", [INF, -INF, NAN])
@pytest.mark.parametrize("place", ["row", "column", "extra column"])
def test_op_of_special_values(place, special, reduction):
    for ids in (False, True):
        call = OpCall(40, 70, 8, torch.float32, reduction, ids)
        call.a[:, 0], call.b[:, 0] = call.a[:, 0].abs(), call.b[:, 0].abs()
        (call.a if place == "row" else call.b)[{"row": 17, "column": 33, "extra column": 66}[place], 0] = special
        (value, *_), _ = call.run()
        log_sums, targets = call.truth()[2:]
        expected = (log_sums - targets).detach()
        assert torch.equal(value.isnan().cpu(), expected.isnan())
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@few
def test_op_of_a_trained_model_keeps_a_small_loss():
    """A difference of large numbers, of which nothing may be left but what they differ by."""
    call = OpCall(40, 50, 8, torch.float32, "none")
    call.a = torch.nn.functional.normalize(call.a, dim=1)
    call.b[:40] = call.a
    call.b[40:] = torch.nn.functional.normalize(call.b[40:], dim=1)
    call.scale = torch.tensor(200.0)
    for ids in ((None, None), (torch.arange(40), torch.arange(50))):
        call.ids = ids
        (value, *_), _ = call.run()
        s = 200 * (call.a.double() @ call.b.double().T)
        expected = (s.logsumexp(1) + s.logsumexp(0)[:40]) / 2 - s.diagonal()
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-3, atol=1e-6)


@few
def test_what_is_too_large_or_empty_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 50)
    for n, m, declined in ((40, 50, False), (40, 51, True), (0, 5, True)):
        call = OpCall(n, m, 8, torch.float32)
        inputs = (call.a, call.b, call.scale, 1.0, None, None, *call.options)
        assert (device_ops.route("info_nce", *inputs) == "composite") == declined
        statistics = [torch.zeros(size) for size in (n, n, m, m, 0, 0)]
        arguments = (torch.ones(()), *inputs, *statistics, [True] * 3)
        assert (device_ops.route("info_nce_backward", *arguments) == "composite") == declined


@few
def test_the_same_inputs_give_the_same_bits():
    call = OpCall(50, 97, 24, torch.float32, ids=True, epsilon=0.1)
    grad = torch.ones(())
    for x, y in zip(*((*results, *gradients) for results, gradients in (call.run(grad), call.run(grad))), strict=True):
        assert torch.equal(x, y)


@few
@pytest.mark.parametrize("sides", ["both", "both of one target", "rows"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 9), (70, 100)])
def test_terms_of_statistics(N, M, reduction, sides):
    statistics = [torch.randn(n) for n in (N, N, N, M, M, N)]
    both, shared = sides != "rows", sides == "both of one target"
    statistics = [*statistics[:5], None] if shared else statistics if both else [*statistics[:3], None, None, None]
    exact = [t if t is None else t.double().requires_grad_() for t in statistics]
    term = (exact[0] - exact[2]) + exact[1]
    if both:
        term = (term + (exact[3][:N] - exact[2 if shared else 5]) + exact[4][:N]) / 2
    truth = term if reduction == "none" else term.sum() / (N if reduction == "mean" else 1)
    grad = torch.randn(truth.shape)
    truth.backward(grad.double())
    on = [t if t is None else t.to(DEVICE) for t in statistics]
    results = device_ops.anchor_terms("info_nce", on, [], reduction)
    torch.testing.assert_close(results.cpu().double(), truth.detach(), rtol=1e-5, atol=1e-5)
    log_sums = [None, on[1], None, None, on[4], None if shared else on[1]]
    drow, dtarget, dcol = device_ops.anchor_terms_backward(grad.to(DEVICE), "info_nce", log_sums, [], reduction)
    wanted = (exact[1], exact[2], exact[4]) if both else (exact[1], exact[2])
    for got, leaf in zip((drow, dtarget, dcol), wanted, strict=both):
        torch.testing.assert_close(got.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-6)
    assert dcol.shape == (M if both else 0,)


# How many kernels a step launches: (forward, backward); t is learned too


def by_scale(x, y, t, **options):
    return gk.info_nce_loss(x, y, scale=t, **options)


STEPS = {
    "a number": (lambda x, y, t: gk.info_nce_loss(x, y, scale=10.0), (2, 2)),
    "learnable": (by_scale, (2, 2)),
    "one direction": (lambda x, y, t: by_scale(x, y, t, symmetric=False), (2, 2)),
    "one side twice": (lambda x, y, t: by_scale(x, x, t), (2, 2)),
    "sum": (lambda x, y, t: by_scale(x, y, t, reduction="sum"), (2, 2)),
    "none": (lambda x, y, t: by_scale(x, y, t, reduction="none"), (2, 2)),
    "smoothed": (lambda x, y, t: by_scale(x, y, t, label_smoothing=0.1), (2, 2)),
    "with ids": (lambda x, y, t: by_scale(x, y, t, x_ids=ids_of(x)), (2, 2)),
    "with ids one direction": (
        lambda x, y, t: by_scale(x, y, t, x_ids=ids_of(x), label_smoothing=0.1, symmetric=False),
        (2, 2),
    ),
    "with ids of one side twice": (lambda x, y, t: by_scale(x, x, t, x_ids=ids_of(x), reduction="none"), (2, 2)),
}
BY_A_METRIC = {
    "a number": (lambda x, y, t, **options: gk.info_nce_loss(x, y, scale=10.0, **options), (3, 3)),
    "learnable": (by_scale, (3, 3)),
    "one direction": (lambda x, y, t, **options: by_scale(x, y, t, symmetric=False, **options), (3, 3)),
    "smoothed": (lambda x, y, t, **options: by_scale(x, y, t, label_smoothing=0.1, **options), (3, 3)),
}


@every_small_batch(STEPS)
def test_launches(loss, expected, n, dtype):
    check_count(loss, expected, n, dtype)


@every_reduction_by_a_metric(BY_A_METRIC)
def test_launches_by_a_metric(loss, expected, reduction, dtype):
    check_count_by_a_metric(loss, expected, reduction, dtype)


@counted
def test_what_info_nce_launches():
    for extra in (0, 37):
        forward, backward = launches(by_scale, 128, extra=extra)
        assert forward == ["sweep_kernel", "merge_terms_kernel"]
        assert backward == ["sweep_kernel", "gradients_kernel"]


@counted
def test_what_a_metric_launches():
    kernels = launches(BY_A_METRIC["a number"][0], 128, metric=metric_of(torch.float32), reduction="none")
    assert kernels[0] == ["sides_kernel", "sweep_kernel", "merge_terms_kernel"]
    assert kernels[1] == ["sweep_kernel", "gradients_kernel", "sides_kernel"]


@counted
@REDUCTIONS
def test_launches_of_a_module_that_learns_a_logarithm(reduction):
    check_learnt_logarithm(gk.InfoNCELoss(reduction=reduction))


@counted
@REDUCTIONS
def test_one_side_twice_by_a_metric(reduction):
    check_one_side_twice_by_a_metric(lambda x, y, t, **options: by_scale(x, x, t, **options), reduction)


@counted
def test_what_many_bf16_scores_launch(monkeypatch):
    """A row panel takes one sweep, its sums and two products; the rest is once a step, and no score is stored."""
    sweeps = []
    for scores in (2**26, 2**21):  # one, and two of 3,072 x 4,096
        monkeypatch.setattr(tiles, "ROW_PANEL_SCORES", scores)
        monkeypatch.setattr(tiles, "SLAB_ENTRIES", scores // 64)
        forward, backward = launches(by_scale, 3072, torch.bfloat16, 1024)
        sweeps.append((forward.count("sweep_kernel"), backward.count("sweep_kernel")))
        assert "merge_kernel" in forward
        assert not {"chunk_kernel"} & {*forward, *backward}
    assert sweeps[0] == (1, 1)
    assert sweeps[1][1] == 6
