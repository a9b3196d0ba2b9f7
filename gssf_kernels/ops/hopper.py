"""The sweep of csrc/cuda for hardest negatives and log-sums, on CUDA where it is built: one op for both.

Called by ``triton/hopper.py`` alone, where the plan's route is "hopper"; elsewhere it is what the other ops give.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels._library import register
from gssf_kernels.ops.hardest import fake_results
from gssf_kernels.plan import accumulation_dtype


class HopperSweepCall(NamedTuple):
    a: Tensor
    b: Tensor
    a_ids: Tensor | None
    b_ids: Tensor | None
    log_sums: bool  # of κ a bᵀ, else hardest negatives
    scale: Tensor | None  # κ, or None: constant is
    constant: float


def _hopper_sweep(call):
    if call.log_sums:
        return torch.ops.gssf.logsumexp_scores(call.a, call.b, call.scale, call.constant)[:5]
    return torch.ops.gssf.hardest_negatives(*call[:4])[:5]


def _fake_hopper_sweep(call):
    if not call.log_sums:
        return fake_results(call.a, call.b)
    n, m = call.a.shape[0], call.b.shape[0]
    dtype = accumulation_dtype(call.a.dtype)
    return tuple(call.a.new_empty(size, dtype=dtype) for size in (n, n, m, m, torch.sym_min(n, m)))


register(
    "hopper_sweep",
    HopperSweepCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_hopper_sweep,
    fake=_fake_hopper_sweep,
    dispatched=False,
)
