"""The terms of a loss made of statistics in one launch, and the statistics' gradients in another.

Formulas stand in `score_functions.py`. A sum is one program's: BT terms at a time are added to a vector, then that
vector is summed. The same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gssf_kernels.triton import score_functions, tiles


@triton.jit
def store_sum(out, total, N, MEAN: tl.constexpr):
    """out = Σ total [BT], or that over N."""
    whole = tl.sum(total, 0)
    if MEAN:
        whole = whole / N
    tl.store(out, whole)


@triton.jit
def add_or_store(total, out, terms, i, N, SUM: tl.constexpr):
    """total with the terms at i added, or the terms stored; `store_sum` ends the sum."""
    if SUM:
        total += tl.where(i < N, terms, 0.0)
    else:
        tl.store(out + i, terms, mask=i < N)
    return total


@triton.jit
def upstream(grad, stride, i, N, SUM: tl.constexpr, MEAN: tl.constexpr):
    """The gradient of the terms at i: where they are summed or averaged, one number for all."""
    if SUM:
        g = tl.load(grad)
        if MEAN:
            g = g / N
    else:
        g = tl.load(grad + i.to(tl.int64) * stride, mask=i < N, other=0.0)
    return g


@triton.jit(do_not_specialize=["N"])
def line_terms_kernel(
    statistics, out, constants, N, TERMS: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr,
    SUM: tl.constexpr, MEAN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BT], tl.float32)
    step = tl.num_programs(0) * BT
    for i0 in range(tl.program_id(0) * BT, N, step):
        i = i0 + tl.arange(0, BT)
        terms = TERMS(statistics, constants, i, N, TRIPLET, PAIR)
        total = add_or_store(total, out, terms, i, N, SUM)
    if SUM:
        store_sum(out, total, N, MEAN)


@triton.jit(do_not_specialize=["N", "M"])
def line_terms_backward_kernel(
    grad, statistics, gradients, constants, grad_stride, N, M,
    GRADIENTS: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """gradients: two of N entries, and of M entries, 0 past N, or None."""
    first, second, of_columns = gradients
    i = tl.program_id(0) * BT + tl.arange(0, BT)
    g = upstream(grad, grad_stride, i, N, SUM, MEAN)
    one, two, three = GRADIENTS(statistics, constants, g, i, N, TRIPLET, PAIR)
    tl.store(first + i, one, mask=i < N)
    tl.store(second + i, two, mask=i < N)
    if of_columns is not None:
        tl.store(of_columns + i, tl.where(i < N, three, 0.0), mask=i < M)


class Formula(NamedTuple):
    """Functions of `score_functions.py`; the first for hardest negatives, in the place where they are merged."""

    function: Any
    terms: Any
    gradients: Any


FORMULAS = {
    "hinge": Formula(score_functions.hinge, score_functions.hinge_terms, score_functions.hinge_gradients),
    "goal": Formula(score_functions.goal, score_functions.goal_terms, score_functions.goal_gradients),
    "contrast": Formula(None, score_functions.contrast_terms, score_functions.contrast_gradients),
    "weights": Formula(None, None, score_functions.weights_gradients),
}


def formula_of(name: str) -> tuple[Formula, dict[str, str]]:
    """("goal nca con") → its functions, and TRIPLET and PAIR."""
    kind, *modes = name.split()
    triplet, pair = modes or ("", "")
    return FORMULAS[kind], {"TRIPLET": triplet, "PAIR": pair}


def _contiguous(statistics: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    return tuple(t.contiguous() if t is not None else None for t in statistics)


def line_terms(call: Any, plan: Any) -> torch.Tensor:
    """Return the terms [N] fp32, or for "sum" and "mean" a scalar. Statistics: fp32."""
    statistics = _contiguous(call.statistics)
    formula, modes = formula_of(call.formula)
    like = call.statistics[1]
    N, summed, BT = len(like), call.reduction != "none", tiles.TERMS
    if N == 0:
        return like.new_zeros(() if summed else 0)
    out = like.new_empty(() if summed else N)
    with torch.cuda.device_of(like):
        line_terms_kernel[(1 if summed else triton.cdiv(N, BT),)](
            statistics, out, tuple(call.constants), N, TERMS=formula.terms, **modes,
            SUM=summed, MEAN=call.reduction == "mean", BT=BT, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def line_terms_backward(call: Any, plan: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the three gradients, fp32, the last empty where there are no columns."""
    statistics, summed, BT = call.statistics, call.reduction != "none", tiles.TERMS
    formula, modes = formula_of(call.formula)
    if call.formula == "weights":
        like, columns = statistics[0], statistics[1]
        N, statistics = like.shape[1], statistics[:1]
    else:
        like, columns = statistics[1], statistics[4 if call.formula == "contrast" else 2]
        N = len(like)
    statistics = _contiguous(statistics)
    M = len(columns) if columns is not None else 0
    first, second = like.new_empty(N), like.new_empty(N)
    of_columns = like.new_empty(M) if columns is not None else None
    if max(N, M) > 0:
        with torch.cuda.device_of(like):
            line_terms_backward_kernel[(triton.cdiv(max(N, M), BT),)](
                call.grad_out, statistics, (first, second, of_columns), tuple(call.constants),
                0 if summed else call.grad_out.stride(0), N, M, GRADIENTS=formula.gradients, **modes,
                SUM=summed, MEAN=call.reduction == "mean", BT=BT, num_warps=4, num_stages=2,
            )  # fmt: skip
    return first, second, of_columns if of_columns is not None else like.new_empty(0)
