"""Scores of listed pairs, ``s_e = a[rows_e] · b[cols_e]``, and their deterministic backward.

    da_i = Σ_{e: rows_e = i} g_e b[cols_e],      db_j = Σ_{e: cols_e = j} g_e a[rows_e]

An edge e is a pair whose score is wanted. Every loss whose dL/ds is sparse uses this backward. It sorts the edges by
the row that receives a gradient, and sums the edges of each row in their order. There are no float atomics, so the same
inputs give the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan, reference
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.plan import accumulation_dtype


class PairScoresCall(NamedTuple):
    a: Tensor  # [N, D]
    b: Tensor  # [M, D]
    rows: Tensor  # [E] int64, a row of a; -1 for no pair
    cols: Tensor  # [E] int64, a row of b; -1 for no pair
    exact: bool = False  # the exact scores, rounded once, where the hardest negatives of a and b are certified (CPU)


class PairScoresBackwardCall(NamedTuple):
    grad_out: Tensor  # [E]
    rows: Tensor  # [E] int64
    cols: Tensor  # [E] int64
    a: Tensor  # [N, D]
    b: Tensor  # [M, D]
    needs: list[bool]  # whether a and b need a gradient


def pair_scores(a: Tensor, b: Tensor, index: Tensor | None = None) -> Tensor:
    """``s_i = a_i · b_index[i]``: one score for each row of a.

    Args:
        a: [N, D] float.
        b: [M, D] of a's dtype and device.
        index: [N] int64, the row of b that row i of a is compared with. None means row i. An entry of -1 means no row:
            the score is -inf, without gradient. Values are checked only on the CPU.

    Returns:
        [N] fp32 (fp64 for fp64). Differentiable once in a and b. For fp32 on the CPU a score has the bits that
        :func:`~gssf_kernels.hardest_negatives` of the same a and b gives it, so that ties are ties. Two
        exceptions, on a CPU with a bf16 unit: its mining of listed pairs is not certified, and PyTorch's setting may
        let fp32 products round to bf16.

    Raises:
        TypeError, ValueError: the type, shape, dtype, device or (on the CPU) a value of an argument is wrong.
    """
    a, b = _checks.autocast(a, b)
    _checks.embeddings(a, b, "a", "b", paired=index is None)
    if index is None:
        index = torch.arange(a.shape[0], device=a.device)
    else:
        _checks.index(index, "index", a.shape[0], a.device)
        if _checks.readable(index) and index.numel():
            low, high = index.aminmax()
            if low < -1 or high >= b.shape[0]:
                raise ValueError(f"index: expected values in -1..{b.shape[0] - 1}, got {int(low)}..{int(high)}")
    a, b = distinct(a, b)
    return _PairScores.apply(a, b, torch.arange(a.shape[0], device=a.device), index, True)


def scores_of_pairs(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor, exact: bool = False) -> Tensor:
    """``a[rows_e] · b[cols_e]`` [E]; -inf, without gradient, where an index is -1. Differentiable once in a and b.

    exact: as in the op, for scores that are compared with the hardest negatives of a and b.
    """
    return _PairScores.apply(*distinct(a, b), *distinct(rows, cols), exact)


class _PairScores(Function):
    @staticmethod
    def forward(a, b, rows, cols, exact):
        return torch.ops.gssf.pair_scores(a, b, rows, cols, exact)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx, grad_out):
        a, b, rows, cols = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        grads = last_derivative(torch.ops.gssf.pair_scores_backward, grad_out, rows, cols, a, b, needs)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


def _pair_scores(call):
    a, b, rows, cols, _ = call
    dtype = accumulation_dtype(a.dtype)
    if a.shape[0] == 0 or b.shape[0] == 0:
        return a.new_full(rows.shape, -torch.inf, dtype=dtype)
    products = a[rows.clamp_min(0)].to(dtype) * b[cols.clamp_min(0)].to(dtype)
    return torch.where((rows < 0) | (cols < 0), -torch.inf, products.sum(-1))


def _pair_scores_backward(call):
    grad_out, rows, cols, a, b, needs = call
    da, db = a.new_empty(0), b.new_empty(0)
    if needs[0]:
        da = reference.weighted_sums(grad_out, rows, cols, b, a.shape[0]).to(a.dtype)
    if needs[1]:
        db = reference.weighted_sums(grad_out, cols, rows, a, b.shape[0]).to(b.dtype)
    return da, db


def _fake_pair_scores(call):
    return call.a.new_empty(call.rows.shape[0], dtype=accumulation_dtype(call.a.dtype))


def _fake_pair_scores_backward(call):
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((call.a, call.b), call.needs, strict=True))


register(
    "pair_scores",
    PairScoresCall,
    "Tensor",
    composite=_pair_scores,
    fake=_fake_pair_scores,
    launcher="pairs.launch_pair_scores",
    plans=plan.kernel,
)
register(
    "pair_scores_backward",
    PairScoresBackwardCall,
    "(Tensor, Tensor)",
    composite=_pair_scores_backward,
    fake=_fake_pair_scores_backward,
    launcher="pairs.pair_scores_backward",
    plans=plan.kernel,
)
