"""The definitions of the losses designed by their gradient, on the stored matrix.

Formulas: the docstrings of `losses/goal.py` and `losses/gradient_space.py`. Source: GOAL, arXiv 2210.13188.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels.reference.statistics import accumulate, maxima, mean_distance, scores
from gssf_kernels.reference.triplet import diagnose, factors, masks, negatives_of, reduce_pairs


class AnchorStatistics(NamedTuple):
    """The argument of a weight function: statistics of the N anchors of one direction, detached tensors [N]."""

    positive: Tensor  # p_i = s_ii
    negative: Tensor  # n_i, the score of the hardest negative; -inf where there is none
    relative_positive: Tensor | None = None  # r⁺_i, with `RelativeTerms`
    relative_negative: Tensor | None = None  # r⁻_i, with `RelativeTerms`


class RelativeTerms(NamedTuple):
    """The settings of the relative terms, which compare an anchor with the positives of others and its close negatives.

        r⁺_i = mean over {k ≠ i : p_k <= n_i + positive_threshold} of e^{α (p_i − p_k)}
        r⁻_i = mean over {j ∉ pos(i), j ≠ a_i : s_ij >= min_k p_k − negative_threshold} of e^{−β (n_i − s_ij)}

    a_i is the index of the hardest negative. The mean of an empty set is 0. The kind "linear" takes the distances
    ``p_i − p_k`` and ``n_i − s_ij`` in place of the exponentials, and leaves distances of exactly 0 out of the mean.
    """

    kind: str = "exponential"  # or "linear", which ignores alpha and beta
    alpha: float = 2.0
    beta: float = 10.0
    positive_threshold: float = 0.1
    negative_threshold: float = 0.1


def gradient_space_loss(
    x: Tensor,
    y: Tensor,
    weights: Callable,
    *,
    value: Callable | None = None,
    relative: RelativeTerms | None = None,
    pairs: str | Tensor | None = None,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    symmetric: bool = True,
    false_negative_margin: float | None = None,
    reduction: str = "sum",
    normalize: bool = False,
    metric=None,
    diagnostics: bool = False,
):
    """A loss defined by the weights of its gradient; see :func:`gssf_kernels.gradient_space_loss`."""
    a, b = factors(x, y, metric, normalize)
    s, mask = scores(a, b), masks(a, b, x_ids, y_ids, pairs)
    options = (symmetric, false_negative_margin)
    per_pair, rows, cols = _designed(s, mask, weights, value, relative, *options)
    loss = reduce_pairs(per_pair, rows, cols, pairs, s.shape, reduction)
    return (loss, diagnose(x, y, s, pairs, mask, 0.0, *options)) if diagnostics else loss


def _designed(
    s: Tensor, mask, weights: Callable, value: Callable | None, relative, symmetric=True, false_negative_margin=None
) -> tuple[Tensor, Tensor, Tensor]:
    """(the terms of all pairs [P]: row term + column term; their rows and columns) from s [N, M] and the masks."""
    pair, same, positive = mask
    rows, cols = pair.nonzero(as_tuple=True)
    positive_score = s[rows, cols]
    per_pair = positive_score * 0
    directions = ((s, same, positive, rows), (s.mT, same.mT, positive.mT, cols))
    for side, excluded, good, pair_anchors in directions[: 1 + symmetric]:
        anchor_scores = negatives_of(side, excluded, good, false_negative_margin)[pair_anchors]  # [P, K]
        negative, _ = maxima(anchor_scores, 1)
        anchor, _ = anchor_statistics(positive_score.detach(), anchor_scores.detach(), relative)
        positive_weight, negative_weight = (w.detach() for w in weights(anchor))
        monitor = anchor.negative - anchor.positive
        term = (monitor if value is None else value(anchor)).detach()
        valid = negative != -torch.inf
        tensors = (positive_weight, negative_weight, term, negative)
        positive_weight, negative_weight, term, n = (torch.where(valid, t, 0) for t in tensors)
        surrogate = negative_weight * n - positive_weight * positive_score  # has the gradient; its value cancels
        per_pair = per_pair + term + (surrogate - surrogate.detach())
    return per_pair, rows, cols


def anchor_statistics(positive_score: Tensor, masked: Tensor, relative) -> tuple[AnchorStatistics, Tensor]:
    """The statistics of N anchors, and the indices [N] of their hardest negatives.

    positive_score: [N].
    masked: [N, K], the scores of the anchors, -inf at positives.
    """
    negative, negative_index = maxima(masked, 1)
    if relative is None:
        return AnchorStatistics(positive_score, negative), negative_index
    linear, count = relative.kind == "linear", positive_score.shape[0]
    p = positive_score
    threshold = torch.cat((p, p.new_full((1,), torch.inf))).min() - relative.negative_threshold
    distance = p[:, None] - p[None, :]  # [N, N]
    close = ~(p[None, :] > (negative + relative.positive_threshold)[:, None])  # NaN is close to everything
    close = close & ~torch.eye(count, dtype=torch.bool, device=p.device)
    if linear:
        close = close & (distance != 0)  # the authors' divisor leaves out exact ties, whose term is 0
    terms = torch.where(close, distance if linear else torch.exp(relative.alpha * distance), 0)
    relative_positive = terms.sum(1) / close.sum(1).clamp_min(1)
    relative_negative = mean_distance(masked, threshold, None if linear else relative.beta)
    return AnchorStatistics(p, negative, relative_positive, relative_negative), negative_index


def goal_loss(
    x: Tensor,
    y: Tensor,
    *,
    triplet: str = "nca",
    pair: str = "con",
    tau: float = 1.0,
    alpha: float = 2.0,
    beta: float = 10.0,
    lam: float = 0.5,
    positive_threshold: float = 0.1,
    negative_threshold: float = 0.1,
    **options,
):
    """GOAL's fifteen losses; see :func:`gssf_kernels.goal_loss`."""
    mode = _mode(triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold)
    return gradient_space_loss(x, y, **mode, **options)


