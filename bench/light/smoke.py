"""The smallest programs first, each in a process of its own: python -m bench.light.smoke NAME [--dry].

    tma         one program copies two tiles by the copy engine and multiplies them
    tile        a sweep of one tile
    persistent  a persistent sweep: 3 programs make 20 tiles each, of 5 steps of channels
    products    torch.mm and torch.addmm with out_dtype

Whole numbers: every answer is exact. Without a card (--dry) kernels are launched into a driver that does nothing, and
the answers are the CPU's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import stub_driver
from bench.light import worker
from bench.light.record import Recorder
from gssf_kernels import plan
from gssf_kernels.triton import tiles
from gssf_kernels.triton.sweep import Sweep

LINE = tiles.SWEEP[90, "half", "narrow"]  # persistent, by the copy engine


@triton.jit
def tma_kernel(a, b, s, BN: tl.constexpr, BM: tl.constexpr):
    x, y = a.load([0, 0]), b.load([0, 0])
    i, j = tl.arange(0, BN), tl.arange(0, BM)
    tl.store(s + i[:, None] * BM + j[None, :], tl.dot(x, y.T))


@triton.jit
def store_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The epilogue that keeps every score."""
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    tl.store(state[0] + i[:, None] * M + j[None, :], s, mask=(i < N)[:, None] & (j < M)[None, :])


def whole(n: int, d: int, seed: int) -> torch.Tensor:
    """[n, d] bf16 whole numbers, whose products and sums are exact."""
    return torch.randint(-3, 4, (n, d), generator=torch.Generator().manual_seed(seed)).bfloat16()


Answers = tuple[torch.Tensor, torch.Tensor]  # what the card gives, the true one


def tma(device: str) -> Answers:
    a, b = whole(128, 64, 0), whole(128, 64, 1)
    s = torch.full((128, 128), float("nan"), device=device)
    sides = [TensorDescriptor.from_tensor(x.to(device), [128, 64]) for x in (a, b)]
    tma_kernel[(1,)](*sides, s, BN=128, BM=128, num_warps=4)
    return s, a.float() @ b.float().T


def _sweep(device: str, line: tiles.Sweep, n: int, m: int, d: int, processors: int) -> Answers:
    a, b = whole(n, d, 0), whole(m, d, 1)
    s = torch.full((n, m), float("nan"), device=device)
    with (
        mock.patch.object(plan, "sweep_tile", return_value=line),
        mock.patch.object(plan, "processors", return_value=processors),
    ):
        sweep = Sweep(a.to(device), b.to(device), line)
        for first, blocks in sweep.slabs():
            sweep.run(store_tile, (s,), first, blocks)
    return s, a.float() @ b.float().T


def tile(device: str) -> Answers:
    return _sweep(device, LINE._replace(persistent=0, num_warps=8), LINE.BN, LINE.BM, 2 * LINE.BK, 132)


def persistent(device: str) -> Answers:
    return _sweep(device, LINE._replace(persistent=1), 6 * LINE.BN, 10 * LINE.BM, 5 * LINE.BK, 3)


def products(device: str) -> Answers:
    a, b = whole(256, 128, 0), whole(128, 192, 1)
    right = a.float() @ b.float()
    if device == "cpu":
        return torch.stack((right, 3 * right)), torch.stack((right, 3 * right))
    out = torch.mm(a.to(device), b.to(device), out_dtype=torch.float32)
    twice = torch.addmm(2 * out, a.to(device), b.to(device), out_dtype=torch.float32)
    return torch.stack((out, twice)), torch.stack((right, 3 * right))


PROGRAMS = {"tma": tma, "tile": tile, "persistent": persistent, "products": products}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.light.smoke")
    parser.add_argument("name", choices=PROGRAMS)
    parser.add_argument("--dry", action="store_true", help="into a driver that does nothing")
    arguments = parser.parse_args()
    recorder = Recorder(arguments.dry)
    with contextlib.ExitStack() as stack:
        if arguments.dry:
            stack.enter_context(stub_driver.installed(worker.ARCH))
        stack.enter_context(mock.patch.object(JITFunction, "run", lambda k, *a, **o: recorder.launch(k, *a, **o)))
        result, right = PROGRAMS[arguments.name]("cpu" if arguments.dry else "cuda")
    if not arguments.dry:
        torch.cuda.synchronize()
    if arguments.dry and arguments.name != "products":
        if stub_driver.launches() == 0:
            raise RuntimeError("nothing was launched")
        result = right
    wrong = (result.cpu() != right).nonzero()
    fields = {"name": arguments.name, "kernels": recorder.summary(), "right": not len(wrong)}
    if len(wrong):
        first = tuple(wrong[0].tolist())
        fields |= {"wrong": len(wrong), "of": right.numel(), "first": list(first), "tiles": _tiles(wrong[:, -2:])}
        fields |= {"value": float(result[first]), "truth": float(right[first]), "nan": bool(result.isnan().any())}
    worker.tell("finding", kind="smoke", **fields)
    return 0


def _tiles(wrong: torch.Tensor) -> list[list[int]]:
    """The tiles that wrong places [k, 2] lie in, the first few."""
    blocks = torch.stack((wrong[:, 0] // LINE.BN, wrong[:, 1] // LINE.BM), 1)
    return blocks.unique(dim=0)[:20].tolist()


if __name__ == "__main__":
    sys.exit(main())
