"""GOAL's Triton kernels against fp64, without relative terms and with them, and how many of them a step launches."""

import device_ops
import pytest
import torch
from interpreted import DEVICE, both_halves, every_dtype
from launch_counts import (
    check_count,
    check_count_by_a_metric,
    counted,
    every_reduction_by_a_metric,
    every_small_batch,
    ids_of,
    launches,
    metric_of,
)
from triton_checks import INF, NAN, close, every_reduction, few, on_device, sides_with_ids

import gssf_kernels as gk
from gssf_kernels import plan, reference
from gssf_kernels.ops.goal import RELATIVE, Constants, anchor_weights

pytest.importorskip("triton")


# Without relative terms

MODES = [(triplet, pair) for triplet in ("con", "nca", "cir") for pair in ("con", "lin", "sig")]
NUMBERS = (3.0, 2.0, 10.0, 0.4)  # τ, α, β, λ


def goal_truth(statistics, triplet, pair, reduction, grad):
    """(loss, gradients) of the definition on a matrix whose statistics are these, in fp64."""
    p, row, col = (t.double() for t in statistics)
    n = len(p)
    options = dict(zip(("tau", "alpha", "beta", "lam"), NUMBERS, strict=True))
    mode = reference.goal._mode(triplet, pair, **options, positive_threshold=0.1, negative_threshold=0.1)
    terms, gradients = torch.zeros(n, dtype=torch.float64), []
    for negative in (row, col[:n]):
        anchor, results = reference.AnchorStatistics(p, negative), negative != -INF
        terms += torch.where(results, mode["value"](anchor), 0)
        gradients.append([torch.where(results, w, 0) for w in mode["weights"](anchor)])
    g = grad.double() / (n if reduction == "mean" else 1)
    (row_pull, row_push), (col_pull, col_push) = gradients
    drawn = -g * (row_pull + col_pull), g * row_push, torch.cat((g * col_push, torch.zeros(len(col) - n)))
    return reference.reduce(terms, reduction), drawn


def goal_lines(n, m):
    p, row, col = torch.randn(n), torch.randn(n), torch.randn(m)
    row[::7] = col[1::5] = -INF
    return p, row, col


@few
@every_reduction
@pytest.mark.parametrize(("triplet", "pair"), MODES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (16, 40), (50, 50)])
def test_goal(n, m, triplet, pair, reduction):
    check_goal(goal_lines(n, m), triplet, pair, reduction)


def check_goal(statistics, triplet, pair, reduction):
    grad = torch.randn(len(statistics[0])) if reduction == "none" else torch.tensor(0.75)
    loss, gradients = goal_truth(statistics, triplet, pair, reduction, grad)
    arguments = f"goal {triplet} {pair}", on_device(*statistics), [*NUMBERS], reduction
    got = device_ops.anchor_terms(*arguments)
    assert got.shape == loss.shape
    size = torch.cat(statistics).nan_to_num(0, 0, 0).square().sum() if reduction == "sum" else 1.0
    torch.testing.assert_close(got.cpu().double(), loss, rtol=4e-6, atol=4e-6 * float(size), equal_nan=True)
    for got, expected, line in zip(
        device_ops.anchor_terms_backward(grad.to(DEVICE), *arguments), gradients, statistics, strict=True
    ):
        assert got.shape == line.shape
        torch.testing.assert_close(got.cpu().double(), expected, rtol=2e-5, atol=1e-7, equal_nan=True)


@few
@pytest.mark.parametrize(("triplet", "pair"), MODES)
def test_goal_of_special_values(triplet, pair):
    for special in (NAN, 40.0, -40.0):
        for line in range(3):
            statistics = goal_lines(20, 23)
            statistics[line][3] = special
            check_goal(statistics, triplet, pair, "none")


