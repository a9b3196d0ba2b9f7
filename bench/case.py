"""A call of a launcher, and the products that calls are made by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

# A product: dtype, and torch.get_float32_matmul_precision().
PRODUCTS = {
    "ieee": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}


class Case(NamedTuple):
    """One call of a launcher."""

    name: str
    launcher: Callable
    arguments: Callable[[], tuple]
    kernels: tuple[str, ...]  # what it launches
    product: str = "ieee"

    def __str__(self) -> str:
        return f"{self.name} {self.product}".replace(" ", "-")


def zeros(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(size) for size in sizes]
