"""GOAL's weights and losses, and the loss of both directions in one op: one launch each way on a GPU.

    terms_i = value(p_i, row_i) + value(p_i, col_i),     i < N,   each 0 where there is no negative
    dL/dp = −w⁺(p, row) − w⁺(p, col),   dL/drow = w⁻(p, row),   dL/dcol = w⁻(p, col)

The weights w are a triplet weight times a pair weight; formulas: :mod:`gssf_kernels.losses.goal`. The op is for modes
without relative terms; those with them are `relative_goal.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels._library import Function, define, last_derivative
from gssf_kernels.precision import accumulation_dtype
from gssf_kernels.reference import AnchorStatistics


class Constants(NamedTuple):
    """τ, α, β and λ."""

    tau: float
    alpha: float
    beta: float
    lam: float


# Each takes AnchorStatistics and Constants.
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
# con·con is n − p, which is what a loss without one of these is reported as
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
    """(w⁺, w⁻) of one direction's anchors."""
    weight = TRIPLET[triplet](anchor, constants)
    positive_weight, negative_weight = PAIR[pair](anchor, constants)
    return weight * positive_weight, weight * negative_weight


def goal_terms(
    positive: Tensor, row: Tensor, col: Tensor, triplet: str, pair: str, constants: Constants, reduction: str
) -> Tensor:
    """The terms [N] of ``positive [N]``, ``row [N]`` and the first N of ``col [M]``, or their sum or mean.

    The gradient is the one designed, times what comes from above, whatever the value says. Differentiable once; NaN
    passes both ways, and -inf (no negative) gives 0.
    """
    return _Goal.apply(positive, row, col, triplet, pair, constants, reduction)


class _Goal(Function):
    @staticmethod
    def forward(positive, row, col, triplet, pair, constants, reduction):
        return torch.ops.gssf.goal_terms(positive, row, col, triplet, pair, *constants, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *lines, triplet, pair, constants, reduction = inputs
        ctx.options = (triplet, pair, *constants, reduction)
        ctx.save_for_backward(*lines)

    @staticmethod
    def backward(ctx, grad):
        found = last_derivative(torch.ops.gssf.goal_terms_backward, grad, *ctx.saved_tensors, *ctx.options)
        return (*(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False)), *[None] * 4)


def _reference(positive, row, col, triplet, pair, tau, alpha, beta, lam, reduction):
    value, constants = LOSS.get((triplet, pair)), Constants(tau, alpha, beta, lam)

    def terms(negative):
        anchor = AnchorStatistics(positive, negative)
        term = negative - positive if value is None else value(anchor, constants)
        return torch.where(negative != -torch.inf, term, 0)

    return reference.reduce(terms(row) + terms(col[: positive.shape[0]]), reduction)


def _reference_backward(grad, positive, row, col, triplet, pair, tau, alpha, beta, lam, reduction):
    count, constants = positive.shape[0], Constants(tau, alpha, beta, lam)
    grad = grad / max(count, 1) if reduction == "mean" else grad

    def gradients(negative):
        found = negative != -torch.inf
        weights = anchor_weights(AnchorStatistics(positive, negative), triplet, pair, constants)
        return (grad * torch.where(found, w, 0) for w in weights)

    (row_pull, drow), (col_pull, dcol) = gradients(row), gradients(col[:count])
    return -(row_pull + col_pull), drow, torch.cat((dcol, dcol.new_zeros(col.shape[0] - count)))


def _fake(positive, row, col, triplet, pair, tau, alpha, beta, lam, reduction):
    return positive.new_empty(positive.shape if reduction == "none" else ())


def _fake_backward(grad, positive, row, col, triplet, pair, tau, alpha, beta, lam, reduction):
    return tuple(t.new_empty(t.shape) for t in (positive, row, col))


def _reference_hardest(a, b, a_ids, b_ids, triplet, pair, tau, alpha, beta, lam, reduction):
    pair_score, row_score, row_index, col_score, col_index = torch.ops.gssf.hardest_negatives(a, b, a_ids, b_ids)
    options = (triplet, pair, tau, alpha, beta, lam, reduction)
    loss = torch.ops.gssf.goal_terms(pair_score, row_score, col_score, *options)
    return loss, pair_score, row_score, row_index, col_score, col_index


def _fake_hardest(a, b, a_ids, b_ids, triplet, pair, tau, alpha, beta, lam, reduction):
    n, m = a.shape[0], b.shape[0]
    row, col = (a.new_empty(size, dtype=accumulation_dtype(a.dtype)) for size in (n, m))
    places = (torch.empty_like(t, dtype=torch.int64) for t in (row, col))
    lines = (torch.empty_like(row), row, next(places), col, next(places))
    return row.new_empty(row.shape if reduction == "none" else ()), *lines


_LINES = "Tensor positive, Tensor row, Tensor col"
_OPTIONS = "str triplet, str pair, float tau, float alpha, float beta, float lam, str reduction"
define(
    f"goal_terms({_LINES}, {_OPTIONS}) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton="goal.goal_terms",
)
define(
    f"goal_terms_backward(Tensor grad, {_LINES}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton="goal.goal_terms_backward",
)
define(
    f"hardest_goal(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_hardest,
    fake=_fake_hardest,
    through="hardest_negatives",
    triton="goal.hardest_goal",
)
