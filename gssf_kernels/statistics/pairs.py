"""Scores of listed pairs, ``s_e = a[rows_e] · b[cols_e]``, and their deterministic backward.

    da_i = Σ_{e: rows_e = i} g_e b[cols_e],      db_j = Σ_{e: cols_e = j} g_e a[rows_e]

The backward is the gradient of every loss here whose ``dL/ds`` is sparse: edges are sorted by
destination and each destination sums its own, in edge order. No float atomics, so the same inputs
give the same bits.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gssf_kernels import _checks
from gssf_kernels._library import accumulation_dtype, define


def pair_scores(a: Tensor, b: Tensor, index: Tensor | None = None) -> Tensor:
    """``s_i = a_i · b_index[i]``: one score for each row of a.

    Args:
        a: [N, D] float.
        b: [M, D] of a's dtype and device.
        index: [N] int64, the row of b that row i meets; absent means row i, and -1 means none (score
            -inf, no gradient). Values are checked on the CPU only.

    Returns:
        [N] fp32 (fp64 for fp64). Differentiable once in a and b.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or (on the CPU) value is off.
    """
    a, b = _checks.autocast(a, b)
    _checks.sides(a, b, "a", "b", paired=index is None)
    if index is None:
        index = torch.arange(a.shape[0], device=a.device)
    else:
        _checks.index(index, "index", a.shape[0], a.device)
        if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
            low, high = index.aminmax()
            if low < -1 or high >= b.shape[0]:
                raise ValueError(f"index: expected values in -1..{b.shape[0] - 1}, got {int(low)}..{int(high)}")
    return _PairScores.apply(a, b, torch.arange(a.shape[0], device=a.device), index)


class _PairScores(torch.autograd.Function):
    @staticmethod
    def forward(a, b, rows, cols):
        return torch.ops.gssf.pair_scores(a, b, rows, cols)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b, rows, cols = ctx.saved_tensors
        return (*torch.ops.gssf.pair_scores_backward(grad, rows, cols, a, b), None, None)


def _reference(a, b, rows, cols):
    dtype = accumulation_dtype(a.dtype)
    picked = a[rows.clamp_min(0)].to(dtype) * b[cols.clamp_min(0)].to(dtype)
    return torch.where((rows < 0) | (cols < 0), -torch.inf, picked.sum(-1))


def _reference_backward(grad, rows, cols, a, b):
    dtype = accumulation_dtype(a.dtype)
    keep = (rows >= 0) & (cols >= 0) & (grad != 0)
    grad, rows, cols = grad[keep, None].to(dtype), rows[keep], cols[keep]
    da = torch.zeros_like(a, dtype=dtype).index_add(0, rows, grad * b[cols].to(dtype))
    db = torch.zeros_like(b, dtype=dtype).index_add(0, cols, grad * a[rows].to(dtype))
    return da.to(a.dtype), db.to(b.dtype)


def _fake(a, b, rows, cols):
    return a.new_empty(rows.shape[0], dtype=accumulation_dtype(a.dtype))


def _fake_backward(grad, rows, cols, a, b):
    return a.new_empty(a.shape), b.new_empty(b.shape)


define(
    "pair_scores(Tensor a, Tensor b, Tensor rows, Tensor cols) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton="pairs.pair_scores",
)
define(
    "pair_scores_backward(Tensor grad, Tensor rows, Tensor cols, Tensor a, Tensor b) -> (Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton="pairs.pair_scores_backward",
)
