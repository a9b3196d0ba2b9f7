"""Triplet loss over every negative (VSE0): margin 0.2, summed, on unit-length inputs."""

import torch

import gssf_kernels as gk
from bench.ops import contrastive
from bench.ops.triplet import MARGIN
from bench.problem import Op, Problem, compiled, normal


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
)
