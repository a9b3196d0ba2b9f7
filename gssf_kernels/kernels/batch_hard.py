"""Batch-hard of few rows: one sweep for hardest positives and negatives, their merge with the loss, and the gradient.

    terms[i] = [m + n[i] - p[i]]₊,   dx[i] = w[i] (x[n_i] - x[p_i]) + Σ_e w[e] ([n_e = i] - [p_e = i]) x[e]

n_i and p_i are places too. Ties go to the lowest index and NaN wins. fp32 products are never TF32: the winner must not
hang on PyTorch's setting. More rows are declined (NotImplemented).
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels import plan
from gssf_kernels.kernels import certified, hopper, operands, tiles
from gssf_kernels.kernels.epilogues import best, tile_lines
from gssf_kernels.kernels.hardest import fold
from gssf_kernels.kernels.pairs import add_row
from gssf_kernels.kernels.sweep import Sweep
from gssf_kernels.kernels.terms import hinge, store_sum, upstream
from gssf_kernels.plan import Scores


@triton.jit
def batch_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's best negative of each row and, as the greatest of -s, its least positive, by position in the tile."""
    labels, negative_score, negative_place, positive_score, positive_place = state
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    same = tl.load(labels + tl.minimum(i, N - 1))[:, None] == tl.load(labels + tl.minimum(j, M - 1))[None, :]
    inside = (i < N)[:, None] & (j < M)[None, :]
    row_at, _, _ = tile_lines(tile_i, tile_j, blocks, M, BN, BM)
    score, place = best(tl.where(inside & (same == 0), s, float("-inf")), tl.arange(0, BM)[None, :], 1)
    tl.store(negative_score + row_at, score)
    tl.store(negative_place + row_at, place.to(tl.int16))
    met = inside & same & (i[:, None] != j[None, :])
    score, place = best(tl.where(met, -s, float("-inf")), tl.arange(0, BM)[None, :], 1)
    tl.store(positive_score + row_at, score)
    tl.store(positive_place + row_at, place.to(tl.int16))


