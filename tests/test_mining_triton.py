"""Mining by the Triton kernels: hardest and relative negatives and hardest positives, against fp64 truth."""

import pytest
import torch
from interpreted import DEVICE, DTYPES, where_triton_runs
from test_relative import gap
from triton_checks import (
    IDS,
    INF,
    NAN,
    assert_as_good,
    best,
    check_hardest,
    check_relative,
    run_hardest,
    small_tiles,  # noqa: F401
)

from gssf_kernels.kernels import tiles
from gssf_kernels.kernels.hardest import hardest_negatives
from gssf_kernels.kernels.positives import hardest_positives
from gssf_kernels.kernels.relative import relative_negatives

# hardest_negatives


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "M", "D"),
    [(1, 1, 1), (1, 40, 3), (16, 32, 16), (17, 33, 17), (15, 31, 64), (48, 64, 100), (50, 97, 24), (35, 35, 8)],
)
def test_hardest_shapes(N, M, D, dtype):
    check_hardest(torch.randn(N, D).to(dtype), torch.randn(M, D).to(dtype))


@pytest.mark.parametrize("tile", [tiles.Sweep(16, 16, 32, 4, 2), tiles.Sweep(32, 16, 16, 4, 2, tma=True)])
@pytest.mark.parametrize("blocks", [1, 3, 100])
def test_hardest_result_is_the_same_for_every_tile_and_slab(tile, blocks, monkeypatch):
    a, b = torch.randint(-3, 4, (45, 20)).float(), torch.randint(-3, 4, (70, 20)).float()
    expected = run_hardest(a, b)
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tile)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", blocks)
    check_hardest(a, b, exact=True)
    for x, y in zip(run_hardest(a, b), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "tile", [tiles.Sweep(16, 16, 32, 4, 2), tiles.Sweep(32, 16, 16, 4, 2, tma=True), tiles.Sweep(16, 64, 16, 4, 2)]
)
@pytest.mark.parametrize("blocks", [1, 2, 100])
def test_hardest_of_one_side_twice_is_that_of_two_equal_sides(tile, blocks, monkeypatch):
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tile)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", blocks)
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", 1)
    a = torch.randint(-3, 4, (75, 20), device=DEVICE).float()
    a[40], a[3, 0], a[70, 1] = NAN, INF, -INF
    for ids in (None, torch.arange(75, device=DEVICE) // 4, torch.zeros(75, dtype=torch.int64, device=DEVICE)):
        for x, y in zip(run_hardest(a, a, ids, ids), run_hardest(a, a.clone(), ids, ids), strict=True):
            assert torch.equal(x.nan_to_num(nan=123.0), y.nan_to_num(nan=123.0))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("D", [1, 3, 17, 100])
def test_hardest_pads_rows_that_are_not_aligned(D, tma, monkeypatch):
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tiles.Sweep(16, 16, 16, 4, 2, tma))
    check_hardest(torch.randint(-9, 9, (20, D)).float(), torch.randint(-9, 9, (33, D)).float(), exact=True)


@pytest.mark.parametrize("kind", IDS)
def test_hardest_ids(kind):
    a, b = torch.randint(-4, 5, (37, 16)).float(), torch.randint(-4, 5, (66, 16)).float()
    check_hardest(a, b, IDS[kind](37), IDS[kind](66), exact=True)


def test_hardest_ties_go_to_the_lowest_index():
    rows = torch.randint(-2, 3, (4, 16)).float()
    check_hardest(rows[torch.arange(40) % 4], rows[torch.arange(75) % 4], exact=True)
    ones = torch.ones(40, 16)
    _, _, row_index, _, col_index = run_hardest(ones, ones)
    assert row_index.tolist() == col_index.tolist() == [1] + [0] * 39


