"""Certified mining by the Triton kernels: the winners of the exact scores, to the bit those of the C++ path."""

import pytest
import torch

pytest.importorskip("triton")

import device_ops
import triton
import triton.language as tl
from certified_cases import MAKERS, UNIT, check, unit
from interpreted import DEVICE
from triton_checks import exact

from gssf_kernels import plan
from gssf_kernels.triton import certified, tiles

pytestmark = exact
INF, NAN = float("inf"), float("nan")


def mined(a, b, a_ids=None, b_ids=None):
    """(the five of hardest_negatives, how many scores were made in fp64)."""
    twice, one = b is a, b_ids is a_ids
    a, a_ids = (t if t is None else t.to(DEVICE) for t in (a, a_ids))
    b, b_ids = a if twice else b.to(DEVICE), a_ids if one else b_ids.to(DEVICE)
    *results, made = device_ops.on_cuda("hardest_negatives", a, b, a_ids, b_ids, "certified")
    return [t.cpu() for t in results], int(made)


def by_cpp(a, b, a_ids=None, b_ids=None):
    return torch.ops.gssf.hardest_negatives(a, b, a_ids, b_ids, "certified")[:5]


def same_bits(results, expected):
    return all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


SHAPES = [(1, 1, 1), (3, 40, 7), (17, 33, 33), (35, 50, 100)]


