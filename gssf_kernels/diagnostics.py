"""Early signs that training on hardest negatives collapses, from statistics that the loss already has.

    active    share of the pairs, in both directions, with  m + n − p > 0;      m = 0 for GOAL
    positive  mean of the scores p of the pairs
    negative  mean of the hardest negatives n of the directions that the loss has, over anchors that have one
    spread    1 − ‖mean of all rows of x and y, each divided by its L2 norm‖²;   0 when all rows are one point

In a collapse, spread goes to 0, positive and negative become equal, and active stays near 1. The choice of these
measures is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels.ops.mining import Mined, PairedInputs, pair_count, pair_directions
from gssf_kernels.ops.segment_terms import segment_terms
from gssf_kernels.reference import Diagnostics, HardestNegatives


def diagnose(x: Tensor, y: Tensor, margin: float, positive_score: Tensor, hardest: HardestNegatives) -> Diagnostics:
    """Detached 0-d tensors of the scores' dtype, on their device. The mean of an empty set is 0.

    x [N, D] and y [M, D] are the loss's arguments, positive_score [N]. Time: O((N + M) D), no sweep.
    """
    count = positive_score.shape[0]
    negatives = [hardest.row_score.detach(), hardest.col_score.detach()[:count]]
    return _diagnostics(x, y, margin, positive_score.detach(), negatives, negatives, max(count, 1))


def diagnose_pairs(x: Tensor, y: Tensor, margin: float, inputs: PairedInputs, mined: Mined) -> Diagnostics:
    """The same for pairs of any kind: shares and means are over pairs, and over anchors that have a negative."""
    a, b, pairing, columns, *_ = inputs
    mined = Mined._make(t.detach() if t is not None else None for t in mined)
    anchors = [mined.row_score, mined.col_score][: 1 + columns]
    if pairing.listed is not None:
        positive_score, *of_pairs = pair_directions(mined, pairing.listed, columns)
        of_pairs = [t for t in of_pairs if t is not None]
        return _diagnostics(x, y, margin, positive_score, of_pairs, anchors, pairing.listed.total.clamp_min(1))
    if pairing.kind == "rows":
        count = mined.positive_score.shape[0]
        of_pairs = [t[:count] for t in anchors]
        return _diagnostics(x, y, margin, mined.positive_score, of_pairs, of_pairs, max(count, 1))
    assert pairing.x_ids is not None
    assert pairing.y_ids is not None
    inputs_of_terms = a.detach(), b.detach(), pairing.x_ids, pairing.y_ids
    total = pair_count(pairing.x_ids, pairing.y_ids).clamp_min(1)
    columns_score = mined.col_score if columns else None
    active = segment_terms(*inputs_of_terms, mined.row_score, columns_score, "active", [margin], False)
    positive = segment_terms(*inputs_of_terms, torch.zeros_like(mined.row_score), None, "score", [], False)
    negative, spread = _mean_negative(anchors), _spread(x, y)
    return Diagnostics(active / (total * (1 + columns)), positive / total, negative, spread.to(negative.dtype))


def _diagnostics(x, y, margin, positive_score, of_pairs, anchors, count) -> Diagnostics:
    """of_pairs: for each direction the negative of each pair; anchors: of each anchor; count: how many pairs."""
    active = sum((margin + n - positive_score > 0).to(positive_score.dtype).sum() for n in of_pairs)
    return Diagnostics(
        active=active / (len(of_pairs) * count),
        positive=positive_score.sum() / count,
        negative=_mean_negative(anchors),
        spread=_spread(x, y),
    )


def _mean_negative(anchors) -> Tensor:
    negative = torch.cat(anchors)
    valid = negative != -torch.inf  # NaN is valid
    return torch.where(valid, negative, 0).sum() / valid.sum().clamp_min(1)


def _spread(x: Tensor, y: Tensor) -> Tensor:
    sums = (F.normalize(reference.accumulate(t.detach()), dim=1, eps=reference.EPS).sum(0) for t in (x, y))
    total = torch.stack(tuple(sums)).sum(0)  # [D]
    points = x.shape[0] + y.shape[0]
    return (1 - (total / max(points, 1)).square().sum()).clamp_min(0)  # rounding may give less than 0; NaN stays
