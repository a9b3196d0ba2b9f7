"""Kernels of rows by every instruction set: the projection and its backward, listed pairs and their gradients."""

import numpy as np
import pytest
import torch


def projection(x, diag, blocks, permutation):
    """x̂ ∘ diag + x̂ · blocks, the channels of the blocks in the order of `permutation`."""
    hat = torch.nn.functional.normalize(x, dim=1)
    grouped = hat[:, permutation].unflatten(1, blocks.shape[:2])
    mixed = torch.einsum("ngk,gkj->ngj", grouped, blocks).flatten(1)
    return hat * diag + torch.zeros_like(hat).index_add(1, permutation, mixed)


@pytest.mark.parametrize("permuted", [False, True], ids=["", "permuted"])
@pytest.mark.parametrize("width", [1, 7, 16, 33])
def test_projection_and_its_backward(kernels, dtype, width, permuted, assert_near):
    random = np.random.default_rng(width)
    dim, rows = 3 * width, 13
    x, grad_out, diag, blocks = (
        random.standard_normal(shape).astype(dtype) for shape in ((rows, dim), (rows, dim), dim, (3, width, width))
    )
    order = random.permutation(dim) if permuted else np.arange(dim)
    weights = diag, blocks, order if permuted else None, True

    leaves = [torch.from_numpy(v).double().requires_grad_() for v in (x, diag, blocks)]
    truth = projection(*leaves, torch.from_numpy(order))
    assert_near(kernels.project(x, *weights), truth.detach().numpy().ravel())
    gradients = torch.autograd.grad(truth, leaves, torch.from_numpy(grad_out).double())
    for result, right in zip(kernels.project_backward(grad_out, x, *weights), gradients, strict=True):
        assert_near(result, right.numpy().ravel())


def test_projection_by_a_diagonal_or_nothing(kernels, dtype, assert_near):
    x = np.random.default_rng(1).standard_normal((5, 21)).astype(dtype)
    diag = np.linspace(-1, 2, 21).astype(dtype)
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_array_equal(kernels.project(x, None, None, None, False), x.ravel())
    np.testing.assert_array_equal(kernels.project(x, diag, None, None, False), (x * diag).ravel())
    assert_near(kernels.project(x, None, None, None, True), (x / norms).ravel())


def test_pair_scores(kernels, dtype, assert_near):
    random = np.random.default_rng(4)
    n, dim, edges = 9, 83, 40
    a, b = (random.standard_normal((n, dim)).astype(dtype) for _ in range(2))
    rows, cols = (random.integers(0, n, edges) for _ in range(2))
    truth = (a[rows].astype(np.float64) * b[cols]).sum(1)
    assert_near(kernels.pair_scores(a, b, rows, cols), truth)
    rows[3] = cols[17] = -1  # pairs that are none
    scores = kernels.pair_scores(a, b, rows, cols)
    assert np.flatnonzero(scores == -np.inf).tolist() == [3, 17]
    assert_near(np.delete(scores, [3, 17]), np.delete(truth, [3, 17]))


def test_gather(kernels, dtype, assert_near):
    random = np.random.default_rng(4)
    n, dim, edges = 9, 83, 40
    x, grad = random.standard_normal((n, dim)).astype(dtype), random.standard_normal(edges).astype(dtype)
    rows, cols = (random.integers(0, n, edges) for _ in range(2))
    grad[7] = 0
    edge = np.argsort(rows, kind="stable")
    first = np.searchsorted(rows[edge], np.arange(n + 1))
    truth = np.zeros((n, dim))
    np.add.at(truth, rows, grad[:, None].astype(np.float64) * x[cols])
    assert_near(kernels.gather(x, cols, grad, first, edge), truth.ravel())