@pytest.mark.parametrize("name", MAKERS)
def test_winners_are_those_of_exact_scores(name):
    for seed, (n, m, d) in enumerate(SHAPES):
        torch.manual_seed(seed)
        a, b = MAKERS[name](n, m, d)
        ids = (None, torch.arange(m) // 4, torch.zeros(m, dtype=torch.int64))[seed % 3]
        ids = () if ids is None else (ids[:n].clone(), ids)
        check(a, b, *ids, by=mined)


@pytest.mark.skipif(UNIT == "none", reason="no bf16 unit on this processor, or no extension")
@pytest.mark.parametrize("name", ["unit", "normal", "halfway", "hubs", "sparse", "mixed channels"])
def test_the_bits_are_those_of_the_cpu(name):
    for n, m, d in [(20, 33, 100), (17, 17, 31), (3, 65, 513)]:
        a, b = MAKERS[name](n, m, d)
        assert same_bits(mined(a, b)[0], by_cpp(a, b))


@pytest.mark.skipif(UNIT == "none", reason="no bf16 unit on this processor, or no extension")
def test_sums_are_added_in_the_order_of_the_cpu():
    """2⁶⁰ and 1 and -2⁶⁰ make 1 or 0."""
    scores = []
    for channels in ((0, 16, 1), (0, 1, 16), (0, 32, 1), (0, 8, 16), (3, 19, 4), (3, 4, 35), (7, 9, 39), (2, 10, 18)):
        a, b = torch.zeros(1, 40), torch.zeros(2, 40)
        a[0, list(channels)], b[1, list(channels)] = (
            torch.tensor([2.0**30, 2.0**30, 1]),
            torch.tensor([2.0**30, -(2.0**30), 1]),
        )
        results = mined(a, b)[0]
        assert same_bits(results, by_cpp(a, b))
        scores.append(results[1].item())
    assert set(scores) == {0.0, 1.0}


@pytest.mark.parametrize("half", [False, True], ids=["", "one side twice"])
def test_exact_ties_go_to_the_lowest_index(half):
    """Over tiles and slabs, among scores that are made alone and with a whole tile."""
    a = torch.randint(-2, 3, (60, 12)).float()
    b = a if half else torch.randint(-2, 3, (75, 12)).float()
    for ids in (None, torch.arange(len(b)) // 3):
        check(a, b, *(() if ids is None else (ids if half else ids[: len(a)].clone(), ids)), ties=True, by=mined)


def test_one_side_twice():
    x = unit(torch.randn(70, 20))
    x[50] = x[3]
    groups = torch.arange(70) % 11
    for ids in ((), (groups, groups)):
        assert same_bits(mined(x, x, *ids)[0], mined(x, x.clone(), *(t.clone() for t in ids))[0])


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_what_is_not_finite_is_as_in_a_sweep(special):
    a, b = torch.randint(1, 5, (40, 20)).float(), torch.randint(1, 5, (70, 20)).float()
    a[3, 4], b[50, 1], b[69, 0] = special, special, -special
    for ids in ((), (torch.arange(40) // 2, torch.arange(70) // 3)):
        results = mined(a, b, *ids)[0]
        swept = device_ops.hardest_negatives(*(t.to(DEVICE) for t in (a, b, *ids)))
        for got, expected in zip(results, swept, strict=True):
            torch.testing.assert_close(got, expected.cpu(), rtol=0, atol=0, equal_nan=True)


def test_sums_beyond_fp32():
    """Scores of 1e40 are told apart; returned as fp32 they are infinite."""
    a, b = torch.full((3, 4), 1e20), torch.full((5, 4), 1e20)
    b[3] *= 2
    (_, row_score, row_index, col_score, col_index), _ = mined(a, b)
    assert row_index.tolist() == [3, 3, 3]
    assert row_score.isinf().all()
    assert col_index.tolist() == [1, 0, 0, 0, 0]
    assert col_score.isinf().all()


@pytest.mark.parametrize("tile", [tiles.Sweep(16, 16, 32, 4, 2), tiles.Sweep(32, 16, 16, 4, 2, tma=True)])
@pytest.mark.parametrize("blocks", [1, 100])
def test_no_tile_and_no_slab_changes_a_bit(tile, blocks, monkeypatch):
    a, b = unit(torch.randn(40, 40)), unit(torch.randn(70, 40))
    b[60:] = b[:10]
    expected = mined(a, b)[0]
    monkeypatch.setattr(plan, "sweep_tile", lambda *_: tile)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", blocks)
    lines = {"one": tiles.Rescore(8, 8, 1, 4, 4), "all": tiles.Rescore(4, 4, 4, 2, 4)}
    monkeypatch.setattr(tiles, "RESCORE", lines)
    assert same_bits(mined(a, b)[0], expected)


def test_rows_far_apart():
    """Strided rows, channels that are no neighbours, ids with gaps."""
    a, b = unit(torch.randn(40, 60)), unit(torch.randn(50, 60))
    ids = torch.arange(100) // 3
    wide, turned = torch.zeros(40, 90), torch.zeros(60, 50)
    wide[:, 7:67], turned[:] = a, b.T
    results = mined(wide[:, 7:67], turned.T, ids[:80:2], ids[::2])[0]
    assert same_bits(results, mined(a, b, ids[:80:2].clone(), ids[::2].clone())[0])


def test_how_many_scores_are_made(monkeypatch):
    """One a line where it is clear which; where rows are equal, all. (Of columns, by slab.)"""
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", 100)
    a = unit(torch.randn(40, 512))
    b = unit(a.roll(1, 0) + 0.01 * torch.randn(40, 512))
    assert mined(a, b)[1] == 2 * 40
    a = unit(torch.randn(1, 16)).repeat(40, 1)
    assert mined(a, a.clone())[1] >= 2 * 40 * 39


@triton.jit
def bound_kernel(norms, blocks, out, lines, parts, D):
    i, p = tl.program_id(0), tl.program_id(1)
    bound = certified.error_bound(
        tl.load(norms + i), tl.load(norms + lines + i), tl.load(blocks + p), tl.load(blocks + parts + p), D
    )
    tl.store(out + i * parts + p, bound)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "beyond"])
def test_the_bound_holds(name):
    """For every score of every part, of which it is the largest."""
    for n, m, d in [(5, 9, 7), (5, 33, 64), (2, 17, 500)]:
        a, b = (x.to(DEVICE) for x in MAKERS[name](n, m, d))
        x, y = certified.Side.of(a, None, False), certified.Side.of(b, None, False)
        blocks = y.blocks(16)
        bound = a.new_empty(n, blocks.shape[1], dtype=torch.float64)
        bound_kernel[(n, blocks.shape[1])](x.norms, blocks.contiguous(), bound, x.norms.shape[1], blocks.shape[1], d)
        off = (x.rounded.float() @ y.rounded.float().T).double() - a.double() @ b.double().T
        assert (off.abs() <= bound.repeat_interleave(16, 1)[:, :m]).all()
        if name == "unit":
            assert bound.max() < 0.02


def test_rounding():
    """To the nearest bf16, ties to even; subnormals and channels past D are 0; norms are true, and never too small."""
    x = torch.randn(13, 20) * 10.0 ** torch.randint(-37, 37, (13, 1))
    x[0, :6] = torch.tensor([1.00390625, 1.01171875, -1.00390625, 1e-40, -1e-45, 2.0**-126])
    x[1], x[2, 3], x[3, 4], x[4, 5] = 0.0, NAN, INF, 3.4e38
    side = certified.Side.of(x.to(DEVICE), None, False)
    rounded, (norm, lost) = side.rounded.float().cpu(), side.norms.cpu()[:, :13]
    expected = x.bfloat16().float()
    expected[expected.abs() < 2.0**-126] = 0
    finite = torch.tensor([i not in (2, 3, 4) for i in range(13)])
    assert torch.equal(rounded[finite, :20], expected[finite])
    assert not rounded[:, 20:].any()
    for got, rows in ((norm, x), (lost, x - expected)):
        assert (got[~finite] == INF).all()
        true = rows.double().norm(dim=1)[finite]
        assert (got[finite] >= true).all()
        assert (got[finite] <= true * (1 + 2.0**-18)).all()


def test_who_takes_it(monkeypatch):
    """fp32 at the precision "highest", from so many scores on."""
    calls = []
    real = certified.hardest_negatives
    monkeypatch.setattr(certified, "hardest_negatives", lambda *arguments: calls.append(arguments) or real(*arguments))
    monkeypatch.setattr(plan, "CERTIFIED", 20 * 30)
    a, b = unit(torch.randn(20, 8)).to(DEVICE), unit(torch.randn(30, 8)).to(DEVICE)
    results = device_ops.hardest_negatives(a, b, None, None)
    assert len(calls) == 1
    assert same_bits(results, real(*calls[0])[:5])
    device_ops.hardest_negatives(a[:19], b, None, None)
    device_ops.hardest_negatives(a.half(), b.half(), None, None)
    monkeypatch.setattr(plan, "fp32_products", lambda device: "tf32")
    device_ops.hardest_negatives(a, b, None, None)
    assert len(calls) == 1
