"""InfoNCE (CLIP's, both directions) and SigLIP with learnable scale and bias, on unit-length inputs."""

from unittest import mock

import torch
import torch.nn.functional as F

import gssf_kernels as gk
from bench.problem import Op, Problem, Work, compiled, normal, on_hopper, product_flop, sides_bytes
from bench.whole import Rows, chunks, sweep
from gssf_kernels.triton import tiles

SCALE, BIAS = 1 / 0.07, -10.0  # CLIP's and SigLIP's starts


def info_nce(problem: Problem):
    logits = problem.scale.to(problem.x.dtype) * (problem.x @ problem.y.t())
    labels = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def sigmoid(problem: Problem):
    dtype = problem.x.dtype
    logits = problem.scale.to(dtype) * (problem.x @ problem.y.t()) + problem.bias.to(dtype)
    signs = 2 * torch.eye(logits.shape[0], device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / logits.shape[0]


def our_info_nce():
    loss = getattr(gk, "info_nce_loss", None)
    return loss and (lambda problem: loss(problem.x, problem.y, scale=problem.scale))


def info_nce_by_hopper(problem: Problem):
    """Ours, with the log-sums made by the CUDA C++ sweep of csrc/cuda; bf16 and fp16."""
    lines = frozenset(("logsumexp_scores", "half", size) for size in ("small", "narrow", "wide"))
    with mock.patch.object(tiles, "HOPPER_CUDA", lines):
        return gk.info_nce_loss(problem.x, problem.y, scale=problem.scale)


def our_sigmoid():
    loss = getattr(gk, "sigmoid_loss", None)
    return loss and (lambda problem: loss(problem.x, problem.y, scale=problem.scale, bias=problem.bias))


def whole_info_nce(exact: Problem, dtype: torch.dtype):
    x, y, scale = (t.detach() for t in (exact.x, exact.y, exact.scale))
    count = len(x)
    row_lse, col_lse = x.new_empty(count), x.new_full((count,), -torch.inf)
    for rows, s in chunks(x, y):
        t = s.mul_(scale)
        row_lse[rows] = t.logsumexp(1)
        col_lse = torch.logaddexp(col_lse, t.logsumexp(0))
    pair = scale * (x * y).sum(1)
    loss = (row_lse + col_lse - 2 * pair).sum() / (2 * count)

    def slope(s, rows):
        t = scale * s
        dt = ((t - row_lse[rows, None]).exp_() + (t - col_lse).exp_()) / (2 * count)
        dt.diagonal(rows.start).sub_(1 / count)
        return scale * dt, [(dt * s).sum()]

    seen = sweep(x, y, slope)
    return [loss, Rows(seen.da, seen.directions), Rows(seen.db, seen.directions), *seen.sums]


def whole_sigmoid(exact: Problem, dtype: torch.dtype):
    x, y, scale, bias = (t.detach() for t in (exact.x, exact.y, exact.scale, exact.bias))

    def slope(s, rows):
        t = scale * s + bias
        t.diagonal(rows.start).neg_()  # of a pair -log σ(t), of others -log σ(-t)
        loss, dt = F.softplus(t).sum() / len(x), torch.sigmoid(t).div_(len(x))
        dt.diagonal(rows.start).neg_()
        return scale * dt, [loss, (dt * s).sum(), dt.sum()]

    seen = sweep(x, y, slope)
    loss, *numbers = seen.sums
    return [loss, Rows(seen.da, seen.directions), Rows(seen.db, seen.directions), *numbers]


def parameter(dtype: torch.dtype) -> torch.dtype:
    """Scale and bias are fp32 whatever the embeddings are, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(shape, dtype, device, seed):
    x, y = normal(shape, dtype, device, seed, 2, unit=True)
    scale = torch.tensor(SCALE, device=device, dtype=parameter(dtype), requires_grad=True)
    return Problem(x.requires_grad_(), y.requires_grad_(), scale=scale)


def inputs_with_bias(shape, dtype, device, seed):
    bias = torch.tensor(BIAS, device=device, dtype=parameter(dtype), requires_grad=True)
    return inputs(shape, dtype, device, seed)._replace(bias=bias)


def work(shape, itemsize):
    """One product forward, two backward: every score carries gradient."""
    g, sides = product_flop(shape), sides_bytes(shape, itemsize)
    return Work(g, 2 * g, sides, 2 * sides)


INFO_NCE = Op(
    "info_nce",
    "InfoNCE / CLIP loss, both directions, learnable scale",
    inputs,
    info_nce,
    {
        "ours": our_info_nce,
        "naive": lambda: info_nce,
        "compile": compiled(info_nce),
        **({"hopper": lambda: info_nce_by_hopper} if on_hopper() else {}),
    },
    work,
    whole_info_nce,
)
SIGMOID = Op(
    "sigmoid",
    "SigLIP loss, learnable scale and bias",
    inputs_with_bias,
    sigmoid,
    {"ours": our_sigmoid, "naive": lambda: sigmoid, "compile": compiled(sigmoid)},
    work,
    whole_sigmoid,
)
