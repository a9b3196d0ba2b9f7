"""Programs that go from tile to tile against those that make one each, and how tiles are numbered for both.

What each gives is held to fp64 in `ops/test_hardest_negatives.py`; here both must give the same bits.
"""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from device_ops import hardest_negatives, relative_negatives
from interpreted import DEVICE, every_dtype
from triton_checks import IDS, INF, NAN, assert_same_bits, check_hardest, check_relative, many

from gssf_kernels import plan
from gssf_kernels.plan import Scores
from gssf_kernels.triton import sweep, tiles
from gssf_kernels.triton.sweep import Sweep, tile_of

pytestmark = many
LINE = tiles.Sweep(16, 32, 16, 4, 2)
PROGRAMS = [(1, 1), (1, 3), (2, 4), (1, 1000)]  # to a processor, and processors: one, a few, more than there are tiles


def use(monkeypatch, line, processors=1):
    """Sweep by this line, on a card of so many processors."""
    monkeypatch.setattr(plan, "sweep_tile", lambda *_: line)
    monkeypatch.setattr(plan, "processors", lambda device: processors)


def both_ways(monkeypatch, call, line=LINE, programs=PROGRAMS):
    """call() by a program for each tile, and by persistent ones."""
    use(monkeypatch, line)
    expected = call()
    for persistent, processors in programs:
        use(monkeypatch, line._replace(persistent=persistent), processors)
        assert_same_bits(call(), expected)


def rows(count, dtype=torch.float32, channels=40):
    x = torch.randint(-3, 4, (count, channels)).to(dtype)
    x[count // 2, 1], x[count // 3, 0], x[count - 1, 2] = NAN, INF, -INF
    return x.to(DEVICE)


@pytest.mark.parametrize("tma", [False, True])
@every_dtype
def test_hardest_gives_the_same_bits(dtype, tma, monkeypatch):
    a, b = rows(45, dtype), rows(70, dtype)
    both_ways(monkeypatch, lambda: hardest_negatives(a, b, None, None), LINE._replace(tma=tma))


@pytest.mark.parametrize("kind", IDS)
def test_hardest_gives_the_same_bits_with_ids(kind, monkeypatch):
    a, b, a_ids, b_ids = rows(45), rows(70), IDS[kind](45).to(DEVICE), IDS[kind](70).to(DEVICE)
    both_ways(monkeypatch, lambda: hardest_negatives(a, b, a_ids, b_ids), programs=[(1, 3)])


@pytest.mark.parametrize("blocks", [1, 4, 100])
@pytest.mark.parametrize("line", [LINE, LINE._replace(BM=16, tma=True), LINE._replace(BN=32, BM=16)], ids=str)
def test_half_of_the_tiles_give_the_same_bits(line, blocks, monkeypatch):
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", blocks)
    a = rows(75)
    both_ways(monkeypatch, lambda: hardest_negatives(a, a, None, None), line, [(1, 1), (1, 3)])
    assert_same_bits(hardest_negatives(a, a, None, None), hardest_negatives(a, a.clone(), None, None))


@pytest.mark.parametrize("beta", [None, 2.0], ids=str)
@pytest.mark.parametrize("kind", [None, "groups"])
def test_relative_gives_the_same_bits(kind, beta, monkeypatch):
    a, b, level = rows(45), rows(70), torch.tensor(2.0, device=DEVICE)
    ids = [IDS[kind](n).to(DEVICE) if kind else None for n in (45, 70)]
    both_ways(monkeypatch, lambda: relative_negatives(a, b, *ids, level, beta), programs=[(1, 1), (2, 4)])


@every_dtype
@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 1), (1, 40, 3), (17, 33, 17), (48, 64, 100)])
def test_values_of_persistent_programs(N, M, D, dtype, monkeypatch):
    use(monkeypatch, LINE._replace(persistent=1), 2)
    check_hardest(torch.randn(N, D).to(dtype), torch.randn(M, D).to(dtype))
    a, b = ((torch.randn(count, D) * 8).round().div(32).to(dtype) for count in (N, M))
    check_relative(a, b, -9.0, 10.0)
    check_relative(a, b, -9.0, None)


@triton.jit
def total_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """An epilogue of its own: a tile's sum, and how often it was made."""
    totals, made, width = state
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    s = tl.where((i < N)[:, None] & (j < M)[None, :], s, 0.0)
    at = (first + tile_i) * width + tile_j
    tl.store(totals + at, tl.sum(tl.sum(s, 1), 0))
    tl.store(made + at, tl.load(made + at) + 1)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("persistent", [0, 1])