def goal_weights(
    scores: Tensor,
    *,
    triplet: str = "nca",
    pair: str = "con",
    tau: float = 1.0,
    alpha: float = 2.0,
    beta: float = 10.0,
    lam: float = 0.5,
    positive_threshold: float = 0.1,
    negative_threshold: float = 0.1,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
) -> Tensor:
    """``G = dL/ds [N, M]``, sparse; see :func:`gssf_kernels.goal_weights`."""
    mode = _mode(triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold)
    s = accumulate(scores.detach()).requires_grad_()
    with torch.enable_grad():
        loss = _designed(s, masks(s, s.mT, x_ids, y_ids, None), **mode)[0].sum()
    return torch.autograd.grad(loss, s)[0].to(scores.dtype).to_sparse()


def _mode(triplet, pair, tau, alpha, beta, lam, positive_threshold, negative_threshold) -> dict:
    """The arguments weights, value and relative of `gradient_space_loss`, for one of the fifteen losses."""

    def softplus(t):
        return -F.logsigmoid(-t)  # to the last bit, where F.softplus drops its tail beyond 20

    def weights(anchor):
        p, n, relative_p, relative_n = anchor
        if triplet == "con":
            weight = torch.ones_like(p)
        elif triplet == "nca":
            weight = torch.sigmoid(-tau * (p - n))
        else:
            weight = torch.sigmoid(-tau * (p * (2 - p) - n.square() - 0.5))
        if pair == "con":
            pull, push = torch.ones_like(p), torch.ones_like(n)
        elif pair == "lin":
            pull, push = 1 - p, n
        elif pair == "sig":
            pull, push = torch.sigmoid(-alpha * (p - lam)), torch.sigmoid(beta * (n - lam))
        elif pair == "lin_ms":
            pull, push = (1 - relative_p) * (1 - p), (1 + relative_n) * n
        else:
            pull = 1 / (torch.exp(alpha * (p - lam)) + relative_p)
            push = 1 / (torch.exp(-beta * (n - lam)) + relative_n)
        return weight * pull, weight * push

    def value(anchor):
        p, n = anchor.positive, anchor.negative
        match triplet, pair:
            case "con", "lin":
                return ((1 - p).square() + n.square()) / 2
            case "con", "sig":
                return softplus(-alpha * (p - lam)) / alpha + softplus(beta * (n - lam)) / beta
            case "nca", "con":
                return softplus(-tau * (p - n)) / tau
            case "cir", "lin":
                return softplus(tau * ((1 - p).square() + n.square() - 0.5)) / (2 * tau)
            case _:
                return n - p

    kind = {"lin_ms": "linear", "sig_ms": "exponential"}.get(pair)
    relative = kind and RelativeTerms(kind, alpha, beta, positive_threshold, negative_threshold)
    return {"weights": weights, "value": value, "relative": relative}
