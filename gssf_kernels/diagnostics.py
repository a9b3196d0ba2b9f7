"""Early signs that training on hardest negatives collapses, from statistics that the loss already has.

    active    share of the 2N anchors, rows and columns, with  m + n − p > 0;      m = 0 for GOAL
    positive  mean of the p_i = s_ii
    negative  mean of the hardest negatives n of both directions, over anchors that have one
    spread    1 − ‖mean of all rows of x and y, each divided by its L2 norm‖²;   0 when all rows are one point

In a collapse, spread goes to 0, positive and negative become equal, and active stays near 1. The choice of these
measures is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels.reference import Diagnostics, HardestNegatives


def diagnose(x: Tensor, y: Tensor, margin: float, positive_score: Tensor, hardest: HardestNegatives) -> Diagnostics:
    """Detached 0-d tensors of the scores' dtype, on their device. The mean of an empty set is 0.

    x [N, D] and y [M, D] are the loss's arguments, positive_score [N]. Time: O((N + M) D), no sweep.
    """
    positive_score, count = positive_score.detach(), positive_score.shape[0]
    negative = torch.stack((hardest.row_score.detach(), hardest.col_score.detach()[:count]))  # [2, N]
    valid = negative != -torch.inf  # NaN is valid
    sums = (F.normalize(reference.accumulate(t.detach()), dim=1, eps=reference.EPS).sum(0) for t in (x, y))
    total = torch.stack(tuple(sums)).sum(0)  # [D]
    points = x.shape[0] + y.shape[0]
    return Diagnostics(
        active=(margin + negative - positive_score > 0).to(positive_score.dtype).sum() / max(2 * count, 1),
        positive=positive_score.sum() / max(count, 1),
        negative=torch.where(valid, negative, 0).sum() / valid.sum().clamp_min(1),
        spread=(1 - (total / max(points, 1)).square().sum()).clamp_min(0),  # rounding may give less than 0; NaN stays
    )
