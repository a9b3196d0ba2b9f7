"""The Triton kernels against fp64 truth: on a GPU where there is one, else under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so without a GPU this file runs once more in a process of its
own (fp32 and fp16: the interpreter's bf16 is wrong). Small tiles make small problems meet every edge.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_relative import gap
from test_relative import plain as plain_relative
from test_relative import truth as true_relative

triton = pytest.importorskip("triton")

from gssf_kernels.kernels import tiles  # noqa: E402
from gssf_kernels.kernels.hardest import hardest_negatives  # noqa: E402
from gssf_kernels.kernels.pairs import hardest_negatives_backward, pair_scores, pair_scores_backward  # noqa: E402
from gssf_kernels.kernels.positives import hardest_positives  # noqa: E402
from gssf_kernels.kernels.project import pairs_project_backward, project, project_backward  # noqa: E402
from gssf_kernels.kernels.relative import relative_negatives  # noqa: E402
from gssf_kernels.kernels.terms import (  # noqa: E402
    contrast_terms,
    contrast_terms_backward,
    hinge_terms,
    hinge_terms_backward,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, slabs of two row blocks, merges of few parts."""
    torch.manual_seed(0)
    monkeypatch.setattr(tiles, "sweep_tile", lambda *_: tiles.Sweep(16, 32, 16, 4, 2))
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", 2)
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", 0)
    monkeypatch.setattr(tiles, "SMALL", 0)
    monkeypatch.setattr(tiles, "MERGE_PARTS", 4)
    monkeypatch.setattr(tiles, "MERGE_LANES", 32)
    monkeypatch.setattr(tiles, "POSITIVES", {key: tiles.Sweep(16, 32, 16, 4, 2) for key in tiles.POSITIVES})
    monkeypatch.setattr(tiles, "PROJECT", {key: tiles.Project(16, 16, 4, 2) for key in tiles.PROJECT})


def assert_as_good(ours, plain, truth):
    """Our error is at most twice that of plain PyTorch in the same dtype, plus four roundings."""
    assert ours.shape == truth.shape
    ours, plain, truth = ours.cpu(), plain.cpu(), truth.cpu()
    assert torch.equal(ours.isnan(), truth.isnan())
    finite = truth.isfinite()
    infinite = truth.isinf()
    assert torch.equal(ours[infinite].double(), truth[infinite])
    if finite.any():
        error = (ours.double() - truth)[finite].abs().max()
        floor = 4 * torch.finfo(ours.dtype).eps * truth[finite].abs().max()
        assert error <= 2 * (plain.double() - truth)[finite].abs().max() + floor


# hardest_negatives


def best(s):
    """(score, index) of the best entry of each row of s: NaN above all, lowest index, -1 where all is -inf."""
    nan = s.isnan()
    score = torch.where(nan.any(1), NAN, s.nan_to_num(-INF, INF, -INF).amax(1))
    hit = torch.where(nan.any(1)[:, None], nan, s == score[:, None])
    return score, torch.where(score == -INF, -1, hit.int().argmax(1))


def positives(N, M, a_ids, b_ids):
    """[N, M] bool: pairs that are no negatives."""
    mask = torch.eye(N, M, dtype=torch.bool)
    return mask if a_ids is None else mask | (a_ids[:, None] == b_ids[None, :])


def run_hardest(a, b, a_ids=None, b_ids=None):
    on = [x.to(DEVICE) if x is not None and not x.is_cuda else x for x in (a, b, a_ids, b_ids)]
    return [x.cpu() for x in hardest_negatives(*on)]


def check_hardest(a, b, a_ids=None, b_ids=None, exact=False):
    """Compare with fp64; exact: every index too, for data whose scores are exact in fp32."""
    pair, row_score, row_index, col_score, col_index = run_hardest(a, b, a_ids, b_ids)
    assert row_index.dtype == col_index.dtype == torch.int64
    a, b = a.cpu(), b.cpu()
    truth = a.double() @ b.double().T
    plain = a.float() @ b.float().T
    assert_as_good(pair, plain.diagonal(), truth.diagonal())
    masked = positives(len(a), len(b), a_ids, b_ids)
    for ours, index, s, p, no in [
        (row_score, row_index, truth, plain, masked),
        (col_score, col_index, truth.T, plain.T, masked.T),
    ]:
        s, p = s.masked_fill(no, -INF), p.masked_fill(no, -INF)
        score, lowest = best(s)
        assert_as_good(ours, best(p)[0], score)
        assert torch.equal(index == -1, lowest == -1)
        some = lowest >= 0
        assert not no[some].gather(1, index[some, None]).any()
        if exact:
            assert torch.equal(index, lowest)
        else:
            assert_as_good(s[some].gather(1, index[some, None])[:, 0].to(ours.dtype), best(p)[0][some], score[some])


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


