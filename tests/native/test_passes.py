"""The passes over a chunk of scores, by every instruction set: all that they leave of a ragged tile."""

import numpy as np
import pytest

N, M, APART = 21, 150, 160  # rows, columns, and the distance of rows
SCALE = 3.0


@pytest.fixture
def random():
    return np.random.default_rng(6)


@pytest.fixture
def s(random, dtype):
    return random.standard_normal((N, APART)).astype(dtype)


def wide(*arrays):
    return [x.astype(np.float64) for x in arrays]


def log_sums(t):
    top = t.max(1)
    return top, np.exp(t - top[:, None]).sum(1)


def test_log_sums_of_a_tile(kernels, dtype, s, assert_near):
    (t,) = wide(SCALE * s[:, :M])
    row_max, row_sum, col_max, col_sum = kernels.logsumexp_tile(s, M, SCALE)
    for top, total, truth in ((row_max, row_sum, log_sums(t)), (col_max, col_sum, log_sums(t.T))):
        assert top.dtype == dtype
        np.testing.assert_array_equal(top, truth[0])
        assert_near(total, truth[1])


def test_log_sums_beside_infinities_and_nan(kernels, s):
    s[2, 5], s[4, 7], s[6, :M] = np.inf, np.nan, -np.inf
    row_max, row_sum, col_max, col_sum = kernels.logsumexp_tile(s, M, 1.0)
    with np.errstate(divide="ignore"):  # the logarithm of 0
        row, col = row_max + np.log(row_sum), col_max + np.log(col_sum)
    assert row[2] == col[5] == np.inf
    assert np.isnan(row[4])
    assert np.isnan(col[7])
    assert row_max[6] == -np.inf
    assert np.isfinite(np.delete(row, [2, 4, 6])).all()
    assert np.isfinite(np.delete(col, [5, 7])).all()


@pytest.mark.parametrize("directions", ["both", "rows", "columns"])
def test_softmax_gradient_of_a_tile(kernels, s, random, directions, assert_near):
    row_grad, col_grad = (random.standard_normal(count).astype(s.dtype) for count in (N, M))
    row_max, row_sum, col_max, col_sum = kernels.logsumexp_tile(s, M, SCALE)
    by_rows, by_columns = directions != "columns", directions != "rows"
    ds = s.copy()
    ds_dot_s = kernels.softmax_tile(
        ds,
        M,
        SCALE,
        row_max=row_max,
        row_log=np.log(row_sum),
        row_grad=row_grad if by_rows else None,
        col_max=col_max,
        col_log=np.log(col_sum),
        col_grad=col_grad if by_columns else None,
    )
    score, row_weight, col_weight = wide(s[:, :M], row_grad, col_grad)
    p, q = (np.exp(SCALE * score - SCALE * score.max(axis, keepdims=True)) for axis in (1, 0))
    truth = by_rows * row_weight[:, None] * p / p.sum(1, keepdims=True)
    truth = truth + by_columns * col_weight * q / q.sum(0)
    assert_near(ds[:, :M], truth)
    assert_near(ds_dot_s, (truth * score).sum(1))
    np.testing.assert_array_equal(ds[:, M:], s[:, M:])


KINDS = {  # f(t) and its derivative
    "hinge": lambda t: (np.maximum(t, 0), (t >= 0).astype(float)),
    "softplus": lambda t: (np.logaddexp(t, 0), 1 / (1 + np.exp(-t))),
    "abs": lambda t: (np.abs(t), np.sign(t)),
    "square": lambda t: (t * t, 2 * t),
}


@pytest.mark.parametrize("with_ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("positives", ["include", "exclude", "negate"])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_a_tile(kernels, s, random, kind, positives, with_ids, assert_near):
    cols, offset, scale = 77, -3, 2.0
    row, col = (random.standard_normal(count).astype(s.dtype) for count in (N, M))
    row_ids, col_ids = (random.integers(0, 5, count) for count in (N, M))
    terms = {
        "row_bias": row,
        "row_weight": row[::-1].copy(),
        "row_ids": row_ids if with_ids else None,
        "col_bias": col,
        "col_weight": col[::-1].copy(),
        "col_ids": col_ids if with_ids else None,
    }
    ds = s.copy()
    row_sum, row_slope, ds_dot_s, col_sum, col_slope = kernels.sum_tile(
        ds, M, cols=cols, offset=offset, scale=scale, kind=kind, positives=positives, gradient=True, **terms
    )
    score, row_bias, row_weight, col_bias, col_weight = wide(s[:, :M], row, row[::-1], col, col[::-1])
    positive = np.arange(N)[:, None] - np.arange(M) == offset
    if with_ids:
        positive |= row_ids[:, None] == col_ids

    def term(bias):
        sign = np.where(positive & (positives == "negate"), -1, 1)
        f, slope = KINDS[kind](sign * (scale * score + bias))
        counts = ~positive | (positives != "exclude")
        return f * counts, slope * sign * counts

    f, slope = term(row_bias[:, None])
    g, other_slope = (v * (np.arange(M) < cols) for v in term(col_bias))
    truth = slope * row_weight[:, None] + other_slope * col_weight
    for result, right in (
        (ds[:, :M], truth),
        (row_sum, f.sum(1)),
        (row_slope, slope.sum(1)),
        (ds_dot_s, (truth * score).sum(1)),
        (col_sum, g.sum(0)[:cols]),
        (col_slope, other_slope.sum(0)[:cols]),
    ):
        assert_near(result, right)
    np.testing.assert_array_equal(ds[:, M:], s[:, M:])


def test_sums_without_biases_weights_or_a_gradient(kernels, s, assert_near):
    before = s.copy()
    nothing = dict.fromkeys(("row_bias", "row_weight", "row_ids", "col_bias", "col_weight", "col_ids"))
    row_sum, row_slope, ds_dot_s, col_sum, _ = kernels.sum_tile(
        s, M, cols=0, offset=0, scale=2.0, kind="square", positives="include", gradient=False, **nothing
    )
    (t,) = wide(2.0 * s[:, :M])
    assert_near(row_sum, (t * t).sum(1))
    assert_near(row_slope, (2 * t).sum(1))
    assert_near(ds_dot_s, (t * t).sum(1))  # a slope of 2t by a score of t / 2
    assert len(col_sum) == 0
    np.testing.assert_array_equal(s, before)


@pytest.mark.parametrize("gradient", [False, True], ids=["", "gradient"])
@pytest.mark.parametrize("kind", ["abs", "square"])
def test_relations_of_a_tile(kernels, s, random, kind, gradient, assert_near):
    once, offset, lam = 40, 2, 0.3
    u, w = (random.standard_normal((N, APART)).astype(s.dtype) for _ in range(2))
    f = s.copy()
    student, teachers, slope_dot_gap = kernels.relation_tile(
        f, u, w, M, once=once, offset=offset, lam=lam, kind=kind, gradient=gradient
    )
    score, one, other = wide(s[:, :M], u[:, :M], w[:, :M])
    gap = other - one
    loss, slope = KINDS[kind](score - one - float(s.dtype.type(lam)) * gap)
    between, _ = KINDS[kind](gap)
    counts = np.arange(N)[:, None] - np.arange(M) != offset
    times = counts * np.where(np.arange(M) < once, 1, 2)
    assert_near(student, (times * loss).sum(1))
    assert_near(teachers, (times * between).sum(1))
    assert_near(slope_dot_gap, (times * slope * gap).sum(1))
    if gradient:
        assert_near(f[:, :M], slope * counts)
        np.testing.assert_array_equal(f[:, M:], s[:, M:])
    else:
        np.testing.assert_array_equal(f, s)
