"""Early signs that training collapses, from statistics that the loss already has: no further sweep.

    active         share of the pairs, in both directions, with  m + n − p > 0;      m = 0 for GOAL
    positive       mean of the scores p of the pairs
    negative       mean of the hardest negatives n of the directions that the loss has, over anchors that have one
    spread         1 − ‖mean of all rows of x and y, each divided by its L2 norm‖²;   0 when all rows are one point
    row_accuracy   share of the pairs that are first in their row:  p > n
    col_accuracy   the same of the columns

In a collapse, spread goes to 0, positive and negative become equal, active stays near 1 and accuracy near 0; but that
of InfoNCE goes to 1, because ties count there. The choice of these measures is ours.

    triplet, GOAL, gradient space    all six, without col_accuracy if symmetric=False
    batch-hard                       the first four: p is the hardest positive of a row that has one and a negative
    InfoNCE                          positive, spread; both accuracies where (i, i) is the only positive of row i and no
                                     y_bias is given. There p is first if it is the maximum, tied or not
    SigLIP, NT-Xent, circle, multi-similarity    positive, spread

Where an anchor of the last two lines may have several positives, ``positive`` is the mean over rows of the mean over
the row's positives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels.ops.batch_hard import BatchHard, has_both
from gssf_kernels.ops.labels import LabelledFactors
from gssf_kernels.ops.mining import Mined, PairedInputs, listed_pairs, pair_count, pair_directions
from gssf_kernels.ops.pairing import Pairing
from gssf_kernels.ops.positive_means import PositiveMeans, positive_means
from gssf_kernels.ops.segment_terms import segment_terms
from gssf_kernels.reference import Diagnostics, HardestNegatives


def diagnose(x: Tensor, y: Tensor, margin: float, positive_score: Tensor, hardest: HardestNegatives) -> Diagnostics:
    """Detached 0-d tensors of the scores' dtype, on their device. The mean of an empty set is 0.

    x [N, D] and y [M, D] are the loss's arguments, positive_score [N]. Time: O((N + M) D), no sweep.
    """
    count = positive_score.shape[0]
    negatives = [hardest.row_score.detach(), hardest.col_score.detach()[:count]]
    return _of_pairs(x, y, margin, positive_score.detach(), negatives, negatives, max(count, 1))


def diagnose_pairs(x: Tensor, y: Tensor, margin: float, inputs: PairedInputs, mined: Mined) -> Diagnostics:
    """The same for pairs of any kind: shares and means are over pairs, and over anchors that have a negative."""
    a, b, pairing, columns, *_ = inputs
    mined = Mined._make(t.detach() if t is not None else None for t in mined)
    anchors = [mined.row_score, mined.col_score][: 1 + columns]
    listed, mined = listed_pairs(inputs._replace(a=a.detach(), b=b.detach()), mined)
    if listed is not None:
        positive_score, *of_pairs = pair_directions(mined, listed, columns)
        of_pairs = [t for t in of_pairs if t is not None]
        total, counted = listed.total.clamp_min(1), listed.counted
        return _of_pairs(x, y, margin, positive_score, of_pairs, anchors, total, counted)
    if pairing.kind == "rows":
        count = mined.positive_score.shape[0]
        of_pairs = [t[:count] for t in anchors]
        return _of_pairs(x, y, margin, mined.positive_score, of_pairs, of_pairs, max(count, 1))
    assert pairing.x_ids is not None
    assert pairing.y_ids is not None
    rows = a.detach(), b.detach(), pairing.x_ids, pairing.y_ids, mined.row_score, None
    cols = b.detach(), a.detach(), pairing.y_ids, pairing.x_ids, mined.col_score, None
    total = pair_count(pairing.x_ids, pairing.y_ids).clamp_min(1)
    sides = (rows, cols)[: 1 + columns]
    active = sum(segment_terms(*side, "active", [margin], False) for side in sides)
    accuracies = [segment_terms(*side, "first", [], False) / total for side in sides]
    score = segment_terms(*rows[:4], torch.zeros_like(mined.row_score), None, "score", [], False)
    negative = _mean_negative(anchors)
    spread = _spread(x, y).to(negative.dtype)
    return Diagnostics(active / (total * len(sides)), score / total, negative, spread, *accuracies)


def diagnose_hardest(x: Tensor, margin: float, batch_hard: BatchHard) -> Diagnostics:
    """Those of batch-hard, over the rows that have a positive and a negative."""
    _, positive, negative, positive_index = batch_hard
    valid = has_both(positive_index, negative)
    count = valid.sum().clamp_min(1)
    positive, negative = (torch.where(valid, t.detach(), 0) for t in (positive, negative))
    active = (valid & (margin + negative - positive > 0)).to(positive.dtype).sum()
    return Diagnostics(active / count, positive.sum() / count, negative.sum() / count, _spread(x, None))


def diagnose_labels(x: Tensor, y: Tensor | None, factors: LabelledFactors) -> Diagnostics:
    """Those of losses over log-sums by label."""
    a, b, a_labels, b_labels, leave_out, _ = factors
    pairing = Pairing("ids", a_labels, b_labels)
    means = positive_means(a.detach(), b.detach(), pairing, ids=True, rows=True, exclude_self=leave_out)
    return diagnose_means(x, y, means)


def diagnose_means(x: Tensor, y: Tensor | None, means: PositiveMeans, *accuracies: Tensor | None) -> Diagnostics:
    """Those of losses over log-sums or sums: means over each row's positives, and the accuracies that are known."""
    score = means.score.detach()
    count = score.shape[0] if means.present is None else means.present.sum()
    if means.present is not None:
        score = torch.where(means.present, score, 0)
    positive = score.sum() / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
    row, col = (*accuracies, None, None)[:2]
    return Diagnostics(positive=positive, spread=_spread(x, y), row_accuracy=row, col_accuracy=col)


