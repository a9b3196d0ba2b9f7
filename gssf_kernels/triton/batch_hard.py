"""Batch-hard of few rows: one sweep for hardest positives and negatives, their merge with the loss, and the gradient.

    terms[i] = [m + n[i] - p[i]]₊,   dx[i] = w[i] (x[n_i] - x[p_i]) + Σ_e w[e] ([n_e = i] - [p_e = i]) x[e]

Stored are the scores p[i], n[i] and their indices p_i, n_i. Ties go to the lowest index and NaN wins. fp32 products are
never TF32: the winner must not depend on PyTorch's setting.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.epilogues import partial_offsets
from gssf_kernels.triton.pairs import add_row
from gssf_kernels.triton.reductions import argmax, merge_rows, merge_terms
from gssf_kernels.triton.score_functions import hinge, hinge_weighted
from gssf_kernels.triton.sweep import Sweep
from gssf_kernels.triton.terms import upstream


@triton.jit
def batch_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's hardest negative of each row and, as the largest -s, its hardest positive, by position in the tile."""
    labels, negative_score, negative_place, positive_score, positive_place = state
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    same = tl.load(labels + tl.minimum(i, N - 1))[:, None] == tl.load(labels + tl.minimum(j, M - 1))[None, :]
    inside = (i < N)[:, None] & (j < M)[None, :]
    row_at, _, _ = partial_offsets(tile_i, tile_j, blocks, M, BN, BM)
    score, place = argmax(tl.where(inside & (same == 0), s, float("-inf")), tl.arange(0, BM)[None, :], 1)
    tl.store(negative_score + row_at, score)
    tl.store(negative_place + row_at, place.to(tl.int16))
    positive = inside & same & (i[:, None] != j[None, :])
    score, place = argmax(tl.where(positive, -s, float("-inf")), tl.arange(0, BM)[None, :], 1)
    tl.store(positive_score + row_at, score)
    tl.store(positive_place + row_at, place.to(tl.int16))


@triton.jit
def batch_hard_merged_terms(
    merged, loss, i, N, M, blocks, FUNCTION: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The hinge of rows i, 0 where there is no positive or no negative. In the columns' place are the positives."""
    negative_partial, positive_partial, negatives, positives = merged
    n, _ = merge_rows(negative_partial, negatives, i, N, M, 0, blocks, "argmax", BN, BM, BP)
    p, place = merge_rows(positive_partial, positives, i, N, M, 0, blocks, "argmin", BN, BM, BP)
    return tl.where((place >= 0) & (n != float("-inf")), hinge(p, n, loss, TRIPLET, PAIR), 0.0)


@triton.jit
def edges(
    grad_out, positive, negative, positive_place, negative_place, margin, grad_out_stride, i, N,
    SUM: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """(w, index of p, index of n) of rows i: w is the gradient with respect to n, -w that with respect to p."""
    g = upstream(grad_out, grad_out_stride, i, N, SUM, MEAN)
    p, n = tl.load(positive + i, mask=i < N, other=0.0), tl.load(negative + i, mask=i < N, other=float("-inf"))
    p_at = tl.load(positive_place + i, mask=i < N, other=-1)
    n_at = tl.load(negative_place + i, mask=i < N, other=-1)
    w, _ = hinge_weighted(p, n, g, (margin,), "", "")
    return tl.where((p_at >= 0) & (n != float("-inf")), w, 0.0), p_at, n_at


@triton.jit(do_not_specialize=["N"])
def batch_scan_kernel(
    grad_out, positive, negative, positive_place, negative_place, x, dx, margin, grad_out_stride, stride, N,
    D: tl.int32, SUM: tl.constexpr, MEAN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program computes BD channels of one row of dx; it scans all rows for those whose hardest that row is."""
    pieces = tl.cdiv(D, BD)
    i = (tl.program_id(0) // pieces).to(tl.int64)
    d = tl.program_id(0) % pieces * BD + tl.arange(0, BD)
    w, p_at, n_at = edges(
        grad_out, positive, negative, positive_place, negative_place, margin, grad_out_stride, i, N, SUM, MEAN
    )
    total = add_row(tl.zeros([BD], tl.float32), x, stride, n_at, w, d, D, False)
    total = add_row(total, x, stride, p_at, -w, d, D, False)
    for e0 in range(0, N, BE):
        e = (e0 + tl.arange(0, BE)).to(tl.int64)
        weight, p_of_e, n_of_e = edges(
            grad_out, positive, negative, positive_place, negative_place, margin, grad_out_stride, e, N, SUM, MEAN
        )
        weight = tl.where(n_of_e == i, weight, tl.where(p_of_e == i, -weight, 0.0))
        hit = weight != 0  # a zero gradient adds nothing, even to an infinite row
        if tl.max(hit.to(tl.int32), 0) > 0:
            y = tl.load(x + e[:, None] * stride + d[None, :], mask=hit[:, None] & (d < D)[None, :], other=0.0)
            total += tl.sum(weight[:, None] * y.to(tl.float32), 0)
    tl.store(dx + i * D + d, total.to(dx.dtype.element_ty), mask=d < D)


def batch_hard(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """Return (terms [N] or their sum or mean, positive [N], negative [N], and their indices [N] int64), fp32.

    Where an anchor has no positive, or no negative, these are -inf and -1. Raises TypeError unless x is fp32, bf16 or
    fp16.
    """
    x, labels, margin, reduction = call
    N = len(x)
    positive, negative = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    positive_index, negative_index = labels.new_empty(N), labels.new_empty(N)
    out = positive.new_empty(() if reduction != "none" else N)
    with torch.cuda.device_of(x):
        sweep = Sweep(x, x, plan.tile, exact=True)
        of_negatives, of_positives = (sweep.empty_partials(torch.float32, torch.int16)[0] for _ in range(2))
        sweep.run(batch_tile, (labels.contiguous(), *of_negatives, *of_positives), 0, sweep.row_blocks)
        merged = of_negatives, of_positives, (negative, negative_index), (positive, positive_index)
        merge_terms(sweep, merged, (margin,), out, reduction, batch_hard_merged_terms)
    return out, positive, negative, positive_index, negative_index


def batch_hard_backward(call: Any, plan: Any) -> torch.Tensor:
    """Return dx [N, D] in the dtype of x, summed in fp32. Raises TypeError unless x is fp32, bf16 or fp16."""
    grad_out, x = call.grad_out, operands.rows(call.x)
    (N, D), summed = x.shape, call.reduction != "none"
    dx = call.x.new_empty(x.shape)
    saved = operands.contiguous(call.positive_score, call.negative_score, call.positive_index, call.negative_index)
    BE, BD = tiles.SCAN_EDGES, tiles.EDGE_CHANNELS
    with torch.cuda.device_of(x):
        batch_scan_kernel[(N * triton.cdiv(D, BD),)](
            grad_out, *saved, x, dx, call.margin, 0 if summed else grad_out.stride(0), x.stride(0), N, D,
            SUM=summed, MEAN=call.reduction == "mean", BE=BE, BD=BD, num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return dx
