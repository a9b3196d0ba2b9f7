"""The triplet loss: over every negative, its warm-up, its Triton kernels, and how many of them a step launches."""

import copy
import pickle

import device_ops
import pytest
import torch
from dense_cases import INF, NAN, normal
from interpreted import DEVICE, every_dtype
from launch_counts import (
    REDUCTIONS,
    SIZES,
    check_count,
    check_count_by_a_metric,
    check_one_side_twice_by_a_metric,
    counted,
    every_reduction_by_a_metric,
    every_small_batch,
    ids_of,
    launches,
    metric_of,
)
from triton_checks import every_reduction, few, on_device, sides_with_ids

import gssf_kernels as gk
from gssf_kernels import plan, reference


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


# TripletLoss(warmup=...): the schedule, its step, and what it costs when over

SEEDED = torch.Generator().manual_seed(0)  # whatever was imported, and drew numbers, before
X, Y = (torch.randn(n, 6, dtype=torch.float64, generator=SEEDED) for n in (9, 12))


def blend(share, **options):
    every, hardest = (gk.reference.triplet_loss(X, Y, negatives=which, **options) for which in ("all", "hardest"))
    return (1 - share) * every + share * hardest


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_the_loss_goes_over_by_degrees(reduction):
    criterion = gk.TripletLoss(margin=0.7, reduction=reduction, warmup=4)
    for share in (0, 0.25, 0.5, 0.75, 1, 1, 1):
        torch.testing.assert_close(
            criterion(X, Y), blend(share, margin=0.7, reduction=reduction), rtol=1e-12, atol=1e-13
        )


def test_ids_metric_and_gradients_go_through_both_parts():
    metric = gk.StructuredSimilarity(6, 3, dtype=torch.float64)
    criterion = gk.TripletLoss(metric=metric, warmup=2)
    ids = torch.arange(9) // 2, torch.arange(12) // 2
    criterion(X, Y, *ids)
    x = X.clone().requires_grad_()
    leaves = [x, metric.diag, metric.blocks]
    got = torch.autograd.grad(criterion(x, Y, *ids), leaves)
    parts = [
        torch.autograd.grad(gk.triplet_loss(x, Y, x_ids=ids[0], y_ids=ids[1], metric=metric, negatives=which), leaves)
        for which in ("all", "hardest")
    ]
    for g, of_all_negatives, of_hardest in zip(got, *parts, strict=True):
        torch.testing.assert_close(g, (of_all_negatives + of_hardest) / 2)


def test_evaluation_looks_without_stepping():
    criterion = gk.TripletLoss(warmup=4)
    criterion(X, Y)
    criterion.eval()
    for _ in range(3):
        torch.testing.assert_close(criterion(X, Y), blend(0.25))
    assert int(criterion.step) == 1
    criterion.train()
    torch.testing.assert_close(criterion(X, Y), blend(0.25))
    torch.testing.assert_close(criterion(X, Y), blend(0.5))