@few
def test_goal_takes_expanded_gradients_and_an_empty_batch():
    statistics, formula, numbers = goal_lines(20, 23), "goal nca con", [*NUMBERS]
    on, grad = on_device(*statistics), torch.tensor(0.5).expand(20).to(DEVICE)
    got = device_ops.anchor_terms_backward(grad, formula, on, numbers, "none")
    for one, expected in zip(got, goal_truth(statistics, "nca", "con", "none", torch.full((20,), 0.5))[1], strict=True):
        torch.testing.assert_close(one.cpu().double(), expected, rtol=2e-5, atol=1e-7)
    nothing = [on[0][:0], on[1][:0], on[2]]
    assert device_ops.anchor_terms(formula, nothing, numbers, "mean").tolist() == 0
    assert device_ops.anchor_terms(formula, nothing, numbers, "none").shape == (0,)
    assert not device_ops.anchor_terms_backward(on[0][0], formula, nothing, numbers, "mean")[2].any()


def check_hardest_goal(a, b, a_ids, b_ids, triplet, pair, reduction):
    formula, on = f"goal {triplet} {pair}", on_device(a, b, a_ids, b_ids)
    loss, *results = device_ops.hardest_terms(*on, formula, [*NUMBERS], reduction)[:6]
    known = device_ops.hardest_negatives(*on)
    for got, expected in zip(results, known, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    expected = device_ops.anchor_terms(formula, [known[0], known[1], known[3]], [*NUMBERS], reduction)
    assert loss.dtype == torch.float32
    assert loss.shape == expected.shape
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6, equal_nan=True)
    statistics = [t.cpu() for t in (known[0], known[1], known[3])]
    exact, _ = goal_truth(statistics, triplet, pair, reduction, torch.ones(len(a) if reduction == "none" else ()))
    size = float(torch.cat(statistics).nan_to_num(0, 0, 0).square().sum())
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=4e-6, atol=4e-6 * size, equal_nan=True)


@few
@every_reduction
@pytest.mark.parametrize(("triplet", "pair"), MODES)
def test_goal_terms_of_a_sweep(triplet, pair, reduction):
    for n, m, d, dtype in ((1, 40, 5, torch.float32), (33, 50, 24, torch.float32), (50, 50, 20, torch.float16)):
        check_hardest_goal(*sides_with_ids(n, m, d, dtype, ids=n > 40), triplet, pair, reduction)


@few
@every_reduction
def test_goal_terms_of_a_sweep_of_special_values(reduction):
    for special in (INF, -INF, NAN):
        a, b, *ids = sides_with_ids(33, 50, 8, torch.float32)
        a[17, 0], b[:, 0] = special, b[:, 0].abs()
        check_hardest_goal(a, b, *ids, "nca", "sig", reduction)
    a, b, *_ = sides_with_ids(20, 20, 8, torch.float32)
    same = torch.zeros(20, dtype=torch.int64)
    assert not device_ops.hardest_terms(*on_device(a, b, same, same), "goal nca sig", [*NUMBERS], reduction)[0].any()


@few
def test_what_is_large_or_empty_is_declined(monkeypatch):
    monkeypatch.setattr(plan, "SMALL", 40 * 50)
    for n, m, declined in ((40, 50, False), (40, 51, True), (0, 5, True)):
        sides = on_device(*sides_with_ids(n, m, 8, torch.float32))
        route = device_ops.route("hardest_terms", *sides, "goal con con", [*NUMBERS], "sum")
        assert route == ("composite" if declined else "small")


