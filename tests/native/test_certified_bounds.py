"""What certifies mining: rounded rows, the bound of a score's error, candidates, and the choice among exact scores.

None of it needs a processor with a bf16 unit: scores that such a unit would make are made here, as wrong as the bound
allows.
"""

import numpy as np
import pytest
import torch

INF = np.inf
TILE = 512
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def as_numpy(x):
    """A tensor; bf16 by its bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def to_bf16(x):
    """x rounded to bf16 by PyTorch, in fp32, subnormals to zero."""
    rounded = torch.from_numpy(x).float().bfloat16().float()
    return torch.where(rounded.abs() < torch.finfo(torch.bfloat16).tiny, 0, rounded).numpy()


# Vector kernels, by every instruction set.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 16, 31, 200])
def test_a_rounded_row_and_what_it_loses(kernels, dim, kind):
    x = (torch.randn(dim) * 10.0 ** torch.empty(dim).uniform_(-4, 4)).to(KINDS[kind])
    x[0] = 0.75 if kind == "fp16" else 1e-40  # subnormal, which fp16 has no number for
    padded = -(-dim // 32) * 32 + 32
    bits, square, lost_square = kernels.round_row(as_numpy(x), padded)
    if kind == "bf16":  # copied; its squares are left alone
        np.testing.assert_array_equal(bits[:dim], as_numpy(x))
        assert (square, lost_square) == (0, 0)
    else:
        rounded = to_bf16(x.numpy())
        np.testing.assert_array_equal((bits.astype(np.uint32) << 16).view(np.float32)[:dim], rounded)
        wide = x.double().numpy()
        np.testing.assert_allclose(square, (wide**2).sum(), rtol=1e-5, atol=1e-44)
        np.testing.assert_allclose(lost_square, ((wide - rounded) ** 2).sum(), rtol=1e-5, atol=1e-44)
    assert (bits[dim:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 31, 32, 100, 257])
def test_an_exact_dot_has_one_order(kernels, dim, kind):
    """Channel c goes to sum c mod 32, and those are folded in halves: the same bits by every instruction set."""
    x, y = (torch.randn(dim).to(KINDS[kind]) for _ in range(2))
    sums = np.zeros(32)
    for c, term in enumerate((x.double() * y.double()).tolist()):
        sums[c % 32] += term
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    assert kernels.exact_dot(as_numpy(x), as_numpy(y)) == sums[0]


@pytest.mark.parametrize("m", [1, 16, 130, 512])
def test_masks_and_tops_of_a_tile(kernels, m):
    random = np.random.default_rng(m)
    n, whole = 23, -(-m // 16) * 16
    scores = random.standard_normal((n, m)).astype(np.float32)
    s = np.full((n, TILE), -INF, np.float32)
    s[:, :m] = scores
    row_id, col_id = random.integers(0, 4, n).astype(np.int32), np.full(whole, -1, np.int32)
    col_id[:m] = random.integers(0, 4, m)
    kernels.mask_ids(s, m, row_id, col_id)
    truth = np.where(row_id[:, None] == col_id[:m], -INF, scores)
    np.testing.assert_array_equal(s[:, :m], truth)
    assert (s[:, m:] == -INF).all()
    row, col = kernels.tile_tops(s, m)
    np.testing.assert_array_equal(row, truth.max(1))
    np.testing.assert_array_equal(col, truth.max(0))


@pytest.mark.parametrize("m", [1, 16, 130, 512])
def test_places_that_reach_a_line_s_least(kernels, m):
    random = np.random.default_rng(m)
    n, whole = 23, -(-m // 16) * 16
    s = np.full((n, TILE), -INF, np.float32)
    s[:, :m] = random.integers(-9, 10, (n, m))
    row_least, col_least = random.integers(7, 12, n).astype(np.float32), np.full(whole, INF, np.float32)
    row_least[::3] = INF  # rows that nothing reaches
    col_least[:m] = random.integers(8, 12, m)
    places = np.full(n * TILE, -7, np.int32)
    count = kernels.reaching(s, m, row_least, col_least, places)
    reaches = (s[:, :m] >= row_least[:, None]) | (s[:, :m] >= col_least[:m])
    i, j = np.nonzero(reaches)
    np.testing.assert_array_equal(places[:count], i * TILE + j)
    row_most, col_most = (least.copy() for least in (row_least, col_least))
    row_most += random.integers(0, 2, row_most.shape)
    col_most[:m] += random.integers(0, 2, m)
    count = kernels.reaching(s, m, row_least, col_least, places, row_most, col_most)
    rows, cols = (
        (s[:, :m] >= least) & (s[:, :m] <= most)
        for least, most in ((row_least[:, None], row_most[:, None]), (col_least[:m], col_most[:m]))
    )
    i, j = np.nonzero(rows | cols)
    np.testing.assert_array_equal(places[:count], i * TILE + j)
    row, col = kernels.tile_tops(s, m, row_most, col_most)
    of_rows, of_cols = (np.where(s[:, :m] <= most, s[:, :m], -INF) for most in (row_most[:, None], col_most[:m]))
    np.testing.assert_array_equal(row, of_rows.max(1))
    np.testing.assert_array_equal(col, of_cols.max(0))


# Rounded sides and the bound.


def uniform_decades(low, high):
    def make(count, dim):
        return torch.randn(count, dim) * 10.0 ** torch.empty(count, 1).uniform_(low, high)

    return make


MAKERS = {
    "normal": torch.randn,
    "unit": lambda count, dim: torch.nn.functional.normalize(torch.randn(count, dim), dim=1),
    # in the middle of two bf16 numbers, all of one sign: they lose as much as can be
    "half way": lambda count, dim: (torch.randint(128, 256, (count, dim)) * 2 + 1) / 512,
    "mixed norms": uniform_decades(-6, 6),
    "tiny": uniform_decades(-22, -19),
    "subnormal": uniform_decades(-42, -36),
    "huge": uniform_decades(17, 18),
    "sparse": lambda count, dim: torch.randn(count, dim) * (torch.rand(count, dim) < 0.05),
    "zeros": torch.zeros,
}


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
@pytest.mark.parametrize("name", MAKERS)
def test_norms_of_rounded_rows_are_never_too_small(internals, name, kind):
    for count, dim in ((5, 1), (30, 7), (9, 100), (3, 4000)):
        x = MAKERS[name](count, dim).to(KINDS[kind])
        x[~x.isfinite()] = 1
        bits, norm, residue = internals.certified.rounded_rows(x.numpy())
        wide, rounded = x.double().numpy(), to_bf16(x.numpy()).astype(np.float64)
        values = (bits.astype(np.uint32) << 16).view(np.float32).reshape(count, -1)
        np.testing.assert_array_equal(values[:, :dim], rounded)
        assert (values[:, dim:] == 0).all()
        for bound, exact in ((norm, wide), (residue, wide - rounded)):
            truth = np.linalg.norm(exact, axis=1)
            assert (bound >= truth).all()
            fits = (truth < 2.0**62) | (name != "huge")  # so that its square is a number of fp32
            limit = truth * (1 + (dim + 8) * 2.0**-22 + 2.0**-19) + 2e-19 * dim**0.5
            assert (bound <= limit)[fits].all()  # nor much too large


def error_bounds(internals, a, b, block=TILE):
    """(bound [N, M] of |s - ŝ| by the rows of a, whether sums are finite)."""
    certified = internals.certified
    (_, norm, residue), (_, other_norm, other_residue) = (certified.rounded_rows(x) for x in (a, b))
    depth = -(-a.shape[1] // 32) * 32
    bounds, size, finite = certified.error_bounds(
        norm, residue, other_norm, other_residue, block_most=block, depth=depth
    )
    return np.repeat(bounds.reshape(len(a), -1), size, 1)[:, : len(b)], finite


@pytest.mark.parametrize("name", MAKERS)
def test_the_bound_holds_for_every_order_of_a_sum(internals, name):
    """Of the fp32 sums of rounded rows as they come, backwards, by size, and of signs apart, the worst order."""
    for count, others, dim in ((6, 9, 1), (8, 11, 7), (30, 70, 100), (5, 6, 1500)):
        a, b = (MAKERS[name](k, dim).numpy() for k in (count, others))
        exact = a.astype(np.float64) @ b.T.astype(np.float64)
        products = to_bf16(a)[:, None].astype(np.float64) * to_bf16(b)
        products[np.abs(products) < 2.0**-126] = 0  # as a unit may lose them
        bound, finite = error_bounds(internals, a, b, block=64)
        transposed, _ = error_bounds(internals, b, a, block=64)
        assert finite or name == "huge"
        by_size = np.sort(products, axis=2)
        for terms in (products, products[:, :, ::-1], by_size, by_size[:, :, ::-1]):
            total = np.zeros(exact.shape, np.float32)
            for k in range(dim):
                total = total + terms[:, :, k].astype(np.float32)
            off = np.abs(total.astype(np.float64) - exact)
            assert (off <= bound).all()
            assert (off <= transposed.T).all()


def test_the_bound_is_that_of_cauchy_and_schwarz(internals):
    """‖δa‖ ‖b̂‖ + ‖a‖ ‖δb‖ + γ ‖â‖ ‖b̂‖, with the longest rows of a block, and not much more."""
    random = np.random.default_rng(2)
    depth, size = 96, 64
    norm, other_norm = (random.uniform(0.5, 2, count).astype(np.float32) for count in (20, 150))
    residue, other_residue = norm[::-1] * np.float32(2**-9), other_norm[::-1] * np.float32(2**-8)
    bounds, block, finite = internals.certified.error_bounds(
        norm, residue.copy(), other_norm, other_residue.copy(), block_most=size, depth=depth
    )
    assert (block, finite) == (size, True)
    gamma = depth * 2.0**-24
    for number, column in enumerate(bounds.reshape(20, 3).T):
        part = slice(number * size, (number + 1) * size)
        longest = (other_norm[part].astype(float) + other_residue[part]).max()
        lost = float(other_residue[part].max())
        mine, mine_lost = norm.astype(float), residue.astype(float)
        truth = mine_lost * longest + mine * lost + gamma * (mine + mine_lost) * longest
        assert (column >= truth).all()
        np.testing.assert_allclose(column, truth, rtol=1e-3)


@pytest.mark.parametrize(
    ("place", "value"),
    [(name, value) for name in ("norm", "residue", "other_norm", "other_residue") for value in (INF, 3e38)]
    + [("norm", np.nan), ("residue", np.nan)],  # NaN of the others is told by the bound in which they are the lines
)
def test_sums_that_may_leave_fp32_are_told(internals, place, value):
    sides = {name: np.ones(70, np.float32) for name in ("norm", "residue", "other_norm", "other_residue")}
    *_, finite = internals.certified.error_bounds(**sides, block_most=64, depth=32)
    assert finite
    sides[place][69] = value
    *_, finite = internals.certified.error_bounds(**sides, block_most=64, depth=32)
    assert not finite


# Candidates.


def winners(s, t):
    """(i, j) of the largest of every row of s, and of every column of t, that have one."""
    rows = {(i, int(j)) for i, j in enumerate(s.argmax(1)) if s[i, j] > -INF}
    return rows | {(int(i), j) for j, i in enumerate(t.argmax(0)) if t[i, j] > -INF}


def below(negatives, limits):
    """The negatives that count for their row, and those for their column."""
    rows, cols = limits
    counted = [np.ones_like(negatives, bool), np.ones_like(negatives, bool)]
    if rows is not None:
        counted[0] = negatives <= rows[:, None].astype(np.float64)
    if cols is not None:
        counted[1] = negatives <= cols.astype(np.float64)
    return [np.where(of_direction, negatives, -INF) for of_direction in counted]


@pytest.mark.parametrize("limited", [False, True], ids=["", "limits"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("zeros", "sparse")])
@pytest.mark.parametrize(("n", "m", "d"), [(40, 70, 33), (130, 131, 8), (520, 600, 16)])
def test_every_winner_is_a_candidate(internals, n, m, d, name, with_ids, limited):
    """Whatever the errors of the scores, inside the bound, and the order of the tiles."""
    random = np.random.default_rng(m)
    a, b = (MAKERS[name](k, d).numpy() for k in (n, m))
    ids = random.integers(0, 5, m) if with_ids else None
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    negatives = exact.copy()
    np.fill_diagonal(negatives, -INF)
    if with_ids:
        negatives[ids[:n, None] == ids] = -INF
    columns = min(max(m // 4, 64), TILE)  # a tile's, at most
    bound = np.minimum(error_bounds(internals, a, b, columns)[0], error_bounds(internals, b, a)[0].T)
    row_id = [] if ids is None else ids[:n].tolist()
    col_id = [] if ids is None else [*ids.tolist(), *[-1] * 16]
    limits = [np.quantile(exact, 0.8, axis=axis).astype(np.float32) if limited else None for axis in (1, 0)]
    counted = below(negatives, limits)
    best = np.zeros((n, m), bool)
    for i, j in winners(*counted):
        best[i, j] = True
    for error in (0, np.where(best, -1, 1), random.uniform(-1, 1, (n, m))):  # the second: winners look worst
        scores = (exact + 0.99 * error * bound).astype(np.float32)
        order = random.permutation(internals.certified.tile_count(n, m)).tolist()
        given_up, i, j, score = internals.certified.candidates(a, b, scores, row_id, col_id, order, *limits)
        if name in ("tiny", "subnormal") and n > 500:  # what a unit may flush to zero is more than scores differ by
            assert given_up
            continue
        if given_up and limited:  # scores are dense at these limits
            continue
        assert not given_up
        places = list(zip(i.tolist(), j.tolist(), strict=True))
        assert places == sorted(set(places))
        assert winners(*counted) <= set(places)
        assert (negatives[i, j] > -INF).all()
        np.testing.assert_array_equal(score, scores[i, j])


def best_places(negatives, k):
    """(i, j) of the k largest of every row, that are scores, and of every column."""
    places = []
    for t in (negatives, negatives.T):
        order = np.argsort(-t, axis=1, kind="stable")[:, :k]
        places.append({(i, int(j)) for i, row in enumerate(order) for j in row if t[i, j] > -INF})
    return places


@pytest.mark.parametrize("limited", [False, True], ids=["", "limits"])
@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("name", ["unit", "large", "small"])
@pytest.mark.parametrize(("n", "m", "d"), [(40, 70, 33), (520, 600, 16)])
def test_each_of_the_k_best_is_a_candidate(internals, n, m, d, name, k, limited):
    """Whatever the errors of the scores, inside the bound, and the order of the tiles."""
    random = np.random.default_rng(m + k)
    scale = {"unit": 1, "large": 1e6, "small": 1e-6}[name]
    a, b = (torch.nn.functional.normalize(torch.randn(count, d), dim=1).numpy() * scale for count in (n, m))
    a, b = a.astype(np.float32), b.astype(np.float32)
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    negatives = exact.copy()
    np.fill_diagonal(negatives, -INF)
    limit = np.quantile(exact, 0.8, axis=1).astype(np.float32) if limited else None
    if limited:
        negatives = np.where(negatives > limit[:, None].astype(np.float64), -INF, negatives)
    best = best_places(negatives, k)
    columns = min(max(m // 4, 64), TILE)
    bound = np.minimum(error_bounds(internals, a, b, columns)[0], error_bounds(internals, b, a)[0].T)
    is_best = np.zeros((n, m), bool)
    for i, j in best[0]:
        is_best[i, j] = True
    for error in (0, np.where(is_best, -1, 1), random.uniform(-1, 1, (n, m))):
        scores = (exact + 0.99 * error * bound).astype(np.float32)
        order = random.permutation(internals.certified.tile_count(n, m)).tolist()
        given_up, *left = internals.certified.best_candidates(a, b, scores, k, True, order, limit)
        if given_up:  # scores are dense below a limit, and where the best look worst
            continue
        for (anchors, others), wanted in zip(left, best, strict=True):
            assert wanted <= set(zip(anchors.tolist(), others.tolist(), strict=True))


def test_few_candidates_of_the_k_best_are_left(internals):
    """Of random unit rows, in which rounding to bf16 tells most apart; of copies it gives up."""
    a, b = (torch.nn.functional.normalize(torch.randn(count, 64), dim=1).numpy() for count in (400, 2000))
    scores = to_bf16(a) @ to_bf16(b).T
    order = list(range(internals.certified.tile_count(400, 2000)))
    given_up, (rows, _), (cols, _) = internals.certified.best_candidates(a, b, scores, 10, False, order)
    assert not given_up
    assert 10 * 400 <= len(rows) <= 2 * 10 * 400
    assert 10 * 2000 <= len(cols) <= 2.5 * 10 * 2000
    a = np.tile(a[:1], (600, 1))
    order = list(range(internals.certified.tile_count(600, 600)))
    given_up, *_ = internals.certified.best_candidates(a, a, (a @ a.T).astype(np.float32), 3, False, order)
    assert given_up
    a[3, 4] = np.nan
    assert internals.certified.best_candidates(a, a, np.zeros((600, 600), np.float32), 3, False, order)[0]


def test_few_candidates_are_left(internals):
    """Of random unit rows little more than one a line."""
    a, b = (torch.nn.functional.normalize(torch.randn(count, 64), dim=1).numpy() for count in (400, 500))
    scores = to_bf16(a) @ to_bf16(b).T
    order = list(range(internals.certified.tile_count(400, 500)))
    _, i, *_ = internals.certified.candidates(a, b, scores, [], [], order)
    assert 500 <= len(i) <= 2 * 900


@pytest.mark.parametrize("value", [np.nan, INF])
def test_it_gives_up_where_an_input_is_not_finite(internals, value):
    a, b = torch.randn(20, 9).numpy(), torch.randn(30, 9).numpy()
    a[3, 4] = value
    given_up, i, *_ = internals.certified.candidates(a, b, np.zeros((20, 30), np.float32), [], [], [0])
    assert given_up
    assert len(i) == 0


def test_it_gives_up_where_the_bound_tells_too_few_apart(internals):
    """Copies of one row: every score may be the best."""
    a = np.tile(torch.randn(1, 16).numpy(), (512, 1))
    scores = (a @ a.T).astype(np.float32)
    order = list(range(internals.certified.tile_count(512, 512)))
    given_up, *_ = internals.certified.candidates(a, a, scores, [], [], order)
    assert given_up


def test_exact_ties_go_to_the_lowest_index(internals):
    random = np.random.default_rng(1)
    for _ in range(200):
        scores = random.integers(-2, 3, 9).astype(float)
        indices = random.permutation(50)[:9]
        best = indices[scores == scores.max()].min()
        assert internals.certified.exact_best(scores.tolist(), indices.tolist()) == (scores.max(), best)
    assert internals.certified.exact_best([], []) == (-INF, -1)
