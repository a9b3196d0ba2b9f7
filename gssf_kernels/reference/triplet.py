"""The definitions of the triplet losses and of the diagnostics, on the stored matrix.

Formulas and sources: the docstrings in :mod:`gssf_kernels.losses` and :mod:`gssf_kernels.diagnostics`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels.reference.statistics import EPS, accumulate, maxima, positives, project, scores


class Diagnostics(NamedTuple):
    """Early signs of a collapse: detached 0-d tensors. See :mod:`gssf_kernels.diagnostics`."""

    active: Tensor
    positive: Tensor
    negative: Tensor
    spread: Tensor


def triplet_loss(
    x: Tensor,
    y: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "hardest",
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    reduction: str = "sum",
    metric=None,
    diagnostics: bool = False,
):
    """Triplet loss over rows and columns; see :func:`gssf_kernels.triplet_loss`."""
    a, b = factors(x, y, metric)
    count = a.shape[0]
    s = scores(a, b)  # [N, M]
    same = positives(a, b, x_ids, y_ids)  # [N, M]
    positive_score = s.diagonal()  # [N]

    def terms(s, same):  # [N, K] scores of N anchors -> [N]
        if s.shape[1] == 0:
            return positive_score * 0
        if negatives == "all":
            return hinge(margin + s - positive_score[:, None]).masked_fill(same, 0).sum(1)
        masked = s.masked_fill(same, -torch.inf)
        hardest = masked.max(1).values
        if negatives == "semihard":
            semihard = masked.masked_fill(masked >= positive_score[:, None], -torch.inf).max(1).values
            hardest = torch.where(semihard == -torch.inf, hardest, semihard)
        return hinge(margin + hardest - positive_score)

    per_pair = terms(s, same) + terms(s[:, :count].mT, same[:, :count].mT)
    loss = reduce(per_pair, reduction)
    return (loss, diagnose(x, y, s, same, margin)) if diagnostics else loss


def batch_hard_loss(x: Tensor, labels: Tensor, *, margin: float = 0.2, reduction: str = "mean", metric=None) -> Tensor:
    """Hardest positive against hardest negative, by label; see :func:`gssf_kernels.batch_hard_loss`."""
    s = scores(*factors(x, x, metric))  # [N, N]
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    positive = -maxima((-s).masked_fill(~same | itself, -torch.inf), 1)[0]  # [N], inf where there is none
    negative = maxima(s.masked_fill(same, -torch.inf), 1)[0]
    valid = (positive != torch.inf) & (negative != -torch.inf)
    terms = hinge(margin + torch.where(valid, negative, 0) - torch.where(valid, positive, 0))
    return reduce(torch.where(valid, terms, 0), reduction)


def diagnose(x: Tensor, y: Tensor, s: Tensor, same: Tensor, margin: float) -> Diagnostics:
    """The diagnostics of x and y, with scores s [N, M] and the mask of positives same [N, M]."""
    s, count = s.detach(), s.shape[0]
    masked = s.masked_fill(same, -torch.inf)
    positive_score = s.diagonal()
    negative = torch.stack((maxima(masked, 1)[0], maxima(masked, 0)[0][:count]))  # [2, N]
    valid = negative != -torch.inf
    points = F.normalize(torch.cat((accumulate(x.detach()), accumulate(y.detach()))), dim=1, eps=EPS)
    return Diagnostics(
        active=(margin + negative - positive_score > 0).to(s).sum() / max(2 * count, 1),
        positive=positive_score.sum() / max(count, 1),
        negative=torch.where(valid, negative, 0).sum() / valid.sum().clamp_min(1),
        spread=(1 - (points.sum(0) / max(points.shape[0], 1)).square().sum()).clamp_min(0),  # less than 0 is rounding
    )


def factors(x: Tensor, y: Tensor, metric) -> tuple[Tensor, Tensor]:
    """The factors ``(a, b)`` of the metric's scores ``a bᵀ``; x and y themselves without a metric."""
    if metric is None:
        return x, y
    a = project(x, metric.diag, metric.blocks, permutation=metric.permutation, normalize=metric.normalize)
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