def test_any_epilogue_meets_every_tile_once(persistent, half, monkeypatch):
    use(monkeypatch, LINE._replace(persistent=persistent), 5)
    a = torch.randint(-3, 4, (75, 20), device=DEVICE).float()
    walk = Sweep(a, a, Scores(a, a).tile(), upper_triangle=half)
    totals, made = (
        torch.zeros(walk.row_blocks, walk.column_blocks, dtype=t, device=DEVICE) for t in (a.dtype, torch.int32)
    )
    for first, blocks in walk.slabs():
        walk.run(total_tile, (totals, made, walk.column_blocks), first, blocks)
    s = torch.zeros(walk.row_blocks * 16, walk.column_blocks * 32)
    s[:75, :75] = (a @ a.T).cpu()
    expected = s.unflatten(0, (-1, 16)).unflatten(2, (-1, 32)).sum((1, 3))
    kept = torch.tensor([[not half or (j + 1) * 32 > i * 16 for j in range(walk.column_blocks)]
                         for i in range(walk.row_blocks)])  # fmt: skip
    assert torch.equal(made.cpu(), kept.int())
    assert torch.equal(totals.cpu(), torch.where(kept, expected, 0))


@triton.jit
def numbers_kernel(
    tile_i, tile_j, first, rows, columns, column_blocks,
    GROUP: tl.constexpr, UPPER: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    t = tl.minimum(tl.arange(0, COUNT), rows * columns - 1)
    i, j = tile_of(t, first, rows, columns, column_blocks, GROUP, UPPER, BN, BM)
    tl.store(tile_i + t, i)
    tl.store(tile_j + t, j)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("BN", "BM"), [(16, 16), (16, 32), (16, 64), (32, 16), (64, 16)])
def test_every_tile_has_one_number(BN, BM, half, monkeypatch):
    """In every slab, whatever is left over: by hand, tile by tile."""
    use(monkeypatch, tiles.Sweep(BN, BM, 16, 4, 2))
    for N in (1, 16, 17, 130, 250, 417):
        for slab in (1, 2, 3, 5, 12, 1000):
            monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", slab)
            x = torch.zeros(N, 16, device=DEVICE)
            walk = Sweep(x, x, Scores(x, x).tile(), upper_triangle=half)
            assert walk.row_blocks * BN >= N
            assert walk.column_blocks * BM >= N
            seen = 0
            for first, blocks in walk.slabs():
                assert first == seen
                seen += blocks
                grid = walk.numbering(first, blocks)
                results = torch.full((2, grid[0] * grid[1]), -1, dtype=torch.int32, device=DEVICE)
                numbers_kernel[(1,)](
                    *results, first, *grid, walk.column_blocks,
                    GROUP=tiles.GROUP, UPPER=half, BN=BN, BM=BM, COUNT=triton.next_power_of_2(results.shape[1]),
                )  # fmt: skip
                wanted = [
                    (i, j)
                    for i in range(blocks)
                    for j in range(walk.column_blocks)
                    if not half or (j + 1) * BM > (first + i) * BN
                ]
                assert sorted(zip(*results.tolist(), strict=True)) == wanted
            assert seen == walk.row_blocks


class Launches:
    """In place of the kernel: the grids it was launched with."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.grids.append((*grid, options["PERSISTENT"]))


def test_no_more_programs_than_the_card_holds_nor_than_there_are_tiles(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(sweep, "sweep_kernel", launches)
    x = torch.zeros(64, 16, device=DEVICE)  # 4 x 2 tiles, 6 of them on or above the diagonal
    for persistent, processors, half in [(0, 1, False), (0, 1, True), (1, 3, False), (2, 3, True), (2, 100, True)]:
        use(monkeypatch, LINE._replace(persistent=persistent), processors)
        walk = Sweep(x, x, Scores(x, x).tile(), upper_triangle=half)
        walk.run(total_tile, (), 0, 4)
    assert launches.grids == [(8, False), (6, False), (3, True), (6, True), (6, True)]


def test_only_lines_of_hopper_are_persistent():
    """And those bring their operands by the copy engine, which needs no program to wait with it."""
    for (arch, _, size), line in tiles.SWEEP.items():
        assert 0 <= line.persistent <= 2
        assert not line.persistent or (arch == 90 and line.tma and size != "small")