def test_a_checkpoint_goes_on_where_it_stood():
    criterion, other = gk.TripletLoss(warmup=4), gk.TripletLoss(warmup=4)
    for _ in range(3):
        criterion(X, Y)
    state = criterion.state_dict()
    assert {name: int(t) for name, t in state.items()} == {"step": 3}
    other.load_state_dict(state)
    for copied in (other, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.testing.assert_close(copied(X, Y), blend(0.75))
        torch.testing.assert_close(copied(X, Y), blend(1))
    inside = torch.nn.ModuleDict({"loss": gk.TripletLoss(warmup=3)})  # and as a part of a model
    inside.load_state_dict({"loss.step": torch.tensor(3)})
    assert inside["loss"]._warm
    back = torch.nn.ModuleDict({"loss": copy.deepcopy(inside["loss"])})
    back.load_state_dict({"loss.step": torch.tensor(0)})
    torch.testing.assert_close(back["loss"](X, Y), blend(0))


def test_without_warmup_there_is_no_state():
    assert not gk.TripletLoss().state_dict()
    assert "warmup" not in repr(gk.TripletLoss())
    assert "warmup=7" in repr(gk.TripletLoss(warmup=7))


def test_nothing_is_left_of_all_negatives_afterwards():
    """Warm-up keeps more tensors for the backward than the hardest alone do; no step keeps a matrix [N, M]."""
    x, y = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    criterion = gk.TripletLoss(warmup=2)

    def kept(loss):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss(x, y)
        assert max(sizes) < 200 * 200
        return len(sizes)

    hardest = kept(gk.TripletLoss())
    assert [kept(criterion) > hardest for _ in range(4)] == [True, True, False, False]


def test_compiled_warmup_has_the_same_schedule():
    """One graph for all steps; train() ends the warm-up for it."""
    torch._dynamo.reset()
    criterion = gk.TripletLoss(warmup=12)
    compiled = torch.compile(criterion, fullgraph=True)
    for step in range(14):
        torch.testing.assert_close(compiled(X, Y), blend(min(step / 12, 1)))
    assert not criterion._warm
    criterion.train()
    assert criterion._warm
    torch.testing.assert_close(compiled(X, Y), blend(1))


def test_the_step_moves_with_the_module():
    with torch.device("meta"):
        criterion = gk.TripletLoss(warmup=3)
        assert criterion.train()(torch.randn(4, 8), torch.randn(5, 8)).shape == ()
    assert criterion.step.is_meta
    assert int(gk.TripletLoss(warmup=3).double().step) == 0  # stays a whole number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_negatives_sum_in_fp32_under_autocast(dtype):
    x, y = X.float(), Y.float()
    for which in ("all", "semihard"):
        with torch.autocast("cpu", dtype):
            loss = gk.triplet_loss(x, y, negatives=which)
        rounded = x.to(dtype).double(), y.to(dtype).double()
        assert loss.dtype == torch.float32
        step = torch.finfo(torch.float32).eps * float((rounded[0] @ rounded[1].T).abs().max())  # of a score
        torch.testing.assert_close(
            loss.double(), gk.reference.triplet_loss(*rounded, negatives=which), rtol=1e-6, atol=step
        )


# Hinge terms of hardest negatives, by Triton


def check_hinge(a, b, a_ids, b_ids, margin, reduction):
    on = on_device(a, b, a_ids, b_ids)
    loss, *results = device_ops.hardest_terms(*on, "hinge", [margin], reduction)[:6]
    for got, expected in zip(results, device_ops.hardest_negatives(*on), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    x, y = a.double(), b.double()
    pair, exact = reference.pair_scores(x, y), reference.hardest_negatives(x, y, a_ids=a_ids, b_ids=b_ids)
    sides = exact.row_score, exact.col_score[: len(a)]
    terms = sum(reference.hinge(margin + negative - pair) for negative in sides)
    assert loss.dtype == torch.float32
    assert loss.shape == (a.shape[:1] if reduction == "none" else ())
    sizes = (reference.reduce(reference.hinge(margin + t.abs() + pair.abs()), reduction) for t in sides)
    expected, size = reference.reduce(terms, reduction), max(float(t.nan_to_num(0, 0, 0).max()) for t in sizes)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=4e-6, atol=4e-6 * size, equal_nan=True)


@few
@every_dtype
@every_reduction
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 3), (1, 40, 5), (16, 32, 16), (33, 50, 24), (50, 50, 20)])
def test_hinge_terms_of_a_sweep(n, m, d, reduction, dtype):
    check_hinge(*sides_with_ids(n, m, d, dtype, ids=n > 40), 0.25, reduction)


@few
@every_reduction
@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_hinge_terms_of_special_values(special, reduction):
    a, b, *ids = sides_with_ids(33, 50, 8, torch.float32)
    a[17, 0], b[:, 0] = special, b[:, 0].abs()
    check_hinge(a, b, *ids, 0.25, reduction)


@few
@every_reduction
def test_hinge_terms_without_negatives_are_0(reduction):
    a, b, *_ = sides_with_ids(20, 20, 8, torch.float32)
    same = torch.zeros(20, dtype=torch.int64)
    results = device_ops.hardest_terms(*on_device(a, b, same, same), "hinge", [0.25], reduction)
    loss, _, row_score, row_index, *_ = results
    assert not loss.any()
    assert set(row_index.tolist()) == {-1}
    assert set(row_score.tolist()) == {-INF}


@few
def test_what_is_large_or_empty_or_certified_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 50)

    def route(n, m):
        sides = on_device(*sides_with_ids(n, m, 8, torch.float32))
        return device_ops.route("hardest_terms", *sides, "hinge", [0.25], "sum")

    for n, m, declined in ((40, 50, False), (40, 51, True), (0, 5, True)):
        assert route(n, m) == ("composite" if declined else "small")
    monkeypatch.setattr(plan, "CERTIFIED", 40 * 50)
    assert route(40, 50) == "composite"


@few
def test_fp64_is_refused():
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        device_ops.launch("hardest_terms", x, x, None, None, "hinge", [0.25], "sum")


