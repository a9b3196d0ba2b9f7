"""GOAL's weights and values of the anchors of one direction.

    w⁺ = T P⁺,   w⁻ = T P⁻,      T the triplet weight, P the pair weight

Their formulas and source: :mod:`gssf_kernels.losses.goal`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels.reference import AnchorStatistics

RELATIVE = {"lin_ms": "linear", "sig_ms": "exponential"}  # pair weights with relative terms, and their kind


class Constants(NamedTuple):
    """τ, α, β and λ."""

    tau: float
    alpha: float
    beta: float
    lam: float


# The functions of these three tables take AnchorStatistics and Constants.
TRIPLET: dict[str, Callable[..., Tensor]] = {
    "con": lambda s, c: torch.ones_like(s.positive),
    "nca": lambda s, c: torch.sigmoid(-c.tau * (s.positive - s.negative)),
    "cir": lambda s, c: torch.sigmoid(-c.tau * (s.positive * (2 - s.positive) - s.negative.square() - 0.5)),
}
PAIR: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {  # (P⁺, P⁻)
    "con": lambda s, c: (torch.ones_like(s.positive), torch.ones_like(s.negative)),
    "lin": lambda s, c: (1 - s.positive, s.negative),
    "sig": lambda s, c: (
        torch.sigmoid(-c.alpha * (s.positive - c.lam)),
        torch.sigmoid(c.beta * (s.negative - c.lam)),
    ),
    "lin_ms": lambda s, c: (
        (1 - s.relative_positive) * (1 - s.positive),
        (1 + s.relative_negative) * s.negative,
    ),
    "sig_ms": lambda s, c: (
        1 / (torch.exp(c.alpha * (s.positive - c.lam)) + s.relative_positive),
        1 / (torch.exp(-c.beta * (s.negative - c.lam)) + s.relative_negative),
    ),
}
# The losses whose derivative is the weights. Other combinations, and con·con, are reported as n − p.
LOSS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("con", "lin"): lambda s, c: ((1 - s.positive).square() + s.negative.square()) / 2,
    ("con", "sig"): lambda s, c: (
        _softplus(-c.alpha * (s.positive - c.lam)) / c.alpha + _softplus(c.beta * (s.negative - c.lam)) / c.beta
    ),
    ("nca", "con"): lambda s, c: _softplus(-c.tau * (s.positive - s.negative)) / c.tau,
    ("cir", "lin"): lambda s, c: (
        _softplus(c.tau * ((1 - s.positive).square() + s.negative.square() - 0.5)) / (2 * c.tau)
    ),
}


def _softplus(t: Tensor) -> Tensor:
    return -F.logsigmoid(-t)  # to the last bit, where F.softplus drops its tail beyond 20


def anchor_weights(anchor: AnchorStatistics, triplet: str, pair: str, constants: Constants) -> tuple[Tensor, Tensor]:
    """(w⁺, w⁻) of the anchors of one direction, [N] each."""
    weight = TRIPLET[triplet](anchor, constants)
    positive_weight, negative_weight = PAIR[pair](anchor, constants)
    return weight * positive_weight, weight * negative_weight


def anchor_values(anchor: AnchorStatistics, triplet: str, pair: str, constants: Constants) -> Tensor:
    """The terms [N] of the loss whose derivative these weights are; n − p where there is no such loss."""
    value = LOSS.get((triplet, pair))
    return anchor.negative - anchor.positive if value is None else value(anchor, constants)
