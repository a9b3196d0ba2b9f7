"""terms[i] = function(statistics at i), or their sum or mean, in one launch; the statistics' gradients in another.

The formulas are in `score_functions.py`. One program computes a sum: it adds BT terms at a time to a vector, then sums
that vector, so the same inputs give the same bits. Nothing else is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gssf_kernels.triton import score_functions, tiles


@triton.jit
def store_sum(out, total, N, MEAN: tl.constexpr):
    """out = Σ total [BT], divided by N for a mean."""
    whole = tl.sum(total, 0)
    if MEAN:
        whole = whole / N
    tl.store(out, whole)


@triton.jit
def add_or_store(total, out, terms, i, N, SUM: tl.constexpr):
    """total plus the terms at i, to be finished by `store_sum`; or, without SUM, store the terms in out."""
    if SUM:
        total += tl.where(i < N, terms, 0.0)
    else:
        tl.store(out + i, terms, mask=i < N)
    return total


@triton.jit
def upstream(grad_out, stride, i, N, SUM: tl.constexpr, MEAN: tl.constexpr):
    """dL with respect to the terms at i: the same number for all where they are summed or averaged."""
    if SUM:
        g = tl.load(grad_out)
        if MEAN:
            g = g / N
    else:
        g = tl.load(grad_out + i.to(tl.int64) * stride, mask=i < N, other=0.0)
    return g


@triton.jit(do_not_specialize=["N"])
def anchor_terms_kernel(
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
def anchor_terms_backward_kernel(
    grad_out, statistics, gradients, constants, grad_out_stride, N, M,
    GRADIENTS: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """gradients: two of N entries, and the columns' of M entries, 0 from N on, or None."""
    first, second, columns_grad = gradients
    i = tl.program_id(0) * BT + tl.arange(0, BT)
    g = upstream(grad_out, grad_out_stride, i, N, SUM, MEAN)
    one, two, three = GRADIENTS(statistics, constants, g, i, N, TRIPLET, PAIR)
    tl.store(first + i, one, mask=i < N)
    tl.store(second + i, two, mask=i < N)
    if columns_grad is not None:
        tl.store(columns_grad + i, tl.where(i < N, three, 0.0), mask=i < M)


class Formula(NamedTuple):
    """Functions of `score_functions.py`; `function` is for the merge of hardest negatives."""

    function: Any
    terms: Any
    gradients: Any


FORMULAS = {
    "hinge": Formula(score_functions.hinge, score_functions.hinge_terms, score_functions.hinge_gradients),
    "goal": Formula(score_functions.goal, score_functions.goal_terms, score_functions.goal_gradients),
    "info_nce": Formula(None, score_functions.info_nce_terms, score_functions.info_nce_gradients),
    "weights": Formula(None, None, score_functions.weights_gradients),
}


def formula_of(name: str) -> tuple[Formula, dict[str, str]]:
    """The functions of a formula such as "goal nca con", and its modes: {"TRIPLET": "nca", "PAIR": "con"}."""
    kind, *modes = name.split()
    triplet, pair = modes or ("", "")
    return FORMULAS[kind], {"TRIPLET": triplet, "PAIR": pair}


def _contiguous(statistics: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    return tuple(t.contiguous() if t is not None else None for t in statistics)


def anchor_terms(call: Any, plan: Any) -> torch.Tensor:
    """Return the terms [N] fp32, or with reduction "sum" or "mean" a scalar; statistics are fp32."""
    statistics = _contiguous(call.statistics)
    formula, modes = formula_of(call.formula)
    like = call.statistics[1]
    N, summed, BT = len(like), call.reduction != "none", tiles.TERMS
    if N == 0:
        return like.new_zeros(() if summed else 0)
    out = like.new_empty(() if summed else N)
    with torch.cuda.device_of(like):
        anchor_terms_kernel[(1 if summed else triton.cdiv(N, BT),)](
            statistics, out, tuple(call.constants), N, TERMS=formula.terms, **modes,
            SUM=summed, MEAN=call.reduction == "mean", BT=BT, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def anchor_terms_backward(call: Any, plan: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of three statistics, fp32; that of columns is empty where there are none."""
    statistics, summed, BT = call.statistics, call.reduction != "none", tiles.TERMS
    formula, modes = formula_of(call.formula)
    if call.formula == "weights":
        like, columns = statistics[0], statistics[1]
        N, statistics = like.shape[1], statistics[:1]
    else:
        like, columns = statistics[1], statistics[4 if call.formula == "info_nce" else 2]
        N = len(like)
    statistics = _contiguous(statistics)
    M = len(columns) if columns is not None else 0
    first, second = like.new_empty(N), like.new_empty(N)
    columns_grad = like.new_empty(M) if columns is not None else None
    if max(N, M) > 0:
        with torch.cuda.device_of(like):
            anchor_terms_backward_kernel[(triton.cdiv(max(N, M), BT),)](
                call.grad_out, statistics, (first, second, columns_grad), tuple(call.constants),
                0 if summed else call.grad_out.stride(0), N, M, GRADIENTS=formula.gradients, **modes,
                SUM=summed, MEAN=call.reduction == "mean", BT=BT, num_warps=4, num_stages=2,
            )  # fmt: skip
    return first, second, columns_grad if columns_grad is not None else like.new_empty(0)
