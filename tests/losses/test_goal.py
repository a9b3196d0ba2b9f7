"""GOAL against its formulas, written out one anchor and one number at a time in `goal_loops.py`."""

import math

import pytest
import torch
from accuracy import error
from cases import FLOOR, INTEGRABLE, PAIRS, TRIPLETS, randn
from goal_loops import exact_scores, loop_goal, loop_gradients, mean, problem

import gssf_kernels as gk
from gssf_kernels.ops import relative_positives

MODES = [(triplet, pair) for triplet in TRIPLETS for pair in PAIRS]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [gk, gk.reference], ids=["ours", "reference"])


def run(implementation, x, y, **options):
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = implementation.goal_loss(*leaves, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def truth(x, y, triplet, pair, x_ids=None, y_ids=None, **constants):
    lists = [None if t is None else t.tolist() for t in (x_ids, y_ids)]
    x, y = x.double(), y.double()
    values, g = loop_goal(exact_scores(x, y), triplet, pair, *lists, **constants)
    return torch.tensor(values, dtype=torch.float64), *loop_gradients(g, x, y)


@pytest.mark.parametrize("ids", ["none", "five", "random", "equal", "unique"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 3), (2, 2), (9, 9), (11, 16)])
@pytest.mark.parametrize(("triplet", "pair"), MODES)
def test_every_mode_is_the_formula(triplet, pair, n, m, ids):
    x, y, x_ids, y_ids = problem(n, m, ids, seed=n)
    for constants in ({}, {"tau": 4.0, "alpha": 6.0, "beta": 25.0, "lam": 0.1, "positive_threshold": 0.3}):
        options = {"triplet": triplet, "pair": pair, "x_ids": x_ids, "y_ids": y_ids, **constants}
        expected = truth(x, y, **options)
        total = float(expected[0].sum())
        for implementation in (gk, gk.reference):
            got = run(implementation, x, y, reduction="none", **options)
            for name, g, t in zip(("value", "dx", "dy"), got, expected, strict=True):
                assert error(g, t) <= 1e-12, f"{name} of {implementation.__name__}"
            for how, scale in (("sum", 1), ("mean", 1 / n)):
                loss = implementation.goal_loss(x, y, reduction=how, **options)
                assert float(loss) == pytest.approx(scale * total, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("ids", ["none", "five"])
@pytest.mark.parametrize(("triplet", "pair"), MODES)
def test_fp32_is_as_good_as_plain_pytorch(triplet, pair, ids):
    """The error against the loops may be twice that of the formula written plainly, plus the rounding of the result."""
    for seed, (n, m) in enumerate(((12, 12), (12, 19), (25, 40))):
        x, y, x_ids, y_ids = problem(n, m, ids, seed)
        x, y = x.float(), y.float()
        options = {"triplet": triplet, "pair": pair, "x_ids": x_ids, "y_ids": y_ids}
        expected = truth(x, y, **options)
        ours, plain = (run(module, x, y, reduction="none", **options) for module in (gk, gk.reference))
        for name, got, twin, t in zip(("value", "dx", "dy"), ours, plain, expected, strict=True):
            assert error(got, t) <= 2 * error(twin, t) + FLOOR[torch.float32], name


@pytest.mark.parametrize(("triplet", "pair"), INTEGRABLE)
def test_the_five_losses_have_the_designed_gradient(triplet, pair):
    """Finite differences of the stated loss, in the loops, against our gradient."""
    x, y, x_ids, y_ids = problem(6, 8, "five", seed=3, d=4)
    ids = x_ids.tolist(), y_ids.tolist()
    _, dx, dy = run(gk, x, y, triplet=triplet, pair=pair, x_ids=x_ids, y_ids=y_ids)
    step = 1e-5
    for which, gradient in ((0, dx), (1, dy)):
        for place in torch.cartesian_prod(*map(torch.arange, gradient.shape)).tolist():
            sides = [[t.clone() for t in (x, y)] for _ in range(2)]
            sides[0][which][tuple(place)] += step
            sides[1][which][tuple(place)] -= step
            up, down = (math.fsum(loop_goal(exact_scores(*pair_), triplet, pair, *ids)[0]) for pair_ in sides)
            assert (up - down) / (2 * step) == pytest.approx(float(gradient[tuple(place)]), rel=1e-7, abs=1e-8)


@pytest.mark.parametrize(("triplet", "pair"), MODES)
def test_what_comes_from_above_is_multiplied_in(triplet, pair):
    x, y, *_ = problem(8, 11)
    leaf = x.clone().requires_grad_()
    loss = gk.goal_loss(leaf, y, triplet=triplet, pair=pair)
    (one,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    for scale in (3.0, -0.5, 2.0**16):  # the last as torch.amp.GradScaler has it
        (scaled,) = torch.autograd.grad(scale * loss, leaf, retain_graph=True)
        torch.testing.assert_close(scaled, scale * one, rtol=1e-12, atol=1e-14)
    (accumulated,) = torch.autograd.grad(loss + 2 * gk.goal_loss(leaf, y, triplet=triplet, pair=pair), leaf)
    torch.testing.assert_close(accumulated, 3 * one, rtol=1e-12, atol=1e-14)


def test_every_pair_has_a_gradient_of_its_own():
    """reduction="none" with a weight for each pair is the weighted sum of the pairs' gradients."""
    x, y, *_ = problem(5, 7)
    options = {"triplet": "cir", "pair": "sig_ms"}
    leaf = x.clone().requires_grad_()
    per_pair = gk.goal_loss(leaf, y, reduction="none", **options)
    weights = torch.tensor([1.0, -2.0, 0.0, 5.0, 0.3], dtype=torch.float64)
    (got,) = torch.autograd.grad(per_pair @ weights, leaf, retain_graph=True)
    each = [torch.autograd.grad(per_pair[k], leaf, retain_graph=True)[0] for k in range(5)]
    torch.testing.assert_close(got, sum(w * t for w, t in zip(weights, each, strict=True)))
    torch.testing.assert_close(run(gk, x, y, **options)[1], sum(each))


def quarters(n, m, seed, d=3):
    """Embeddings whose scores are multiples of 1/4, exact in any order, with ties everywhere."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(-1, 2, (rows, d), generator=g).double() / 2 for rows in (n, m))


@pytest.mark.parametrize("pair", PAIRS)
def test_exact_ties(pair):
    """Ties go to the lowest index; lin_ms leaves tied terms out of its divisors; thresholds hit exactly are inside."""
    for seed in range(6):
        x, y = quarters(13, 17, seed)
        for threshold in (0.0, 0.25):
            options = {"triplet": "con", "pair": pair}
            options |= {"positive_threshold": threshold, "negative_threshold": threshold}
            expected = truth(x, y, **options)
            for implementation in (gk, gk.reference):
                for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
                    got = run(implementation, x.to(dtype), y.to(dtype), reduction="none", **options)
                    for g, t in zip(got, expected, strict=True):
                        assert error(g, t) <= allowed


@IMPLEMENTATIONS
@pytest.mark.parametrize("pair", PAIRS)
def test_identical_rows(pair, implementation):
    """All scores are 1. Of n = p = 1, every weight is finite, and the gradient is that of the formula."""
    x = torch.zeros(6, 4, dtype=torch.float64)
    x[:, 0] = 1
    got = run(implementation, x, x, pair=pair, reduction="none")
    for g, t in zip(got, truth(x, x, "nca", pair), strict=True):
        assert g.isfinite().all()
        assert error(g, t) <= 1e-12


@IMPLEMENTATIONS
@pytest.mark.parametrize(("pair", "expected"), [("lin_ms", (0.0, 0.5)), ("sig_ms", (math.exp(-1.0), math.exp(0.0)))])
def test_empty_relative_sets_leave_the_pair_weights(pair, expected, implementation):
    """Positives of 1, negatives of ½ or 0: nothing is within 0.1 of anything, and r⁺ = r⁻ = 0."""
    x = torch.eye(4, dtype=torch.float64)
    y = x.clone()
    y[1, 0] = y[2, 1] = y[3, 2] = y[0, 3] = 0.5  # s_ij = ½ for one j of every i, and one i of every j
    s = (x @ y.T).requires_grad_()
    weights = implementation.goal_weights(s, triplet="con", pair=pair).to_dense()
    torch.testing.assert_close(weights.diagonal(), torch.full((4,), -2 * expected[0], dtype=torch.float64))
    torch.testing.assert_close(weights[s == 0.5], torch.full((4,), 2 * expected[1], dtype=torch.float64))
    assert not weights[s == 0].any()


@IMPLEMENTATIONS
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("triplet", TRIPLETS)
def test_anchors_without_a_negative_are_left_out(pair, triplet, implementation):
    x, y, *_ = problem(6, 6)
    value, dx, dy = run(implementation, x, y, pair=pair, triplet=triplet, x_ids=torch.zeros(6, dtype=torch.long))
    assert float(value) == 0
    assert not dx.any()
    assert not dy.any()
    empty = run(implementation, x[:0], y, pair=pair)
    assert float(empty[0]) == 0
    assert not empty[2].any()
    assert run(implementation, x[:0], y[:0], pair=pair)[1].shape == (0, 6)


@IMPLEMENTATIONS
@pytest.mark.parametrize("pair", PAIRS)
def test_nan_propagates(pair, implementation):
    x, y, *_ = problem(6, 8)
    x[2, 1] = math.nan
    value, dx, dy = run(implementation, x, y, pair=pair, reduction="none")
    assert value.isnan().all()  # every column meets row 2
    assert dx.isnan().all(1).all()
    assert dy[:6].isnan().all(1).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("triplet", TRIPLETS)
def test_steep_weights_stay_numbers(triplet, dtype, implementation):
    """e^{−β(n−λ)} overflows far below λ: its reciprocal is 0, not NaN. Above λ weights are large, as they should."""
    x, y, *_ = problem(10, 10, seed=5)
    for pair in ("sig", "sig_ms"):
        for constants in ({"beta": 1e4, "lam": 1.0}, {"beta": 60.0, "alpha": 40.0}, {"alpha": 1e4, "lam": -1.0}):
            got = run(implementation, x.to(dtype), y.to(dtype), triplet=triplet, pair=pair, **constants)
            for g, t in zip(got, truth(x, y, triplet, pair, **constants), strict=True):
                assert g.isfinite().all()
                assert error(g.sum(), t.sum()) <= (1e-9 if dtype == torch.float64 else 1e-2)


def test_weights_beyond_fp32_leave_the_value_alone():
    """P⁺ of sig_ms is e^{α(λ−p)} where no other positive is near: infinite here, and so is the gradient."""
    x, y, *_ = problem(10, 10, seed=5)
    value, dx, dy = run(gk, x.float(), y.float(), pair="sig_ms", alpha=1e3)
    assert float(value) == pytest.approx(float(truth(x, y, "nca", "sig_ms")[0].sum()), rel=1e-5)
    assert not dx.isfinite().all()
    assert not dy.isfinite().all()


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("alpha", [2.0, 50.0])
def test_relative_positives_keep_their_digits(kind, alpha):
    """An anchor's own term is taken out of a prefix sum it may dwarf by many decades."""
    g = torch.Generator().manual_seed(1)
    positive = torch.cat((randn(g, 40), randn(g, 3).abs() * 1e-3 + 2, torch.tensor([-6.0, -6.0 + 2**-40, -6.0])))
    negative = torch.cat((randn(g, 40), randn(g, 6) + 1))
    terms = gk.RelativeTerms(kind, alpha=alpha)
    got = relative_positives(positive, negative, terms)
    for i, (p, n) in enumerate(zip(positive.tolist(), negative.tolist(), strict=True)):
        near = [p - q for k, q in enumerate(positive.tolist()) if k != i and q <= n + 0.1]
        near = [d for d in near if d != 0] if kind == "linear" else [math.exp(alpha * d) for d in near]
        assert float(got[i]) == pytest.approx(mean(near), rel=1e-12, abs=1e-13 if kind == "linear" else 0)


def test_a_metric_keeps_only_the_embeddings_for_the_backward():
    x, y = torch.randn(300, 64, requires_grad=True), torch.randn(400, 64, requires_grad=True)
    metric, kept = gk.StructuredSimilarity(64, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = gk.goal_loss(x, y, pair="sig_ms", metric=metric)
    large = {t.data_ptr() for t in kept if t.numel() >= 300 * 64}
    assert large == {x.data_ptr(), y.data_ptr()}
    loss.backward()
    ours = [t.grad.clone() for t in (x, y, *metric.parameters())]
    x.grad = y.grad = None
    metric.zero_grad()
    gk.goal_loss(*metric.factors(x, y), pair="sig_ms").backward()
    for got, expected in zip(ours, (x, y, *metric.parameters()), strict=True):
        torch.testing.assert_close(got, expected.grad, rtol=1e-4, atol=1e-5)


# The weights of given scores


@IMPLEMENTATIONS
@pytest.mark.parametrize("ids", ["none", "five", "equal"])
@pytest.mark.parametrize(("triplet", "pair"), MODES)
def test_goal_weights_of_a_product_give_the_gradients_of_goal_loss(triplet, pair, ids, implementation):
    x, y, x_ids, y_ids = problem(9, 13, ids, seed=6)
    options = {"triplet": triplet, "pair": pair, "x_ids": x_ids, "y_ids": y_ids}
    _, dx, dy = run(gk, x, y, **options)
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    s = leaves[0] @ leaves[1].T
    weights = implementation.goal_weights(s, **options)
    assert weights.layout == torch.sparse_coo
    assert not weights.requires_grad
    assert weights.is_coalesced()
    assert weights._nnz() <= 3 * 9
    dense = weights.to_dense()
    for way in (lambda: (s * dense).sum().backward(retain_graph=True), lambda: s.backward(dense)):
        way()
        for leaf, expected in zip(leaves, (dx, dy), strict=True):
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-11, atol=1e-13)
            leaf.grad = None
    _, g = loop_goal(exact_scores(x, y), triplet, pair, *(t if t is None else t.tolist() for t in (x_ids, y_ids)))
    expected = torch.zeros(9, 13, dtype=torch.float64)
    for (i, j), entry in g.items():
        expected[i, j] = entry
    torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_goal_weights_have_the_dtype_of_the_scores(dtype):
    x, y, *_ = problem(9, 13)
    s = (x @ y.T).to(dtype)
    weights = gk.goal_weights(s, pair="sig_ms")
    assert weights.dtype == dtype
    exact = gk.goal_weights(s.double(), pair="sig_ms").to_dense()
    assert error(weights.to_dense(), exact) <= 4 * FLOOR[dtype]
