"""The lines of the tile table for sm_90 themselves, where a program or a gradient goes over many tiles.

A card has more processors than a test has tiles, so that persistent programs would make one tile each, and memory for
all of dL/ds at once. Here three processors share the tiles, and a slab is one row block, at the tile sizes that are
used. The interpreter takes the same sizes, in fp16 and fp32.
"""

import device_ops
import pytest
import torch
from certified_cases import check, unit
from interpreted import DEVICE, INTERPRETED
from row_panel_checks import close, true_sums
from triton_checks import check_hardest, check_relative, fp64_leaves, own_tiles

pytest.importorskip("triton")

from gssf_kernels import plan
from gssf_kernels.triton import certified, logsumexp, sums, sweep, tiles

pytestmark = own_tiles
PROCESSORS = 3
HALF = torch.float16 if INTERPRETED else torch.bfloat16
KINDS = {"half": (HALF, "highest"), "tf32": (torch.float32, "high"), "ieee": (torch.float32, "highest")}
PERSISTENT = [key[1:] for key, line in tiles.SWEEP.items() if key[0] == 90 and line.persistent]
N, M = 450, 700  # ragged: 4 x 6 tiles of 128, and none is small
CHANNELS = {"narrow": 200, "wide": 520}  # several steps of 64 and of 32, the last not whole


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """An sm_90 card of three processors, on which no problem is small."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("lines of sm_90 need such a card")
    monkeypatch.setattr(plan, "architecture", lambda device: 90)
    monkeypatch.setattr(plan, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(plan, "SMALL", 0)
    if INTERPRETED:  # whose bf16 is wrong
        monkeypatch.setattr(certified, "ROUNDED", torch.float32)


@pytest.fixture
def line(request, monkeypatch):
    """(dtype, channels, tile) of a line's problems, which then get that line."""
    kind, size = request.param
    dtype, precision = KINDS[kind]
    monkeypatch.setattr(plan, "fp32_products", lambda device: "tf32" if precision == "high" else "ieee")
    return dtype, CHANNELS[size], tiles.SWEEP[90, kind, size]


class Launches:
    """`sweep_kernel`, and the grid, tiles and steps of each launch."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            (rows, columns), D = arguments[9:11], arguments[6]
            self.seen.append((grid[0], rows * columns, -(-D // options["BK"]), options["PERSISTENT"]))
            return self.kernel[grid](*arguments, **options)

        return launch


@pytest.fixture
def launches(monkeypatch):
    results = Launches(sweep.sweep_kernel)
    monkeypatch.setattr(sweep, "sweep_kernel", results)
    return results.seen


def whole(count, channels, dtype):
    """Numbers whose products and sums are exact in every product, TF32 too; the last row and channel count."""
    x = torch.randint(-3, 4, (count, channels)).to(dtype)
    x[count - 1, channels - 1] = 16
    return x


def go_on(launches, tile):
    """Every launch was of persistent programs, with two tiles each or more, and four steps to a tile or more."""
    assert launches
    for programs, made, steps, persistent in launches:
        assert persistent
        assert programs == tile.persistent * PROCESSORS
        assert made >= 2 * programs
        assert steps >= 4


on_persistent = pytest.mark.parametrize("line", PERSISTENT, indirect=True, ids="-".join)


def test_there_are_persistent_lines():
    assert {("half", "narrow"), ("tf32", "narrow"), ("tf32", "wide")} == set(PERSISTENT)


@on_persistent
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
def test_hardest_over_many_tiles(line, ids, launches):
    dtype, channels, tile = line
    a, b = whole(N, channels, dtype), whole(M, channels, dtype)
    labels = (torch.arange(N) // 5, torch.arange(M) // 7) if ids else (None, None)
    check_hardest(a, b, *labels, exact=True)
    go_on(launches, tile)


@on_persistent
def test_half_of_the_tiles(line, launches):
    """Of one side twice tiles on and above the diagonal alone have a number."""
    dtype, channels, tile = line
    a = whole(M, channels, dtype).to(DEVICE)
    results = device_ops.hardest_negatives(a, a, None, None)
    go_on(launches, tile)
    s = a.double() @ a.double().T
    s.fill_diagonal_(-torch.inf)
    best = s.amax(1)
    for score, index in (results[1:3], results[3:5]):
        assert torch.equal(score.double(), best)
        assert torch.equal(index, (s == best[:, None]).int().argmax(1))


@on_persistent
def test_relative_over_many_tiles(line, launches, monkeypatch):
    """Its own line makes a tile a program; here it goes on, as the tuner may propose."""
    dtype, channels, tile = line
    table = {key: tile for key in tiles.SWEEP if key[2] == "sums"}
    monkeypatch.setattr(tiles, "SWEEP", {**tiles.SWEEP, **table})
    a, b = whole(N, channels, dtype), whole(M, channels, dtype)
    check_relative(a, b, -9.0, None, exact=True)
    go_on([seen for seen in launches if seen[3]], tile)


@on_persistent
def test_rows_that_are_no_numbers_stay_in_their_tiles(line):
    """Nothing is carried from tile to tile: a NaN or an infinity of one is not another's."""
    dtype, channels, _ = line
    a, b = whole(N, channels, dtype), whole(M, channels, dtype)
    a[130, 3], a[300, 0], b[500, 7] = float("nan"), float("inf"), -float("inf")
    check_hardest(a, b)


