"""What every launcher asks of its tensors: a supported dtype, and rows that kernels can load in vectors."""

from __future__ import annotations

import torch


def check_dtype(name: str, *tensors: torch.Tensor) -> None:
    """Raise TypeError unless all tensors are fp32, bf16 or fp16."""
    for x in tensors:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name}: the Triton kernel takes float32, bfloat16 or float16, got {x.dtype}")


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Each tensor contiguous, None as it is."""
    return [x.contiguous() if x is not None else None for x in tensors]


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether both are the same numbers in the same place."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [N, D] with adjacent channels; rows may lie any distance apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def aligned_rows(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """x [N, D] with rows that start on 16 bytes and hold a multiple of `multiple` channels.

    Where they do not, a copy with zero channels added: they leave every score as it is.
    """
    N, D = x.shape
    padding = -D % multiple
    if not padding and x.stride(1) == 1 and x.stride(0) >= D and x.stride(0) % multiple == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(N, D + padding)
    padded[:, :D] = x
    return padded
