"""A tile's maxima, terms of relative negatives and the exponential, by every instruction set this processor has."""

import numpy as np
import pytest
import torch

INF, NAN = np.inf, np.nan
TILE = 512  # the distance of a tile's rows
LANE = {np.float32: np.int32, np.float64: np.int64}


def test_instruction_sets(internals):
    """Where PyTorch itself has AVX-512, all three are tested."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert internals.instruction_sets == ["plain", "v3", "v4"]
    assert internals.instruction_sets[0] == "plain"
    assert internals.kTileMost == TILE


def tile(scores):
    """scores [n, m] as a tile: rows of 512, -inf behind each."""
    s = np.full((len(scores), TILE), -INF, scores.dtype)
    s[:, : scores.shape[1]] = scores
    return s


def whole_scores(random, n, m, dtype):
    """Few values, so that many tie, and now and then NaN and infinity."""
    s = random.integers(-3, 4, (n, m)).astype(dtype)
    kind = random.integers(0, 401, (n, m))
    s[kind == 0], s[kind == 1] = NAN, INF
    return s


def maxima(s):
    """(score, index) of every row: the first NaN, else the first of the largest; -inf and -1 where all are -inf."""
    score, index = [], []
    for row in s:
        nan = np.isnan(row)
        best = nan.argmax() if nan.any() else row.argmax()
        score.append(row[best])
        index.append(-1 if row[best] == -INF else best)
    return np.array(score), np.array(index)


@pytest.mark.parametrize("with_ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("m", [1, 15, 16, 17, 130, 512])
def test_maxima_of_a_tile(kernels, dtype, m, with_ids):
    random = np.random.default_rng(m)
    n, lane = 37, LANE[dtype]
    scores = whole_scores(random, n, m, dtype)
    s, truth, ids = tile(scores), scores.copy(), (None, None)
    if with_ids:
        row_id, col_id = random.integers(-3, 4, n).astype(lane), random.integers(-3, 4, m).astype(lane)
        truth[row_id[:, None] == col_id] = -INF
        behind = np.full(-m % 16 if dtype == np.float32 else -m % 8, -5, lane)
        ids = row_id, np.concatenate((col_id, behind))
    row_score, row_index, col_score, col_index = kernels.tile_maxima(s, m, *ids)
    for result, right in zip((row_score, row_index), maxima(truth), strict=True):
        np.testing.assert_array_equal(result, right)
    for result, right in zip((col_score, col_index), maxima(truth.T), strict=True):
        np.testing.assert_array_equal(result, right)
    np.testing.assert_array_equal(s, tile(truth))  # what is no negative is -inf from here on


def relative_terms(s, index, least, beta):
    """(sum, count, ties) of every row: of the scores that reach `least`, but for the maximum, at `index`."""
    best = np.take_along_axis(s, index[:, None], 1)
    counts = (s >= least) & (np.arange(s.shape[1]) != index[:, None])
    if beta is not None:
        return np.where(counts, np.exp(beta * (s - best)), 0).sum(1), counts.sum(1), np.zeros(len(s))
    return np.where(counts, best - s, 0).sum(1), counts.sum(1), (counts & (s == best)).sum(1)


@pytest.mark.parametrize("beta", [None, 3.0], ids=["distances", "exponentials"])
def test_terms_of_a_tile(kernels, dtype, beta, assert_near):
    random = np.random.default_rng(3)
    n, m, least = 37, 130, dtype(-0.2)
    scores = random.integers(-3, 4, (n, m)).astype(dtype) / dtype(7)
    s = tile(scores)
    best = kernels.tile_maxima(s, m, None, None)
    row_sum, row_count, row_ties, col_sum, col_count, col_ties = kernels.tile_terms(s, m, *best, least, beta)
    wide = scores.astype(np.float64)
    for results, right in (
        ((row_sum, row_count, row_ties), relative_terms(wide, wide.argmax(1), least, beta)),
        ((col_sum, col_count, col_ties), relative_terms(wide.T, wide.argmax(0), least, beta)),
    ):
        assert_near(results[0], right[0])
        np.testing.assert_array_equal(results[1], right[1])
        np.testing.assert_array_equal(results[2], right[2])


def test_exponential(kernels, dtype):
    """Rows of two scores, 0 and x ≤ 0, have the one term e^x: to an ulp and a half, and 0 where it is subnormal."""
    limits = np.finfo(dtype)
    lowest_log = float(np.log(limits.tiny))
    index = np.zeros(TILE, LANE[dtype])
    best = [np.zeros(TILE, dtype), index, np.array([0, 1], dtype), np.zeros(2, LANE[dtype])]
    for scale in (1e-9, 1e-3, 1.0, 10.0, -lowest_log):
        x = (-scale * 0.9999 * np.arange(1, TILE + 1) / TILE).astype(dtype)
        s = tile(np.stack((np.zeros(TILE, dtype), x), 1))
        sums = kernels.tile_terms(s, 2, *best, limits.min, 1.0)[0]
        truth = np.exp(x.astype(np.longdouble))
        assert (np.abs(sums / truth - 1) < 1.5 * limits.eps).all()
    for far in (2 * lowest_log, -1e30, float(limits.min)):
        s = tile(np.array([[0, far]], dtype))
        first = [best[0][:1], best[1][:1], best[2], best[3]]
        assert kernels.tile_terms(s, 2, *first, limits.min, 1.0)[0] == 0


def test_arrays_are_never_converted(internals):
    """An argument of another dtype or size is an error: a copy would hide what a kernel writes, and where."""
    kernels = internals.plain
    with pytest.raises(TypeError, match="s: no kernel"):
        kernels.tile_maxima(np.zeros((2, TILE), np.int32), 5, None, None)
    with pytest.raises(ValueError, match="s: not contiguous"):
        kernels.tile_maxima(np.zeros((TILE, 2), np.float32).T, 5, None, None)
    with pytest.raises(ValueError, match="row_id: of another dtype"):
        kernels.tile_maxima(np.zeros((2, TILE), np.float32), 5, np.zeros(2, np.int64), np.zeros(16, np.int32))
    with pytest.raises(ValueError, match="col_id: expected 16 numbers, got 5"):
        kernels.tile_maxima(np.zeros((2, TILE), np.float32), 5, np.zeros(2, np.int32), np.zeros(5, np.int32))
