"""Triplet loss over every negative (VSE0): margin 0.2, summed, on unit-length inputs."""

import torch

import gssf_kernels as gk
from bench.ops import contrastive
from bench.ops.triplet import MARGIN
from bench.problem import Op, Problem, compiled, normal
from bench.whole import Rows, pairs_out, sweep


def naive(problem: Problem):
    """As in VSE++'s public code without its maximum: the matrix, both cost matrices, two masks, two sums."""
    scores = problem.x @ problem.y.t()
    diagonal = scores.diag().view(-1, 1)
    cost_y = (MARGIN + scores - diagonal.expand_as(scores)).clamp(min=0)
    cost_x = (MARGIN + scores - diagonal.t().expand_as(scores)).clamp(min=0)
    mask = torch.eye(scores.size(0), dtype=torch.bool, device=scores.device)
    cost_y = cost_y.masked_fill(mask, 0)
    cost_x = cost_x.masked_fill(mask, 0)
    wide = contrastive.parameter(scores.dtype)  # fp16 does not hold the sum of a million hinges
    return cost_y.sum(dtype=wide) + cost_x.sum(dtype=wide)


def ours(problem: Problem):
    return gk.triplet_loss(problem.x, problem.y, margin=MARGIN, negatives="all", reduction="sum")


def whole(exact: Problem, dtype: torch.dtype):
    x, y = exact.x.detach(), exact.y.detach()
    pair = (x * y).sum(1)
    of_pair = torch.zeros_like(pair)  # what s_ii gets of the terms of row i and of column i

    def slope(s, rows):
        by_row, by_col = MARGIN + pairs_out(s, rows) - pair[rows, None], MARGIN + s - pair
        loss = by_row.clamp(min=0).sum() + by_col.clamp(min=0).sum()
        active_row, active_col = (by_row > 0).double(), (by_col > 0).double()
        of_pair[rows] -= active_row.sum(1)
        of_pair.sub_(active_col.sum(0))
        return active_row + active_col, [loss]

    seen = sweep(x, y, slope)
    da, db = (t + of_pair[:, None] * (other @ seen.directions) for t, other in ((seen.da, y), (seen.db, x)))
    return [*seen.sums, Rows(da, seen.directions), Rows(db, seen.directions)]


def inputs(shape, dtype, device, seed):
    """Random pairs: nearly every hinge is active, as for an untrained model."""
    x, y = normal(shape, dtype, device, seed, 2, unit=True)
    return Problem(x.requires_grad_(), y.requires_grad_())


OP = Op(
    "sum_hinge",
    "triplet loss over every negative (VSE0)",
    inputs,
    naive,
    {"ours": lambda: ours, "naive": lambda: naive, "compile": compiled(naive)},
    contrastive.work,
    whole,
)