@few
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 9), (32, 32), (70, 100)])
def test_hinge_terms(N, M, reduction):
    positive, row, col = torch.randn(N), torch.randn(N), torch.randn(M)
    row[0], col[M // 2] = -INF, -INF
    row[N // 2] = positive[N // 2] - 0.25  # exactly on the hinge, for a margin that is exact too
    for special in (None, NAN, INF):
        if special is not None:
            row[N - 1] = special
        exact = [t.double().requires_grad_() for t in (positive, row, col)]
        total = sum(torch.where(0.25 + n - exact[0] < 0, 0, 0.25 + n - exact[0]) for n in (exact[1], exact[2][:N]))
        truth = total if reduction == "none" else total.sum() / (N if reduction == "mean" else 1)
        grad = torch.randn(truth.shape)
        truth.backward(grad.double())
        on = [t.to(DEVICE) for t in (positive, row, col)]
        arguments = "hinge", on, [0.25], reduction
        results = device_ops.anchor_terms(*arguments)
        torch.testing.assert_close(results.cpu().double(), truth.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
        for got, leaf in zip(device_ops.anchor_terms_backward(grad.to(DEVICE), *arguments), exact, strict=True):
            torch.testing.assert_close(got.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-6)


@few
def test_hinge_terms_take_expanded_gradients_and_an_empty_batch():
    statistics = [t.to(DEVICE) for t in (torch.zeros(9), torch.zeros(9), torch.zeros(12))]
    grad = torch.tensor(2.0).expand(9).to(DEVICE)
    dpositive, drow, dcol = device_ops.anchor_terms_backward(grad, "hinge", statistics, [0.25], "none")
    assert (dpositive.tolist(), drow.tolist(), dcol.tolist()) == ([-4.0] * 9, [2.0] * 9, [2.0] * 9 + [0.0] * 3)
    nothing = [*(t[:0] for t in statistics[:2]), statistics[2]]
    assert device_ops.anchor_terms("hinge", nothing, [0.25], "mean").tolist() == 0
    assert device_ops.anchor_terms("hinge", nothing, [0.25], "none").shape == (0,)
    one = torch.ones(()).to(DEVICE)
    assert device_ops.anchor_terms_backward(one, "hinge", nothing, [0.25], "mean")[2].tolist() == [0.0] * 12


# How many kernels a step launches: (forward, backward); t is learned too


def of_all(x, y, t, **options):
    return gk.triplet_loss(x, y, negatives="all", **options)


STEPS = {
    "triplet": (lambda x, y, t: gk.triplet_loss(x, y), (3, 2)),
    "triplet mean": (lambda x, y, t: gk.triplet_loss(x, y, reduction="mean"), (3, 2)),
    "triplet with ids": (lambda x, y, t: gk.triplet_loss(x, y, x_ids=ids_of(x)), (3, 2)),
    "all negatives": (of_all, (3, 1)),
    "all negatives mean": (lambda x, y, t: of_all(x, y, t, reduction="mean"), (3, 1)),
    "all negatives with ids": (lambda x, y, t: of_all(x, y, t, x_ids=ids_of(x)), (3, 1)),
    "all negatives none": (lambda x, y, t: of_all(x, y, t, reduction="none"), (3, 2)),
    "all negatives none with ids": (lambda x, y, t: of_all(x, y, t, reduction="none", x_ids=ids_of(x)), (3, 2)),
}
BY_A_METRIC = {
    "triplet": (lambda x, y, t, **options: gk.triplet_loss(x, y, **options), (3, 3)),
    "all negatives": (of_all, (3, 2)),
}


@every_small_batch(STEPS)
def test_launches(loss, expected, n, dtype):
    check_count(loss, expected, n, dtype)


@every_reduction_by_a_metric(BY_A_METRIC)
def test_launches_by_a_metric(loss, expected, reduction, dtype):
    check_count_by_a_metric(loss, expected, reduction, dtype)


@counted
def test_what_the_triplet_launches():
    forward, backward = launches(STEPS["triplet"][0], 128)
    assert forward == ["sweep_kernel", "merge_kernel", "anchor_terms_kernel"]
    assert backward == ["anchor_terms_backward_kernel", "scan_kernel"]


@counted
def test_what_all_negatives_launch():
    for extra in (0, 37):
        assert launches(of_all, 128, extra=extra) == (
            ["pair_scores_kernel", "sweep_kernel", "gradients_kernel"],
            ["scaled_kernel"],
        )


@counted
@SIZES
def test_a_metric_takes_as_few(n):
    """The projection of both sides, and back that of both, with the sums of the weights."""
    forward, backward = launches(
        lambda x, y, t, **options: gk.triplet_loss(x, y, **options), n, metric=metric_of(torch.float32)
    )
    assert forward == ["sides_kernel", "sweep_kernel", "merge_terms_kernel"]
    assert backward == ["anchor_terms_backward_kernel", "scan_kernel", "sides_kernel"]


@counted
def test_what_all_negatives_launch_by_a_metric():
    kernels = launches(of_all, 128, metric=metric_of(torch.float32), reduction="none")
    assert kernels[0] == ["sides_kernel", "sweep_kernel", "merge_terms_kernel"]
    assert kernels[1] == ["sweep_kernel", "gradients_kernel", "sides_kernel"]


@counted
@REDUCTIONS
def test_one_side_twice_by_a_metric(reduction):
    check_one_side_twice_by_a_metric(lambda x, y, t, **options: of_all(x, x, t, **options), reduction)


@counted
def test_the_count_does_not_grow_with_the_batch_but_for_the_sort():
    """Past `plan.SCAN_ROWS` the gradient's edges are sorted, and that is one step for any size; fp32 is certified."""
    for dtype, count in ((torch.bfloat16, (3, 14)), (torch.float32, (11, 14))):
        steps = [launches(STEPS["triplet"][0], n, dtype) for n in (4096, 16384)]
        assert [tuple(map(len, step)) for step in steps] == [count] * 2
