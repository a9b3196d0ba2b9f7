"""The definitions of the triplet losses and of the diagnostics, on the stored matrix.

Formulas and sources: the docstrings in :mod:`gssf_kernels.losses` and :mod:`gssf_kernels.diagnostics`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels.reference.statistics import EPS, accumulate, maxima, paired, positives, project, scores


class Diagnostics(NamedTuple):
    """Early signs of a collapse: detached 0-d tensors, or None for what a loss does not know.

    ``_asdict()`` has what the loss knows, for a logger. See :mod:`gssf_kernels.diagnostics`.
    """

    active: Tensor | None = None
    positive: Tensor | None = None
    negative: Tensor | None = None
    spread: Tensor | None = None
    row_accuracy: Tensor | None = None
    col_accuracy: Tensor | None = None


def _known(diagnostics: Diagnostics) -> dict[str, Tensor]:
    """The fields that are not None, by name."""
    return {k: v for k, v in zip(diagnostics._fields, diagnostics, strict=True) if v is not None}


Diagnostics._asdict = _known  # type: ignore[method-assign,assignment]  # a NamedTuple's body cannot define it


def triplet_loss(
    x: Tensor,
    y: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "hardest",
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
    """Triplet loss over rows and columns; see :func:`gssf_kernels.triplet_loss`."""
    a, b = factors(x, y, metric, normalize)
    s = scores(a, b)  # [N, M]
    pair, same, positive = masks(a, b, x_ids, y_ids, pairs)
    rows, cols = pair.nonzero(as_tuple=True)  # [P]
    positive_score = s[rows, cols]

    def terms(s, anchor, same, positive):  # of one direction: scores [N, K] of N anchors -> [P]
        left = negatives_of(s, same, positive, false_negative_margin)[anchor]  # [P, K], the pair's anchor's negatives
        return terms_of_negatives(left, positive_score, margin, negatives)

    per_pair = terms(s, rows, same, positive)
    if symmetric:
        per_pair = per_pair + terms(s.mT, cols, same.mT, positive.mT)
    loss = reduce_pairs(per_pair, rows, cols, pairs, s.shape, reduction)
    mask = pair, same, positive
    return (loss, diagnose(x, y, s, pairs, mask, margin, symmetric, false_negative_margin)) if diagnostics else loss


def triplet_from_scores(
    scores: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "hardest",
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    symmetric: bool = True,
    reduction: str = "sum",
) -> Tensor:
    """Triplet loss of a matrix of scores; see :func:`gssf_kernels.triplet_from_scores`."""
    s = accumulate(scores)
    left = s.masked_fill(positives(s, s.mT, x_ids, y_ids), -torch.inf)
    terms = terms_of_negatives(left, s.diagonal(), margin, negatives)
    if symmetric:
        terms = terms + terms_of_negatives(left[:, : s.shape[0]].mT, s.diagonal(), margin, negatives)
    return reduce(terms, reduction)


def terms_of_negatives(left: Tensor, p: Tensor, margin: float, negatives: str) -> Tensor:
    """The terms of one direction [P] for pairs of score p [P]; left [P, K]: their negatives, -inf for what is none."""
    if p.shape[0] == 0:
        return p
    if negatives == "all":
        return hinge(margin + left - p[:, None]).masked_fill(left == -torch.inf, 0).sum(1)
    hardest = left.max(1).values
    if negatives == "semihard":
        semihard = left.masked_fill(left >= p[:, None], -torch.inf).max(1).values
        hardest = torch.where(semihard == -torch.inf, hardest, semihard)
    return hinge(margin + hardest - p)


def masks(a, b, a_ids, b_ids, pairs) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs, scores that are never negatives, positives of ``false_negative_margin``), [N, M] bool each."""
    pair, same = paired(a, b, a_ids, b_ids, pairs), positives(a, b, a_ids, b_ids, pairs)
    return pair, same, same if pairs is None else pair


def negatives_of(s: Tensor, same: Tensor, positive: Tensor, false_negative_margin: float | None) -> Tensor:
    """s [N, K] with -inf where a score is no negative of its row."""
    left = s.masked_fill(same, -torch.inf)
    if false_negative_margin is not None and s.shape[1]:
        lowest = s.detach().masked_fill(~positive, torch.inf).min(1, keepdim=True).values
        left = left.masked_fill(s > lowest + false_negative_margin, -torch.inf)
    return left


