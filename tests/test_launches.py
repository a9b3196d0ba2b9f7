"""How many kernels a step launches on CUDA: what a small batch's time is made of.

Counted without a card (`device_path.py`): Triton's launches, and PyTorch's ops that are no views, each as one (a sort
is several). These are the figures of this version: a change that raises one has to say so here.
"""

import pytest
import torch

import gssf_kernels as gk

pytest.importorskip("triton")

from bench.device_path import DEVICE, device_path
from gssf_kernels.kernels import tiles


def ids_of(x):
    return torch.empty(len(x), dtype=torch.int64, device=DEVICE)


def with_ids(x, y, t):
    return gk.triplet_loss(x, y, x_ids=ids_of(x))


def distilled(kind="mae", learned=True):
    def loss(x, y, t):
        lam, tau = (t, torch.empty((), device=DEVICE, requires_grad=True)) if learned else (0.5, 0.07)
        return gk.relational_distillation_loss(x, y, y[:, :256], lam=lam, tau=tau, kind=kind)

    return loss


def relative(triplet, pair):
    return lambda x, y, t: gk.goal_loss(x, y, triplet=triplet, pair=pair)


STEPS = {  # (forward, backward); t is learned too
    "triplet": (lambda x, y, t: gk.triplet_loss(x, y), (3, 2)),
    "triplet mean": (lambda x, y, t: gk.triplet_loss(x, y, reduction="mean"), (3, 2)),
    "triplet with ids": (with_ids, (3, 2)),
    "info_nce": (lambda x, y, t: gk.info_nce_loss(x, y, scale=10.0), (2, 2)),
    "info_nce learnable": (lambda x, y, t: gk.info_nce_loss(x, y, scale=t), (2, 2)),
    "info_nce one direction": (lambda x, y, t: gk.info_nce_loss(x, y, scale=t, symmetric=False), (2, 2)),
    "info_nce of one side twice": (lambda x, y, t: gk.info_nce_loss(x, x, scale=t), (2, 2)),
    "info_nce sum": (lambda x, y, t: gk.info_nce_loss(x, y, scale=t, reduction="sum"), (2, 2)),
    "info_nce none": (lambda x, y, t: gk.info_nce_loss(x, y, scale=t, reduction="none"), (2, 2)),
    "info_nce smoothed": (lambda x, y, t: gk.info_nce_loss(x, y, scale=t, label_smoothing=0.1), (2, 2)),
    "info_nce with ids": (lambda x, y, t: gk.info_nce_loss(x, y, scale=t, x_ids=ids_of(x)), (2, 2)),
    "info_nce with ids one direction": (
        lambda x, y, t: gk.info_nce_loss(x, y, scale=t, x_ids=ids_of(x), label_smoothing=0.1, symmetric=False),
        (2, 2),
    ),
    "info_nce with ids of one side twice": (
        lambda x, y, t: gk.info_nce_loss(x, x, scale=t, x_ids=ids_of(x), reduction="none"),
        (2, 2),
    ),
    "sigmoid": (lambda x, y, t: gk.sigmoid_loss(x, y, scale=10.0, bias=-1.0), (2, 1)),
    "sigmoid learnable": (lambda x, y, t: gk.sigmoid_loss(x, y, scale=t, bias=-1.0), (2, 1)),
    "sigmoid bias": (lambda x, y, t: gk.sigmoid_loss(x, y, scale=10.0, bias=t, reduction="sum"), (2, 1)),
    "sigmoid of one side twice": (lambda x, y, t: gk.sigmoid_loss(x, x, scale=t, bias=-1.0), (2, 1)),
    "sigmoid with ids": (lambda x, y, t: gk.sigmoid_loss(x, y, scale=t, bias=-1.0, x_ids=ids_of(x)), (2, 1)),
    "sigmoid none": (lambda x, y, t: gk.sigmoid_loss(x, y, scale=t, bias=-1.0, reduction="none"), (2, 2)),
    "sigmoid none bias": (lambda x, y, t: gk.sigmoid_loss(x, y, scale=10.0, bias=t, reduction="none"), (2, 2)),
    "sigmoid none with ids": (
        lambda x, y, t: gk.sigmoid_loss(x, y, scale=t, bias=-1.0, x_ids=ids_of(x), reduction="none"),
        (2, 2),
    ),
    "sigmoid none of one side twice": (
        lambda x, y, t: gk.sigmoid_loss(x, x, scale=t, bias=-1.0, reduction="none"),
        (2, 2),
    ),
    "sum_scores none": (lambda x, y, t: gk.sum_scores(x, y, "abs", scale=t, reduction="none"), (2, 2)),
    "goal": (lambda x, y, t: gk.goal_loss(x, y), (3, 2)),
    "goal con lin": (lambda x, y, t: gk.goal_loss(x, y, triplet="con", pair="lin", reduction="mean"), (3, 2)),
    "goal cir sig": (lambda x, y, t: gk.goal_loss(x, y, triplet="cir", pair="sig"), (3, 2)),
    **{
        f"goal {triplet} {pair}": (relative(triplet, pair), (2, 2))
        for triplet in ("con", "nca", "cir")
        for pair in ("lin_ms", "sig_ms")
    },
    "batch-hard": (
        lambda x, y, t: gk.batch_hard_loss(x, ids_of(x)),
        (2, 1),
    ),
    "distillation": (distilled(), (2, 1)),
    "distillation mse": (distilled("mse", learned=False), (2, 1)),
    "batch-hard none": (lambda x, y, t: gk.batch_hard_loss(x, ids_of(x), reduction="none"), (2, 1)),
    "all negatives": (lambda x, y, t: gk.triplet_loss(x, y, negatives="all"), (3, 1)),
    "all negatives mean": (lambda x, y, t: gk.triplet_loss(x, y, negatives="all", reduction="mean"), (3, 1)),
    "all negatives with ids": (lambda x, y, t: gk.triplet_loss(x, y, negatives="all", x_ids=ids_of(x)), (3, 1)),
    "all negatives none": (lambda x, y, t: gk.triplet_loss(x, y, negatives="all", reduction="none"), (3, 2)),
    "all negatives none with ids": (
        lambda x, y, t: gk.triplet_loss(x, y, negatives="all", reduction="none", x_ids=ids_of(x)),
        (3, 2),
    ),
}
BY_A_METRIC = {  # the same, of x, y, t and options: a reduction and the metric, whose weights are learned too
    "triplet": (lambda x, y, t, **given: gk.triplet_loss(x, y, **given), (3, 3)),
    "all negatives": (lambda x, y, t, **given: gk.triplet_loss(x, y, negatives="all", **given), (3, 2)),
    "info_nce": (lambda x, y, t, **given: gk.info_nce_loss(x, y, scale=10.0, **given), (3, 3)),
    "info_nce learnable": (lambda x, y, t, **given: gk.info_nce_loss(x, y, scale=t, **given), (3, 3)),
    "info_nce one direction": (
        lambda x, y, t, **given: gk.info_nce_loss(x, y, scale=t, symmetric=False, **given),
        (3, 3),
    ),
    "info_nce smoothed": (
        lambda x, y, t, **given: gk.info_nce_loss(x, y, scale=t, label_smoothing=0.1, **given),
        (3, 3),
    ),
    "sigmoid": (lambda x, y, t, **given: gk.sigmoid_loss(x, y, scale=t, bias=-1.0, **given), (3, 2)),
    "sigmoid bias": (lambda x, y, t, **given: gk.sigmoid_loss(x, y, scale=10.0, bias=t, **given), (3, 2)),
    "goal": (lambda x, y, t, **given: gk.goal_loss(x, y, **given), (3, 3)),
    "goal cir sig": (lambda x, y, t, **given: gk.goal_loss(x, y, triplet="cir", pair="sig", **given), (3, 3)),
}


