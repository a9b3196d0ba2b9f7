"""GOAL's formulas, written out one anchor and one number at a time in Python's fp64.

The loops share nothing with the package: they follow the paper and its authors' code row by row.
"""

import math

import torch
import torch.nn.functional as F
from cases import IDS, randn

DEFAULTS = {"tau": 1.0, "alpha": 2.0, "beta": 10.0, "lam": 0.5, "positive_threshold": 0.1, "negative_threshold": 0.1}


def exp(t):
    return math.inf if t > 709 else math.exp(t)


def sigmoid(t):
    return 1 / (1 + exp(-t))


def softplus(t):
    return max(t, 0.0) + math.log1p(math.exp(-abs(t)))


def triplet_weight(triplet, p, n, c):
    if triplet == "con":
        return 1.0
    return sigmoid(-c["tau"] * (p - n if triplet == "nca" else p * (2 - p) - n * n - 0.5))


def pair_weights(pair, p, n, r_plus, r_minus, c):
    """(P⁺, P⁻)"""
    lam = c["lam"]
    return {
        "con": lambda: (1.0, 1.0),
        "lin": lambda: (1 - p, n),
        "sig": lambda: (sigmoid(-c["alpha"] * (p - lam)), sigmoid(c["beta"] * (n - lam))),
        "lin_ms": lambda: ((1 - r_plus) * (1 - p), (1 + r_minus) * n),
        "sig_ms": lambda: (
            1 / (exp(c["alpha"] * (p - lam)) + r_plus),
            1 / (exp(-c["beta"] * (n - lam)) + r_minus),
        ),
    }[pair]()


def stated_loss(triplet, pair, p, n, c):
    """The loss of the five combinations that have one; else the monitor."""
    tau, alpha, beta, lam = (c[name] for name in ("tau", "alpha", "beta", "lam"))
    if (triplet, pair) == ("con", "lin"):
        return ((1 - p) ** 2 + n**2) / 2
    if (triplet, pair) == ("con", "sig"):
        return softplus(-alpha * (p - lam)) / alpha + softplus(beta * (n - lam)) / beta
    if (triplet, pair) == ("nca", "con"):
        return softplus(-tau * (p - n)) / tau
    if (triplet, pair) == ("cir", "lin"):
        return softplus(tau * ((1 - p) ** 2 + n**2 - 0.5)) / (2 * tau)
    return n - p


def mean(terms):
    return math.fsum(terms) / len(terms) if terms else 0.0


def relative_terms(pair, i, p, scores, negatives, a, c):
    """(r⁺_i, r⁻_i) of anchor i with this row of scores, whose hardest negative stands at a."""
    n = scores[a]
    near_p = [p[i] - p[k] for k in range(len(p)) if k != i and p[k] <= n + c["positive_threshold"]]
    near_n = [n - scores[j] for j in negatives if j != a and scores[j] >= min(p) - c["negative_threshold"]]
    if pair == "lin_ms":  # the authors count the terms that are not 0, and those above 0
        return mean([d for d in near_p if d != 0]), mean([d for d in near_n if d > 0])
    return mean([exp(c["alpha"] * d) for d in near_p]), mean([exp(-c["beta"] * d) for d in near_n])


def loop_goal(s, triplet, pair, x_ids=None, y_ids=None, **constants):
    """Per-pair values [N] and G = dL/ds as {(i, j): entry}, of scores s as a list of rows."""
    c = {**DEFAULTS, **constants}
    count, width = len(s), len(s[0])
    p = [s[i][i] for i in range(count)]
    values, g = [0.0] * count, {}

    def negative(i, j):
        return i != j and (x_ids is None or x_ids[i] != y_ids[j])

    def anchor(i, scores, negatives, cell):
        if not negatives:
            return
        a = max(negatives, key=lambda j: (scores[j], -j))
        n = scores[a]
        r_plus, r_minus = relative_terms(pair, i, p, scores, negatives, a, c)
        weight = triplet_weight(triplet, p[i], n, c)
        p_plus, p_minus = pair_weights(pair, p[i], n, r_plus, r_minus, c)
        values[i] += stated_loss(triplet, pair, p[i], n, c)
        g[i, i] = g.get((i, i), 0.0) - weight * p_plus
        g[cell(a)] = g.get(cell(a), 0.0) + weight * p_minus

    for i in range(count):
        anchor(i, s[i], [j for j in range(width) if negative(i, j)], lambda j, i=i: (i, j))
    for j in range(count):
        column = [s[i][j] for i in range(count)]
        anchor(j, column, [i for i in range(count) if negative(i, j)], lambda i, j=j: (i, j))
    return values, g


def loop_gradients(g, x, y):
    """dX = G Y and dY = Gᵀ X, entry by entry."""
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    for (i, j), entry in sorted(g.items()):
        dx[i] += entry * y[j]
        dy[j] += entry * x[i]
    return dx, dy


def exact_scores(x, y):
    return [[math.fsum(p * q for p, q in zip(u, v, strict=True)) for v in y.tolist()] for u in x.tolist()]


def problem(n, m, ids="none", seed=0, d=6):
    g = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(randn(g, rows, d), dim=1) for rows in (n, m))
    return x, y, *IDS[ids](g, n, m)
