"""Every Triton kernel in every dtype once, on ragged sizes, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.sanitize [--seconds 50]

Without PyTorch's cache each tensor is an allocation of its own, so that a step past its end is seen. The calls are the
ragged ones of `bench/calls.py`, on random numbers, and those of launchers that have no ragged ones. First come products
of four warps by tiles of 32 channels, of which Triton has made illegal accesses on Hopper (triton-lang/triton#10486 and
#11366, with 3.6 and 3.7). The others come in turns, launcher by launcher: where time runs out, what was left out is
said, and every kernel has had its share.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import Any

import torch

from bench.calls import CASES
from bench.case import PRODUCTS, Case

RAGGED = ("ragged", "b=3", "b=16", "blocks alone", "D=100", "columns", "rows", "hinge", "info_nce", "none")
FIRST = {"gradients_kernel", "relation_loss_kernel"}  # tiles.GRADIENTS: 4 warps, BK = 32
FIRST_SWEEP = "hardest_negatives narrow"  # the persistent sweep of 4 warps; BK = 32 in tf32
TENSOR_CORES = ("bf16", "tf32", "fp16")


def calls() -> list[Case]:
    """What is FIRST on tensor cores, once for every launcher and product; then launchers in turns."""
    by_launcher: dict[str, list[Case]] = {}
    for case in CASES:
        by_launcher.setdefault(_launcher(case), []).append(case)
    for name, cases in by_launcher.items():
        by_launcher[name] = [case for case in cases if any(word in case.name for word in RAGGED)] or cases
    turns = itertools.zip_longest(*(sorted(cases, key=_turn) for cases in by_launcher.values()))
    every = [case for turn in turns for case in turn if case is not None]
    first: dict[tuple[str, str], Case] = {}
    for product in TENSOR_CORES:
        for case in every:
            if case.product == product and (FIRST & set(case.kernels) or case.name.startswith(FIRST_SWEEP)):
                first.setdefault((product, _launcher(case)), case)
    return [*first.values(), *(case for case in every if case not in first.values())]


def _launcher(case: Case) -> str:
    return case.name.partition(" ")[0]


def _turn(case: Case) -> tuple[int, str]:
    return ("ieee", "bf16", "fp16", "tf32").index(case.product), case.name


def arguments(case: Case, device: str) -> list[Any]:
    """The case's own, random: labels of some groups, and places within bounds."""
    g = torch.Generator().manual_seed(0)

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(entry) for entry in value]
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=g).to(value).to(device)
        if value.any():  # a permutation
            return torch.randperm(len(value), generator=g).to(device)
        return torch.randint(0, 40, value.shape, generator=g).to(device)

    return [filled(value) for value in case.arguments()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no call after this")
    seconds = parser.parse_args().seconds
    if not torch.cuda.is_available():
        parser.exit(2, "python -m bench.sanitize: PyTorch sees no CUDA device\n")
    start, wanted = time.perf_counter(), calls()
    done: set[str] = set()
    for count, case in enumerate(wanted):
        if time.perf_counter() - start > seconds:
            missing = {kernel for left in wanted[count:] for kernel in left.kernels} - done
            left_out = f"; not reached: {', '.join(sorted(missing))}" if missing else ""
            print(f"out of time: {count} of {len(wanted)} calls, {len(done)} kernels{left_out}")
            return 0
        torch.set_float32_matmul_precision(PRODUCTS[case.product][1])
        case.launcher(*arguments(case, "cuda"))
        torch.cuda.synchronize()
        done.update(case.kernels)
        print(f"{case}: done", flush=True)
    print(f"{len(wanted)} calls of {len(done)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
