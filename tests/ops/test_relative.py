"""GOAL's relative negatives, on the CPU and by Triton, against `relative_loops.py`: loops over single rows in fp64."""

import functools
import math

import device_ops
import pytest
import torch
from cases import DTYPES, FLOOR, IDS, randn
from interpreted import DEVICE, every_dtype
from kernel_modules import tiles
from relative_loops import gap, plain, truth
from triton_checks import IDS as KERNEL_IDS
from triton_checks import INF, NAN, check_relative, many

BETAS = [None, 10.0, 1000.0]
NAMES = ("pair_score", "row_score", "row_index", "col_score", "col_index", "row_relative", "col_relative")


def run(a, b, threshold, beta, a_ids=None, b_ids=None):
    """{name: what the op gives}."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    results = torch.ops.gssf.relative_negatives(a, b, a_ids, b_ids, torch.tensor(threshold, dtype=dtype), beta)
    assert [t.dtype for t in results] == [torch.int64 if "index" in name else dtype for name in NAMES]
    return dict(zip(NAMES, results, strict=True))


def distance(got, exact):
    """‖got − exact‖ / ‖exact‖, infinities and NaN having to stand in the same places."""
    got = got.double()
    special = ~exact.isfinite()
    assert torch.equal(got[special].nan_to_num(nan=1e300), exact[special].nan_to_num(nan=1e300))
    scale = float(exact[~special].norm())
    return float((got - exact)[~special].norm()) / (scale if scale > 0 else 1.0)


def check(a, b, threshold, beta, a_ids=None, b_ids=None):
    """Our error is at most twice plain PyTorch's in the same dtype, plus rounding; the maxima are those we know."""
    arguments = (a, b, threshold, beta, a_ids, b_ids)
    results, exact, twin = run(*arguments), truth(*arguments), plain(*arguments)
    known = torch.ops.gssf.hardest_negatives(a, b, a_ids, b_ids)[:5]
    for got, expected in zip(list(results.values())[:5], known, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    floor = 1e-12 if a.dtype == torch.float64 else FLOOR[torch.float32]
    for name, same in zip(("row_relative", "col_relative"), twin, strict=True):
        error, allowed = distance(results[name], exact[name]), 2 * distance(same, exact[name]) + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return results, exact


def unit(n, m, d, dtype=torch.float64):
    g = torch.Generator().manual_seed(n + m)
    return (torch.nn.functional.normalize(randn(g, rows, d)).to(dtype) for rows in (n, m))


SHAPES = [(1, 1, 3), (1, 2, 3), (2, 2, 5), (2, 3, 4), (3, 130, 8), (17, 31, 9), (129, 257, 40), (513, 700, 24)]


@pytest.mark.parametrize("beta", BETAS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value(shape, dtype, beta):
    a, b = unit(*shape, dtype)
    if beta == 1000.0:  # scores that are exact in fp32: it would magnify their rounding past that of all else
        a, b = (a * 64).round() / 64, (b * 64).round() / 64
    for quantile in (0.0, 0.6):
        check(a, b, gap(a, b, quantile), beta)
    check(a, b, -10.0, beta)  # below all scores


@pytest.mark.parametrize("beta", BETAS, ids=str)
@pytest.mark.parametrize("ids", sorted(IDS))
def test_ids(ids, beta):
    for n, m in ((37, 61), (700, 900)):
        a, b = unit(n, m, 12, torch.float32)
        if beta == 1000.0:  # as in test_value
            a, b = (a * 64).round() / 64, (b * 64).round() / 64
        check(a, b, gap(a, b, 0.4), beta, *IDS[ids](torch.Generator().manual_seed(1), n, m))


@pytest.mark.parametrize("beta", [None, 0.0, 0.5, 10.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_line_to_rounding(dtype, beta):
    """Line by line, not in the norm: fp64 to 1e-12, fp32 to the few roundings that its own scores leave."""
    a, b = unit(700, 1300, 32, dtype)
    results, exact = check(a, b, gap(a, b, 0.3), beta)
    for name in ("row_relative", "col_relative"):
        rtol = 1e-12 if dtype == torch.float64 else 4e-6
        torch.testing.assert_close(results[name].double(), exact[name], rtol=rtol, atol=0)


@functools.cache  # for all dtypes
def whole_numbers(n, m):
    """[(a, b, threshold, (a_ids, b_ids), the truth)], all of whole numbers that fp16 and bf16 hold."""
    problems = []
    for d in (1, 3):
        a, b = torch.randint(-3, 4, (n, d)).double(), torch.randint(-3, 4, (m, d)).double()
        ids = torch.randint(0, n, (n,)), torch.randint(0, n, (m,))
        for pair_ids in ((None, None), ids):
            for threshold in (-100.0, 0.0, 2.0, 8.0, 100.0):
                problems.append((a, b, threshold, pair_ids, truth(a, b, threshold, None, *pair_ids)))
    return problems


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (15, 17), (40, 130), (600, 1100), (1030, 1031)])
def test_whole_numbers_are_exact(n, m, dtype):
    """Scores, distances and sums are whole, so that but one rounding is left; and nearly every maximum is tied."""
    for a, b, threshold, pair_ids, exact in whole_numbers(n, m):
        results = run(a.to(dtype), b.to(dtype), threshold, None, *pair_ids)
        for name, expected in exact.items():
            assert torch.equal(results[name], expected.to(results[name].dtype)), name


@pytest.mark.parametrize("beta", BETAS, ids=str)
def test_duplicate_rows_tie_exactly(beta):
    """Each score stands in many tiles; ties with the maximum have the term 1, or none among distances."""
    rows = torch.randint(-2, 3, (7, 6)).float() / 4
    a, b = rows[torch.arange(900) % 7], rows[torch.arange(1400) * 5 % 7]
    check(a, b, -0.3, beta)
    ones = run(torch.ones(600, 4), torch.ones(800, 4), 0.0, beta)
    expected = 0.0 if beta is None else 1.0
    assert ones["row_relative"].tolist() == [expected] * 600
    assert ones["col_relative"].tolist() == [expected] * 800


@pytest.mark.parametrize("beta", BETAS, ids=str)
def test_empty_sets_give_zero(beta):
    a, b = unit(600, 700, 8, torch.float32)
    for arguments in (
        (a, b, 1.5, beta),  # no score comes near
        (a, b, math.inf, beta),
        (a, b, -5.0, beta, torch.zeros(600, dtype=torch.int64), torch.zeros(700, dtype=torch.int64)),
        (a[:1], b[:1], -5.0, beta),
        (a[:2], b[:2], -5.0, beta),  # one negative a row: the hardest itself
        (a[:0], b[:5], -5.0, beta),
        (a[:0], b[:0], -5.0, beta),
    ):
        results = run(*arguments)
        assert results["row_relative"].tolist() == [0.0] * len(arguments[0])
        assert results["col_relative"].tolist() == [0.0] * len(arguments[1])


@pytest.mark.parametrize("beta", BETAS, ids=str)
def test_a_threshold_keeps_what_equals_it(beta):
    a, b = torch.arange(1.0, 701.0)[:, None], torch.ones(900, 1)  # s_ij = i + 1
    results = run(a, b, 698.0, beta)
    terms = [1.0, 2.0] if beta is None else [math.exp(-beta), math.exp(-2 * beta)]  # of 699 and 698 against 700
    torch.testing.assert_close(results["col_relative"][:690], torch.full((690,), sum(terms) / 2))
    assert not results["row_relative"][:697].any()
    assert results["row_relative"][-1] == (0.0 if beta is None else 1.0)


@pytest.mark.parametrize("beta", [None, 20.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("down", [(), (0,), (1,), (0, 1)], ids=["up-up", "down-up", "up-down", "down-down"])
def test_running_maxima_that_rise_or_fall_from_tile_to_tile(down, dtype, beta):
    """Every tile brings a new maximum to every row and column, or none but the first does."""
    n, m = 1100, 1300
    sides = [torch.linspace(0.1, 1, count, dtype=torch.float64)[:, None] for count in (n, m)]
    a, b = (side.flip(0).to(dtype) if k in down else side.to(dtype) for k, side in enumerate(sides))
    for threshold in (-1.0, gap(a, b, 0.5)):
        results, exact = check(a, b, threshold, beta)
        for name in ("row_relative", "col_relative"):
            # fp32: a rounding of scores up to 1, which is the whole error of a distance, and beta times that of a power
            rtol, atol = (1e-12, 1e-30) if dtype == torch.float64 else (5e-6, 1.2e-7)
            torch.testing.assert_close(results[name].double(), exact[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("beta", [None, 0.001, 10.0, 1000.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores(dtype, beta):
    g = torch.Generator().manual_seed(2)
    a, b = (100 * randn(g, 600, 4)).to(dtype), (100 * randn(g, 1100, 4)).to(dtype)
    assert float((a @ b.T).max()) > 1e4
    for threshold in (-1e9, gap(a, b, 0.5)):
        results, _ = check(a, b, threshold, beta)
        assert results["row_relative"].isfinite().all()


@pytest.mark.parametrize("beta", [None, 0.0, 10.0], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 15, 511, 512, 640])
def test_nan_and_infinities(place, value, beta):
    n, m = 650, 700
    a, b = torch.randint(1, 4, (n, 4)).float(), torch.randint(1, 4, (m, 4)).float()
    b[place] = value
    b[min(place + 30, m - 1), 1] = value
    a[place] = value
    for threshold in (10.0, math.nan):
        arguments = (a, b, threshold, beta)
        results, exact = run(*arguments), truth(*arguments)
        for name, expected in exact.items():
            torch.testing.assert_close(results[name].double(), expected, rtol=1e-5, atol=0, equal_nan=True)
        for got, expected in zip((results["row_relative"], results["col_relative"]), plain(*arguments), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("beta", BETAS, ids=str)
@pytest.mark.parametrize("threshold", [math.nan, -math.inf])
def test_a_nan_threshold_includes_everything(threshold, beta):
    a, b = unit(600, 700, 8, torch.float32)
    results, lowest = (run(a, b, t, beta) for t in (threshold, -9.0))
    for name in NAMES:
        assert torch.equal(results[name], lowest[name])
    check(a, b, threshold, beta, torch.arange(600) // 9, torch.arange(700) // 9)


@pytest.mark.parametrize("beta", [None, 10.0], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d", "dtype"),
    [
        (128, 128, 256, torch.float32),
        (1100, 1700, 48, torch.float32),
        (1100, 1700, 48, torch.bfloat16),
        (1500, 1600, 20, torch.float64),
        (4100, 4500, 4, torch.float32),  # more tiles than one thread holds slots for: several rounds
    ],
)
def test_the_same_bits_for_every_thread_count_and_run(n, m, d, dtype, beta):
    a, b = unit(n, m, d, dtype)
    ids = torch.arange(n) // 5, torch.arange(m) // 5
    threshold = gap(a[:500], b[:500], 0.3)
    torch.set_num_threads(1)
    first = run(a, b, threshold, beta, *ids)
    for threads in (2, 2, 2, 5, 1):
        torch.set_num_threads(threads)
        again = run(a, b, threshold, beta, *ids)
        for name in NAMES:
            assert torch.equal(again[name], first[name]), f"{name} with {threads} threads"


def test_any_layout_and_inputs_left_alone():
    wide = torch.randint(-9, 9, (60, 70)).float()
    before = wide.clone()
    a, b, ids = wide[::2, 1:18], wide.T[:45, :34:2], torch.arange(90) // 6
    arguments = (a, b, 0.0, None, ids[:60:2], ids[::2])
    results, exact = run(*arguments), truth(*arguments[:4], ids[:60:2].clone(), ids[::2][:45].clone())
    for name, expected in exact.items():
        assert torch.equal(results[name], expected.float()), name
    assert torch.equal(wide, before)


# By Triton


@many
@pytest.mark.parametrize("beta", [None, 10.0, 1000.0], ids=str)
@every_dtype
@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 1), (1, 40, 3), (2, 2, 16), (17, 33, 17), (50, 70, 8)])
def test_kernels_shapes(N, M, D, dtype, beta):
    a, b = ((torch.randn(rows, D) * 8).round().div(32).to(dtype) for rows in (N, M))  # exact scores: β leaves them so
    for threshold in (-9.0, gap(a, b, 0.5)):
        check_relative(a, b, threshold, beta)


@many
@pytest.mark.parametrize("kind", KERNEL_IDS)
def test_kernels_ids_and_exact_ties(kind):
    a, b = torch.randint(-3, 4, (37, 3)).float(), torch.randint(-3, 4, (66, 3)).float()
    check_relative(a, b, -100.0, None, KERNEL_IDS[kind](37), KERNEL_IDS[kind](66), exact=True)
    check_relative(a, b, 4.0, 0.5, KERNEL_IDS[kind](37), KERNEL_IDS[kind](66))


@many
@pytest.mark.parametrize("beta", [None, 8.0], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("down", [(), (0,), (1,), (0, 1)], ids=["up-up", "down-up", "up-down", "down-down"])
def test_kernels_maxima_that_rise_or_fall_from_tile_to_tile_and_slab_to_slab(down, blocks, beta, monkeypatch):
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", blocks)
    a, b = (torch.linspace(1, 2, rows)[:, None] for rows in (70, 100))
    a, b = (x.flip(0) if k in down else x for k, x in enumerate((a, b)))
    check_relative(a, b, gap(a, b, 0.2), beta)


@many
@pytest.mark.parametrize("beta", [None, 2.0], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_kernels_keeps_nan_and_inf(value, beta):
    a, b = torch.randint(1, 4, (37, 8)).float(), torch.randint(1, 4, (70, 8)).float()
    a[5, 2] = a[20, 0] = b[33, 7] = b[66, 1] = value
    check_relative(a, b, 30.0, beta)
    check_relative(a, b, NAN, beta, torch.arange(37) % 21, torch.arange(70) % 33)


@many
def test_kernels_of_an_empty_batch():
    x, level = torch.randn(0, 8).to(DEVICE), torch.tensor(0.0, device=DEVICE)
    results = device_ops.relative_negatives(x, torch.randn(5, 8).to(DEVICE), None, None, level, 1.0)
    assert [t.tolist() for t in results] == [[], [], [], [-INF] * 5, [-1] * 5, [], [0.0] * 5]


@many
def test_fp64_is_refused():
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        device_ops.launch("relative_negatives", x, x, None, None, x[0, 0], None)
