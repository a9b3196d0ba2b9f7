"""One op for the sweep of csrc/cuda, for GPUs of compute capability 9.0: hardest negatives or log-sum-exps.

    the results of ``hardest_negatives`` (``hardest.py``) or of ``logsumexp_scores`` (``logsumexp.py``)

Only ``triton/hopper.py`` calls it, if the plan's route is "hopper". On other devices it calls those two ops.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels._library import register
from gssf_kernels.ops.hardest import fake_results
from gssf_kernels.plan import accumulation_dtype


class HopperSweepCall(NamedTuple):
    a: Tensor  # [N, D]
    b: Tensor  # [M, D]
    a_ids: Tensor | None  # [N] int64
    b_ids: Tensor | None  # [M] int64
    log_sums: bool  # log-sum-exps of κ a bᵀ; False: hardest negatives
    scale: Tensor | None  # κ, a scalar; None: κ is constant
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