@few
def test_fp64_is_refused():
    x = torch.randn(4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        device_ops.launch("anchor_terms", "goal con con", [x, x, x], [*NUMBERS], "sum")


# With relative terms

RELATIVE_MODES = [(triplet, pair) for triplet in ("con", "nca", "cir") for pair in ("lin_ms", "sig_ms")]
RELATIVE_NUMBERS = (3.0, 2.0, 6.0, 0.4)  # τ, α, β, λ
NEAR = (0.125, 0.25)  # thresholds of positives and negatives: of exact scores, some stand on them
SHAPES = [(1, 1, 3), (1, 40, 5), (2, 2, 8), (16, 32, 16), (17, 33, 17), (40, 70, 24), (50, 50, 20)]
every_mode = pytest.mark.parametrize(("triplet", "pair"), RELATIVE_MODES)
every_pair = pytest.mark.parametrize("pair", ["lin_ms", "sig_ms"])


def eighths(n, m, d, dtype=torch.float32, ids=False):
    """Rows in eighths: scores are exact and tie often, and no rounding carries one across a threshold."""
    a, b = ((torch.randint(-2, 3, (rows, d)) / 8).to(dtype) for rows in (n, m))
    b[:n] = torch.where(torch.rand(n, 1) < 0.5, a, b[:n])  # pairs that score well
    labels = (torch.arange(n) % 5 - 2**40, torch.arange(m) % 3 - 2**40) if ids else (None, None)
    return a, b, *labels


def backward_of_weights(grad, weights, columns, reduction):
    """Gradients of the pairs' scores and of the hardest, whose weights [4, N] are known."""
    return device_ops.anchor_terms_backward(grad, "weights", [weights, weights.new_empty(columns)], [], reduction)


def check_relative_goal(a, b, a_ids, b_ids, triplet, pair, reduction, numbers=RELATIVE_NUMBERS, near=NEAR):
    """Loss and gradients against the definition, what is found against the reference."""
    grad = torch.randn(len(a)) if reduction == "none" else torch.tensor(0.75)
    leaves = [t.double().requires_grad_() for t in (a, b)]
    options = dict(zip(("tau", "alpha", "beta", "lam"), numbers, strict=True))
    options |= dict(zip(("positive_threshold", "negative_threshold"), near, strict=True))
    options |= {"triplet": triplet, "pair": pair, "x_ids": a_ids, "y_ids": b_ids}
    expected = reference.goal_loss(*leaves, reduction=reduction, **options)
    expected.backward(grad.double())

    on = on_device(a, b, a_ids, b_ids)
    loss, *results, weights = device_ops.hardest_terms(*on, f"goal {triplet} {pair}", [*numbers, *near], reduction)
    assert loss.dtype == weights.dtype == torch.float32
    assert loss.shape == expected.shape
    close(
        loss,
        expected.detach(),
        torch.float32,
        rtol=1e-5,
        size=2 * len(a) * float((a.double() @ b.double().T).abs().max()),
    )
    hardest = reference.hardest_negatives(a.double(), b.double(), a_ids=a_ids, b_ids=b_ids)
    for got, known in zip(results, (reference.pair_scores(a.double(), b.double()), *hardest[:4]), strict=True):
        assert torch.equal(got.cpu(), known.to(got.dtype))
    statistics = backward_of_weights(grad.to(DEVICE), weights, len(b), reduction)
    gradients = device_ops.backward_without_metric(*statistics, results[2], results[4], *on[:2], [True, True])
    for got, leaf in zip(gradients, leaves, strict=True):
        assert got.dtype == a.dtype
        close(got, leaf.grad, a.dtype, rtol=1e-5)
    return loss, weights


@few
@every_mode
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_relative_goal(n, m, d, triplet, pair):
    check_relative_goal(*eighths(n, m, d, ids=n % 2 == 1), triplet, pair, ("sum", "mean", "none")[n % 3])


@few
@both_halves
@every_pair
@pytest.mark.parametrize(("n", "m", "d"), SHAPES[2:5])
def test_relative_goal_of_halves(n, m, d, pair, dtype):
    check_relative_goal(*eighths(n, m, d, dtype, ids=n % 2 == 1), "cir", pair, "mean")


@few
@every_reduction
@every_pair
def test_every_reduction_of_relative_goal(pair, reduction):
    for ids in (False, True):
        check_relative_goal(*eighths(33, 50, 24, ids=ids), "nca", pair, reduction)


@few
@every_pair
@pytest.mark.parametrize("near", [(0.0, 0.0), (0.0, 2.0), (2.0, 0.0), (8.0, 8.0)])
def test_every_threshold(near, pair):
    """From none but those level with the hardest, or with the least positive, to all."""
    for numbers in (RELATIVE_NUMBERS, (0.5, 4.0, 1.0, -0.25)):
        check_relative_goal(*eighths(40, 50, 24), "con", pair, "none", numbers, near)


def weights_of(a, b, a_ids, b_ids, pair, near=NEAR):
    """(ours, those of the definition in fp64), [4, N]"""
    on, numbers = on_device(a, b, a_ids, b_ids), [*RELATIVE_NUMBERS, *near]
    *_, ours = device_ops.hardest_terms(*on, f"goal nca {pair}", numbers, "none")
    s = a.double() @ b.double().T
    relative = reference.RelativeTerms(RELATIVE[pair], *RELATIVE_NUMBERS[1:3], *near)
    masked, known = s.masked_fill(reference.positives(a, b, a_ids, b_ids), -INF), []
    for side in (masked, masked[:, : len(a)].mT):
        anchor, hardest = reference.anchor_statistics(s.diagonal(), side, relative)
        both = anchor_weights(anchor, "nca", pair, Constants(*RELATIVE_NUMBERS))
        known += [torch.where(hardest >= 0, weight, 0) for weight in both]
    return ours.cpu(), torch.stack(known)


@few
@every_dtype
@every_pair
def test_weights_of_relative_goal(pair, dtype):
    for ids in (False, True):
        close(*weights_of(*eighths(33, 70, 24, dtype, ids), pair), torch.float32, rtol=1e-5)


@few
@every_pair
@pytest.mark.parametrize("place", ["pair", "row", "bank"])
def test_nan_in_relative_goal(place, pair):
    a, b, *ids = eighths(40, 70, 8)
    if place == "pair":
        a[17] = NAN
    elif place == "row":
        b[3, 1] = NAN
    else:
        b[60] = NAN
    ours, known = weights_of(a, b, *ids, pair)
    assert torch.equal(ours.isnan(), known.isnan())
    close(ours, known, torch.float32, rtol=1e-5)


@few
@every_pair
def test_infinite_scores(pair):
    """-inf is no hardest negative, and below every threshold; a row of it has none."""
    a, b, *ids = eighths(40, 70, 8)
    a[:, 0], b[:, 0] = 1.0, 0.0
    b[50, 0] = b[3, 0] = -INF
    close(*weights_of(a, b, *ids, pair), torch.float32, rtol=1e-5)
    b[:, 0] = -INF
    ours, known = weights_of(a, b, *ids, pair)
    assert not known.any()
    assert not ours.any()


@few
@pytest.mark.parametrize("infinity", [INF, -INF])
@pytest.mark.parametrize("near", [(0.125, 8.0), (8.0, 8.0)], ids=["few close", "all close"])
@every_pair
def test_pairs_of_infinite_scores(pair, near, infinity):
    """The distance of one infinity from another is NaN, and no tie."""
    a, b, *ids = eighths(20, 30, 8)
    a[:, 0], b[:, 0] = 1.0, 0.0
    b[3, 0] = b[5, 0] = infinity
    ours, known = weights_of(a, b, *ids, pair, near)
    assert torch.equal(ours.isnan(), known.isnan())
    close(ours, known, torch.float32, rtol=1e-5)


@few
@every_reduction
@every_pair
def test_without_negatives_there_is_nothing(pair, reduction):
    a, b, *_ = eighths(20, 33, 8)
    loss, weights = check_relative_goal(a, b, torch.zeros(20).long(), torch.zeros(33).long(), "nca", pair, reduction)
    assert not loss.any()
    assert not weights.any()


@few
@every_pair
def test_all_alike(pair):
    """Every score ties with every other: distances are of no one, powers are of all others and 1."""
    ones = torch.full((40, 4), 0.5)
    _, weights = check_relative_goal(
        ones, ones.clone(), None, None, "con", pair, "sum", (1.0, 2.0, 6.0, 1.0), (0.1, 0.1)
    )
    pull, push = (0.0, 1.0) if pair == "lin_ms" else (0.5, 0.5)
    expected = torch.tensor([pull, push, pull, push])[:, None].expand(4, 40)
    torch.testing.assert_close(weights.cpu(), expected)


@few
def test_backward_takes_expanded_gradients():
    weights = torch.randn(4, 20).to(DEVICE)
    got = backward_of_weights(torch.tensor(0.5).expand(20).to(DEVICE), weights, 23, "none")
    for one, known in zip(
        got,
        torch.ops.gssf.anchor_terms_backward(torch.tensor(0.5), "weights", [weights.cpu(), torch.empty(23)], [], "sum"),
        strict=True,
    ):
        torch.testing.assert_close(one.cpu(), known)


@few
def test_the_same_inputs_give_the_same_bits():
    a, b = torch.randn(50, 24), torch.randn(97, 24)
    options = (None, None, "goal cir sig_ms", [*RELATIVE_NUMBERS, *NEAR], "sum")
    runs = [device_ops.hardest_terms(*on_device(a, b), *options) for _ in range(2)]
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y)


