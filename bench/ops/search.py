"""The k best of y for every row of x by ``x yᵀ``, rows of unit length; forward only."""

import torch

import gssf_kernels as gk
from bench.problem import Op, Problem, Work, compiled, normal, product_flop, sides_bytes
from bench.whole import Rows, chunks


def top(k: int):
    def naive(problem: Problem):
        return tuple((problem.x @ problem.y.t()).topk(k, dim=1))

    def ours():
        search = getattr(gk, "top_scores", None)
        return search and (lambda problem: search(problem.x, problem.y, k))

    return naive, ours


def outcome(outputs, exact: Problem):
    """The scores, and the exact scores of the places named."""
    score, index = outputs
    index = index.reshape(score.shape).long()
    return [score, torch.stack([(exact.x * exact.y[place]).sum(1) for place in index.unbind(1)], 1)]


def inputs(shape, dtype, device, seed):
    return Problem(*normal(shape, dtype, device, seed, 2, unit=True))


def op(name: str, k: int) -> Op:
    naive, ours = top(k)

    def whole(exact: Problem, dtype: torch.dtype):
        best = Rows(torch.cat([s.topk(k, dim=1).values for _, s in chunks(exact.x, exact.y)]))
        return [best, best]

    def work(shape, itemsize):
        return Work(product_flop(shape), 0.0, sides_bytes(shape, itemsize) + 12.0 * k * shape.n, 0.0)

    summary = f"the {k} best of y for every row of x" if k > 1 else "the nearest of y for every row of x"
    variants = {"ours": ours, "naive": lambda: naive, "compile": compiled(naive)}
    return Op(name, summary, inputs, naive, variants, work, whole, differentiable=False, outcome=outcome)


NEAREST = op("nearest", 1)
TOP_SCORES = op("top_scores", 10)