def launches(loss, n, dtype, extra=0, metric=None, of=None, **given):
    """(forward's, backward's) of inputs [n, 512] and [n + extra, 512]; of: a module, whose parameters get gradients."""
    x, y = (torch.empty(k, 512, dtype=dtype, device=DEVICE, requires_grad=True) for k in (n, n + extra))
    t = torch.empty((), device=DEVICE, requires_grad=True)
    given = given if metric is None else {**given, "metric": metric}
    weights = [] if metric is None else list(metric.parameters())
    weights += [] if of is None else list(of.parameters())
    with device_path() as path:
        value = loss(x, y, t, **given)
        forward = list(path.launches)
        upstream = torch.empty(value.shape, device=DEVICE)
        torch.autograd.grad(value, [x, y, t, *weights], upstream, allow_unused=True)
    return forward, path.launches[len(forward) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("n", [128, 256, 512, 1024])
@pytest.mark.parametrize("name", STEPS)
def test_small_batches(name, n, dtype):
    loss, expected = STEPS[name]
    forward, backward = launches(loss, n, dtype)
    assert (len(forward), len(backward)) == expected, (forward, backward)


def test_what_the_triplet_launches():
    forward, backward = launches(STEPS["triplet"][0], 128, torch.float32)
    assert forward == ["sweep_kernel", "merge_kernel", "hinge_kernel"]
    assert backward == ["hinge_backward_kernel", "scan_kernel"]


def test_what_info_nce_launches():
    for extra in (0, 37):
        forward, backward = launches(STEPS["info_nce learnable"][0], 128, torch.float32, extra)
        assert forward == ["sweep_kernel", "contrast_lines_kernel"]
        assert backward == ["sweep_kernel", "gradients_kernel"]


def test_what_sums_launch():
    for extra in (0, 37):
        assert launches(STEPS["sigmoid learnable"][0], 128, torch.float32, extra) == (
            ["sweep_kernel", "gradients_kernel"],
            ["scaled_kernel"],
        )
        assert launches(STEPS["all negatives"][0], 128, torch.float32, extra) == (
            ["pair_scores_kernel", "sweep_kernel", "gradients_kernel"],
            ["scaled_kernel"],
        )
        assert launches(STEPS["sigmoid none"][0], 128, torch.float32, extra) == (
            ["sweep_kernel", "line_sums_kernel"],
            ["sweep_kernel", "gradients_kernel"],
        )


def metric_of(dtype, **options):
    order = torch.randperm(512) if options.get("block_size", 16) else None
    return gk.StructuredSimilarity(512, permutation=order, dtype=dtype, **options).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", BY_A_METRIC)
def test_small_batches_by_a_metric(name, reduction, dtype):
    """With ids where the loss takes them, and with more rows of y."""
    loss, (forward, backward) = BY_A_METRIC[name]
    backward += reduction == "none" and backward == 2  # scores made again in the place of kept gradients
    for options in ({}, {"normalize": False}, {"block_size": None}, {"diagonal": False}):
        metric = metric_of(dtype, **options)
        for n, extra in ((128, 0), (1000, 24)):
            found = launches(loss, n, dtype, extra, metric, reduction=reduction)
            assert tuple(map(len, found)) == (forward, backward), found
            ids = {"x_ids": ids_of(range(n)), "y_ids": ids_of(range(n + extra))}
            found = launches(loss, n, dtype, extra, metric, reduction=reduction, **ids)
            assert tuple(map(len, found)) == (forward, backward), found


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_modules_that_learn_a_logarithm(reduction):
    """Its exponential takes no launch."""
    for metric, most in ((None, 2), (metric_of(torch.float32), 3)):
        for loss in (gk.InfoNCELoss(reduction=reduction), gk.SigmoidLoss(reduction=reduction)):
            loss.to(DEVICE).metric = metric
            found = launches(lambda x, y, t, loss=loss: loss(x, y), 256, torch.float32, of=loss)
            assert [len(part) <= most for part in found] == [True, True], found


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_side_twice_by_a_metric(reduction):
    """Both its factors' gradients go back in one launch."""
    for loss in (
        lambda x, y, t, **given: gk.info_nce_loss(x, x, scale=t, **given),
        lambda x, y, t, **given: gk.sigmoid_loss(x, x, scale=t, bias=-1.0, **given),
        lambda x, y, t, **given: gk.triplet_loss(x, x, negatives="all", **given),
    ):
        found = launches(loss, 256, torch.float32, metric=metric_of(torch.float32), reduction=reduction)
        assert [len(part) <= 3 for part in found] == [True, True], found


def test_what_a_metric_launches():
    metric, given = metric_of(torch.float32), {"reduction": "none"}
    gradients = ["sweep_kernel", "gradients_kernel", "sides_kernel"]
    for name, after in (("info_nce", "contrast_lines"), ("sigmoid", "line_sums"), ("all negatives", "line_sums")):
        found = launches(BY_A_METRIC[name][0], 128, torch.float32, metric=metric, **given)
        assert found == (["sides_kernel", "sweep_kernel", f"{after}_kernel"], gradients)
    found = launches(BY_A_METRIC["goal"][0], 128, torch.float32, metric=metric, **given)
    assert found[0] == ["sides_kernel", "sweep_kernel", "merge_goal_kernel"]
    assert found[1] == ["goal_backward_kernel", "scan_kernel", "sides_kernel"]


def test_what_distillation_launches():
    forward, backward = launches(STEPS["distillation"][0], 128, torch.float32)
    assert forward == ["relation_tile_kernel", "relation_loss_kernel"]
    assert backward == ["scaled_kernel"]


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])
def test_what_goal_with_relative_terms_launches(pair, reduction, metric):
    """By a metric the projections of both sides besides, and their gradients and those of its weights."""
    s = gk.StructuredSimilarity(512, permutation=torch.randperm(512)).to(DEVICE) if metric else None
    x, y = (torch.empty(n, 512, device=DEVICE, requires_grad=True) for n in (300, 337))
    ids = [torch.empty(n, dtype=torch.int64, device=DEVICE) for n in (300, 337)]
    upstream = torch.empty(300 if reduction == "none" else (), device=DEVICE)
    with device_path() as path:
        loss = gk.goal_loss(x, y, pair=pair, reduction=reduction, x_ids=ids[0], y_ids=ids[1], metric=s)
        forward = list(path.launches)
        torch.autograd.grad(loss, [x, y, *(s.parameters() if metric else ())], upstream)
    sides = ["sides_kernel"] if metric else []
    assert forward == [*sides, "sweep_kernel", "relative_goal_kernel"]
    assert path.launches[len(forward) :] == ["relative_goal_backward_kernel", "scan_kernel", *sides]