@few
def test_relative_goal_of_what_is_large_or_empty_is_declined(monkeypatch):
    options = ("goal nca lin_ms", [*RELATIVE_NUMBERS, *NEAR], "sum")

    def declined(n, m):
        return device_ops.route("hardest_terms", *on_device(*eighths(n, m, 8)), *options) == "composite"

    monkeypatch.setattr(plan, "SMALL", 40 * 50)
    assert [declined(40, 50), declined(40, 51), declined(0, 5)] == [False, True, True]
    monkeypatch.setattr(plan, "LONGEST_ROW", 48)
    assert [declined(20, 48), declined(20, 49)] == [False, True]


@few
def test_relative_goal_refuses_fp64():
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        device_ops.launch("hardest_terms", x, x, None, None, "goal nca lin_ms", [*RELATIVE_NUMBERS, *NEAR], "sum")


# How many kernels a step launches: (forward, backward)

STEPS = {
    "goal": (lambda x, y, t: gk.goal_loss(x, y), (3, 2)),
    "goal con lin": (lambda x, y, t: gk.goal_loss(x, y, triplet="con", pair="lin", reduction="mean"), (3, 2)),
    "goal cir sig": (lambda x, y, t: gk.goal_loss(x, y, triplet="cir", pair="sig"), (3, 2)),
    **{
        f"goal {triplet} {pair}": (
            lambda x, y, t, mode=(triplet, pair): gk.goal_loss(x, y, triplet=mode[0], pair=mode[1]),
            (2, 2),
        )
        for triplet, pair in RELATIVE_MODES
    },
}
BY_A_METRIC = {
    "goal": (lambda x, y, t, **options: gk.goal_loss(x, y, **options), (3, 3)),
    "goal cir sig": (lambda x, y, t, **options: gk.goal_loss(x, y, triplet="cir", pair="sig", **options), (3, 3)),
}


