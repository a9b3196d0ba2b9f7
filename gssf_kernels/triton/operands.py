"""Tensors in the layout that kernels read."""

from __future__ import annotations

import torch


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Each tensor contiguous; None stays None."""
    return [x.contiguous() if x is not None else None for x in tensors]


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x and y have the same memory, shape and strides."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [N, D] with adjacent channels; its rows may have any stride."""
    return x if x.stride(1) == 1 else x.contiguous()
