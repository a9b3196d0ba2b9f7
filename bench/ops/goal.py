"""GOAL, all fifteen gradients, on a structured similarity: one op each, ``goal_<triplet>_<pair>``."""

import math
from typing import Any

import torch
import torch.nn.functional as F

import gssf_kernels as gk
from bench.ops import rows, triplet
from bench.problem import Op, Problem, compiled

TRIPLETS, PAIRS = ("con", "nca", "cir"), ("con", "lin", "sig", "lin_ms", "sig_ms")
TAU, ALPHA, BETA, LAMBDA, THRESHOLD = 1.0, 2.0, 10.0, 0.5, 0.1


def naive(triplet_mode: str, pair_mode: str):
    """The authors' way (microsoft/VSE_Gradient): the matrix, its maxima, for the relative terms more matrices, and the
    gradient made in the forward pass; with index_add in place of their Python loops."""

    def triplet_weight(p, n):
        if triplet_mode == "con":
            return torch.ones_like(p)
        gap = p - n if triplet_mode == "nca" else p * (2 - p) - n * n - 0.5
        return torch.sigmoid(-TAU * gap)

    def relative(s, p, n, place):
        """(r⁺, r⁻) of the rows of s [N, N], whose diagonal is masked."""
        positive, negative = p[:, None] - p[None, :], n[:, None] - s  # [N, N]
        if pair_mode == "sig_ms":
            positive, negative = torch.exp(ALPHA * positive), torch.exp(-BETA * negative)
        positive = positive.masked_fill(p[None, :] > n[:, None] + THRESHOLD, 0).fill_diagonal_(0)
        negative = negative.masked_fill(s < p.min() - THRESHOLD, 0).fill_diagonal_(0)
        negative.scatter_(1, place[:, None], 0)
        count_positive, count_negative = (positive != 0).sum(1), (negative > 0).sum(1)
        return positive.sum(1) / count_positive.clamp_min(1), negative.sum(1) / count_negative.clamp_min(1)

    def pair_weights(s, p, n, place):
        if pair_mode == "con":
            return torch.ones_like(p), torch.ones_like(n)
        if pair_mode == "lin":
            return 1 - p, n
        if pair_mode == "sig":
            return torch.sigmoid(-ALPHA * (p - LAMBDA)), torch.sigmoid(BETA * (n - LAMBDA))
        more_positive, more_negative = relative(s, p, n, place)
        if pair_mode == "lin_ms":
            return (1 - more_positive) * (1 - p), (1 + more_negative) * n
        return (
            1 / (torch.exp(ALPHA * (p - LAMBDA)) + more_positive),
            1 / (torch.exp(-BETA * (n - LAMBDA)) + more_negative),
        )

    def value(p, n):
        kind = (triplet_mode, pair_mode)
        if kind == ("con", "lin"):
            return ((1 - p) ** 2 + n**2) / 2
        if kind == ("con", "sig"):
            return F.softplus(-ALPHA * (p - LAMBDA)) / ALPHA + F.softplus(BETA * (n - LAMBDA)) / BETA
        if kind == ("nca", "con"):
            return F.softplus(-TAU * (p - n)) / TAU
        if kind == ("cir", "lin"):
            return F.softplus(TAU * ((1 - p) ** 2 + n**2 - 0.5)) / (2 * TAU)
        return n - p

    class Designed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            s = a @ b.t()
            p = s.diagonal().clone()
            s.fill_diagonal_(-math.inf)
            da, db, loss = torch.zeros_like(a), torch.zeros_like(b), 0.0
            for scores, x, y, dx, dy in ((s, a, b, da, db), (s.t(), b, a, db, da)):
                n, place = scores.max(1)
                weight = triplet_weight(p, n)
                positive, negative = pair_weights(scores, p, n, place)
                positive, negative = (weight * positive)[:, None], (weight * negative)[:, None]
                dx += negative * y[place] - positive * y
                dy -= positive * x
                dy.index_add_(0, place, negative * x)
                loss = loss + value(p, n).sum()
            ctx.save_for_backward(da, db)
            return loss

        @staticmethod
        def backward(ctx, grad):
            da, db = ctx.saved_tensors
            return grad * da, grad * db

    return lambda problem: Designed.apply(rows.project_naive(problem), F.normalize(problem.y, dim=1))


def op(triplet_mode: str, pair_mode: str) -> Op:
    modes: dict[str, Any] = {"triplet": triplet_mode, "pair": pair_mode}

    def ours():
        loss = getattr(gk, "goal_loss", None)
        return loss and (lambda problem: loss(problem.x, problem.y, metric=problem.metric, **modes))

    def truth(problem: Problem):
        return gk.reference.goal_loss(problem.x, problem.y, metric=problem.metric, **modes)

    plain = naive(triplet_mode, pair_mode)
    return Op(
        f"goal_{triplet_mode}_{pair_mode}",
        f"GOAL's gradient {triplet_mode} x {pair_mode}, structured similarity",
        triplet.inputs,
        truth,
        {"ours": ours, "naive": lambda: plain, "compile": compiled(plain)},
        triplet.work,
    )


GOAL = [op(triplet_mode, pair_mode) for triplet_mode in TRIPLETS for pair_mode in PAIRS]