def test_hardest_takes_signed_zeros_as_equal():
    a, b = torch.zeros(20, 1), torch.zeros(40, 1)
    a[0] = -1.0
    check_hardest(a, b, exact=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_hardest_keeps_nan_and_inf(value, dtype):
    a, b = torch.randint(1, 4, (37, 8)).to(dtype), torch.randint(1, 4, (70, 8)).to(dtype)
    a[5, 2] = a[20, 0] = b[33, 7] = b[66, 1] = value
    check_hardest(a, b, exact=True)
    check_hardest(a, b, torch.arange(37) % 21, torch.arange(70) % 33, exact=True)


def test_hardest_sees_a_nan_that_is_a_candidate_only_in_one_direction():
    a, b = torch.eye(20), torch.eye(20)
    a[3, 3] = NAN  # s[3, :] = NaN: all of row 3, and candidate 3 of every column but its own
    _, row_score, row_index, col_score, col_index = run_hardest(a, b)
    assert row_score.isnan().nonzero().flatten().tolist() == [3]
    assert row_index[3] == 0
    assert col_score.isnan().tolist() == [j != 3 for j in range(20)]
    assert col_index.tolist() == [3] * 3 + [0] + [3] * 16


def test_hardest_without_any_negative():
    pair, row_score, row_index, col_score, col_index = run_hardest(torch.full((1, 4), 2.0), torch.full((1, 4), 3.0))
    assert (pair.item(), row_score.item(), row_index.item(), col_score.item(), col_index.item()) == (
        24.0, -INF, -1, -INF, -1,
    )  # fmt: skip
    ids = torch.zeros(40, dtype=torch.int64)
    pair, row_score, row_index, col_score, col_index = run_hardest(torch.ones(40, 4), torch.ones(40, 4), ids, ids)
    assert pair.tolist() == [4.0] * 40
    assert row_score.tolist() == col_score.tolist() == [-INF] * 40
    assert row_index.tolist() == col_index.tolist() == [-1] * 40


@pytest.mark.parametrize("M", [0, 5])
def test_hardest_of_an_empty_batch(M):
    found = hardest_negatives(torch.randn(0, 8).to(DEVICE), torch.randn(M, 8).to(DEVICE), None, None)
    assert [len(t) for t in found] == [0, 0, 0, M, M]
    assert found[3].tolist() == [-INF] * M
    assert found[4].tolist() == [-1] * M


def test_hardest_takes_any_layout():
    wide = torch.randint(-9, 9, (60, 70)).float()
    a, b = wide[::2, 1:18], wide.T[:45, :34:2]
    ids = torch.arange(90) // 6
    check_hardest(a, b, ids[:60:2], ids[::2], exact=True)


# relative_negatives


@pytest.mark.parametrize("beta", [None, 10.0, 1000.0], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 1), (1, 40, 3), (2, 2, 16), (17, 33, 17), (50, 70, 8)])
def test_relative_shapes(N, M, D, dtype, beta):
    a, b = ((torch.randn(rows, D) * 8).round().div(32).to(dtype) for rows in (N, M))  # exact scores: β leaves them so
    for threshold in (-9.0, gap(a, b, 0.5)):
        check_relative(a, b, threshold, beta)


@pytest.mark.parametrize("kind", IDS)
def test_relative_ids_and_exact_ties(kind):
    a, b = torch.randint(-3, 4, (37, 3)).float(), torch.randint(-3, 4, (66, 3)).float()
    check_relative(a, b, -100.0, None, IDS[kind](37), IDS[kind](66), exact=True)
    check_relative(a, b, 4.0, 0.5, IDS[kind](37), IDS[kind](66))


