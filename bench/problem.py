"""A problem to measure, and what every op in :mod:`bench.ops` says of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.whole import Expected
from gssf_kernels import plan


class Shape(NamedTuple):
    """Size of a problem: x [n, d] against y [n, d]; block is the width of the metric's channel blocks."""

    n: int
    d: int
    block: int = 32


class Problem(NamedTuple):
    """Inputs of one step. Those that require gradients get them; an op leaves out what it has no use for."""

    x: Tensor  # [N, D]
    y: Tensor  # [N, D]
    metric: Any = None  # StructuredSimilarity
    scale: Any = None  # [] fp32
    bias: Any = None  # [] fp32
    z: Any = None  # [N, D]
    lam: Any = None  # [] fp32
    tau: Any = None  # [] fp32
    places: Any = None  # [N] int64, rows of y
    upstream: Tensor | None = None  # gradient of an output that is no scalar

    def leaves(self) -> list[Tensor]:
        """What gets gradients."""
        tensors = [t for t in self if isinstance(t, Tensor)]
        if self.metric is not None:
            tensors += list(self.metric.parameters())
        return [t for t in tensors if t.requires_grad]

    def double(self) -> Problem:
        """The same numbers in fp64: the input of the truth."""
        wide = {}
        for name, value in self._asdict().items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.detach().double().requires_grad_(value.requires_grad)
            elif isinstance(value, torch.nn.Module):
                value = copy.deepcopy(value).double()
            wide[name] = value
        return Problem(**wide)


Variant = Callable[[Problem], Any]  # one way to compute an op: the scalar loss, or the output tensors


def on_hopper() -> bool:
    """Whether csrc/cuda was built, and can run on this machine's first card."""
    return plan.hopper_built() and torch.cuda.is_available() and torch.cuda.get_device_capability(0) == (9, 0)


class Work(NamedTuple):
    """The least that any way of computing an op must do: not what a variant wastes."""

    forward_flop: float
    backward_flop: float
    forward_bytes: float
    backward_bytes: float


class Op(NamedTuple):
    """An op to measure. ``variants`` holds builders, so that nothing is imported or compiled before it is asked for."""

    name: str
    summary: str
    inputs: Callable[[Shape, torch.dtype, torch.device, int], Problem]  # of a seed
    truth: Variant  # on fp64 inputs
    variants: dict[
        str, Callable[[], Variant | None]
    ]  # "ours", "naive", …; a builder gives None where there is none yet
    work: Callable[[Shape, int], Work]  # of the bytes of one input number
    # The truth of a problem of any size (fp64, and the dtype that variants get), in chunks: bench/whole.py. Where there
    # is none, `truth` serves: it stores no matrix.
    whole: Callable[[Problem, torch.dtype], Expected] | None = None
    differentiable: bool = True
    outcome: Callable[[Any, Problem], Sequence[Tensor]] | None = None  # outputs as numbers that truth can be held to


def normal(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, count: int, unit: bool = False):
    """``count`` random [N, D] tensors, rows of unit length if asked; random, because zeros multiply faster."""
    g = torch.Generator(device=device).manual_seed(seed)
    sides = [torch.randn(shape.n, shape.d, generator=g, device=device) for _ in range(count)]
    if unit:
        sides = [torch.nn.functional.normalize(t, dim=1) for t in sides]
    return [t.to(dtype) for t in sides]


def product_flop(shape: Shape) -> float:
    """G: one N x N x D matrix product."""
    return 2.0 * shape.n * shape.n * shape.d


def sides_bytes(shape: Shape, itemsize: int) -> float:
    """x and y, once."""
    return 2.0 * shape.n * shape.d * itemsize


def compiled(variant: Variant) -> Callable[[], Variant]:
    """A builder of ``torch.compile`` of a plain variant, static in shape as a training loop's is."""
    return lambda: torch.compile(variant, dynamic=False)
