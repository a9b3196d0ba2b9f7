"""Hardest negatives by the Triton kernels, and their gradient, against fp64 truth."""

import device_ops
import pytest
import torch
from interpreted import DEVICE, every_dtype
from triton_checks import IDS, INF, NAN, check_hardest, many, run_hardest

pytest.importorskip("triton")

from gssf_kernels import plan
from gssf_kernels.triton import tiles

pytestmark = many


@every_dtype
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
    monkeypatch.setattr(plan, "sweep_tile", lambda *_: tile)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", blocks)
    check_hardest(a, b, exact=True)
    for x, y in zip(run_hardest(a, b), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "tile", [tiles.Sweep(16, 16, 32, 4, 2), tiles.Sweep(32, 16, 16, 4, 2, tma=True), tiles.Sweep(16, 64, 16, 4, 2)]
)
@pytest.mark.parametrize("blocks", [1, 2, 100])
def test_hardest_of_one_side_twice_is_that_of_two_equal_sides(tile, blocks, monkeypatch):
    monkeypatch.setattr(plan, "sweep_tile", lambda *_: tile)
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
    monkeypatch.setattr(plan, "sweep_tile", lambda *_: tiles.Sweep(16, 16, 16, 4, 2, tma))
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


@every_dtype
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
    results = device_ops.hardest_negatives(torch.randn(0, 8).to(DEVICE), torch.randn(M, 8).to(DEVICE), None, None)
    assert [len(t) for t in results] == [0, 0, 0, M, M]
    assert results[3].tolist() == [-INF] * M
    assert results[4].tolist() == [-1] * M


def test_hardest_takes_any_layout():
    wide = torch.randint(-9, 9, (60, 70)).float()
    a, b = wide[::2, 1:18], wide.T[:45, :34:2]
    ids = torch.arange(90) // 6
    check_hardest(a, b, ids[:60:2], ids[::2], exact=True)


# The gradient


@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]], ids=str)
@every_dtype
@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 1), (1, 40, 3), (33, 50, 130), (70, 70, 17)])
def test_hardest_backward_scanning_is_the_sum_of_its_pairs(N, M, D, dtype, needs, monkeypatch):
    a, b = torch.randn(N, D).to(dtype), torch.randn(D, M).to(dtype).T
    rows, cols = torch.randint(-1, M, (N,)), torch.randint(-1, N, (M,))
    cols[::2] = N // 2  # a hub of more edges than one step takes
    dpositive, drow, dcol = torch.randn(N), torch.randn(N), torch.randn(M)
    dpositive[::3] = dcol[1::5] = 0
    on = [t.to(DEVICE) for t in (dpositive, drow, dcol, rows, cols, a, b)]
    scanned = device_ops.backward_without_metric(*on, needs)
    monkeypatch.setattr(plan, "SCAN_ROWS", 0)
    summed = device_ops.backward_without_metric(*on, needs)
    i, j = torch.arange(N), torch.arange(M)
    edges = torch.cat((i, i, cols)), torch.cat((i, rows, j))
    weight = torch.cat((dpositive, drow, dcol)).double()
    real = (edges[0] >= 0) & (edges[1] >= 0)
    g = torch.zeros(N, M, dtype=torch.float64)
    g.index_put_((edges[0][real], edges[1][real]), weight[real], accumulate=True)
    for k, exact in enumerate((g @ b.double(), g.T @ a.double())):
        for results in (scanned[k], summed[k]):
            if needs[k]:
                assert results.dtype == dtype
                floor = 8 * torch.finfo(dtype).eps * float(exact.abs().max())
                assert float((results.cpu().double() - exact).abs().max()) <= floor
            else:
                assert results.numel() == 0


def test_hardest_backward_lets_through_no_nan_of_absent_edges_or_zero_gradients():
    a, b = torch.ones(4, 3), torch.full((5, 3), INF)
    rows, cols = torch.full((4,), -1), torch.full((5,), -1)
    lines = torch.zeros(4), torch.full((4,), NAN), torch.full((5,), NAN)
    da, db = device_ops.backward_without_metric(*(t.to(DEVICE) for t in (*lines, rows, cols, a, b)), [True, True])
    assert not da.any()
    assert not db.any()
    da, db = device_ops.backward_without_metric(*(t.to(DEVICE) for t in (*lines, rows, cols, a[:0], b)), [True, True])
    assert da.shape == (0, 3)
    assert not db.any()


def test_fp64_is_refused():
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        device_ops.launch("hardest_negatives", x, x, None, None)
