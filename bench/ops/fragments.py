"""Late interaction: the mean over words of the best region's score, for n / 32 pictures and as many captions.

A picture has 36 regions, a caption 32 words. Numbers are whole, of seven bits: scores are exact in every dtype, so that
every variant has the same best regions, and of equal ones takes the first.
"""

import torch

import gssf_kernels as gk
from bench import whole
from bench.problem import Op, Problem, Shape, Work, compiled

REGIONS, WORDS = 36, 32


def items(shape: Shape) -> int:
    """How many pictures, and captions."""
    return max(shape.n // WORDS, 1)


def naive(problem: Problem):
    return torch.einsum("nrd,mtd->nmrt", problem.x, problem.y).max(2).values.mean(2)


def scores_naive(problem: Problem):
    return (naive(problem),)


def ours(problem: Problem):
    return gk.late_interaction(problem.x, problem.y)


def truth(problem: Problem):
    return gk.reference.late_interaction(problem.x, problem.y)


def whole_truth(exact: Problem, dtype: torch.dtype) -> whole.Expected:
    """The truth in chunks of pictures, and the gradients of both leaves if there are any."""
    x, y, grad_out = exact.x, exact.y, exact.upstream
    step = max(whole.CHUNK_SCORES[x.device.type] // max(y.shape[0] * y.shape[1] * x.shape[1], 1), 1)
    scores, gradients = [], [torch.zeros_like(leaf) for leaf in exact.leaves()]
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        score = truth(exact._replace(x=x[rows]))
        scores.append(score.detach())
        if gradients and grad_out is not None:
            of_pictures, of_captions = torch.autograd.grad(score, (x, y), grad_out[rows])
            gradients[0] += of_pictures
            gradients[1] += of_captions
    return [torch.cat(scores), *map(whole.Rows, gradients)]


def inputs(shape, dtype, device, seed):
    g = torch.Generator(device=device).manual_seed(seed)
    n = items(shape)
    x, y = (
        (torch.randint(-127, 128, (n, fragments, shape.d), generator=g, device=device) / 128).to(dtype)
        for fragments in (REGIONS, WORDS)
    )
    upstream = torch.randn(n, n, generator=g, device=device)
    return Problem(x.requires_grad_(), y.requires_grad_(), upstream=upstream)


def scores_inputs(shape, dtype, device, seed):
    x, y, *_ = inputs(shape, dtype, device, seed)
    return Problem(x.detach(), y.detach())


def work(shape, itemsize):
    """One product forward; backward, one row of either side for every word and picture."""
    n, d = items(shape), shape.d
    sides = float(n * (REGIONS + WORDS) * d * itemsize)
    words = float(n * n * WORDS)
    return Work(2.0 * words * REGIONS * d, 4.0 * words * d, sides + 2 * words, 2 * sides + 2 * words)


def scores_work(shape, itemsize):
    return work(shape, itemsize)._replace(backward_flop=0.0, backward_bytes=0.0)


LATE_INTERACTION = Op(
    "late_interaction",
    "late interaction of n / 32 pictures (36 regions) and captions (32 words)",
    inputs,
    truth,
    {"ours": lambda: ours, "naive": lambda: naive, "compile": compiled(naive)},
    work,
    whole_truth,
)
LATE_SCORES = Op(
    "late_interaction_scores",
    "the same without gradients",
    scores_inputs,
    lambda problem: (truth(problem),),
    {
        "ours": lambda: lambda problem: (ours(problem),),
        "naive": lambda: scores_naive,
        "compile": compiled(scores_naive),
    },
    scores_work,
    whole_truth,
    differentiable=False,
)