IDS = {
    "distinct": lambda n: torch.arange(n),
    "equal": lambda n: torch.zeros(n, dtype=torch.int64),
    "groups": lambda n: torch.arange(n) // 5,
    "shuffled": lambda n: torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(n)),
    "negative": lambda n: torch.arange(n) // 3 - 2**40,
    "low bits alike": lambda n: (torch.arange(n) % 7) * 2**32 + 5,
    "extreme": lambda n: torch.where(torch.arange(n) % 2 == 0, 2**63 - 1, -(2**63)),
}


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


def test_pair_scores_backward_gives_only_what_is_needed():
    a, b, index = torch.randn(4, 8).to(DEVICE), torch.randn(4, 8).to(DEVICE), torch.arange(4).to(DEVICE)
    grad = torch.ones(4).to(DEVICE)
    both = pair_scores_backward(grad, index, index, a, b, [True, True])
    for side in range(2):
        one = pair_scores_backward(grad, index, index, a, b, [side == 0, side == 1])
        assert torch.equal(one[side], both[side])
        assert one[1 - side].numel() == 0


def test_hardest_takes_any_layout():
    wide = torch.randint(-9, 9, (60, 70)).float()
    a, b = wide[::2, 1:18], wide.T[:45, :34:2]
    ids = torch.arange(90) // 6
    check_hardest(a, b, ids[:60:2], ids[::2], exact=True)


# relative_negatives


def check_relative(a, b, threshold, beta, a_ids=None, b_ids=None, exact=False):
    """Compare with loops in fp64; exact: distances of whole numbers, which leave but one rounding."""
    level = torch.tensor(threshold, device=DEVICE)
    on = [x.to(DEVICE) if x is not None else None for x in (a, b, a_ids, b_ids)]
    *found, rows, cols = (x.cpu() for x in relative_negatives(*on, level, beta))
    for ours, known in zip(found, run_hardest(a, b, a_ids, b_ids), strict=True):
        torch.testing.assert_close(ours, known, rtol=0, atol=0, equal_nan=True)
    arguments = (a, b, threshold, beta, a_ids, b_ids)
    expected = true_relative(*arguments)
    for ours, twin, name in zip(
        (rows, cols), plain_relative(*arguments), ("row_relative", "col_relative"), strict=True
    ):
        if exact:
            assert torch.equal(ours, expected[name].float())
        else:
            assert_as_good(ours, twin, expected[name])
    return rows, cols


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


# pair_scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 3, 100, 257])
def test_pair_scores(D, dtype):
    N, M, E = 13, 21, 70
    a, b = torch.randn(N, D).to(dtype), torch.randn(D, M).to(dtype).T
    rows, cols = torch.randint(-1, N, (E,)), torch.randint(-1, M, (E,))
    rows[::7] = 3  # a hub of more edges than one step takes
    grad = torch.randn(E)[torch.arange(E)]

    def scores(a, b):
        s = (a[rows.clamp(0)] * b[cols.clamp(0)]).sum(1)
        return torch.where((rows >= 0) & (cols >= 0), s, -INF)

    on = [x.to(DEVICE) for x in (a, b, rows, cols)]
    wide_a, wide_b = a.double().requires_grad_(), b.double().requires_grad_()
    truth = scores(wide_a, wide_b)
    ours = pair_scores(*on)
    assert ours.dtype == torch.float32
    assert_as_good(ours, scores(a.float(), b.float()), truth.detach())

    truth.backward(grad.double())
    plain_a, plain_b = a.clone().requires_grad_(), b.clone().requires_grad_()
    scores(plain_a, plain_b).backward(grad.to(dtype))
    da, db = pair_scores_backward(grad.to(DEVICE), on[2], on[3], on[0], on[1], [True, True])
    assert da.dtype == db.dtype == dtype
    assert_as_good(da, plain_a.grad, wide_a.grad)
    assert_as_good(db, plain_b.grad, wide_b.grad)


