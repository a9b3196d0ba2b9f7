"""What search and ranks do to a tile of scores, by every instruction set this processor has."""

import numpy as np
import pytest

INF, NAN = np.inf, np.nan
TILE = 512  # the distance of a tile's rows
WIDTHS = pytest.mark.parametrize("m", [1, 15, 16, 17, 130, 512])


def lanes(dtype):
    return 16 if dtype == np.float32 else 8


def tile(scores, behind):
    """scores [n, m] as a tile: rows of 512, `behind` after each."""
    s = np.full((len(scores), TILE), behind, scores.dtype)
    s[:, : scores.shape[1]] = scores
    return s


def whole_scores(random, n, m, dtype):
    """Few values, so that many tie, and now and then NaN and infinity."""
    s = random.integers(-3, 4, (n, m)).astype(dtype)
    kind = random.integers(0, 41, (n, m))
    s[kind == 0], s[kind == 1], s[kind == 2] = NAN, INF, -INF
    return s


@WIDTHS
def test_limits_and_nan_of_a_tile(kernels, dtype, m):
    random = np.random.default_rng(m)
    scores = whole_scores(random, 21, m, dtype)
    most = random.integers(-2, 3, 21).astype(dtype)
    s = tile(scores, -INF)
    kernels.limit_rows(s, m, most)
    np.testing.assert_array_equal(s, tile(np.where(scores > most[:, None], -INF, scores), -INF))
    s = tile(scores, 0)
    kernels.nan_ahead(s, m)
    np.testing.assert_array_equal(s, tile(np.where(np.isnan(scores), INF, scores), 0))


def counts(scores, levels, starts):
    """(greater, reaching) of every level, by loops over single rows."""
    of = np.searchsorted(starts, np.arange(len(levels)), side="right") - 1
    rows = scores[of]
    return (rows > levels[:, None]).sum(1), (rows >= levels[:, None]).sum(1)


def some_levels(random, anchors, most, dtype):
    """Ascending levels, 0 to `most` for each anchor."""
    sizes = random.integers(0, most + 1, anchors)
    levels = [np.sort(random.integers(-4, 5, size)).astype(dtype) for size in sizes]
    return np.concatenate(levels), np.concatenate(([0], sizes.cumsum())).astype(np.int64)


@WIDTHS
@pytest.mark.parametrize("most", [1, 3, 20], ids=["one level", "few levels", "many levels"])
def test_counts_of_a_tile(kernels, dtype, m, most):
    random = np.random.default_rng(m)
    scores = whole_scores(random, 21, m, dtype)  # a NaN is what is left out
    s = tile(scores, NAN)
    levels, starts = some_levels(random, 21, most, dtype)
    for result, right in zip(kernels.count_rows(s, m, levels, starts), counts(scores, levels, starts), strict=True):
        np.testing.assert_array_equal(result, right)
    levels, starts = some_levels(random, m, most, dtype)
    results = kernels.count_column_levels(s, m, levels, starts)
    for result, right in zip(results, counts(scores.T, levels, starts), strict=True):
        np.testing.assert_array_equal(result, right)


@WIDTHS
def test_counts_of_a_tile_s_columns_with_one_level_each(kernels, dtype, m):
    random = np.random.default_rng(m)
    scores = whole_scores(random, 21, m, dtype)
    level = random.integers(-4, 5, m).astype(dtype)
    padded = np.full(-(-m // lanes(dtype)) * lanes(dtype), INF, dtype)
    padded[:m] = level
    results = kernels.count_columns(tile(scores, NAN), m, padded)
    for result, right in zip(results, counts(scores.T, level, np.arange(m + 1)), strict=True):
        np.testing.assert_array_equal(result, right)


@WIDTHS
def test_places_that_are_not_below_a_row_s_least(kernels, m):
    """Without columns; a NaN is below nothing."""
    random = np.random.default_rng(m)
    scores = whole_scores(random, 21, m, np.float32)
    least = random.integers(-2, 5, 21).astype(np.float32)
    places = np.full(21 * TILE, -7, np.int32)
    count = kernels.reaching(tile(scores, -INF), m, least, None, places)
    i, j = np.nonzero(~(scores < least[:, None]))
    np.testing.assert_array_equal(places[:count], i * TILE + j)
