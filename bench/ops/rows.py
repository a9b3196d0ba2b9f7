"""The memory-bound ops: the structured projection of every row, and the scores of listed pairs."""

import torch
import torch.nn.functional as F

import gssf_kernels as gk
from bench.ops import triplet
from bench.problem import Op, Problem, Work, compiled, normal, sides_bytes


def project_naive(problem: Problem):
    metric = problem.metric
    x = F.normalize(problem.x, dim=1)
    groups, width, _ = metric.blocks.shape
    mixed = torch.bmm(x.view(-1, groups, width).transpose(0, 1), metric.blocks).transpose(0, 1).reshape(x.shape)
    return x * metric.diag + mixed


def project_ours(problem: Problem):
    return gk.project(problem.x, problem.metric.diag, problem.metric.blocks, normalize=True)


def project_truth(problem: Problem):
    return gk.reference.project(problem.x, problem.metric.diag, problem.metric.blocks, normalize=True)


def project_inputs(shape, dtype, device, seed):
    problem = triplet.inputs(shape, dtype, device, seed)
    return problem._replace(y=problem.y.detach(), upstream=problem.y.detach())


def project_work(shape, itemsize):
    n, d, b = shape
    rows = float(n * d)
    return Work(2 * rows * (b + 2), 4 * rows * (b + 2), 2 * rows * itemsize, 3 * rows * itemsize)


def pairs_naive(problem: Problem):
    return (problem.x * problem.y[problem.places]).sum(1)


def pairs_ours(problem: Problem):
    return gk.pair_scores(problem.x, problem.y, problem.places)


def pairs_inputs(shape, dtype, device, seed):
    x, y = normal(shape, dtype, device, seed, 2)
    g = torch.Generator(device=device).manual_seed(seed + 1)
    places = torch.randint(shape.n, (shape.n,), generator=g, device=device)
    upstream = torch.randn(shape.n, generator=g, device=device)
    return Problem(x.requires_grad_(), y.requires_grad_(), places=places, upstream=upstream)


def pairs_work(shape, itemsize):
    sides, rows = sides_bytes(shape, itemsize), float(shape.n * shape.d)
    return Work(2 * rows, 4 * rows, sides, 2 * sides)


PROJECT = Op(
    "project",
    "normalise, scale and mix the channels of every row",
    project_inputs,
    project_truth,
    {"ours": lambda: project_ours, "naive": lambda: project_naive, "compile": compiled(project_naive)},
    project_work,
)
PAIR_SCORES = Op(
    "pair_scores",
    "the scores of N listed pairs",
    pairs_inputs,
    pairs_naive,
    {"ours": lambda: pairs_ours, "naive": lambda: pairs_naive, "compile": compiled(pairs_naive)},
    pairs_work,
)