def test_pair_scores_backward_of_a_hub_and_of_absent_edges():
    a, b = torch.ones(3, 130), torch.arange(40.0)[:, None].expand(40, 130)
    rows = torch.cat([torch.full((40,), 1), torch.tensor([-1, 0])])
    cols = torch.cat([torch.arange(40), torch.tensor([2, -1])])
    grad = torch.ones(42)
    grad[40:] = NAN  # the gradient of an edge that is none must not count
    da, db = (x.cpu() for x in pair_scores_backward(*(x.to(DEVICE) for x in (grad, rows, cols, a, b)), [True, True]))
    assert torch.equal(da, torch.tensor([0.0, 780.0, 0.0])[:, None].expand(3, 130))
    assert torch.equal(db, torch.ones(40, 130))


def test_pair_scores_backward_of_a_zero_gradient_adds_nothing_even_to_infinite_rows():
    a, b, index = torch.ones(2, 5), torch.full((2, 5), INF), torch.arange(2)
    da, db = (
        x.cpu()
        for x in pair_scores_backward(*(x.to(DEVICE) for x in (torch.zeros(2), index, index, a, b)), [True, True])
    )
    assert not da.any()
    assert not db.any()


def test_pair_scores_backward_takes_an_expanded_gradient_and_no_edges():
    a, b = torch.randint(-3, 4, (5, 6)).float(), torch.randint(-3, 4, (7, 6)).float()
    index = torch.arange(5)
    grad = torch.tensor(2.0).expand(5)
    da, db = (x.cpu() for x in pair_scores_backward(*(x.to(DEVICE) for x in (grad, index, index, a, b)), [True, True]))
    assert torch.equal(da, 2 * b[:5])
    assert torch.equal(db, torch.cat([2 * a, torch.zeros(2, 6)]))
    none = index[:0].to(DEVICE)
    da, db = pair_scores_backward(grad[:0].to(DEVICE), none, none, a.to(DEVICE), b.to(DEVICE), [True, True])
    assert da.shape == (5, 6)
    assert db.shape == (7, 6)
    assert not da.any()
    assert not db.any()
    assert pair_scores(a.to(DEVICE), b.to(DEVICE), none, none).shape == (0,)


# the gradient of hardest negatives, and the triplet formula


@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 1), (1, 40, 3), (33, 50, 130), (70, 70, 17)])
def test_hardest_backward_scanning_is_the_sum_of_its_pairs(N, M, D, dtype, needs, monkeypatch):
    a, b = torch.randn(N, D).to(dtype), torch.randn(D, M).to(dtype).T
    rows, cols = torch.randint(-1, M, (N,)), torch.randint(-1, N, (M,))
    cols[::2] = N // 2  # a hub of more edges than one step takes
    dpair, drow, dcol = torch.randn(N), torch.randn(N), torch.randn(M)
    dpair[::3] = dcol[1::5] = 0
    on = [t.to(DEVICE) for t in (dpair, drow, dcol, rows, cols, a, b)]
    scanned = hardest_negatives_backward(*on, needs)
    monkeypatch.setattr(tiles, "SCAN_ROWS", 0)
    summed = hardest_negatives_backward(*on, needs)
    i, j = torch.arange(N), torch.arange(M)
    edges = torch.cat((i, i, cols)), torch.cat((i, rows, j))
    weight = torch.cat((dpair, drow, dcol)).double()
    real = (edges[0] >= 0) & (edges[1] >= 0)
    g = torch.zeros(N, M, dtype=torch.float64)
    g.index_put_((edges[0][real], edges[1][real]), weight[real], accumulate=True)
    for k, exact in enumerate((g @ b.double(), g.T @ a.double())):
        for found in (scanned[k], summed[k]):
            if needs[k]:
                assert found.dtype == dtype
                floor = 8 * torch.finfo(dtype).eps * float(exact.abs().max())
                assert float((found.cpu().double() - exact).abs().max()) <= floor
            else:
                assert found.numel() == 0