@pytest.mark.parametrize("beta", [None, 8.0], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("down", [(), (0,), (1,), (0, 1)], ids=["up-up", "down-up", "up-down", "down-down"])
def test_relative_maxima_that_rise_or_fall_from_tile_to_tile_and_slab_to_slab(down, blocks, beta, monkeypatch):
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", blocks)
    a, b = (torch.linspace(1, 2, rows)[:, None] for rows in (70, 100))
    a, b = (x.flip(0) if k in down else x for k, x in enumerate((a, b)))
    check_relative(a, b, gap(a, b, 0.2), beta)


@pytest.mark.parametrize("beta", [None, 2.0], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_relative_keeps_nan_and_inf(value, beta):
    a, b = torch.randint(1, 4, (37, 8)).float(), torch.randint(1, 4, (70, 8)).float()
    a[5, 2] = a[20, 0] = b[33, 7] = b[66, 1] = value
    check_relative(a, b, 30.0, beta)
    check_relative(a, b, NAN, beta, torch.arange(37) % 21, torch.arange(70) % 33)


def test_relative_of_an_empty_batch():
    x, level = torch.randn(0, 8).to(DEVICE), torch.tensor(0.0, device=DEVICE)
    found = relative_negatives(x, torch.randn(5, 8).to(DEVICE), None, None, level, 1.0)
    assert [t.tolist() for t in found] == [[], [], [], [-INF] * 5, [-1] * 5, [], [0.0] * 5]


# hardest_positives


def check_positives(x, labels, exact=True):
    """Compare with fp64; exact: every index too, for data whose scores are exact in fp32."""
    found = hardest_positives(x.to(DEVICE), labels.to(DEVICE)).cpu()
    assert found.dtype == torch.int64
    s = x.double() @ x.double().T
    no = (labels[:, None] != labels[None, :]) | torch.eye(len(x), dtype=torch.bool)
    score, lowest = best((-s).masked_fill(no, -INF))
    if exact:
        assert torch.equal(found, lowest)
    assert torch.equal(found == -1, lowest == -1)
    some = lowest >= 0
    assert not no[some].gather(1, found[some, None]).any()
    taken = -s[some].gather(1, found[some, None])[:, 0]
    assert_as_good(taken.float(), (-(x.float() @ x.float().T)).masked_fill(no, -INF).amax(1)[some], score[some])


LABELS = {
    "fours": lambda n: torch.arange(n) // 4,
    "shuffled": lambda n: torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(n)) - 3,
    "one": lambda n: torch.zeros(n, dtype=torch.int64),
    "unique": lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(n)),
    "giant beside singles": lambda n: torch.where(torch.arange(n) % 3 == 0, torch.arange(n), -(2**60)),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), [(1, 1), (2, 3), (16, 16), (33, 17), (90, 40)])
def test_positives(N, D, dtype, kind):
    check_positives(torch.randint(-2, 3, (N, D)).to(dtype), LABELS[kind](N))  # ties everywhere, and exact
    check_positives(torch.randn(N, D).to(dtype), LABELS[kind](N), exact=False)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_positives_keep_nan_and_inf(value):
    x, labels = torch.randint(1, 4, (50, 5)).float(), torch.arange(50) % 3
    x[7, 1] = x[34, 0] = x[35, 2] = value
    check_positives(x, labels)
    x[:, 0] = value
    check_positives(x, labels)


def test_positives_take_any_layout_and_an_empty_batch():
    wide = torch.randint(-9, 9, (60, 70)).float()
    check_positives(wide[::2, 1:18], (torch.arange(90) // 6)[:60:2])
    check_positives(wide.T[:45, :34:2], torch.arange(45) % 4)
    assert hardest_positives(torch.randn(0, 8).to(DEVICE), torch.zeros(0, dtype=torch.int64).to(DEVICE)).shape == (0,)


def test_fp64_is_refused():
    x = torch.randn(4, 4, dtype=torch.float64)
    for call in [
        lambda: hardest_negatives(x, x, None, None),
        lambda: relative_negatives(x, x, None, None, x[0, 0], None),
        lambda: hardest_positives(x, torch.arange(4)),
    ]:
        with pytest.raises(TypeError, match="float64"):
            call()


where_triton_runs(globals())
