"""How launchers take their tensors."""

from __future__ import annotations

import torch


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Each tensor contiguous, None as it is."""
    return [x.contiguous() if x is not None else None for x in tensors]


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether both are the same numbers in the same place."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [N, D] with adjacent channels; rows may lie any distance apart."""
    return x if x.stride(1) == 1 else x.contiguous()
