"""Row and column maxima of ``x yᵀ`` off the diagonal, with their places; forward only."""

import sys
from unittest import mock

import torch

import gssf_kernels as gk
from bench.problem import Op, Problem, Work, compiled, normal, on_hopper, product_flop, sides_bytes
from bench.whole import Rows, hardest
from gssf_kernels import plan
from gssf_kernels.triton import hopper


def naive(problem: Problem):
    scores = problem.x @ problem.y.t()
    scores.fill_diagonal_(-torch.inf)
    row, col = scores.max(1), scores.max(0)
    return row.values, row.indices, col.values, col.indices


def ours(problem: Problem):
    return gk.hardest_negatives(problem.x, problem.y)[:4]


def swept(problem: Problem):
    """By products in the inputs' own dtype, where `ours` may be certified mining: what that gains."""
    if problem.x.device.type == "cpu":
        return torch.ops.gssf.hardest_negatives(problem.x, problem.y, None, None, "sweep")[1:5]
    with mock.patch.object(plan, "CERTIFIED", sys.maxsize):
        return ours(problem)


def by_hopper(problem: Problem):
    """The CUDA C++ sweep of csrc/cuda, which nothing is dispatched to; bf16 and fp16."""
    return hopper.hardest_negatives(problem.x, problem.y, None, None)[1:]


def outcome(outputs, exact: Problem):
    """The maxima, and the exact scores of the places named: near-ties may name another place, at no cost."""
    row_score, row_index, col_score, col_index = outputs
    return [
        row_score,
        col_score,
        (exact.x * exact.y[row_index]).sum(1),
        (exact.x[col_index] * exact.y).sum(1),
    ]


def whole(exact: Problem, dtype: torch.dtype):
    lines = [Rows(anchors.score) for anchors in hardest(exact.x, exact.y, torch.zeros_like)]
    return [*lines, *lines]


def inputs(shape, dtype, device, seed):
    return Problem(*normal(shape, dtype, device, seed, 2, unit=True))


def work(shape, itemsize):
    return Work(product_flop(shape), 0.0, sides_bytes(shape, itemsize) + 24.0 * shape.n, 0.0)


OP = Op(
    "hardest_negatives",
    "hardest negative of every row and column, with its place",
    inputs,
    naive,
    {
        "ours": lambda: ours,
        "naive": lambda: naive,
        "compile": compiled(naive),
        "swept": lambda: swept,
        **({"hopper": lambda: by_hopper} if on_hopper() else {}),
    },
    work,
    whole,
    differentiable=False,
    outcome=outcome,
)