@triton.jit(do_not_specialize=["N", "blocks"])
def merge_batch_kernel(
    partial, out, positive, negative, positive_place, negative_place, margin, N, blocks, BN: tl.constexpr,
    BM: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Each row's best of all tiles, and the terms of them; a sum is one program's."""
    negative_scores, negative_places, positive_scores, positive_places = partial
    total = tl.zeros([BL], tl.float32)
    for i0 in range(tl.program_id(0) * BL, N, tl.num_programs(0) * BL):
        i = i0 + tl.arange(0, BL)
        low, none = tl.full([BL], float("-inf"), tl.float32), tl.full([BL], -1, tl.int32)
        n, at = fold(low, none, negative_scores, negative_places, i, blocks * BN, tl.cdiv(N, BM), 0, BM, BP)
        tl.store(negative + i, n, mask=i < N)
        tl.store(negative_place + i, at.to(tl.int64), mask=i < N)
        p, at = fold(low, none, positive_scores, positive_places, i, blocks * BN, tl.cdiv(N, BM), 0, BM, BP)
        p = tl.where(at >= 0, -p, float("-inf"))
        tl.store(positive + i, p, mask=i < N)
        tl.store(positive_place + i, at.to(tl.int64), mask=i < N)
        t, over = hinge(p, n, margin)
        terms = tl.where((at >= 0) & (n != float("-inf")) & over & (i < N), t, 0.0)
        if SUM:
            total += terms
        else:
            tl.store(out + i, terms, mask=i < N)
    if SUM:
        store_sum(out, total, N, MEAN)


@triton.jit
def edges(
    grad, positive, negative, positive_place, negative_place, margin, grad_stride, i, N,
    SUM: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """(w, p's place, n's place) of the rows i: what their negative gets and their positive loses."""
    g = upstream(grad, grad_stride, i, N, SUM, MEAN)
    p, n = tl.load(positive + i, mask=i < N, other=0.0), tl.load(negative + i, mask=i < N, other=float("-inf"))
    p_at = tl.load(positive_place + i, mask=i < N, other=-1)
    n_at = tl.load(negative_place + i, mask=i < N, other=-1)
    _, over = hinge(p, n, margin)
    return tl.where((p_at >= 0) & (n != float("-inf")) & over, g, 0.0), p_at, n_at


@triton.jit(do_not_specialize=["N"])
def batch_scan_kernel(
    grad, positive, negative, positive_place, negative_place, x, dx, margin, grad_stride, stride, N, D: tl.int32,
    SUM: tl.constexpr, MEAN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program for every row of dx and BD channels, which looks for the rows whose best it is."""
    pieces = tl.cdiv(D, BD)
    i = (tl.program_id(0) // pieces).to(tl.int64)
    d = tl.program_id(0) % pieces * BD + tl.arange(0, BD)
    w, p_at, n_at = edges(
        grad, positive, negative, positive_place, negative_place, margin, grad_stride, i, N, SUM, MEAN
    )
    total = add_row(tl.zeros([BD], tl.float32), x, stride, n_at, w, d, D, False)
    total = add_row(total, x, stride, p_at, -w, d, D, False)
    for e0 in range(0, N, BE):
        e = (e0 + tl.arange(0, BE)).to(tl.int64)
        weight, far, near = edges(
            grad, positive, negative, positive_place, negative_place, margin, grad_stride, e, N, SUM, MEAN
        )
        weight = tl.where(near == i, weight, tl.where(far == i, -weight, 0.0))
        mine = weight != 0  # a zero gradient adds nothing, even to an infinite row
        if tl.max(mine.to(tl.int32), 0) > 0:
            y = tl.load(x + e[:, None] * stride + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0)
            total += tl.sum(weight[:, None] * y.to(tl.float32), 0)
    tl.store(dx + i * D + d, total.to(dx.dtype.element_ty), mask=d < D)


def batch_hard(
    x: torch.Tensor, labels: torch.Tensor, margin: float, reduction: str
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return (terms [N] or their sum or mean, positive [N], negative [N], and their places [N] int64), fp32.

    x: [N, D] fp32, bf16 or fp16; labels: [N] int64
    Without a positive: -inf and -1; without a negative the same.

    Raises TypeError for other dtypes. Declines more than `plan.SMALL` scores, none, and those another kernel mines.
    """
    operands.check_dtype("batch_hard", x)
    N, some = len(x), reduction != "none"
    if not 0 < N * N <= plan.SMALL or hopper.takes_over("hardest_negatives", x, x) or certified.pays(x, x):
        return NotImplemented
    positive, negative = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    places = labels.new_empty(N), labels.new_empty(N)
    out = positive.new_empty(() if some else N)
    with torch.cuda.device_of(x):
        sweep = Sweep(x, x, Scores(x, x).tile(exact=True), exact=True)
        ((_, blocks),) = sweep.slabs()  # so few scores are one
        partial = [row for _ in range(2) for row in sweep.partial_results(torch.float32, torch.int16)[0]]
        sweep.run(batch_tile, (labels.contiguous(), *partial), 0, blocks)
        BL = tiles.TERM_LANES
        merge_batch_kernel[(1 if some else triton.cdiv(N, BL),)](
            tuple(partial), out, positive, negative, *places, margin, N, blocks, BN=sweep.tile.BN, BM=sweep.tile.BM,
            SUM=some, MEAN=reduction == "mean", BP=tiles.MERGE_PARTS, BL=BL, num_warps=8, num_stages=2,
        )  # fmt: skip
    return out, positive, negative, *places


def batch_hard_backward(
    grad: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    positive_place: torch.Tensor,
    negative_place: torch.Tensor,
    x: torch.Tensor,
    margin: float,
    reduction: str,
) -> torch.Tensor | NotImplementedType:
    """Return dx [N, D] in the dtype of x, summed in fp32; grad and the rest: of what `batch_hard` gives.

    Raises TypeError for other dtypes. Declines more than `plan.SCAN_ROWS` rows, whose edges have to be sorted.
    """
    operands.check_dtype("batch_hard_backward", grad, positive, negative, x)
    (N, D), some = x.shape, reduction != "none"
    if not 0 < N <= plan.SCAN_ROWS:
        return NotImplemented
    dx, x = x.new_empty(x.shape), operands.rows(x)
    given = operands.contiguous(positive, negative, positive_place, negative_place)
    BE, BD = tiles.SCAN_EDGES, tiles.EDGE_CHANNELS
    with torch.cuda.device_of(x):
        batch_scan_kernel[(N * triton.cdiv(D, BD),)](
            grad, *given, x, dx, margin, 0 if some else grad.stride(0), x.stride(0), N, D,
            SUM=some, MEAN=reduction == "mean", BE=BE, BD=BD, num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return dx
