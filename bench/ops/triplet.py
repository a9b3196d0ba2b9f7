"""Hardest-negative triplet loss on a structured similarity: margin 0.2, summed, L2-normalised inputs."""

from typing import Any

import torch
import torch.nn.functional as F

import gssf_kernels as gk
from bench.problem import Op, Problem, Work, compiled, normal, product_flop, sides_bytes
from bench.whole import TIES, by_choice

MARGIN = 0.2


def naive(problem: Problem):
    """As in VSE++'s public code: the matrix, both cost matrices, two masks, two maxima."""
    metric = problem.metric
    x, y = F.normalize(problem.x, dim=1), F.normalize(problem.y, dim=1)
    groups, width, _ = metric.blocks.shape
    mixed = torch.bmm(x.view(-1, groups, width).transpose(0, 1), metric.blocks).transpose(0, 1).reshape(x.shape)
    scores = (x * metric.diag + mixed) @ y.t()
    diagonal = scores.diag().view(-1, 1)
    cost_y = (MARGIN + scores - diagonal.expand_as(scores)).clamp(min=0)
    cost_x = (MARGIN + scores - diagonal.t().expand_as(scores)).clamp(min=0)
    mask = torch.eye(scores.size(0), dtype=torch.bool, device=scores.device)
    cost_y = cost_y.masked_fill(mask, 0)
    cost_x = cost_x.masked_fill(mask, 0)
    return cost_y.max(1)[0].sum() + cost_x.max(0)[0].sum()


def ours(problem: Problem):
    return gk.triplet_loss(problem.x, problem.y, margin=MARGIN, metric=problem.metric)


def truth(problem: Problem):
    return gk.reference.triplet_loss(problem.x, problem.y, margin=MARGIN, metric=problem.metric)


def whole(problem: Problem, dtype: torch.dtype):
    """The costs that public code chooses among are rounded three times: scores, with the margin, less the pair's."""

    def window(score):
        return TIES[dtype] * (3 * score.abs() + 2 * MARGIN)

    def terms(p, n, q, k, anchors):
        cost = MARGIN + n - p
        return cost.clamp(min=0), cost.detach().abs() <= window(anchors.score)

    return by_choice(problem.leaves(), *sides(problem), window, terms)


def sides(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The metric's two factors."""
    metric = problem.metric
    a = gk.reference.project(problem.x, metric.diag, metric.blocks, normalize=True)
    return a, F.normalize(problem.y, dim=1)


def inputs(shape, dtype, device, seed):
    """Random embeddings, and a metric a little off its start."""
    x, y = normal(shape, dtype, device, seed, 2)
    metric: Any = gk.StructuredSimilarity(shape.d, shape.block, dtype=dtype).to(device)
    g = torch.Generator(device=device).manual_seed(seed + 1)
    with torch.no_grad():
        metric.diag += 0.1 * torch.randn(metric.diag.shape, generator=g, device=device)
        metric.blocks += 0.1 * torch.randn(metric.blocks.shape, generator=g, device=device)
    return Problem(x.requires_grad_(), y.requires_grad_(), metric=metric)


def work(shape, itemsize):
    """One product forward; the backward is sparse: 3N scores carry gradient, and the metric mixes channels."""
    n, d, b = shape
    mixing = 2.0 * n * d * (b + 1)
    sides = sides_bytes(shape, itemsize)
    return Work(product_flop(shape) + mixing, 2 * mixing + 12.0 * n * d, sides, 2 * sides)


OP = Op(
    "triplet",
    "hardest-negative triplet loss (VSE++), structured similarity",
    inputs,
    truth,
    {"ours": lambda: ours, "naive": lambda: naive, "compile": compiled(naive)},
    work,
    whole,
)
