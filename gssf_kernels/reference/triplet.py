"""The triplet losses, and what is watched beside them, defined on the stored matrix."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels.reference.statistics import EPS, accumulate, best, positives, project, scores


class Diagnostics(NamedTuple):
    """What tells a collapse early; detached 0-d tensors. See :mod:`gssf_kernels.diagnostics`."""

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
    positive = s.diagonal()  # [N]

    def terms(s, same):  # [N, K] scores of N anchors -> [N]
        if s.shape[1] == 0:
            return positive * 0
        if negatives == "all":
            return hinge(margin + s - positive[:, None]).masked_fill(same, 0).sum(1)
        masked = s.masked_fill(same, -torch.inf)
        hardest = masked.max(1).values
        if negatives == "semihard":
            below = masked.masked_fill(masked >= positive[:, None], -torch.inf).max(1).values
            hardest = torch.where(below == -torch.inf, hardest, below)
        return hinge(margin + hardest - positive)

    per_pair = terms(s, same) + terms(s[:, :count].mT, same[:, :count].mT)
    loss = reduce(per_pair, reduction)
    return (loss, diagnose(x, y, s, same, margin)) if diagnostics else loss


def batch_hard_loss(x: Tensor, labels: Tensor, *, margin: float = 0.2, reduction: str = "mean", metric=None) -> Tensor:
    """Hardest positive against hardest negative, by label; see :func:`gssf_kernels.batch_hard_loss`."""
    s = scores(*factors(x, x, metric))  # [N, N]
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    positive = -best((-s).masked_fill(~same | itself, -torch.inf), 1)[0]  # [N], inf where there is none
    negative = best(s.masked_fill(same, -torch.inf), 1)[0]
    whole = (positive != torch.inf) & (negative != -torch.inf)
    terms = hinge(margin + torch.where(whole, negative, 0) - torch.where(whole, positive, 0))
    return reduce(torch.where(whole, terms, 0), reduction)


def diagnose(x: Tensor, y: Tensor, s: Tensor, same: Tensor, margin: float) -> Diagnostics:
    """Diagnostics of the scores ``s [N, M]`` between x and y, with positives ``same [N, M]``."""
    s, count = s.detach(), s.shape[0]
    masked = s.masked_fill(same, -torch.inf)
    positive = s.diagonal()
    negative = torch.stack((best(masked, 1)[0], best(masked, 0)[0][:count]))  # [2, N]
    found = negative != -torch.inf
    points = F.normalize(torch.cat((accumulate(x.detach()), accumulate(y.detach()))), dim=1, eps=EPS)
    return Diagnostics(
        active=(margin + negative - positive > 0).to(s).sum() / max(2 * count, 1),
        positive=positive.sum() / max(count, 1),
        negative=torch.where(found, negative, 0).sum() / found.sum().clamp_min(1),
        spread=(1 - (points.sum(0) / max(points.shape[0], 1)).square().sum()).clamp_min(0),  # past 0 is rounding
    )


def factors(x: Tensor, y: Tensor, metric) -> tuple[Tensor, Tensor]:
    """The two sides whose plain product the metric is; x and y themselves without one."""
    if metric is None:
        return x, y
    a = project(x, metric.diag, metric.blocks, permutation=metric.permutation, normalize=metric.normalize)
    return a, project(y, normalize=metric.normalize)


def hinge(t: Tensor) -> Tensor:
    """``[t]₊``, with gradient 1 at 0 as in ``clamp(min=0)``, but NaN passes both ways (clamp stops its gradient)."""
    return torch.where(t < 0, 0, t)


def reduce(per_pair: Tensor, reduction: str) -> Tensor:
    """``per_pair [N]`` summed, averaged over the N pairs, or as it is. The mean of none is 0."""
    if reduction == "none":
        return per_pair
    total = per_pair.sum()
    return total / max(per_pair.shape[0], 1) if reduction == "mean" else total
