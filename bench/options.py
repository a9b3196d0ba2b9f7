"""What the package offers besides plain losses, beside what it replaces: forward and backward, in turns, on the CPU.

    python -m bench.options [--turns 5] [--only NAME] [--out bench/results/cpu-options.json]

Each comparison is of two functions that are run one after the other, several times; a ratio is the median of those of
the turns, with the lowest and the highest. Peak memory is that of one run in a fresh process, besides the inputs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gssf_kernels as gk
from bench import retrieval
from bench.clock import CpuClock
from bench.results import machine

Way = Callable[[], Any]  # a tensor to go back from, or results without a gradient


def unit(n: int, d: int, seed: int = 0, grad: bool = True) -> Tensor:
    rows = F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)
    return rows.requires_grad_(grad)


def pairs_by_id(loss: str, **settings) -> dict[str, Way]:
    """1,638 pictures with five captions each, against the pictures repeated for every caption."""
    pictures, captions = unit(1638, 1024), unit(8190, 1024, 1)
    ids, caption_ids = torch.arange(1638), torch.arange(1638).repeat_interleave(5)
    function = getattr(gk, loss)
    settings |= {"scale": 20.0} if loss == "info_nce_loss" else {}

    def repeated():
        return function(pictures[caption_ids], captions, x_ids=caption_ids, y_ids=caption_ids, **settings)

    return {
        'pairs="ids"': lambda: function(pictures, captions, pairs="ids", x_ids=ids, y_ids=caption_ids, **settings),
        "repeated rows": repeated,
    }


def false_negatives(loss: str, n: int = 4096) -> dict[str, Way]:
    x, y = unit(n, 1024), unit(n, 1024, 1)
    scalars = {"scale": 20.0} if loss == "info_nce_loss" else {}
    function = getattr(gk, loss)
    return {
        "false_negative_margin": lambda: function(x, y, false_negative_margin=0.1, **scalars),
        "without": lambda: function(x, y, **scalars),
    }


def queue(loss: str) -> dict[str, Way]:
    """64 queries against a queue of 65,536 rows without gradient."""
    x, y = unit(64, 256), unit(65536, 256, 1, grad=False)
    target = torch.arange(64)

    def plain_info_nce():
        return F.cross_entropy(20 * x @ y.mT, target)

    def plain_sigmoid():
        t = 10 * x @ y.mT - 10
        sign = torch.full_like(t, 1.0)
        sign.fill_diagonal_(-1)
        return F.softplus(sign * t).sum() / 64

    if loss == "info_nce_loss":
        return {"ours": lambda: gk.info_nce_loss(x, y, scale=20.0, symmetric=False), "plain PyTorch": plain_info_nce}
    return {"ours": lambda: gk.sigmoid_loss(x, y, scale=10.0, bias=-10.0), "plain PyTorch": plain_sigmoid}


def semihard_by_id() -> dict[str, Way]:
    """1,638 pictures with five captions each: five limits for each picture."""
    return pairs_by_id("triplet_loss", negatives="semihard")


def semihard(n: int = 8192) -> dict[str, Way]:
    x, y = unit(n, 1024), unit(n, 1024, 1)
    return {
        "ours": lambda: gk.triplet_loss(x, y, negatives="semihard"),
        "plain PyTorch": lambda: gk.reference.triplet_loss(x, y, negatives="semihard"),
    }


def graph_pattern(nodes: int = 4, n: int = 2048, d: int = 256) -> dict[str, Way]:
    """Four representations of either modality: 28 edges, against a loop over plain losses."""
    xs, ys = (unit(nodes * n, d, k).detach().view(nodes, n, d).requires_grad_() for k in range(2))

    def plain():
        sides, total = [*xs, *ys], torch.zeros(())
        diagonal = torch.eye(n, dtype=torch.bool)
        for p, q in itertools.combinations(sides, 2):
            s = p @ q.mT
            positive, negative = s.diagonal(), s.masked_fill(diagonal, -torch.inf)
            for hardest in (negative.amax(1), negative.amax(0)):
                total = total + (0.2 + hardest - positive).relu().sum()
        return total

    return {"ours": lambda: gk.graph_pattern_loss(xs, ys), "a loop over plain PyTorch": plain}


def attention(batch: int = 4, length: int = 1024, heads: int = 8, dim: int = 64) -> dict[str, Way]:
    """Scores q W kᵀ against q kᵀ, by the same fused attention."""
    q, k, v = (unit(batch * length, heads * dim, seed) for seed in range(3))
    diag = torch.ones(heads, dim, requires_grad=True)
    blocks = torch.zeros(heads, dim // 16, 16, 16, requires_grad=True)

    def heads_of(t):
        return t.view(batch, length, heads, dim).transpose(1, 2)

    return {
        "q W kᵀ": lambda: gk.structured_attention(heads_of(q), heads_of(k), heads_of(v), diag, blocks).square().sum(),
        "q kᵀ": lambda: F.scaled_dot_product_attention(heads_of(q), heads_of(k), heads_of(v)).square().sum(),
    }


def fragments(loss: bool, n: int = 256, regions: int = 36, words: int = 32, d: int = 256) -> dict[str, Way]:
    """Scores of pictures and captions from their regions and words, or the triplet loss of these scores."""
    v, w = (
        unit(n * size, d, seed).detach().view(n, size, d).requires_grad_() for seed, size in ((0, regions), (1, words))
    )

    def plain():
        scores = torch.einsum("nrd,mtd->nmrt", v, w).amax(2).mean(2)
        return gk.reference.triplet_from_scores(scores) if loss else scores.sum()

    if loss:
        return {"ours": lambda: gk.late_interaction_triplet_loss(v, w), "plain PyTorch": plain}
    return {"ours": lambda: gk.late_interaction(v, w).sum(), "plain PyTorch": plain}


COMPARISONS: dict[str, Callable[[], dict[str, Way]]] = {
    "triplet, pairs by id": lambda: pairs_by_id("triplet_loss"),
    "InfoNCE, pairs by id": lambda: pairs_by_id("info_nce_loss"),
    "triplet, false negatives": lambda: false_negatives("triplet_loss"),
    "InfoNCE, false negatives": lambda: false_negatives("info_nce_loss"),
    "InfoNCE, queue": lambda: queue("info_nce_loss"),
    "SigLIP, queue": lambda: queue("sigmoid_loss"),
    "triplet, semi-hard": semihard,
    "triplet, semi-hard by id": semihard_by_id,
    "graph pattern, 28 edges": graph_pattern,
    "structured attention": attention,
    "late interaction": lambda: fragments(False),
    "late interaction, triplet": lambda: fragments(True),
    **retrieval.COMPARISONS,
}


def run(way: Way) -> None:
    """Forward, and backward if there is one."""
    result = way()
    if isinstance(result, Tensor):
        result.backward()


def seconds(way: Way) -> float:
    start = time.perf_counter()
    run(way)
    return time.perf_counter() - start


def compare(name: str, turns: int) -> dict:
    """{way: milliseconds of every turn}, and the ratio of each way to the first."""
    ways = COMPARISONS[name]()
    for function in ways.values():
        seconds(function)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, function in ways.items():
            times[way].append(1000 * seconds(function))
    first = next(iter(times.values()))
    ratios = {way: [t / f for t, f in zip(all_times, first, strict=True)] for way, all_times in times.items()}
    peak = {way: peak_mib(name, way) for way in ways}
    return {"name": name, "ms": times, "times_the_first": ratios, "peak_mib": peak}


def peak_mib(name: str, way: str) -> float:
    """That of one run in a fresh process."""
    command = [sys.executable, "-m", "bench.options", "--peak", name, way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(name: str, way: str) -> None:
    (unit(64, 64) @ unit(64, 64, 1).mT).sum().backward()  # libraries allocate at their first use
    function = COMPARISONS[name]()[way]
    print(CpuClock(torch.device("cpu")).peak_mib(lambda: run(function)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", default="", help="a part of the name of a comparison")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu-options.json"))
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "WAY"), help="print the peak memory of this alone, in MiB")
    arguments = parser.parse_args()
    if arguments.peak:
        return print_peak(*arguments.peak)
    rows = []
    for name in COMPARISONS:
        if arguments.only not in name:
            continue
        row = compare(name, arguments.turns)
        rows.append(row)
        for way, ratios in row["times_the_first"].items():
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            middle, peak = statistics.median(row["ms"][way]), row["peak_mib"][way]
            print(f"{name:26} {way:24} {middle:9.1f} ms   {spread:20} {peak:9.1f} MiB", flush=True)
    about = {**machine(), "turns": arguments.turns, "date": time.strftime("%Y-%m-%d")}
    arguments.out.write_text(json.dumps({"about": about, "comparisons": rows}, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
