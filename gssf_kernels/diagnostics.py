"""What tells early that training on hardest negatives collapses, from statistics the loss has anyway.

    active    share of the 2N anchors, rows and columns, with  m + n − p > 0;      m = 0 for GOAL
    positive  mean of the p_i = s_ii
    negative  mean of the hardest negatives n of both directions, over anchors that have one
    spread    1 − ‖mean of all rows of x and y, each divided by its L2 norm‖²:   0 when all are one point

A collapse shows as spread → 0, with positive and negative meeting, and active staying near 1.
The choice of measures is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels.reference import Diagnostics, HardestNegatives


def diagnose(x: Tensor, y: Tensor, margin: float, positive: Tensor, hardest: HardestNegatives) -> Diagnostics:
    """Detached 0-d tensors of the scores' dtype, left on their device; the mean of none is 0.

    x [N, D] and y [M, D] as given to the loss, positive [N]; no sweep, O((N + M) D).
    """
    positive, count = positive.detach(), positive.shape[0]
    negative = torch.stack((hardest.row_score.detach(), hardest.col_score.detach()[:count]))  # [2, N]
    found = negative != -torch.inf  # NaN is found
    sums = (F.normalize(reference.accumulate(t.detach()), dim=1, eps=reference.EPS).sum(0) for t in (x, y))
    total = torch.stack(tuple(sums)).sum(0)  # [D]
    points = x.shape[0] + y.shape[0]
    return Diagnostics(
        active=(margin + negative - positive > 0).to(positive.dtype).sum() / max(2 * count, 1),
        positive=positive.sum() / max(count, 1),
        negative=torch.where(found, negative, 0).sum() / found.sum().clamp_min(1),
        spread=(1 - (total / max(points, 1)).square().sum()).clamp_min(0),  # which rounding may pass; NaN stays
    )
