"""The definitions of the losses in which every score carries gradient, on the stored matrix.

Formulas and sources: the docstrings in :mod:`gssf_kernels.losses` and :mod:`gssf_kernels.ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels.reference.statistics import positives as _positives
from gssf_kernels.reference.statistics import scores
from gssf_kernels.reference.triplet import factors, hinge, masks, reduce


def _compared(x: Tensor, y: Tensor, metric, normalize: bool) -> Tensor:
    """``s = x yᵀ`` [N, M], or the scores of ``metric``."""
    return scores(*factors(x, y, metric, normalize))


def logsumexp_scores(
    a: Tensor,
    b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    exclude_self: bool = False,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    same_id: str = "positive",
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the rows and columns of ``κ s``; see :func:`gssf_kernels.logsumexp_scores`."""
    t = scale * scores(a, b)
    pair, same, _ = masks(a, b, a_ids, b_ids, None)
    out = same & ~pair if same_id == "ignore" else torch.zeros_like(pair)
    t = t.masked_fill(out | pair if exclude_self else out, -torch.inf)
    return t.logsumexp(1), t.logsumexp(0)


def nt_xent_loss(
    x: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    metric=None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """NT-Xent, or SupCon; see :func:`gssf_kernels.nt_xent_loss`."""
    t = scale * _compared(x, x if y is None else y, metric, normalize)  # [N, M]
    positive = labels[:, None] == (labels if y_labels is None else y_labels)
    if y is None:
        itself = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
        t, positive = t.masked_fill(itself, -torch.inf), positive & ~itself
    has = positive.any(1)
    if t.shape[1] == 0:
        return reduce(t.sum(1), reduction)
    t = torch.where(has[:, None], t, 0)
    terms = torch.where(has, t.logsumexp(1) - torch.where(positive, t, 0).sum(1) / positive.sum(1).clamp_min(1), 0)
    if reduction == "none":
        return terms
    return terms.sum() / has.sum().clamp_min(1) if reduction == "mean" else terms.sum()


def _contrasted(x, y, x_ids, y_ids, pairs, same_id) -> tuple[Tensor, Tensor]:
    """(positives, scores that are left out), [N, M] bool each."""
    pair, same, _ = masks(x, y, x_ids, y_ids, pairs)
    positive = same if pairs is None and same_id == "positive" else pair
    return positive, same & ~positive


def _false_negatives(s: Tensor, positive: Tensor, margin: float | None) -> Tensor:
    """Which scores [N, M] are above the lowest positive score of their row plus the margin, and no positives."""
    if margin is None or s.shape[1] == 0:
        return torch.zeros_like(positive)
    lowest = s.detach().masked_fill(~positive, torch.inf).min(1, keepdim=True).values
    return (s > lowest + margin) & ~positive


def info_nce_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    pairs: str | Tensor | None = None,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same_id: str = "positive",
    y_bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    symmetric: bool = True,
    false_negative_margin: float | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    metric=None,
) -> Tensor:
    """InfoNCE over rows and columns; see :func:`gssf_kernels.info_nce_loss`."""
    s = _compared(x, y, metric, normalize)  # [N, M]
    positive, left_out = _contrasted(x, y, x_ids, y_ids, pairs, same_id)
    count = x.shape[0]

    def terms(s, positive, left_out, bias=None):  # [K, C] scores of K anchors -> [K], and which have a positive
        if s.shape[0] == 0:
            return s.sum(1), positive.any(1)
        t = scale * s if bias is None else scale * s + bias
        t = t.masked_fill(left_out | _false_negatives(s, positive, false_negative_margin), -torch.inf)
        has = positive.any(1)
        log_p = torch.where(has[:, None], t, 0).log_softmax(1)
        loss = -torch.where(positive, log_p, 0).sum(1) / positive.sum(1).clamp_min(1)
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(1)
        return torch.where(has, loss, 0), has

    loss, has = terms(s, positive, left_out, None if y_bias is None else y_bias.detach())
    if pairs is None:
        if symmetric:
            parts = (t[:, :count].mT for t in (s, positive, left_out))
            loss = (loss + terms(*parts)[0]) / 2
        return reduce(loss, reduction)
    if reduction == "none":
        return loss
    sums = [(loss, has)] + ([terms(s.mT, positive.mT, left_out.mT)] if symmetric else [])
    totals = [t.sum() / h.sum().clamp_min(1) if reduction == "mean" else t.sum() for t, h in sums]
    return torch.stack(totals).mean()


_POINTWISE = {
    "hinge": hinge,
    "softplus": lambda t: torch.logaddexp(t, t.new_zeros(())),
    "abs": torch.abs,
    "square": torch.square,
}


def sum_scores(
    a: Tensor,
    b: Tensor,
    kind: str,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    positives: str = "include",
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """``Σ_ij f(κ s_ij + β)``; see :func:`gssf_kernels.sum_scores`."""
    t = scale * scores(a, b) + bias
    same = _positives(a, b, a_ids, b_ids)
    terms = _POINTWISE[kind](torch.where(same, -t, t) if positives == "negate" else t)
    if positives == "exclude":
        terms = terms.masked_fill(same, 0)
    return reduce(terms.sum(1), reduction)


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    pairs: str | Tensor | None = None,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same_id: str = "positive",
    false_negative_margin: float | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    metric=None,
) -> Tensor:
    """``−Σ_j log σ(z_ij (κ s_ij + β))`` over pairs; see :func:`gssf_kernels.sigmoid_loss`."""
    s = _compared(x, y, metric, normalize)
    positive, left_out = _contrasted(x, y, x_ids, y_ids, pairs, same_id)
    left_out = left_out | _false_negatives(s, positive, false_negative_margin)
    left_out = left_out | _false_negatives(s.mT, positive.mT, false_negative_margin).mT
    terms = -F.logsigmoid(torch.where(positive, 1, -1) * (scale * s + bias)).masked_fill(left_out, 0).sum(1)
    if pairs is None:
        return reduce(terms, reduction)
    terms = torch.where(positive.any(1), terms, 0)
    if reduction == "none":
        return terms
    return terms.sum() / positive.any(1).sum().clamp_min(1) if reduction == "mean" else terms.sum()


def relational_distillation_loss(
    student: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    *,
    lam: float | Tensor,
    tau: float | Tensor,
    weights: tuple[float, float, float] = (2.0, 1.0, 1.0),
    kind: str = "mae",
    metric=None,
) -> Tensor:
    """Student's relations against the teachers'; see :func:`gssf_kernels.relational_distillation_loss`."""
    count = student.shape[0]
    image, text = (scores(x, x).detach() / tau for x in (image_teacher, text_teacher))
    mixture = lam * text + (1 - lam) * image
    off_diagonal = ~torch.eye(count, dtype=torch.bool, device=student.device)
    total = mixture.new_zeros(())
    relations_of_student = scores(*factors(student, student, metric)) / tau
    for weight, relations in zip(weights, (relations_of_student, image, text), strict=True):
        gap = (relations - mixture)[off_diagonal]
        total = total + weight * (gap.abs() if kind == "mae" else gap.square()).sum()
    return total / max(count * (count - 1), 1)
