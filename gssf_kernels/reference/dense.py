"""The definitions of the losses in which every score carries gradient, on the stored matrix.

Formulas and sources: the docstrings in :mod:`gssf_kernels.losses` and :mod:`gssf_kernels.ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels.reference.statistics import positives as _positives
from gssf_kernels.reference.statistics import scores
from gssf_kernels.reference.triplet import factors, hinge, reduce


def _compared(x: Tensor, y: Tensor, metric) -> Tensor:
    """``s = x yᵀ`` [N, M], or the scores of ``metric``."""
    return scores(*factors(x, y, metric))


def logsumexp_scores(a: Tensor, b: Tensor, *, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the rows and columns of ``κ s``; see :func:`gssf_kernels.logsumexp_scores`."""
    t = scale * scores(a, b)
    return t.logsumexp(1), t.logsumexp(0)


def info_nce_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    symmetric: bool = True,
    reduction: str = "mean",
    metric=None,
) -> Tensor:
    """InfoNCE over rows and columns; see :func:`gssf_kernels.info_nce_loss`."""
    t = scale * _compared(x, y, metric)  # [N, M]
    same = _positives(x, y, x_ids, y_ids)
    count = x.shape[0]

    def terms(t, same):  # [K, C] logits of K anchors -> [K]
        if t.shape[0] == 0:
            return t.sum(1)
        log_p = t.log_softmax(1)
        loss = -torch.where(same, log_p, 0).sum(1) / same.sum(1)
        return (1 - label_smoothing) * loss - label_smoothing * log_p.mean(1) if label_smoothing else loss

    loss = terms(t, same)
    if symmetric:
        loss = (loss + terms(t[:, :count].mT, same[:, :count].mT)) / 2
    return reduce(loss, reduction)


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
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    reduction: str = "mean",
    metric=None,
) -> Tensor:
    """``−Σ_j log σ(z_ij (κ s_ij + β))`` over pairs; see :func:`gssf_kernels.sigmoid_loss`."""
    t = scale * _compared(x, y, metric) + bias  # [N, M]
    z = torch.where(_positives(x, y, x_ids, y_ids), 1, -1)
    return reduce(-F.logsigmoid(z * t).sum(1), reduction)


def relational_distillation_loss(
    student: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    *,
    lam: float | Tensor,
    tau: float | Tensor,
    weights: tuple[float, float, float] = (2.0, 1.0, 1.0),
    kind: str = "mae",
) -> Tensor:
    """Student's relations against the teachers'; see :func:`gssf_kernels.relational_distillation_loss`."""
    count = student.shape[0]
    image, text = (scores(x, x).detach() / tau for x in (image_teacher, text_teacher))
    mixture = lam * text + (1 - lam) * image
    off_diagonal = ~torch.eye(count, dtype=torch.bool, device=student.device)
    total = mixture.new_zeros(())
    for weight, relations in zip(weights, (scores(student, student) / tau, image, text), strict=True):
        gap = (relations - mixture)[off_diagonal]
        total = total + weight * (gap.abs() if kind == "mae" else gap.square()).sum()
    return total / max(count * (count - 1), 1)
