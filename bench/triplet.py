"""Time of the triplet loss, forward + backward, ours against plain PyTorch and torch.compile of it.

    python -m bench.triplet --n 8192 --dim 1024 --block 32 --repeats 5 [--out FILE.json]

Variants take turns in one run, so a noisy neighbour hits all alike; compare by the ratios, which are taken
turn by turn. A variant whose loss or gradients are off fp64 by more than ten times plain PyTorch's own
error is reported as wrong and not timed.
"""

import argparse
import copy
import datetime
import json
import statistics
import time
from pathlib import Path

import torch

from bench.variants import inputs, leaves, machine, naive, variants


def step(variant, problem):
    """(forward ms, backward ms, loss); gradients are left in the leaves."""
    for t in leaves(*problem):
        t.grad = None
    start = time.perf_counter()
    loss = variant(*problem)
    middle = time.perf_counter()
    loss.backward()
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3, loss.detach()


def results(variant, problem):
    """The loss and every gradient."""
    loss = step(variant, problem)[2]
    return [loss, *(t.grad for t in leaves(*problem))]


def wrong(found: dict[str, list[float]]) -> dict[str, str]:
    """Variants whose error is beyond ten times the naive one's (and a few roundings of fp32)."""
    return {
        name: f"relative error {max(values):.1e}"
        for name, values in found.items()
        if any(v > 10 * plain + 1e-6 for v, plain in zip(values, found["naive"], strict=True))
    }


def check(candidates, dim, block, dtype):
    """Relative errors of the loss and of each gradient against fp64, on a small problem of the same D and b."""
    x, y, metric = problem = inputs(1000, dim, block, dtype)
    exact = (x.detach().double().requires_grad_(), y.detach().double().requires_grad_(), copy.deepcopy(metric).double())
    truth = results(naive, exact)
    found = {}
    for name, variant in candidates.items():
        got = results(variant, problem)
        found[name] = [float((g.double() - t).norm() / t.norm()) for g, t in zip(got, truth, strict=True)]
    return found


def measure(n, dim, block, repeats, dtype):
    candidates = variants()
    found = check(candidates, dim, block, dtype)
    bad = wrong(found)
    for name, why in bad.items():
        print(f"{name}: WRONG, not timed: {why}")
    times = {name: [] for name in candidates if name not in bad}
    for turn in range(repeats + 1):  # the first turn warms up
        problem = inputs(n, dim, block, dtype, seed=turn)
        for name in times:
            forward, backward, _ = step(candidates[name], problem)
            if turn:
                times[name].append((forward, backward))
                print(f"turn {turn}/{repeats} {name}: {forward:.1f} + {backward:.1f} ms", flush=True)
    return {"errors": found, "wrong": bad, "times_ms": times}


def spread(values) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def table(result) -> str:
    times = result["times_ms"]
    ours = [sum(t) for t in times["fused"]]
    lines = ["variant    forward ms            backward ms           both ms               times ours, turn by turn"]
    for name, turns in times.items():
        forward, backward = ([t[k] for t in turns] for k in (0, 1))
        ratios = [sum(t) / o for t, o in zip(turns, ours, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        both = spread([sum(t) for t in turns])
        lines.append(f"{name:10} {spread(forward):21} {spread(backward):21} {both:21} {ratio}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8192, help="pairs in the batch")
    parser.add_argument("--dim", type=int, default=1024, help="channels")
    parser.add_argument("--block", type=int, default=32, help="channels of a block; divides --dim")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    arguments = parser.parse_args()
    if arguments.dim % arguments.block:
        parser.error(f"--block: {arguments.block} does not divide --dim {arguments.dim}")
    dtype = getattr(torch, arguments.dtype)
    result = measure(arguments.n, arguments.dim, arguments.block, arguments.repeats, dtype)
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    print(f"\n{settings}; median (min–max)\n{table(result)}")
    if arguments.out:
        stamp = {"date": datetime.date.today().isoformat(), "settings": settings, "machine": machine()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**stamp, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