def test_hardest_backward_lets_through_no_nan_of_absent_edges_or_zero_gradients():
    a, b = torch.ones(4, 3), torch.full((5, 3), INF)
    rows, cols = torch.full((4,), -1), torch.full((5,), -1)
    lines = torch.zeros(4), torch.full((4,), NAN), torch.full((5,), NAN)
    da, db = hardest_negatives_backward(*(t.to(DEVICE) for t in (*lines, rows, cols, a, b)), [True, True])
    assert not da.any()
    assert not db.any()
    da, db = hardest_negatives_backward(*(t.to(DEVICE) for t in (*lines, rows, cols, a[:0], b)), [True, True])
    assert da.shape == (0, 3)
    assert not db.any()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 9), (32, 32), (70, 100)])
def test_hinge_terms(N, M, reduction, monkeypatch):
    monkeypatch.setattr(tiles, "TERMS", 16)
    positive, row, col = torch.randn(N), torch.randn(N), torch.randn(M)
    row[0], col[M // 2] = -INF, -INF
    row[N // 2] = positive[N // 2] - 0.25  # exactly on the hinge, for a margin that is exact too
    for special in (None, NAN, INF):
        if special is not None:
            row[N - 1] = special
        exact = [t.double().requires_grad_() for t in (positive, row, col)]
        terms = sum(torch.where(0.25 + n - exact[0] < 0, 0, 0.25 + n - exact[0]) for n in (exact[1], exact[2][:N]))
        truth = terms if reduction == "none" else terms.sum() / (N if reduction == "mean" else 1)
        grad = torch.randn(truth.shape)
        truth.backward(grad.double())
        on = [t.to(DEVICE) for t in (positive, row, col)]
        found = hinge_terms(*on, 0.25, reduction)
        torch.testing.assert_close(found.cpu().double(), truth.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
        for got, leaf in zip(hinge_terms_backward(grad.to(DEVICE), *on, 0.25, reduction), exact, strict=True):
            torch.testing.assert_close(got.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-6)


def test_hinge_terms_take_expanded_gradients_and_an_empty_batch():
    lines = [t.to(DEVICE) for t in (torch.zeros(9), torch.zeros(9), torch.zeros(12))]
    grad = torch.tensor(2.0).expand(9).to(DEVICE)
    dpositive, drow, dcol = hinge_terms_backward(grad, *lines, 0.25, "none")
    assert (dpositive.tolist(), drow.tolist(), dcol.tolist()) == ([-4.0] * 9, [2.0] * 9, [2.0] * 9 + [0.0] * 3)
    none = [t[:0] for t in lines[:2]]
    assert hinge_terms(*none, lines[2], 0.25, "mean").tolist() == 0
    assert hinge_terms(*none, lines[2], 0.25, "none").shape == (0,)
    one = torch.ones(()).to(DEVICE)
    assert hinge_terms_backward(one, *none, lines[2], 0.25, "mean")[2].tolist() == [0.0] * 12


@pytest.mark.parametrize("sides", ["both", "both of one target", "rows"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 9), (70, 100)])
def test_contrast_terms(N, M, reduction, sides, monkeypatch):
    monkeypatch.setattr(tiles, "TERMS", 16)
    lines = [torch.randn(n) for n in (N, N, N, M, M, N)]
    both, shared = sides != "rows", sides == "both of one target"
    lines = [*lines[:5], None] if shared else lines if both else [*lines[:3], None, None, None]
    exact = [t if t is None else t.double().requires_grad_() for t in lines]
    terms = (exact[0] - exact[2]) + exact[1]
    if both:
        terms = (terms + (exact[3][:N] - exact[2 if shared else 5]) + exact[4][:N]) / 2
    truth = terms if reduction == "none" else terms.sum() / (N if reduction == "mean" else 1)
    grad = torch.randn(truth.shape)
    truth.backward(grad.double())
    on = [t if t is None else t.to(DEVICE) for t in lines]
    found = contrast_terms(*on, reduction)
    torch.testing.assert_close(found.cpu().double(), truth.detach(), rtol=1e-5, atol=1e-5)
    drow, dtarget, dcol = contrast_terms_backward(grad.to(DEVICE), on[1], on[4], shared, reduction)
    wanted = (exact[1], exact[2], exact[4]) if both else (exact[1], exact[2])
    for got, leaf in zip((drow, dtarget, dcol), wanted, strict=both):
        torch.testing.assert_close(got.cpu().double(), leaf.grad, rtol=1e-5, atol=1e-6)
    assert dcol.shape == (M if both else 0,)


# project


def plain_project(x, diag, blocks, permutation, normalize):
    """The definition, in the dtype of x."""
    x = F.normalize(x, dim=1) if normalize else x
    if diag is None and blocks is None:
        return x
    p = x * diag if diag is not None else torch.zeros_like(x)
    if blocks is None:
        return p
    at = permutation if permutation is not None else torch.arange(x.shape[1])
    q = x[:, at].reshape(len(x), *blocks.shape[:2])
    return p.index_add(1, at, torch.einsum("ngk,gkc->ngc", q, blocks).reshape(x.shape))


def check_project(x, diag, blocks, permutation, normalize):
    """Compare p and all gradients with fp64 autograd."""
    grad = torch.randn(x.shape).to(x.dtype)

    def differentiate(dtype):
        leaves = [t.to(dtype).clone().requires_grad_() if t is not None else None for t in (x, diag, blocks)]
        p = plain_project(*leaves, permutation, normalize)
        p.backward(grad.to(dtype))
        return [p.detach()] + [t.grad if t is not None else None for t in leaves]

    on = [t.to(DEVICE) if t is not None else None for t in (x, diag, blocks, permutation)]
    p = project(*on, normalize)
    needs = [True, diag is not None, blocks is not None]
    gradients = project_backward(grad.to(DEVICE), *on, normalize, needs)
    assert p.dtype == gradients[0].dtype == x.dtype
    for ours, plain, truth in zip([p, *gradients], differentiate(x.dtype), differentiate(torch.float64), strict=True):
        if truth is None:
            assert ours.numel() == 0
        else:
            assert_as_good(ours, plain, truth)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "D", "b"),
    [(1, 1, 1), (20, 3, 3), (5, 17, 1), (19, 48, 3), (40, 64, 16), (33, 64, 64), (18, 100, 25), (7, 96, 8)],
)
def test_project(N, D, b, dtype, normalize):
    check_project(
        torch.randn(N, D).to(dtype), torch.randn(D).to(dtype), torch.randn(D // b, b, b).to(dtype),
        torch.randperm(D), normalize,
    )  # fmt: skip


@pytest.mark.parametrize("terms", ["diag", "blocks", "both", "neither"])
@pytest.mark.parametrize("normalize", [False, True])
def test_project_terms(terms, normalize):
    diag = torch.randn(24) if terms in ("diag", "both") else None
    blocks = torch.randn(6, 4, 4) if terms in ("blocks", "both") else None
    check_project(torch.randn(9, 24), diag, blocks, None, normalize)


def test_project_sums_many_rows_in_splits():
    check_project(torch.randn(300, 20), torch.randn(20), torch.randn(10, 2, 2), None, True)


def test_project_takes_any_layout():
    wide = torch.randn(40, 70)
    check_project(
        wide.T[:30, ::2][:, :18], torch.randn(36)[::2], torch.randn(6, 3, 3).transpose(1, 2),
        torch.randperm(18).repeat_interleave(2)[::2], True,
    )  # fmt: skip


def test_project_of_mixed_dtypes():
    x, diag, blocks = torch.randn(20, 32).half(), torch.randn(32), torch.randn(4, 8, 8)
    p = project(*(t.to(DEVICE) for t in (x, diag, blocks)), None, True)
    truth = plain_project(x.double(), diag.double(), blocks.double(), None, True)
    plain = plain_project(x, diag.half(), blocks.half(), None, True)
    assert_as_good(p, plain, truth)
    grad = torch.randn(20, 32).half()
    _, ddiag, dblocks = project_backward(
        *(t.to(DEVICE) for t in (grad, x, diag, blocks)), None, True, [False, True, True]
    )
    assert ddiag.dtype == dblocks.dtype == torch.float32
    unit = F.normalize(x.double(), dim=1)
    assert_as_good(ddiag, (F.normalize(x, dim=1) * grad).sum(0), (unit * grad.double()).sum(0))


def test_project_of_zero_and_nan_rows():
    x = torch.randn(6, 8)
    x[2] = 0.0
    x[4, 3] = NAN
    diag, blocks = torch.randn(8), torch.randn(2, 4, 4)
    p = project(*(t.to(DEVICE) for t in (x, diag, blocks)), None, True).cpu()
    assert torch.equal(p[2], torch.zeros(8))
    assert p[4].isnan().all()
    assert p[[0, 1, 3, 5]].isfinite().all()
    finite = x.clone()
    finite[4] = 1.0
    check_project(finite, diag, blocks, None, True)


def test_project_backward_gives_only_what_is_needed():
    x, grad = torch.randn(9, 8).to(DEVICE), torch.randn(9, 8).to(DEVICE)
    diag, blocks = torch.randn(8).to(DEVICE), torch.randn(2, 4, 4).to(DEVICE)
    everything = project_backward(grad, x, diag, blocks, None, True, [True] * 3)
    for one in range(3):
        some = project_backward(grad, x, diag, blocks, None, True, [k == one for k in range(3)])
        assert [t.numel() for t in some] == [everything[k].numel() * (k == one) for k in range(3)]
        assert torch.equal(some[one], everything[one])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("permuted", [False, True])
def test_pairs_project_backward(permuted, dtype, normalize):
    """The gradient of Σ_e g_e ⟨p of x, ŷ⟩ over listed pairs, by autograd in fp64."""
    D, N, M, E = 24, 19, 30, 70
    x, y = torch.randn(N, D).to(dtype), torch.randn(M, D).to(dtype)
    diag, blocks = torch.randn(D).to(dtype), torch.randn(3, 8, 8).to(dtype)
    permutation = torch.randperm(D) if permuted else None
    grad, rows, cols = torch.randn(E), torch.randint(-1, N, (E,)), torch.randint(-1, M, (E,))
    rows[:25] = 4  # a hub
    grad[::6] = 0

    def differentiate(dtype):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, diag, blocks)]
        p = plain_project(*leaves, permutation, normalize)
        other = F.normalize(y.to(dtype), dim=1) if normalize else y.to(dtype)
        real = (rows >= 0) & (cols >= 0)
        (grad[real].to(dtype) * (p[rows[real]] * other[cols[real]]).sum(1)).sum().backward()
        return [t.grad for t in leaves]

    on = [t.to(DEVICE) if t is not None else None for t in (grad, rows, cols, x, y, diag, blocks, permutation)]
    found = pairs_project_backward(*on, normalize, [True] * 3)
    for ours, plain, truth in zip(found, differentiate(dtype), differentiate(torch.float64), strict=True):
        assert ours.dtype == dtype
        assert_as_good(ours, plain, truth)