@pytest.mark.parametrize("n", [128, 256, 512, 1024])
def test_a_metric_takes_as_few(n):
    """The projection of both sides, and back that of both, with the sums of the weights."""
    metric = gk.StructuredSimilarity(512, permutation=torch.randperm(512)).to(DEVICE)
    x, y = (torch.empty(n, 512, device=DEVICE, requires_grad=True) for _ in range(2))
    with device_path() as path:
        loss = gk.triplet_loss(x, y, metric=metric)
        forward = list(path.launches)
        torch.autograd.grad(loss, [x, y, *metric.parameters()], torch.empty((), device=DEVICE))
    assert forward == ["sides_kernel", "sweep_kernel", "merge_hinge_kernel"]
    assert path.launches[3:] == ["hinge_backward_kernel", "scan_kernel", "sides_kernel"]


def test_the_count_does_not_grow_with_the_batch_but_for_the_sort():
    """Past `plan.SCAN_ROWS` the gradient's edges are sorted, and that is one step for any size; fp32 is certified."""
    for dtype, count in ((torch.bfloat16, (3, 14)), (torch.float32, (11, 14))):
        steps = [launches(STEPS["triplet"][0], n, dtype) for n in (4096, 16384)]
        assert [tuple(map(len, step)) for step in steps] == [count] * 2


def test_what_many_bf16_scores_launch(monkeypatch):
    """A slab takes one sweep, its sums and two products; the rest is once a step, and no score is stored forward."""
    sweeps = []
    for slab in (2**26, 2**21):  # one, and two of 3,072 x 4,096
        monkeypatch.setattr(tiles, "SLAB_SCORES", slab)
        monkeypatch.setattr(tiles, "SLAB_ENTRIES", slab // 64)
        for name in ("info_nce learnable", "sigmoid learnable"):
            forward, backward = launches(STEPS[name][0], 3072, torch.bfloat16, 1024)
            sweeps.append((forward.count("sweep_kernel"), backward.count("sweep_kernel")))
            assert "log_lines_kernel" in forward or name != "info_nce learnable"
            assert not {"logsumexp_kernel", "softmax_kernel", "score_sums_kernel"} & {*forward, *backward}
    assert sweeps[:2] == [(1, 1), (1, 0)]
    assert sweeps[2][1] == sweeps[3][0] == 6
