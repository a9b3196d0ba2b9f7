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


def lane(dtype):
    return np.int32 if dtype == np.float32 else np.int64


def numbered(labels, dtype):
    """Labels as the kernels take them: a vector's worth of others behind the last."""
    return np.concatenate((labels, np.full(16 if dtype == np.float32 else 8, -1))).astype(lane(dtype))


def scaled(s, positive):
    return SCALE * s, np.full(s.shape, SCALE)


def circle(s, positive, margin=0.25, scale=0.5):
    distance = np.where(positive, 1 + margin - s, s + margin)
    slope = scale * np.maximum(distance, 0) * np.where(positive, -1, 1)
    return slope * (s - np.where(positive, 1 - margin, margin)), slope


def multi_similarity(s, positive, alpha=2.0, beta=3.0, base=0.5):
    slope = np.where(positive, -alpha, beta)
    return slope * (s - base), slope


SCORES = {  # (t and dt/ds, its constants)
    "scaled": (scaled, [SCALE]),
    "limited": (scaled, [SCALE]),
    "circle": (circle, [0.25, 0.5]),
    "multi_similarity": (multi_similarity, [2.0, 3.0, 0.5]),
}


class Problem:
    """A tile's logits, what of them counts for rows and for columns, by class, and the kernel's arguments for that."""

    def __init__(self, internals, s, score, random, options=""):
        function, constants = SCORES[score]
        row_labels, col_labels = random.integers(0, 4, N), random.integers(0, 4, M)
        self.positive = row_labels[:, None] == col_labels
        (self.score,) = wide(s[:, :M])
        self.t, self.slope = function(self.score, self.positive)
        itself = np.arange(N)[:, None] - np.arange(M) == 3
        counts = ~itself if "leave out" in options else np.ones_like(itself)
        self.row_counts = self.col_counts = counts
        arguments = {"offset": 3, "leave_out": "leave out" in options, "columns": "rows alone" not in options}
        if score == "limited":
            self.positive &= "labels" in options
            self.positive |= itself
            row_bounds, col_bounds = (random.uniform(-0.5, 0.5, (2, count)).astype(s.dtype) for count in (N, M))
            arguments.update(row_bounds=row_bounds, col_bounds=col_bounds)
            self.row_counts = self.positive | (self.score <= row_bounds[0][:, None])
            self.col_counts = self.positive | (self.score <= col_bounds[0])
        if score != "scaled" and (score != "limited" or "labels" in options):
            arguments["row_labels"], arguments["col_labels"] = (numbered(v, s.dtype) for v in (row_labels, col_labels))
        if "mining" in options:  # positives below and negatives above these scores
            row_bounds, col_bounds = (random.uniform(-0.5, 0.5, (2, count)).astype(s.dtype) for count in (N, M))
            arguments.update(row_bounds=row_bounds, col_bounds=col_bounds)
            self.row_counts, self.col_counts = (
                counts & np.where(self.positive, self.score < below, self.score > above)
                for below, above in (row_bounds[:, :, None], col_bounds[:, None])
            )
        self.classes = [np.ones_like(itself)] if score in ("scaled", "limited") else [self.positive, ~self.positive]
        self.logits = internals.Logits(M, score, constants, **arguments)

    def log_sums(self, counts, axis):
        """(max, Σ e^(t - max)), each [classes, lines]."""
        tops, sums = [], []
        for of_class in self.classes:
            t = np.where(counts & of_class, self.t, -np.inf)
            top = t.max(axis)
            shift = np.where(np.isfinite(top), top, 0)
            tops.append(top), sums.append(np.exp(t - np.expand_dims(shift, axis)).sum(axis))
        return np.array(tops), np.array(sums)


OPTIONS = ["", "leave out", "mining", "leave out, mining", "rows alone"]
CASES = [("scaled", ""), ("scaled", "rows alone"), *(("limited", options) for options in ("", "labels", "rows alone"))]
CASES += [(score, options) for score in ("circle", "multi_similarity") for options in OPTIONS]


@pytest.mark.parametrize(("score", "options"), CASES)
def test_log_sums_of_a_tile(internals, kernels, s, random, score, options, assert_near):
    problem = Problem(internals, s, score, random, options)
    row_max, row_sum, col_max, col_sum = kernels.logsumexp_tile(s, problem.logits)
    directions = [(row_max, row_sum, *problem.log_sums(problem.row_counts, 1))]
    if options != "rows alone":
        directions.append((col_max, col_sum, *problem.log_sums(problem.col_counts, 0)))
    for top, total, true_top, true_total in directions:
        finite = np.isfinite(true_top.ravel())
        np.testing.assert_array_equal(np.isfinite(top), finite)
        assert (top[~finite] == -np.inf).all()
        assert_near(top[finite], true_top.ravel()[finite])
        assert_near(total, true_total.ravel())


def test_log_sums_beside_infinities_and_nan(internals, kernels, s):
    s[2, 5], s[4, 7], s[6, :M] = np.inf, np.nan, -np.inf
    row_max, row_sum, col_max, col_sum = kernels.logsumexp_tile(s, internals.Logits(M, "scaled", [1.0]))
    with np.errstate(divide="ignore"):  # the logarithm of 0
        row, col = row_max + np.log(row_sum), col_max + np.log(col_sum)
    assert row[2] == col[5] == np.inf
    assert np.isnan(row[4])
    assert np.isnan(col[7])
    assert row_max[6] == -np.inf
    assert np.isfinite(np.delete(row, [2, 4, 6])).all()
    assert np.isfinite(np.delete(col, [5, 7])).all()


@pytest.mark.parametrize("directions", ["both", "rows", "columns"])
@pytest.mark.parametrize(("score", "options"), [case for case in CASES if case[1] != "rows alone"])
def test_softmax_gradient_of_a_tile(internals, kernels, s, random, score, options, directions, assert_near):
    problem = Problem(internals, s, score, random, options)
    classes = len(problem.classes)
    row_grad, col_grad = (random.standard_normal((classes, count)).astype(s.dtype) for count in (N, M))
    row_max, row_sum, col_max, col_sum = kernels.logsumexp_tile(s, problem.logits)
    by_rows, by_columns = directions != "columns", directions != "rows"
    ds = s.copy()
    with np.errstate(divide="ignore"):
        row_log, col_log = np.log(row_sum), np.log(col_sum)
    ds_dot_s = kernels.softmax_tile(
        ds,
        problem.logits,
        row_max=row_max,
        row_log=row_log,
        row_grad=row_grad if by_rows else None,
        col_max=col_max,
        col_log=col_log,
        col_grad=col_grad if by_columns else None,
    )
    truth = np.zeros((N, M))
    for used, counts, grad, axis in (
        (by_rows, problem.row_counts, row_grad, 1),
        (by_columns, problem.col_counts, col_grad, 0),
    ):
        tops, sums = problem.log_sums(counts, axis)
        for of_class, top, total, weight in zip(problem.classes, tops, sums, wide(*grad), strict=True):
            top, total, weight = (np.expand_dims(v, axis) for v in (top, total, weight))
            members = used & counts & of_class
            p = np.where(members, np.exp(np.where(members, problem.t - top, 0)), 0)
            truth += weight * p / np.where(total > 0, total, 1)
    if score not in ("scaled", "limited"):  # the scale of scores is left to who calls
        truth *= problem.slope
    assert_near(ds[:, :M], truth)
    assert_near(ds_dot_s, (truth * problem.score).sum(1))
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
