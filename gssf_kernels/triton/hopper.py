"""Hardest negatives and log-sums by the CUDA C++ sweep for Hopper (csrc/cuda): bf16 and fp16, compute capability 9.0.

Compiled, and run on an emulated card by the tests; not yet run on a real one. `tiles.HOPPER_CUDA` lists the sizes that
take this route instead of Triton's or, for log-sums of many scores, instead of chunks: none so far.
"""

from __future__ import annotations

import torch

from gssf_kernels.triton import operands

ops = torch.ops.gssf


def hardest_negatives(
    a: torch.Tensor, b: torch.Tensor, a_ids: torch.Tensor | None, b_ids: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Return (positive_score [N], row_score [N], row_index [N], col_score [M], col_index [M]).

    a: [N, D] bf16 or fp16
    b: [M, D] as a, M ≥ N
    a_ids, b_ids: [N], [M] int64, or both None

    Scores are fp32, indices int64. Extra memory: the same as Triton's.
    """
    (a, b), ids = _aligned("hardest_negatives", a, b), operands.contiguous(a_ids, b_ids)
    return ops.hopper_sweep(a, b, *ids, False, None, 1.0)


def logsumexp_scores(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | None, constant: float
) -> tuple[torch.Tensor, ...]:
    """Return (row_max [N], row_log [N], col_max [M], col_log [M], positive_score [min(N, M)]), fp32.

    a: [N, D] bf16 or fp16
    b: [M, D] as a
    scale: κ, one fp32 number, or None where κ is constant

    Extra memory: 8 bytes per partial, of which there are as many as for hardest negatives. Raises TypeError for other
    dtypes.
    """
    return ops.hopper_sweep(*_aligned("logsumexp_scores", a, b), None, None, True, scale, constant)


def _aligned(name: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """a and b with rows that start on 16 bytes, as the copy engine requires."""
    from gssf_kernels.triton.sweep import aligned_rows  # which imports Triton

    for x in inputs:
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"{name}: the Hopper kernel takes bfloat16 or float16, got {x.dtype}")
    return tuple(aligned_rows(x, 16 // x.element_size()) for x in inputs)