def share_first(positive_logit: Tensor, maximum: Tensor) -> Tensor:
    """The share of the pairs (i, i) that are the maximum of their row, or of their column; 0 for none."""
    first = positive_logit.detach() >= maximum.detach()[: positive_logit.shape[0]]
    return first.to(maximum.dtype).sum() / max(first.shape[0], 1)


def _of_pairs(x, y, margin, positive_score, of_pairs, anchors, count, counted=None) -> Diagnostics:
    """of_pairs: for each direction the negative of each pair; anchors: of each anchor; count: how many pairs.

    counted: which pairs count; None: all.
    """
    active = sum((margin + n - positive_score > 0).to(positive_score.dtype).sum() for n in of_pairs)
    accuracies = []
    for n in of_pairs:
        first = positive_score > n if counted is None else counted & (positive_score > n)
        accuracies.append(first.to(positive_score.dtype).sum() / count)
    active, positive = active / (len(of_pairs) * count), positive_score.sum() / count
    return Diagnostics(active, positive, _mean_negative(anchors), _spread(x, y), *accuracies)


def _mean_negative(anchors) -> Tensor:
    negative = torch.cat(anchors)
    valid = negative != -torch.inf  # NaN is valid
    return torch.where(valid, negative, 0).sum() / valid.sum().clamp_min(1)


def _spread(x: Tensor, y: Tensor | None) -> Tensor:
    sides = (x,) if y is None else (x, y)
    sums = (F.normalize(reference.accumulate(t.detach()), dim=1, eps=reference.EPS).sum(0) for t in sides)
    total = torch.stack(tuple(sums)).sum(0)  # [D]
    points = sum(t.shape[0] for t in sides)
    return (1 - (total / max(points, 1)).square().sum()).clamp_min(0)  # rounding may give less than 0; NaN stays


__all__ = [
    "diagnose",
    "diagnose_hardest",
    "diagnose_labels",
    "diagnose_means",
    "diagnose_pairs",
    "share_first",
]
