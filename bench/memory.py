"""Peak extra memory of the triplet loss, forward + backward, over N.

    python -m bench.memory --sizes 4096,8192,16384,32768,65536 --dim 256 [--out FILE.json]

Each measurement runs in a fresh child process: resident-set high-water after the step less that before
it, with inputs already there and the code warmed up on a small problem; the gradients of the inputs, which
every variant returns, are part of it (their own size stands in the header). The naive variant is left out
(and said so) where its matrices would not fit.
"""

import argparse
import datetime
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.variants import fused, inputs, machine, naive

NAIVE_MATRICES = 10  # N x M fp32 matrices that the naive step was seen to hold at its peak, rounded up


def high_water_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(name: str, n: int, dim: int, block: int) -> None:
    variant = {"fused": fused, "naive": naive}[name]
    problem = inputs(n, dim, block, torch.float32)
    variant(*inputs(256, dim, block, torch.float32)).backward()
    before = high_water_mib()
    start = time.perf_counter()
    variant(*problem).backward()
    print(json.dumps({"peak_mib": high_water_mib() - before, "time_s": time.perf_counter() - start}))


def available_mib() -> float:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 1024


def measure(name, n, dim, block):
    """The child's figures, or None where the naive variant would not fit."""
    if name == "naive" and NAIVE_MATRICES * n * n * 4 / 2**20 > available_mib():
        return None
    command = [sys.executable, "-m", "bench.memory", "--child", name, "--sizes", str(n)]
    command += ["--dim", str(dim), "--block", str(block)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4096,8192,16384,32768,65536", help="N, comma-separated")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--variants", default="fused,naive")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.child:
        return child(arguments.child, sizes[0], arguments.dim, arguments.block)
    rows = []
    gradients_kib = 2 * arguments.dim * 4 / 1024
    print(
        f"D = {arguments.dim}, b = {arguments.block}, fp32, forward + backward; "
        f"the gradients themselves are {gradients_kib:.0f} KiB per pair"
    )
    print(f"{'N':>6}  {'variant':8} {'peak extra MiB':>14} {'KiB per pair':>13} {'time s':>8}")
    for n in sizes:
        for name in arguments.variants.split(","):
            figures = measure(name, n, arguments.dim, arguments.block)
            rows.append({"n": n, "variant": name, **(figures or {"not_run": "would not fit in memory"})})
            if figures is None:
                print(f"{n:6}  {name:8} not run: {NAIVE_MATRICES} matrices of {n}² fp32 would not fit", flush=True)
                continue
            peak = figures["peak_mib"]
            print(f"{n:6}  {name:8} {peak:14.0f} {peak * 1024 / n:13.1f} {figures['time_s']:8.2f}", flush=True)
    if arguments.out:
        settings = {"dim": arguments.dim, "block": arguments.block}
        stamp = {"date": datetime.date.today().isoformat(), "settings": settings, "machine": machine()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**stamp, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
