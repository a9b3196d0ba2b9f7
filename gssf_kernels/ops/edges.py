"""Hardest negatives of every edge of a graph whose nodes are matrices, in one sweep.

    edge (p, q):   s = a_p b_qᵀ,   row_score_i = max_{j ∉ pos(i)} s_ij,   col_score_j = max_{i ∉ pos(j)} s_ij

Row i of every node is the same instance, so the pairs are (i, i). Only 3N scores of an edge carry gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels._library import Function, distinct, last_derivative


class EdgeNegatives(NamedTuple):
    """Of each edge: the scores of the pairs, the hardest negatives of rows and of columns, and their indices [E, N]."""

    positive_score: Tensor
    row_score: Tensor
    row_index: Tensor
    col_score: Tensor
    col_index: Tensor


def hardest_of_edges(
    a: Tensor, b: Tensor, edges: Tensor, ids: Tensor | None, limit: Tensor | None = None, route: str = ""
) -> EdgeNegatives:
    """The hardest negatives of the edges, differentiable once in a and b through the scores.

    Args:
        a: [L, N, D] float.
        b: [R, N, D] of a's dtype and device.
        edges: [E, 2] int64, of (node of a, node of b).
        ids: [N] int64 or None: scores of equal id are no negatives.
        limit: [E, N], the largest score of the negatives of row i of each edge, and of its column i.
        route: "sweep" rounds scores as with a limit.
    """
    a, b = distinct(a, b)
    ids, other_ids = distinct(ids, ids)
    row_limit, col_limit = distinct(limit, limit)
    return EdgeNegatives(*_EdgeNegatives.apply(a, b, edges, ids, other_ids, row_limit, col_limit, route))


class _EdgeNegatives(Function):
    @staticmethod
    def forward(a, b, edges, a_ids, b_ids, row_limit, col_limit, route):
        negatives = True, True, None, None, row_limit, col_limit
        return torch.ops.gssf.hardest_negatives(a, b, a_ids, b_ids, route, *negatives, edges)[:5]

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, edges, *_ = inputs
        _, _, row_index, _, col_index = output
        ctx.mark_non_differentiable(row_index, col_index)
        ctx.save_for_backward(a, b, edges, row_index, col_index)

    @staticmethod
    def backward(ctx, dpositive, drow, _drow_index, dcol, _dcol_index):
        needs = list(ctx.needs_input_grad[:2])
        grads = last_derivative(_gradients, needs, dpositive, drow, dcol, *ctx.saved_tensors)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 6)


def _gradients(needs, dpositive, drow, dcol, a, b, edges, row_index, col_index):
    """The gradients of a and b, from the list of scores that carry gradient; nodes stand one below another."""
    n = a.shape[1]
    left, right = (edges[:, k : k + 1] * n for k in (0, 1))
    i = torch.arange(n, device=a.device).expand_as(row_index)
    row_negative, col_negative = (
        torch.where(index < 0, -1, start + index) for start, index in ((right, row_index), (left, col_index))
    )
    rows = torch.stack((left + i, left + i, col_negative)).flatten()
    cols = torch.stack((right + i, row_negative, right + i)).flatten()
    dscores = torch.stack((dpositive, drow, dcol)).flatten()
    sides = a.flatten(0, 1), b.flatten(0, 1)
    grads = torch.ops.gssf.pair_scores_backward(dscores, rows, cols, *sides, needs)
    return tuple(g.view_as(t) if need else g for g, t, need in zip(grads, (a, b), needs, strict=True))
