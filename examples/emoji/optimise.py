"""AdamW with a linear warm-up and a cosine to 0, for the model and for its teachers alike."""

import math

import torch
from torch import nn

LEARNING_RATE = 3e-3
WARM_UP = 0.05  # of the run, learning rate from 0
WEIGHT_DECAY = 0.01


def adamw(decayed: list[nn.Parameter], free: list[nn.Parameter]) -> torch.optim.AdamW:
    """Weight decay on the first list alone: scales, biases and mixtures are not pulled to 0."""
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def set_learning_rate(optimiser: torch.optim.Optimizer, progress: float, highest: float = LEARNING_RATE) -> None:
    """At progress in (0, 1] of the run."""
    rate = highest * min(1.0, progress / WARM_UP) * (1 + math.cos(math.pi * progress)) / 2
    for group in optimiser.param_groups:
        group["lr"] = rate


def step(optimiser: torch.optim.Optimizer, loss: torch.Tensor, where: str) -> None:
    """One step of descent; where names it in the error."""
    if not torch.isfinite(loss):
        raise SystemExit(f"{where}: the loss is {float(loss.detach())}; training has diverged")
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
