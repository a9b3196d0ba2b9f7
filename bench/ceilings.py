"""What this machine can do, measured in the run that is held against it: matrix products and memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.clock import clock
from bench.problem import Work
from gssf_kernels.dense import Right

PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_MIB = {"cpu": 256, "cuda": 2048}
REPEATS = 3  # before every case; the best of the whole run counts


class Ceilings(NamedTuple):
    """What can be reached: the best of all tries of a run."""

    tflop_per_s: float  # a square matrix product of random numbers, PyTorch's own or ours, whichever is faster
    gb_per_s: float  # a copy, reads and writes counted

    def floor_ms(self, work: Work) -> tuple[float, float]:
        """(forward, backward): the longer of matrix work at the one ceiling and bytes at the other."""

        def floor(flop: float, moved: float) -> float:
            return 1e3 * max(flop / (self.tflop_per_s * 1e12), moved / (self.gb_per_s * 1e9))

        return floor(work.forward_flop, work.forward_bytes), floor(work.backward_flop, work.backward_bytes)


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings for products in dtype on device."""
    timer = clock(device)
    size = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    product_ms = _best(timer, lambda: torch.mm(a, b.t(), out=product))
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        right = Right(b.t(), dtype)
        product_ms = min(product_ms, _best(timer, lambda: right.product(a, product)))
    source = torch.ones(COPY_MIB[device.type] << 18, device=device)
    target = torch.zeros_like(source)
    copy_ms = _best(timer, lambda: target.copy_(source))
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(2 * size**3 / product_ms / 1e9, moved / copy_ms / 1e6)


def _best(timer, stage) -> float:
    stage()
    return min(timer.time_ms(stage)[0] for _ in range(REPEATS))