def test_pairs_project_backward_of_a_zero_gradient_adds_nothing_even_from_nan_rows():
    x, y, index = torch.randn(3, 8), torch.full((3, 8), NAN), torch.arange(3)
    on = [t.to(DEVICE) for t in (torch.zeros(3), index, index, x, y, torch.randn(8))]
    dx, ddiag, _ = pairs_project_backward(*on, None, None, True, [True, True, False])
    assert not dx.any()
    assert not ddiag.any()


def test_fp64_is_refused():
    x = torch.randn(4, 4, dtype=torch.float64)
    index = torch.arange(4)
    for call in [
        lambda: hardest_negatives(x, x, None, None),
        lambda: relative_negatives(x, x, None, None, x[0, 0], None),
        lambda: hardest_positives(x, index),
        lambda: pair_scores(x, x, index, index),
        lambda: pair_scores_backward(x[0], index, index, x, x, [True, True]),
        lambda: project(x, None, None, None, True),
        lambda: project_backward(x, x, None, None, None, True, [True] * 3),
    ]:
        with pytest.raises(TypeError, match="float64"):
            call()


if DEVICE is None:
    for name in [name for name in globals() if name.startswith("test_")]:
        del globals()[name]

    def test_under_the_interpreter():
        """All of the above, in a process of its own."""
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        summary = run.stdout.strip().splitlines()[-1:]
        print(*summary)
        assert run.returncode == 0, run.stdout + run.stderr
        assert re.search(r"\d{2,} passed", run.stdout), summary
