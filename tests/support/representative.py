"""The cases that stand for every function where all of the table would take too long, and a step of one."""

import torch
from cases import CASES

SINGLE = [
    "triplet-129x257x40-five",
    "triplet-all-129x257x40",
    "triplet-semihard-five",
    "metric-130x200x64-b16",
    "metric-permuted",
    "infonce-129x257x40",
    "infonce-ids-random",
    "infonce-smoothed-ids",
    "sum-softplus-negate",
    "sigmoid-129x257x40",
    "sigmoid-ids-random",
    "distillation-mae-130x20",
    "distillation-mse-40x9",
    "goal-nca-con",
    "goal-cir-lin_ms",
    "metric-goal-nca-sig_ms",
    "space-relative",
    "batch-hard-random-300x24",
    "batch-hard-one-33x8",
    "graph-3+1-70x24-pairs",
    "graph-semihard",
    "late-9x36x13x11x24-masked",
    "late-triplet-mean",
    "pooling-9x36x13x11x24-masked",
    "circle_loss-between-random",
    "multi_similarity_loss-between-random",
    "hardest-129x257x40-random",
    "logsumexp-129x257x40",
    "pairs",
    "top-left-out",
    "project-b16-permuted-normalized",
    "similarity",
]
REPRESENTATIVE = [case for case in CASES if case.name in SINGLE]


def step(case, tensors, options, upstream=None):
    """(outputs, gradients of all inputs), for given gradients of the outputs."""
    outputs = case.ours(tensors, options)
    upstream = [torch.ones_like(t) for t in outputs] if upstream is None else upstream
    return [t.detach() for t in outputs], torch.autograd.grad(
        outputs, list(tensors.values()), upstream, allow_unused=True
    )


def leaves(tensors):
    return {name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, t in tensors.items()}