@every_small_batch(STEPS)
def test_launches(loss, expected, n, dtype):
    check_count(loss, expected, n, dtype)


@every_reduction_by_a_metric(BY_A_METRIC)
def test_launches_by_a_metric(loss, expected, reduction, dtype):
    check_count_by_a_metric(loss, expected, reduction, dtype)


@counted
def test_what_a_metric_launches():
    kernels = launches(BY_A_METRIC["goal"][0], 128, metric=metric_of(torch.float32), reduction="none")
    assert kernels[0] == ["sides_kernel", "sweep_kernel", "merge_terms_kernel"]
    assert kernels[1] == ["anchor_terms_backward_kernel", "scan_kernel", "sides_kernel"]


@counted
@pytest.mark.parametrize("metric", [False, True])
@every_reduction
@every_pair
def test_what_goal_with_relative_terms_launches(pair, reduction, metric):
    """By a metric the projections of both sides besides, and their gradients and those of its weights."""
    ids = {"x_ids": ids_of(range(300)), "y_ids": ids_of(range(337))}
    forward, backward = launches(
        lambda x, y, t, **options: gk.goal_loss(x, y, pair=pair, reduction=reduction, **ids, **options),
        300,
        extra=37,
        metric=metric_of(torch.float32) if metric else None,
    )
    sides = ["sides_kernel"] if metric else []
    assert forward == [*sides, "sweep_kernel", "relative_goal_kernel"]
    assert backward == ["anchor_terms_backward_kernel", "scan_kernel", *sides]
