"""What losses make of scores, each in one place: of an anchor's positive score p and hardest negative n, or of sums.

    function(p, n, constants, TRIPLET, PAIR)                → the term of one direction
    gradients(p, n, g, constants, TRIPLET, PAIR)            → (g times p's weight, g times n's weight)

hinge     [m + n − p]₊                                      constants (m)
goal      gssf_kernels/losses/goal.py, TRIPLET and PAIR     constants (τ, α, β, λ)

The terms of a formula and what its statistics get of the terms' gradient g, for `terms.py`:

    terms(statistics, constants, i, N, TRIPLET, PAIR)       → [BT] at i
    gradients(statistics, constants, g, i, N, TRIPLET, PAIR) → one for each of three statistics
"""

from __future__ import annotations

import triton
import triton.language as tl

from gssf_kernels.kernels.dense import pointwise


@triton.jit
def hinge(p, n, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    t = (n + constants[0]) - p
    return tl.where((t < 0) == 0, t, 0.0)  # NaN passes


@triton.jit
def hinge_weighted(p, n, g, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    g = tl.where((((n + constants[0]) - p) < 0) == 0, g, 0.0)
    return g, g


@triton.jit
def goal_weights(p, n, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """(w⁺, w⁻); a sigmoid is softplus' slope. PAIR without relative terms."""
    tau, alpha, beta, lam = constants[0], constants[1], constants[2], constants[3]
    one = tl.zeros_like(p) + 1
    weight, of_positive, of_negative = one, one, one
    if TRIPLET == "nca":
        _, weight = pointwise(-tau * (p - n), "softplus")
    elif TRIPLET == "cir":
        _, weight = pointwise(-tau * (p * (2 - p) - n * n - 0.5), "softplus")
    if PAIR == "lin":
        of_positive, of_negative = 1 - p, n
    elif PAIR == "sig":
        _, of_positive = pointwise(-alpha * (p - lam), "softplus")
        _, of_negative = pointwise(beta * (n - lam), "softplus")
    return weight * of_positive, weight * of_negative


@triton.jit
def goal(p, n, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """The loss that has this derivative, or n - p; 0 where there is no negative."""
    tau, alpha, beta, lam = constants[0], constants[1], constants[2], constants[3]
    MODE: tl.constexpr = TRIPLET + " " + PAIR
    if MODE == "con lin":
        term = ((1 - p) * (1 - p) + n * n) * 0.5
    elif MODE == "con sig":
        of_positive, _ = pointwise(-alpha * (p - lam), "softplus")
        of_negative, _ = pointwise(beta * (n - lam), "softplus")
        term = of_positive / alpha + of_negative / beta
    elif MODE == "nca con":
        term, _ = pointwise(-tau * (p - n), "softplus")
        term = term / tau
    elif MODE == "cir lin":
        term, _ = pointwise(tau * ((1 - p) * (1 - p) + n * n - 0.5), "softplus")
        term = term / (2 * tau)
    else:
        term = n - p
    return tl.where(n != float("-inf"), term, 0.0)


@triton.jit
def goal_weighted(p, n, g, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    of_positive, of_negative = goal_weights(p, n, constants, TRIPLET, PAIR)
    valid = n != float("-inf")
    return g * tl.where(valid, of_positive, 0.0), g * tl.where(valid, of_negative, 0.0)


@triton.jit
def anchors(statistics, i, N):
    """(positive_score, row_score, col_score) at i, as without a negative past N."""
    positive_score, row_score, col_score = statistics
    p = tl.load(positive_score + i, mask=i < N, other=0.0)
    row = tl.load(row_score + i, mask=i < N, other=float("-inf"))
    col = tl.load(col_score + i, mask=i < N, other=float("-inf"))
    return p, row, col


@triton.jit
def both_directions(
    statistics, constants, i, N, FUNCTION: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    p, row, col = anchors(statistics, i, N)
    return FUNCTION(p, row, constants, TRIPLET, PAIR) + FUNCTION(p, col, constants, TRIPLET, PAIR)


@triton.jit
def both_gradients(
    statistics, constants, g, i, N, WEIGHTED: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    p, row, col = anchors(statistics, i, N)
    row_positive, row_negative = WEIGHTED(p, row, g, constants, TRIPLET, PAIR)
    col_positive, col_negative = WEIGHTED(p, col, g, constants, TRIPLET, PAIR)
    return -(row_positive + col_positive), row_negative, col_negative


@triton.jit
def hinge_terms(statistics, constants, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    return both_directions(statistics, constants, i, N, hinge, TRIPLET, PAIR)


@triton.jit
def hinge_gradients(statistics, constants, g, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    return both_gradients(statistics, constants, g, i, N, hinge_weighted, TRIPLET, PAIR)


@triton.jit
def goal_terms(statistics, constants, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    return both_directions(statistics, constants, i, N, goal, TRIPLET, PAIR)


@triton.jit
def goal_gradients(statistics, constants, g, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    return both_gradients(statistics, constants, g, i, N, goal_weighted, TRIPLET, PAIR)


@triton.jit
def log_ratio(top, log, target, i, inside):
    """log Σ e^s less the target: maximum and target are subtracted first, which is exact where the loss is small."""
    t = tl.load(top + i, mask=inside, other=0.0) - tl.load(target + i, mask=inside, other=0.0)
    return t + tl.load(log + i, mask=inside, other=0.0)


@triton.jit
def contrast_terms(statistics, constants, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    row_max, row_log, row_target, col_max, col_log, col_target = statistics
    terms = log_ratio(row_max, row_log, row_target, i, i < N)
    if col_log is not None:
        if col_target is not None:
            terms += log_ratio(col_max, col_log, col_target, i, i < N)
        else:
            terms += log_ratio(col_max, col_log, row_target, i, i < N)
        terms *= 0.5
    return terms


@triton.jit
def contrast_gradients(statistics, constants, g, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """Of row_log, of either target, and of col_log."""
    _, _, _, _, col_log, col_target = statistics
    g = tl.where(i < N, g, 0.0)
    dtarget = -g
    if col_log is not None:
        g = g * 0.5
        dtarget = -g
        if col_target is None:  # one target stands for both directions
            dtarget = -2.0 * g
    return g, dtarget, g


@triton.jit
def weights_gradients(statistics, constants, g, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """By weights [4, N] that are known: of the positives and negatives of rows, then of columns."""
    at, line = statistics[0] + i, N.to(tl.int64)
    row_positive = tl.load(at, mask=i < N, other=0.0)
    row_negative = tl.load(at + line, mask=i < N, other=0.0)
    col_positive = tl.load(at + 2 * line, mask=i < N, other=0.0)
    col_negative = tl.load(at + 3 * line, mask=i < N, other=0.0)
    return -(g * row_positive + g * col_positive), g * row_negative, g * col_negative
