"""Certified mining beside the sweep by fp32 products and PyTorch's bare bf16 product; and one side given twice.

    python -m bench.certified [--sizes 2048x1024,8192x1024] [--turns 5]

Forward of `hardest_negatives` on unit rows, milliseconds: medians of interleaved turns, on one thread and on all. The
last two columns are random copies of 50 rows, for which the bound tells nothing and fp64 takes over, and a with itself.
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
    by = torch.ops.gssf.hardest_negatives_by
    a16, b16, product = a.bfloat16(), b.bfloat16(), torch.empty(n, n, dtype=torch.bfloat16)
    return {
        "certified": lambda: by(a, b, None, None, True),
        "fp32 products": lambda: by(a, b, None, None, False),
        "PyTorch's bf16 product": lambda: torch.mm(a16, b16.T, out=product),
        "PyTorch's fp32 product": lambda: torch.mm(a, b.T),
        "copies of 50 rows": lambda: by(c, c.clone(), None, None, True),
        "a with itself": lambda: by(a, a, None, None, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.certified", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="2048x1024,8192x256,8192x1024", help="NxD, commas between")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    if gk.backends()["hardest_negatives"]["certified"] == "no":
        parser.exit(2, "python -m bench.certified: this processor has no bf16 unit, or the extension is not built\n")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    for n, d in (map(int, size.split("x")) for size in options.sizes.split(",")):
        table = ways(n, d)
        print(f"| N | D | threads | {' | '.join(table)} |\n|{'---|' * (3 + len(table))}")
        for count in dict.fromkeys((1, threads)):
            torch.set_num_threads(count)
            found: dict[str, list[float]] = {name: [] for name in table}
            for _ in range(options.turns):
                for name, way in table.items():
                    start = time.perf_counter()
                    way()
                    found[name].append(1e3 * (time.perf_counter() - start))
            cells = " | ".join(f"{statistics.median(times):.1f}" for times in found.values())
            print(f"| {n:,} | {d:,} | {count} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
