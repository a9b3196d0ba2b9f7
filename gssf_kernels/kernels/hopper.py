"""Hardest negatives by the CUDA C++ sweep for Hopper (csrc/cuda): bf16 and fp16, compute capability 9.0.

Compiled, and run on an emulated card by the tests; not yet run on a real one. `tiles.HOPPER_CUDA` says which sizes go
here instead of to Triton: none so far. Needs no Triton.
"""

from __future__ import annotations

import torch

from gssf_kernels.kernels import operands, tiles

op = torch.ops.gssf.hardest_negatives_hopper


def built() -> bool:
    """Whether the extension has csrc/cuda (setup.py says when)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("gssf::hardest_negatives_hopper", "CUDA")


def takes_over(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the table sends a [N, D] and b [M, D] here, and there is a kernel to send them to."""
    line = tiles.kind(a.dtype), tiles.sweep_size(len(a), len(b), a.shape[1])
    return line in tiles.HOPPER_CUDA and tiles.architecture(a.device) == 90 and built()


def hardest_negatives(
    a: torch.Tensor, b: torch.Tensor, a_ids: torch.Tensor | None, b_ids: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Return (pair_score [N], row_score [N], row_index [N], col_score [M], col_index [M]).

    a: [N, D] bf16 or fp16
    b: [M, D] as a, M ≥ N
    a_ids, b_ids: [N], [M] int64, or both None

    Scores are fp32, indices int64. Extra memory as Triton's. Raises TypeError for other dtypes.
    """
    for x in (a, b):
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"hardest_negatives: the Hopper kernel takes bfloat16 or float16, got {x.dtype}")
    multiple = 16 // a.element_size()  # the copy engine asks for rows that start on 16 bytes
    a, b = operands.aligned_rows(a, multiple), operands.aligned_rows(b, multiple)
    return op(a, b, *operands.contiguous(a_ids, b_ids))