# Certified mining


@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
def test_certified_mining_above_its_threshold(channels, ids, monkeypatch, launches):
    """The launcher takes this way by itself, and sweeps in bf16 by that sweep's own line."""
    n, m = (300, 420) if INTERPRETED else (2048, 2049)
    if INTERPRETED:
        monkeypatch.setattr(plan, "CERTIFIED", n * m)
        lines = {"one": tiles.Rescore(256, 4, 1, 1, 4), "all": tiles.Rescore(64, 4, 64, 1, 4)}
        monkeypatch.setattr(tiles, "RESCORE", lines)  # a program of four lines takes the interpreter as long
        monkeypatch.setitem(tiles.SWEEP, (90, "ieee", "sums"), tiles.SWEEP[90, "half", "sums"])
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", 0)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", 2)
    assert plan.CERTIFIED <= n * m < plan.CERTIFIED + m
    a, b = unit(torch.randn(n, channels)), unit(torch.randn(m, channels))
    b[270:290] = b[10:30]  # ties of rows two tiles apart
    labels = (torch.arange(n) // 3, torch.arange(m) // 3) if ids else ()
    calls = []
    real = certified.hardest_negatives

    def counted(call, plan):
        *results, made = real(call._replace(route="certified"), plan)
        calls.append(int(made))
        return *results, made

    monkeypatch.setattr(certified, "hardest_negatives", counted)

    def mined(*sides):
        results = device_ops.hardest_negatives(*(t if t is None else t.to(DEVICE) for t in sides))
        return [t.cpu() for t in results], calls[-1]

    check(a, b, *labels, by=mined)
    assert len(calls) == 1
    assert n + m <= calls[0] <= 40 * (n + m)
    assert len(launches) == -(-n // 256)  # slabs
    assert all(steps >= 4 for _, _, steps, _ in launches)


# dscores of several row panels


@pytest.fixture(params=[1, 2], ids=["a row block a panel", "two"])
def panels(request, monkeypatch):
    """How many row panels the gradients of [N, M] scores go by, at the line of the table for them."""
    tile = tiles.SWEEP[90, "half", "row panels"]
    blocks = request.param
    monkeypatch.setattr(tiles, "ROW_PANEL_SCORES", blocks * tile.BN * M)
    monkeypatch.setattr(tiles, "SLAB_ENTRIES", 0)
    monkeypatch.setattr(tiles, "MIN_SLAB_BLOCKS", blocks)
    if INTERPRETED:
        monkeypatch.setattr(plan, "ROW_PANEL_DTYPES", frozenset({torch.float32}))
        for size in ("row panels", "sums"):
            monkeypatch.setitem(tiles.SWEEP, (90, "ieee", size), tiles.SWEEP[90, "half", size])
    return -(-N // (tile.BN * blocks))


@pytest.fixture
def swept(monkeypatch):
    """(first row block, row blocks) of every row panel whose dscores were stored."""
    seen = []
    real = sweep.gradients_by_row_panels

    def watched(a, b, tile, needs, count, launch):
        def noted(sweep, first, blocks, ds, parts):
            assert ds is not None
            assert (sweep.tile.BN, sweep.tile.BM) == (128, 64)
            seen.append((first, blocks))
            launch(sweep, first, blocks, ds, parts)

        return real(a, b, tile, needs, count, noted)

    for module in (logsumexp, sums):
        monkeypatch.setattr(module, "gradients_by_row_panels", watched)
    return seen


def sides(channels=200):
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    return [unit(torch.randn(count, channels)).to(dtype).to(DEVICE) for count in (N, M)]


def test_info_nce_s_gradients_over_row_panels(panels, swept):
    a, b = sides()
    scale = torch.tensor(14.3, device=DEVICE)
    x, y, kappa = fp64_leaves(a, b, torch.tensor(14.3))
    t = kappa * (x @ y.T)
    loss = (t.logsumexp(1) - t.diagonal()).mean() / 2 + (t.logsumexp(0)[:N] - t.diagonal()).mean() / 2
    expected = torch.autograd.grad(loss, (x, y, kappa))

    row_max, row_log, col_max, col_log, pair, _ = device_ops.logsumexp_scores(a, b, scale, 1.0)
    close(row_max + row_log, t.detach().logsumexp(1))
    close(col_max + col_log, t.detach().logsumexp(0))
    close(pair, t.detach().diagonal())
    share = torch.full((N,), 0.5 / N, device=DEVICE)
    of_columns = torch.zeros(M, device=DEVICE)
    of_columns[:N] = 0.5 / N
    lines = row_max, row_log, col_max, col_log
    results = device_ops.logsumexp_scores_backward(
        share, of_columns, -2 * share, a, b, scale, 1.0, *lines, [True, True, True]
    )
    assert len(swept) == panels > 1
    assert sum(blocks for _, blocks in swept) == 4
    for ours, right in zip(results, expected, strict=True):
        close(ours, right)
    rows_close(results[:2], expected[:2])


@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
def test_siglip_s_gradients_over_row_panels(ids, panels, swept):
    a, b = sides()
    labels = [torch.arange(count, device=DEVICE) // 3 if ids else None for count in (N, M)]
    scale, bias = torch.tensor(10.0, device=DEVICE), torch.tensor(-3.0, device=DEVICE)
    expected, right = true_sums(fp64_leaves(a, b, scale, bias), labels, "softplus", "negate", 1 / N)

    total, dscale, dbias, da, db = device_ops.total(
        a, b, scale, bias, 1.0, 0.0, *labels, "softplus", "negate", False, share=1 / N, needs=[True, True]
    )
    assert len(swept) == panels > 1
    for ours, truth in zip((total, dscale, dbias), (expected, *right[2:]), strict=True):
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=2e-5, atol=2e-5)
    gradients = [10.0 / N * g for g in (da, db)]  # κ, the share and what comes from above are still to come
    for ours, truth in zip(gradients, right[:2], strict=True):
        close(ours, truth)
    rows_close(gradients, right[:2])


def rows_close(results, expected):
    """Every row by itself: one that lacks a panel, or has one twice, is off by a good part of itself."""
    for ours, right in zip(results, expected, strict=True):
        off = (ours.cpu().double() - right).norm(dim=1) / right.norm(dim=1)
        assert float(off.max()) <= (1e-4 if INTERPRETED else 0.02)  # dL/ds is bf16
