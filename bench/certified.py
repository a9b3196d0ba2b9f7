"""Certified mining beside the sweep by fp32 products and PyTorch's bare bf16 product; and one side given twice.

    python -m bench.certified [--sizes 2048x1024,8192x1024] [--turns 5] [--stages]

Forward of `hardest_negatives` on unit rows, milliseconds: medians of interleaved turns, on one thread and on all. The
last two columns are random copies of 50 rows, for which the bound tells nothing and fp64 takes over, and a with itself.

With --stages, instead: what a step of the triplet loss, forward and backward, spends its time on, by PyTorch's
profiler on the calling thread, which does its share of every stage.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import gssf_kernels as gk


def ways(n: int, d: int) -> dict:
    a, b = (F.normalize(torch.randn(n, d), dim=1) for _ in range(2))
    c = a[torch.randint(0, 50, (n,))]
    by = torch.ops.gssf.hardest_negatives
    a16, b16, product = a.bfloat16(), b.bfloat16(), torch.empty(n, n, dtype=torch.bfloat16)
    return {
        "certified": lambda: by(a, b, None, None, "certified"),
        "fp32 products": lambda: by(a, b, None, None, "sweep"),
        "PyTorch's bf16 product": lambda: torch.mm(a16, b16.T, out=product),
        "PyTorch's fp32 product": lambda: torch.mm(a, b.T),
        "copies of 50 rows": lambda: by(c, c.clone(), None, None, "certified"),
        "a with itself": lambda: by(a, a, None, None, "certified"),
    }


STAGES = {
    "rounding, packing": "gssf::stage::pack",
    "products": "gssf::stage::product",
    "candidates": "gssf::stage::epilogue",
    "fold": "gssf::stage::fold",
    "rescoring": "gssf::stage::rescore",
    "gradients": "gssf::hardest_negatives_backward",
}


def stages(n: int, d: int, turns: int) -> tuple[float, list[float]]:
    """(milliseconds of a step, the share of each of STAGES and of the rest), by the median step."""
    x, y = (F.normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
    loss, steps = gk.TripletLoss(), []
    for turn in range(turns + 1):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            start = time.perf_counter()
            loss(x, y).backward()
            step_us = 1e6 * (time.perf_counter() - start)
        times = {event.key: event.cpu_time_total for event in profile.key_averages()}
        shares = [times.get(key, 0.0) / step_us for key in STAGES.values()]
        if turn:  # the first one reserves memory
            steps.append((step_us / 1e3, [*shares, 1 - sum(shares)]))
    return sorted(steps)[len(steps) // 2]


def print_stages(sizes: list[tuple[int, int]], turns: int) -> None:
    print(f"| N | D | threads | step, ms | {' | '.join(STAGES)} | rest |\n|{'---|' * (5 + len(STAGES))}")
    for n, d in sizes:
        for count in dict.fromkeys((1, torch.get_num_threads())):
            before = torch.get_num_threads()
            torch.set_num_threads(count)
            took, shares = stages(n, d, turns)
            torch.set_num_threads(before)
            cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
            print(f"| {n:,} | {d:,} | {count} | {took:.1f} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.certified", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="2048x1024,8192x256,8192x1024", help="NxD, commas between")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--stages", action="store_true", help="share of time by stage")
    options = parser.parse_args()
    if gk.backends()["hardest_negatives"]["certified"] == "no":
        parser.exit(2, "python -m bench.certified: this processor has no bf16 unit, or the extension is not built\n")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    sizes = [(int(n), int(d)) for n, d in (size.split("x") for size in options.sizes.split(","))]
    if options.stages:
        print_stages(sizes, options.turns)
        return
    for n, d in sizes:
        table = ways(n, d)
        print(f"| N | D | threads | {' | '.join(table)} |\n|{'---|' * (3 + len(table))}")
        for count in dict.fromkeys((1, threads)):
            torch.set_num_threads(count)
            times_ms: dict[str, list[float]] = {name: [] for name in table}
            for _ in range(options.turns):
                for name, way in table.items():
                    start = time.perf_counter()
                    way()
                    times_ms[name].append(1e3 * (time.perf_counter() - start))
            cells = " | ".join(f"{statistics.median(times):.1f}" for times in times_ms.values())
            print(f"| {n:,} | {d:,} | {count} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
