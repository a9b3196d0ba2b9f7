"""Products by every instruction set: of every remainder of rows, columns and channels, onto a frame that stays."""

import itertools

import numpy as np
import pytest


@pytest.fixture
def shapes(internals, dtype):
    """(n, m, k): register tiles and panels that are full and not, chains and stretches of channels that end early."""
    panel = internals.kPanel[np.dtype(dtype).name]
    columns = 1, panel // 2, panel, 2 * panel + 3
    return list(itertools.product((1, 2, 3, 5, 13), columns, (1, internals.kChain + 1, internals.kDepth + 9)))


def panels_of(b, internals):
    """b [m, k] as panels [ceil(m / kPanel), k, kPanel], zeros behind the last column."""
    panel = internals.kPanel[b.dtype.name]
    m, k = b.shape
    padded = np.zeros((-(-m // panel) * panel, k), b.dtype)
    padded[:m] = b
    return np.ascontiguousarray(padded.reshape(-1, panel, k).swapaxes(1, 2))


def product(kernels, a, panels, frame, m, add):
    """The frame [n + 1, m + 2], its first n rows and m columns the product of a and panels."""
    out = frame.copy()
    kernels.product(a, panels, out[:-1, :m], add)
    return out


@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("order", ["C", "F"], ids=["rows", "columns"])
def test_products_of_every_remainder(kernels, internals, dtype, shapes, order, add, assert_near):
    random = np.random.default_rng(5)
    results, truths = [], []
    for n, m, k in shapes:
        a, b = (random.standard_normal((count, k)).astype(dtype) for count in (n, m))
        frame = random.standard_normal((n + 1, m + 2)).astype(dtype)
        out = product(kernels, np.array(a, order=order), panels_of(b, internals), frame, m, add)
        truth = frame.astype(np.float64)
        truth[:n, :m] = a.astype(np.float64) @ b.T.astype(np.float64) + (frame[:n, :m] if add else 0)
        size = np.abs(a).astype(np.float64) @ np.abs(b).T.astype(np.float64) + np.abs(frame[:n, :m])
        roundings = internals.kChain + -(-k // internals.kChain) + 1  # that a term meets, at most
        assert (np.abs(out[:n, :m] - truth[:n, :m]) <= roundings * np.finfo(dtype).eps / 2 * size).all()
        np.testing.assert_array_equal(out[n], frame[n])
        np.testing.assert_array_equal(out[:, m:], frame[:, m:])
        results.append(out.ravel()), truths.append(truth.ravel())
    assert_near(np.concatenate(results), np.concatenate(truths))


def test_both_sets_of_fused_multiply_adds_give_the_same_bits(internals, dtype, shapes):
    if "v4" not in internals.instruction_sets:
        pytest.skip("this processor does not have x86-64-v4")
    random = np.random.default_rng(5)
    for n, m, k in shapes:
        a, b = (random.standard_normal((count, k)).astype(dtype) for count in (n, m))
        frame = random.standard_normal((n + 1, m + 2)).astype(dtype)
        v3, v4 = (
            product(getattr(internals, name), a, panels_of(b, internals), frame, m, add=True) for name in ("v3", "v4")
        )
        np.testing.assert_array_equal(v3, v4)


def test_an_element_depends_on_its_two_vectors_alone(kernels, internals, dtype, shapes):
    """To the bit: ties between equal rows are exact, wherever the rows stand."""
    random = np.random.default_rng(6)
    for n, m, k in shapes:
        a, b = (random.standard_normal((count, k)).astype(dtype) for count in (n, m))
        whole = product(kernels, a, panels_of(b, internals), np.zeros((n + 1, m + 2), dtype), m, add=False)
        for i, j in {(0, 0), (n - 1, m - 1), (n // 2, m // 3)}:
            alone = product(
                kernels, a[i : i + 1], panels_of(b[j : j + 1], internals), np.zeros((2, 3), dtype), 1, add=False
            )
            assert alone[0, 0] == whole[i, j]
