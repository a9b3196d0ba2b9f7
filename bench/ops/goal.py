"""GOAL, all fifteen gradients, on a structured similarity: one op each, ``goal_<triplet>_<pair>``."""

import math
from typing import Any

import torch
import torch.nn.functional as F

import gssf_kernels as gk
from bench.ops import rows, triplet
from bench.problem import Op, Problem, compiled
from bench.whole import TIES, by_choice, chunks, pairs_out

TRIPLETS, PAIRS = ("con", "nca", "cir"), ("con", "lin", "sig", "lin_ms", "sig_ms")
RELATIVE = ("lin_ms", "sig_ms")
TAU, ALPHA, BETA, LAMBDA, THRESHOLD = 1.0, 2.0, 10.0, 0.5, 0.1


def triplet_weight(mode: str, p, n):
    if mode == "con":
        return torch.ones_like(p)
    gap = p - n if mode == "nca" else p * (2 - p) - n * n - 0.5
    return torch.sigmoid(-TAU * gap)


def relative(mode: str, s, p, n, place, rows):
    """(r⁺, r⁻) of the rows of s, all [N, N] or a chunk of rows, whose diagonal is masked; p of all pairs."""
    n, place = n[rows], place[rows]
    positive, negative = p[rows, None] - p[None, :], n[:, None] - s  # [·, N]
    if mode == "sig_ms":
        positive, negative = torch.exp(ALPHA * positive), torch.exp(-BETA * negative)
    positive = positive.masked_fill(p[None, :] > n[:, None] + THRESHOLD, 0)
    positive.diagonal(rows.start or 0).fill_(0)
    negative = negative.masked_fill(s < p.min() - THRESHOLD, 0)
    negative.scatter_(1, place[:, None], 0)
    count_positive, count_negative = (positive != 0).sum(1), (negative > 0).sum(1)
    return positive.sum(1) / count_positive.clamp_min(1), negative.sum(1) / count_negative.clamp_min(1)


def pair_weights(mode: str, p, n, terms):
    """(weights of positives, of negatives); terms: the relative ones, where the mode has them."""
    if mode == "con":
        return torch.ones_like(p), torch.ones_like(n)
    if mode == "lin":
        return 1 - p, n
    if mode == "sig":
        return torch.sigmoid(-ALPHA * (p - LAMBDA)), torch.sigmoid(BETA * (n - LAMBDA))
    if mode == "lin_ms":
        return (1 - terms[0]) * (1 - p), (1 + terms[1]) * n
    return 1 / (torch.exp(ALPHA * (p - LAMBDA)) + terms[0]), 1 / (torch.exp(-BETA * (n - LAMBDA)) + terms[1])


def value(triplet_mode: str, pair_mode: str, p, n):
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


def naive(triplet_mode: str, pair_mode: str):
    """The authors' way (microsoft/VSE_Gradient): the matrix, its maxima, for the relative terms more matrices, and the
    gradient made in the forward pass; with index_add in place of their Python loops."""

    class Designed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            s = a @ b.t()
            p = s.diagonal().clone()
            s.fill_diagonal_(-math.inf)
            da, db, loss = torch.zeros_like(a), torch.zeros_like(b), 0.0
            for scores, x, y, dx, dy in ((s, a, b, da, db), (s.t(), b, a, db, da)):
                n, place = scores.max(1)
                weight = triplet_weight(triplet_mode, p, n)
                terms = relative(pair_mode, scores, p, n, place, slice(None)) if pair_mode in RELATIVE else None
                positive, negative = pair_weights(pair_mode, p, n, terms)
                positive, negative = (weight * positive)[:, None], (weight * negative)[:, None]
                dx += negative * y[place] - positive * y
                dy -= positive * x
                dy.index_add_(0, place, negative * x)
                loss = loss + value(triplet_mode, pair_mode, p, n).sum()
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

    def whole(problem: Problem, dtype: torch.dtype):
        def terms(p, n, q, k, anchors):
            positive_score, hardest = p.detach(), n.detach()
            relative_terms = None
            if pair_mode in RELATIVE:
                of_chunks = [
                    relative(pair_mode, pairs_out(s, rows), positive_score, hardest, anchors.place, rows)
                    for rows, s in chunks(q, k)
                ]
                relative_terms = [torch.cat(parts) for parts in zip(*of_chunks, strict=True)]
            weight = triplet_weight(triplet_mode, positive_score, hardest)
            positive_weight, negative_weight = pair_weights(pair_mode, positive_score, hardest, relative_terms)
            surrogate = weight * (negative_weight * n - positive_weight * p)  # for its gradient
            return value(triplet_mode, pair_mode, positive_score, hardest) + surrogate - surrogate.detach(), None

        def window(score):
            return TIES[dtype] * 2 * score.abs()  # rounded, and made of projected rows that are

        return by_choice(problem.leaves(), *triplet.sides(problem), window, terms)

    plain = naive(triplet_mode, pair_mode)
    return Op(
        f"goal_{triplet_mode}_{pair_mode}",
        f"GOAL's gradient {triplet_mode} x {pair_mode}, structured similarity",
        triplet.inputs,
        truth,
        {"ours": ours, "naive": lambda: plain, "compile": compiled(plain)},
        triplet.work,
        whole,
    )


GOAL = [op(triplet_mode, pair_mode) for triplet_mode in TRIPLETS for pair_mode in PAIRS]
