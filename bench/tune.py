"""Times tiles around each line of the tile table on the card that is there, and proposes a table. It changes nothing.

    python -m bench.tune --out PAGE.md [--lines half-narrow,tf32-wide] [--seconds 100]

For every line of this card's architecture in ``tiles.SWEEP``, or those that --lines names, in its order, the candidates
are the line itself and those that differ in one number, or in whether programs are persistent. They are compiled first,
side by side: what spills or does not fit is left out. Each must give the line's own results. Then they take turns
behind a cold L2, each a CUDA graph, so that the host's share does not count, and are compared turn by turn. A line is
replaced where another was faster in nine turns of ten, and by 3 % in the median.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import clock, lowering, report, results
from bench.case import PRODUCTS, Case
from gssf_kernels import plan
from gssf_kernels._library import OPS
from gssf_kernels.triton import tiles

SHARED = {80: 99 << 10, 90: 227 << 10}  # bytes of a block
PROBLEMS = {"small": (1024, 512), "narrow": (8192, 256), "wide": (8192, 1024), "sums": (8192, 512)}
PROBLEMS["row panels"] = 16384, 768  # N, D: a whole step, with the products that follow
PRODUCT = {"half": "bf16", "tf32": "tf32", "ieee": "ieee"}
CLOSE = {"half": 1e-4, "tf32": 4e-3, "ieee": 1e-4}  # of the largest score: another order of summation
GAIN = 0.97  # of the line's time, in the median, that a candidate must not pass
TURNS = 5, 25

Key = tuple[int, str, str]


class Timed(NamedTuple):
    """A candidate's fate."""

    tile: tiles.Sweep
    note: str  # why it was not timed, or empty
    ms: list[float]


