"""GOAL's loss over positives and hardest negatives in one launch, and its designed gradient in another.

The formulas stand in `gssf_kernels/losses/goal.py`; modes are compiled in. Sums are made as in `terms.py`.
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels.kernels import operands, tiles
from gssf_kernels.kernels.hardest import merge_lines, merged_terms
from gssf_kernels.kernels.score_functions import pointwise
from gssf_kernels.kernels.terms import store_sum, upstream


@triton.jit
def weights(p, n, tau, alpha, beta, lam, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """(w⁺, w⁻); a sigmoid is softplus' slope."""
    one = tl.zeros_like(p) + 1
    weight, pull, push = one, one, one
    if TRIPLET == "nca":
        _, weight = pointwise(-tau * (p - n), "softplus")
    elif TRIPLET == "cir":
        _, weight = pointwise(-tau * (p * (2 - p) - n * n - 0.5), "softplus")
    if PAIR == "lin":
        pull, push = 1 - p, n
    elif PAIR == "sig":
        _, pull = pointwise(-alpha * (p - lam), "softplus")
        _, push = pointwise(beta * (n - lam), "softplus")
    return weight * pull, weight * push


@triton.jit
def value(p, n, tau, alpha, beta, lam, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """The loss that has this derivative, or n - p."""
    MODE: tl.constexpr = TRIPLET + " " + PAIR
    if MODE == "con lin":
        term = ((1 - p) * (1 - p) + n * n) * 0.5
    elif MODE == "con sig":
        of_p, _ = pointwise(-alpha * (p - lam), "softplus")
        of_n, _ = pointwise(beta * (n - lam), "softplus")
        term = of_p / alpha + of_n / beta
    elif MODE == "nca con":
        term, _ = pointwise(-tau * (p - n), "softplus")
        term = term / tau
    elif MODE == "cir lin":
        term, _ = pointwise(tau * ((1 - p) * (1 - p) + n * n - 0.5), "softplus")
        term = term / (2 * tau)
    else:
        term = n - p
    return term


@triton.jit
def both_values(p, row, col, tau, alpha, beta, lam, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """Both directions' terms, 0 where there is no negative."""
    terms = tl.where(row != float("-inf"), value(p, row, tau, alpha, beta, lam, TRIPLET, PAIR), 0.0)
    return terms + tl.where(col != float("-inf"), value(p, col, tau, alpha, beta, lam, TRIPLET, PAIR), 0.0)


@triton.jit(do_not_specialize=["N"])
def goal_kernel(
    positive, row, col, out, tau, alpha, beta, lam, N,
    TRIPLET: tl.constexpr, PAIR: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BT], tl.float32)
    step = tl.num_programs(0) * BT
    for i0 in range(tl.program_id(0) * BT, N, step):
        i = i0 + tl.arange(0, BT)
        p = tl.load(positive + i, mask=i < N, other=0.0)
        of_row = tl.load(row + i, mask=i < N, other=float("-inf"))
        of_col = tl.load(col + i, mask=i < N, other=float("-inf"))
        terms = both_values(p, of_row, of_col, tau, alpha, beta, lam, TRIPLET, PAIR)
        if SUM:
            total += terms
        else:
            tl.store(out + i, terms, mask=i < N)
    if SUM:
        store_sum(out, total, N, MEAN)


@triton.jit(do_not_specialize=["N", "M", "blocks"])
def merge_goal_kernel(
    partial, positive, out, row_score, row_index, col_score, col_index, tau, alpha, beta, lam, N, M, blocks,
    BN: tl.constexpr, BM: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
    TRIPLET: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """`merge_hinge_kernel` with GOAL's terms."""
    total = tl.zeros([BL], tl.float32)
    for i0 in range(tl.program_id(0) * BL, M, tl.num_programs(0) * BL):
        i = i0 + tl.arange(0, BL)
        p, row, col = merge_lines(
            partial, positive, row_score, row_index, col_score, col_index, i, N, M, blocks, BN, BM, BP, BL
        )
        terms = both_values(p, row, col, tau, alpha, beta, lam, TRIPLET, PAIR)
        if SUM:
            total += tl.where(i < N, terms, 0.0)
        else:
            tl.store(out + i, terms, mask=i < N)
    if SUM:
        store_sum(out, total, N, MEAN)


@triton.jit
def designed(p, n, g, tau, alpha, beta, lam, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """g times both weights, times 0 where there is no negative."""
    pull, push = weights(p, n, tau, alpha, beta, lam, TRIPLET, PAIR)
    found = n != float("-inf")
    return g * tl.where(found, pull, 0.0), g * tl.where(found, push, 0.0)


@triton.jit(do_not_specialize=["N", "M"])
def goal_backward_kernel(
    grad, positive, row, col, dpositive, drow, dcol, tau, alpha, beta, lam, grad_stride, N, M,
    TRIPLET: tl.constexpr, PAIR: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BT + tl.arange(0, BT)
    g = upstream(grad, grad_stride, i, N, SUM, MEAN)
    p = tl.load(positive + i, mask=i < N, other=0.0)
    n = tl.load(row + i, mask=i < N, other=float("-inf"))
    pull, push = designed(p, n, g, tau, alpha, beta, lam, TRIPLET, PAIR)
    tl.store(drow + i, push, mask=i < N)
    n = tl.load(col + i, mask=i < N, other=float("-inf"))
    col_pull, push = designed(p, n, g, tau, alpha, beta, lam, TRIPLET, PAIR)
    tl.store(dcol + i, tl.where(i < N, push, 0.0), mask=i < M)
    tl.store(dpositive + i, -(pull + col_pull), mask=i < N)


def goal_terms(
    positive: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
    triplet: str,
    pair: str,
    tau: float,
    alpha: float,
    beta: float,
    lam: float,
    reduction: str,
) -> torch.Tensor:
    """Return the terms [N] fp32, or for "sum" and "mean" a scalar.

    positive, row: [N] fp32; col: [M] fp32, M >= N
    triplet: "con", "nca" or "cir"; pair: "con", "lin" or "sig"

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("goal_terms", positive, row, col)
    N, some, BT = len(positive), reduction != "none", tiles.TERMS
    if N == 0:
        return positive.new_zeros(() if some else 0)
    out = positive.new_empty(() if some else N)
    given = operands.contiguous(positive, row, col)
    with torch.cuda.device_of(positive):
        goal_kernel[(1 if some else triton.cdiv(N, BT),)](
            *given, out, tau, alpha, beta, lam, N, TRIPLET=triplet, PAIR=pair,
            SUM=some, MEAN=reduction == "mean", BT=BT, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def hardest_goal(
    a: torch.Tensor,
    b: torch.Tensor,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    triplet: str,
    pair: str,
    tau: float,
    alpha: float,
    beta: float,
    lam: float,
    reduction: str,
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return (GOAL's terms [N] or their sum or mean, and what `hardest.hardest_negatives` gives), in two launches.

    The rest as for `hardest.hardest_hinge` and `goal_terms`.
    """
    operands.check_dtype("hardest_goal", a, b)
    numbers = (tau, alpha, beta, lam)
    return merged_terms(merge_goal_kernel, a, b, a_ids, b_ids, numbers, reduction, TRIPLET=triplet, PAIR=pair)


def goal_terms_backward(
    grad: torch.Tensor,
    positive: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
    triplet: str,
    pair: str,
    tau: float,
    alpha: float,
    beta: float,
    lam: float,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what positive [N], row [N] and col [M] get, fp32; grad: of what `goal_terms` gives.

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("goal_terms_backward", grad, positive, row, col)
    N, M, some, BT = len(positive), len(col), reduction != "none", tiles.TERMS
    out = positive.new_empty(N), positive.new_empty(N), positive.new_empty(M)
    if M > 0:
        given = operands.contiguous(positive, row, col)
        with torch.cuda.device_of(positive):
            goal_backward_kernel[(triton.cdiv(M, BT),)](
                grad, *given, *out, tau, alpha, beta, lam, 0 if some else grad.stride(0), N, M, TRIPLET=triplet,
                PAIR=pair, SUM=some, MEAN=reduction == "mean", BT=BT, num_warps=4, num_stages=2,
            )  # fmt: skip
    return out
