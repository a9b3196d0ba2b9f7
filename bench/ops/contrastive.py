"""InfoNCE (CLIP's, both directions) and SigLIP with learnable scale and bias, on unit-length inputs."""

from unittest import mock

import torch
import torch.nn.functional as F

import gssf_kernels as gk
from bench.problem import Op, Problem, Work, compiled, normal, on_hopper, product_flop, sides_bytes
from gssf_kernels.kernels import tiles

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
)
SIGMOID = Op(
    "sigmoid",
    "SigLIP loss, learnable scale and bias",
    inputs_with_bias,
    sigmoid,
    {"ours": our_sigmoid, "naive": lambda: sigmoid, "compile": compiled(sigmoid)},
    work,
)
