"""Hypothesis looks for a shape, layout, id pattern or weight on which we and the definition disagree."""

import torch
from cases import PAIRS, TRIPLETS
from hypothesis import given, settings
from hypothesis import strategies as st

import gssf_kernels as gk

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def matrices(draw, rows, cols, values=3):
    """[rows, cols] of small whole numbers (exact in any order), in one of several memory layouts."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(("plain", "transposed", "strided", "offset")))
    draw_one = lambda *shape: torch.randint(-values, values + 1, shape, generator=g).float()  # noqa: E731
    if layout == "transposed":
        return draw_one(cols, rows).t()
    if layout == "strided":
        return draw_one(rows * 2, cols * 3)[::2, ::3]
    if layout == "offset":
        return draw_one(rows + 1, cols + 5)[1:, 5:]
    return draw_one(rows, cols)


@st.composite
def problems(draw):
    n = draw(st.integers(1, 150))
    m = n + draw(st.integers(0, 150))
    d = draw(st.integers(1, 40))
    a, b = draw(matrices(n, d)), draw(matrices(m, d))
    if draw(st.booleans()):
        return a, b, None, None
    pool = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pick = lambda count: torch.tensor(pool)[torch.randint(0, len(pool), (count,), generator=g)]  # noqa: E731
    return a, b, pick(n), pick(m)


@SETTINGS
@given(problems())
def test_hardest_negatives_exactly(problem):
    a, b, a_ids, b_ids = problem
    results = gk.hardest_negatives(a, b, a_ids=a_ids, b_ids=b_ids)
    truth = gk.reference.hardest_negatives(a, b, a_ids=a_ids, b_ids=b_ids)
    for got, expected in zip(results, truth, strict=True):
        assert torch.equal(got, expected)


@SETTINGS
@given(problems(), st.sampled_from((0.0, 0.2, 1.0, 7.5)))
def test_triplet_value_and_gradient(problem, margin):
    x, y, x_ids, y_ids = problem
    results = []
    for module in (gk, gk.reference):
        leaves = x.double().requires_grad_(), y.double().requires_grad_()
        loss = module.triplet_loss(*leaves, margin=margin, x_ids=x_ids, y_ids=y_ids)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@SETTINGS
@given(problems(), st.sampled_from(TRIPLETS), st.sampled_from(PAIRS), st.sampled_from((0.0, 0.1, 0.25)))
def test_goal_value_and_gradient(problem, triplet, pair, threshold):
    x, y, x_ids, y_ids = problem
    options = {"triplet": triplet, "pair": pair, "x_ids": x_ids, "y_ids": y_ids}
    options |= {"positive_threshold": threshold, "negative_threshold": threshold}
    results = []
    for module in (gk, gk.reference):
        leaves = (x.double() / 32).requires_grad_(), (y.double() / 16).requires_grad_()  # |s| < 1, still exact
        loss = module.goal_loss(*leaves, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@SETTINGS
@given(problems(), st.integers(1, 30), st.sampled_from((0.0, 0.5, 20.0)))
def test_batch_hard_exactly(problem, count, margin):
    x = problem[0]
    labels = torch.randint(0, count, (x.shape[0],), generator=torch.Generator().manual_seed(x.shape[0]))
    results = []
    for module in (gk, gk.reference):
        leaf = x.clone().requires_grad_()
        loss = module.batch_hard_loss(leaf, labels, margin=margin, reduction="sum")
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@SETTINGS
@given(
    st.integers(0, 200),
    st.integers(1, 20),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_projection(rows, groups, width, with_diag, permuted, normalize, seed):
    g = torch.Generator().manual_seed(seed)
    dim = groups * width
    x = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    diag = torch.randn(dim, generator=g, dtype=torch.float64) if with_diag else None
    blocks = torch.randn(groups, width, width, generator=g, dtype=torch.float64)
    permutation = torch.randperm(dim, generator=g) if permuted else None
    upstream = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    results = []
    for module in (gk, gk.reference):
        leaves = [t.clone().requires_grad_() for t in (x, diag, blocks) if t is not None]
        w = leaves[1] if with_diag else None
        p = module.project(leaves[0], w, leaves[-1], permutation=permutation, normalize=normalize)
        results.append((p.detach(), *torch.autograd.grad(p, leaves, upstream)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