def reduce_pairs(per_pair: Tensor, rows: Tensor, cols: Tensor, pairs, shape, reduction: str) -> Tensor:
    """The terms of all pairs, in the order of their rows and columns, reduced; "none": as the user listed them."""
    if reduction != "none" or pairs is None:
        return reduce(per_pair, reduction)
    if isinstance(pairs, str):
        return per_pair.new_zeros(shape[0]).index_add(0, rows, per_pair)
    matrix = per_pair.new_zeros(shape).index_put((rows, cols), per_pair)
    seen: set = set()
    terms = []
    for i, j in pairs.tolist():
        terms.append(per_pair.new_zeros(()) if (i, j) in seen else matrix[i, j])
        seen.add((i, j))
    return torch.stack(terms) if terms else per_pair


def batch_hard_loss(
    x: Tensor, labels: Tensor, *, margin: float = 0.2, reduction: str = "mean", normalize: bool = False, metric=None
) -> Tensor:
    """Hardest positive against hardest negative, by label; see :func:`gssf_kernels.batch_hard_loss`."""
    s = scores(*factors(x, x, metric, normalize))  # [N, N]
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    positive = -maxima((-s).masked_fill(~same | itself, -torch.inf), 1)[0]  # [N], inf where there is none
    negative = maxima(s.masked_fill(same, -torch.inf), 1)[0]
    valid = (positive != torch.inf) & (negative != -torch.inf)
    terms = hinge(margin + torch.where(valid, negative, 0) - torch.where(valid, positive, 0))
    return reduce(torch.where(valid, terms, 0), reduction)


def diagnose(
    x: Tensor, y: Tensor, s: Tensor, pairs, mask, margin: float, symmetric: bool = True, false_negative_margin=None
) -> Diagnostics:
    """The diagnostics of x and y, with scores s [N, M]; mask: the three of `masks`."""
    s, (pair, same, positive) = s.detach(), mask
    rows, cols = pair.nonzero(as_tuple=True)
    directions = [(s, same, positive, rows), (s.mT, same.mT, positive.mT, cols)][: 1 + symmetric]
    hardest = [maxima(negatives_of(*side[:3], false_negative_margin), 1)[0] for side in directions]
    of_pairs = torch.stack([n[anchor] for n, (*_, anchor) in zip(hardest, directions, strict=True)])
    count = max(rows.shape[0], 1)
    anchors = of_pairs if pairs is None else torch.cat(hardest)
    valid = anchors != -torch.inf
    points = F.normalize(torch.cat((accumulate(x.detach()), accumulate(y.detach()))), dim=1, eps=EPS)
    accuracies = [(s[rows, cols] > n).to(s).sum() / count for n in of_pairs]
    return Diagnostics(
        active=(margin + of_pairs - s[rows, cols] > 0).to(s).sum() / (len(directions) * count),
        positive=s[rows, cols].sum() / count,
        negative=torch.where(valid, anchors, 0).sum() / valid.sum().clamp_min(1),
        spread=(1 - (points.sum(0) / max(points.shape[0], 1)).square().sum()).clamp_min(0),  # less than 0 is rounding
        row_accuracy=accuracies[0],
        col_accuracy=accuracies[1] if symmetric else None,
    )


def factors(x: Tensor, y: Tensor, metric, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """The factors ``(a, b)`` of the metric's scores ``a bᵀ``; x and y themselves, or normalised, without a metric."""
    if metric is None:
        return project(x, normalize=normalize), project(y, normalize=normalize)
    a = project(x, *metric.weights, permutation=metric.permutation, normalize=metric.normalize)
    return a, project(y, normalize=metric.normalize)


def hinge(t: Tensor) -> Tensor:
    """``[t]₊``, with gradient 1 at 0 as ``clamp(min=0)`` has. Unlike with clamp, the gradient of a NaN is passed on."""
    return torch.where(t < 0, 0, t)


def reduce(per_pair: Tensor, reduction: str) -> Tensor:
    """per_pair [N] as it is ("none"), its sum, or its mean, which is 0 for N = 0."""
    if reduction == "none":
        return per_pair
    total = per_pair.sum()
    return total / max(per_pair.shape[0], 1) if reduction == "mean" else total