def candidates(line: tiles.Sweep, arch: int) -> list[tiles.Sweep]:
    """The line, and those that differ from it in one number."""
    tried = [line]
    numbers: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("BN", (line.BN // 2, line.BN * 2)),
        ("BM", (line.BM // 2, line.BM * 2)),
        ("BK", (line.BK // 2, line.BK * 2)),
        ("num_warps", (line.num_warps // 2, line.num_warps * 2)),
        ("num_stages", (line.num_stages - 1, line.num_stages + 1)),
        ("tma", (not line.tma,) if arch == 90 else ()),
        ("persistent", tuple({0, 1, 2} - {line.persistent}) if arch == 90 and line.tma else ()),
    )
    for name, values in numbers:
        tried += [line._replace(**{name: value}) for value in values]
    sane = [t for t in tried if 16 <= t.BK <= 128 and min(t.BN, t.BM) >= 32 and max(t.BN, t.BM) <= 256]
    return [t for t in sane if 2 <= t.num_stages <= 6 and 2 <= t.num_warps <= 8]


def problem(key: Key, device: str) -> tuple:
    """Arguments of the line's launcher, random: zeros multiply faster."""
    _, kind, size = key
    n, d = PROBLEMS[size]
    g = torch.Generator(device=device).manual_seed(0)
    rows = (torch.nn.functional.normalize(torch.randn(n, d, generator=g, device=device), dim=1) for _ in range(2))
    a, b = (x.to(_product(kind)[0]) for x in rows)
    return (a, b, *_options(size, device))


def _options(size: str, device: str) -> tuple:
    """What the launcher takes besides a and b."""
    if size == "row panels":
        return None, None, 10.0, -10.0, None, None, "softplus", "negate", False, "sum", 1.0, [True, True]
    return None, None, *((torch.tensor(0.1, device=device), 10.0) if size == "sums" else ())


def _product(kind: str) -> tuple[torch.dtype, str]:
    return PRODUCTS[PRODUCT[kind]]


def _launcher(size: str) -> Any:
    return OPS[{"sums": "relative_negatives", "row panels": "score_sums"}.get(size, "hardest_negatives")].on_cuda


def why_not(key: Key, tile: tiles.Sweep) -> str:
    """What the compiler has against a tile, or nothing; run in processes of their own, it fills the cache on disk."""
    arch, kind, size = key
    case = Case("", _launcher(size), lambda: _small_problem(key), (), PRODUCT[kind])
    try:
        with mock.patch.dict(tiles.SWEEP, {key: tile}):
            sweep = next(kernel for kernel in lowering.lower(case, arch) if kernel.name == "sweep_kernel")
    except Exception as error:
        return f"does not compile: {type(error).__name__}"
    used = lowering.resources(sweep)
    if used.stack:
        return f"spills {used.stack} bytes"
    return f"takes {used.shared >> 10} KiB of shared memory" if used.shared > SHARED[arch] else ""


def _small_problem(key: Key) -> tuple:
    """As `problem`, of zeros on the CPU, and of rows enough to be of the same size in the table."""
    _, kind, size = key
    n, d = (128, 256) if size == "small" else (1040, PROBLEMS[size][1])
    x = torch.zeros(n, d, dtype=_product(kind)[0])
    return (x, x, *_options(size, "cpu"))


def time_line(key: Key, compiling: list[tiles.Sweep], device: torch.device, seconds: float) -> list[Timed]:
    """Turns of all candidates, the line itself the first of them."""
    _, kind, size = key
    arguments, launcher, timer = problem(key, str(device)), _launcher(size), clock.clock(device)
    timed: dict[tiles.Sweep, Timed] = {}
    steps: dict[tiles.Sweep, Callable[[], Any]] = {}
    expected: list[torch.Tensor] = []
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32" if kind == "tf32" else "ieee"
    try:
        for tile in compiling:
            step = partial(launch, tile, launcher, arguments)
            try:
                outputs = [t for t in step() if t.is_floating_point()]
                expected = expected or outputs
                timed[tile] = Timed(tile, _difference(outputs, expected, CLOSE[kind]), [])
                steps[tile] = replayed(step, device)
            except Exception as error:  # a tile that the card refuses is a row
                timed[tile] = Timed(tile, f"does not run: {type(error).__name__}", [])
        start, turns = time.perf_counter(), 0
        while turns < TURNS[0] or (turns < TURNS[1] and time.perf_counter() - start < seconds):
            order = [tile for tile in compiling if not timed[tile].note]
            shift = turns % max(len(order), 1)
            for tile in order[shift:] + order[:shift]:
                timed[tile].ms.append(timer.time_ms(steps[tile], of=tile)[0])
            turns += 1
    finally:
        products.fp32_precision = before
    return list(timed.values())


def launch(tile: tiles.Sweep, launcher: Callable, arguments: tuple) -> tuple[torch.Tensor, ...]:
    """The launcher's work with a tile of ours, in the product that the line is for."""
    with (
        mock.patch.object(plan, "sweep_tile", return_value=tile),
        mock.patch.object(plan, "CERTIFIED", sys.maxsize),
    ):
        return launcher(*arguments)


def replayed(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The step as a captured graph."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _difference(outputs: list[torch.Tensor], expected: list[torch.Tensor], close: float) -> str:
    for got, wanted in zip(outputs, expected, strict=True):
        off = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not off <= close:
            return f"results differ from the line's by {off:.1e}"
    return ""


def chosen(timed: list[Timed]) -> tiles.Sweep:
    """The line, the first of timed, or the fastest of those that beat it."""
    line, best, best_ratio = timed[0], timed[0].tile, 1.0
    for other in timed[1:]:
        ratio = results.spread([o / m for o, m in zip(other.ms, line.ms, strict=False)])
        if ratio and ratio.high < 1 and ratio.median <= GAIN and ratio.median < best_ratio:
            best, best_ratio = other.tile, ratio.median
    return best


def page(timed_of: dict[Key, list[Timed]], card: str, finished: bool) -> str:
    """What was seen, and the lines that follow from it."""
    lines, table = [], []
    for key, timed in timed_of.items():
        winner = chosen(timed)
        for one in sorted(timed, key=lambda t: sorted(t.ms)[len(t.ms) // 2] if t.ms else float("inf")):
            spread_ms, first = results.spread(one.ms), timed[0]
            ratio = results.spread([o / m for o, m in zip(one.ms, first.ms, strict=False)])
            mark = "proposed" if one.tile == winner else ""
            mark += " the table's" if one is first else ""
            shown = (report.between(spread_ms), report.between(ratio, "×") if ratio else one.note)
            lines.append([" ".join(map(str, key)), source(one.tile), *shown, mark.strip()])
        table.append(f"    {key}: {source(winner)},".replace("'", '"'))
    n_d = "; ".join(f"{size}: N = M = {n:,}, D = {d}" for size, (n, d) in PROBLEMS.items())
    head = ["line", "tile", "ms", "times the table's", ""]
    return "\n\n".join(
        (
            f"# Tiles of the sweep on {card}",
            f"`python -m bench.tune`, {datetime.date.today()}, torch {torch.__version__}, {n_d}, bf16 for half. "
            "Medians (10th–90th percentile) of turns behind a cold L2."
            + ("" if finished else " Out of time: lines are missing, or have few turns."),
            "Proposed lines of `tiles.SWEEP` (the others stay):",
            "```python\n" + "\n".join(table) + "\n```",
            report.table(head, lines),
        )
    )


def source(tile: tiles.Sweep) -> str:
    """As the table writes it."""
    numbers = ", ".join(map(str, tile[:5]))
    persistent = f", persistent={tile.persistent}" if tile.persistent else ""
    return f"Sweep({numbers}{', tma=True' if tile.tma else ''}{persistent})"


def name_of(key: Key) -> str:
    """A line of the table, of whichever architecture."""
    return f"{key[1]}-{key[2]}"


def line_names(parser: argparse.ArgumentParser, text: str) -> list[str]:
    """The lines that --lines names; the process ends where there is no such line."""
    known = list(dict.fromkeys(map(name_of, tiles.SWEEP)))
    names = known if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            parser.exit(2, f"{parser.prog}: --lines: expected all or some of {', '.join(known)}, got {name!r}\n")
    return names


def answer(compilation: concurrent.futures.Future) -> str:
    try:
        return compilation.result()
    except concurrent.futures.BrokenExecutor:
        return "not compiled: a compiler of its line crashed"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--lines", default="all", help="KIND-SIZE of the table, commas between, or all; default all")
    parser.add_argument("--seconds", type=float, default=100.0, help="for all of it, compilation included; default 100")
    arguments = parser.parse_args()
    names = line_names(parser, arguments.lines)
    if not torch.cuda.is_available():
        parser.exit(2, "python -m bench.tune: PyTorch sees no CUDA device\n")
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # ends as gently
    start, device = time.perf_counter(), torch.device("cuda", torch.cuda.current_device())
    arch, card = plan.architecture(device), torch.cuda.get_device_name(device)
    keys = sorted(
        (key for key in tiles.SWEEP if key[0] == arch and name_of(key) in names), key=lambda k: names.index(name_of(k))
    )
    tiles_of = {key: candidates(tiles.SWEEP[key], arch) for key in keys}
    timed_of: dict[Key, list[Timed]] = {}
    finished = False
    # A compiler that crashes takes its pool down: one for every line.
    workers = max(len(os.sched_getaffinity(0)) // len(keys), 1)
    spawn = multiprocessing.get_context("spawn")
    pools = {key: concurrent.futures.ProcessPoolExecutor(workers, spawn) for key in keys}
    try:
        submitted = {(key, tile): pools[key].submit(why_not, key, tile) for key in keys for tile in tiles_of[key]}
        for count, key in enumerate(keys):
            notes = {tile: answer(submitted[key, tile]) for tile in tiles_of[key]}
            compiling = [tile for tile in tiles_of[key] if not notes[tile]]
            left = arguments.seconds - (time.perf_counter() - start)
            if notes[tiles_of[key][0]]:  # the line itself is needed to compare with
                print(
                    f"{key}: the table's own {source(tiles_of[key][0])}: {notes[tiles_of[key][0]]}",
                    flush=True,
                )
                continue
            timed_of[key] = time_line(key, compiling, device, left / (len(keys) - count))
            timed_of[key] += [Timed(tile, note, []) for tile, note in notes.items() if note]
            print(f"{key}: {len(compiling)} of {len(notes)} timed; {source(chosen(timed_of[key]))}", flush=True)
        finished = True
    except KeyboardInterrupt:
        print("interrupted: what was timed is kept", flush=True)
    finally:
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        if timed_of:
            arguments.out.write_text(page(timed_of, card, finished) + "\n")
    changed = sum(chosen(timed) != tiles.SWEEP[key] for key, timed in timed_of.items())
    print(f"{len(timed_of)} of {len(keys)} lines timed, {changed} to be replaced; written to {arguments.out}")
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main())
