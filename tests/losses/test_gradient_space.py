"""Losses given by the weights of their gradient: the general form of GOAL."""

import pytest
import torch
from goal_loops import exact_scores, loop_goal, loop_gradients, problem, relative_terms

import gssf_kernels as gk


def test_a_loss_of_ones_own():
    """Weights as a function; with a value that has them as its derivative, autograd of the value says the same."""
    x, y, x_ids, y_ids = problem(9, 12, "five", seed=2)
    seen = []

    def weights(anchor):
        seen.append(anchor)
        return 2 * anchor.positive, torch.exp(anchor.negative)

    def value(anchor):
        return torch.exp(anchor.negative) - anchor.positive.square()

    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = gk.gradient_space_loss(*leaves, weights, value=value, x_ids=x_ids, y_ids=y_ids)
    grads = torch.autograd.grad(loss, leaves)
    s = leaves[0] @ leaves[1].T
    masked = s.masked_fill(gk.reference.positives(x, y, x_ids, y_ids), -torch.inf)
    n = torch.stack((masked.max(1).values, masked.max(0).values[:9]))
    plain = (torch.exp(n) - s.diagonal().square()).sum()
    torch.testing.assert_close(loss, plain)
    for got, expected in zip(grads, torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, expected)
    assert len(seen) == 2  # the rows, the columns
    for anchor, negative in zip(seen, n.detach(), strict=True):
        torch.testing.assert_close(anchor.negative, negative)
        torch.testing.assert_close(anchor.positive, s.diagonal().detach())
        assert anchor.relative_positive is None
        assert anchor.relative_negative is None
        assert not anchor.positive.requires_grad
    monitor = gk.gradient_space_loss(x, y, weights, x_ids=x_ids, y_ids=y_ids)
    torch.testing.assert_close(monitor, (n - s.diagonal()).sum().detach())


def test_weights_are_constants():
    """What the weights are made of gets no gradient, parameters included."""
    x, y, *_ = problem(6, 6)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    leaf = x.clone().requires_grad_()
    loss = gk.gradient_space_loss(leaf, y, lambda anchor: (scale * anchor.positive, scale * anchor.negative))
    dx, dscale = torch.autograd.grad(loss, (leaf, scale), allow_unused=True)
    assert dscale is None
    _, g = loop_goal(exact_scores(x, y), "con", "lin")
    g = {(i, j): 2 * (e + 2 if i == j else e) for (i, j), e in g.items()}  # −(1 − p) twice, to −2p twice
    for i in range(6):
        g[i, i] = -4 * float(x[i] @ y[i])
    torch.testing.assert_close(dx, loop_gradients(g, x, y)[0])


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_relative_terms_reach_the_weights(kind):
    x, y, *_ = problem(10, 14, seed=4)
    seen = []
    relative = gk.RelativeTerms(kind, alpha=3.0, beta=7.0, positive_threshold=0.4, negative_threshold=0.2)
    gk.gradient_space_loss(x, y, lambda a: seen.append(a) or (a.positive, a.negative), relative=relative)
    c = {"alpha": 3.0, "beta": 7.0, "positive_threshold": 0.4, "negative_threshold": 0.2}
    s = exact_scores(x, y)
    p = [s[i][i] for i in range(10)]
    for anchor, rows in zip(seen, (s, list(zip(*s, strict=True))[:10]), strict=True):
        for i, row in enumerate(rows):
            others = [j for j in range(len(row)) if j != i]
            a = max(others, key=lambda j: row[j])
            pair = "lin_ms" if kind == "linear" else "sig_ms"
            expected = relative_terms(pair, i, p, row, others, a, c)
            assert float(anchor.relative_positive[i]) == pytest.approx(expected[0], rel=1e-12)
            assert float(anchor.relative_negative[i]) == pytest.approx(expected[1], rel=1e-12)
