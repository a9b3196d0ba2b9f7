"""The definitions of the losses of labelled embeddings, on the stored matrix.

Formulas and sources: the docstrings in :mod:`gssf_kernels.losses`.
"""

import torch
from torch import Tensor

from gssf_kernels.reference.statistics import scores
from gssf_kernels.reference.triplet import factors, reduce


def by_label(
    x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, metric, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(s, positive, negative)`` [N, M], masks by label. Without y, b is a and the diagonal is in neither mask."""
    s = scores(*factors(x, x if y is None else y, metric, normalize))
    same = labels[:, None] == (labels if y_labels is None else y_labels)
    itself = torch.eye(*s.shape, dtype=torch.bool, device=s.device) if y is None else torch.zeros_like(same)
    return s, same & ~itself, ~same


def circle_loss(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.4,
    scale: float = 80.0,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    metric=None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Circle loss; see :func:`gssf_kernels.circle_loss`."""
    s, positive, negative = by_label(x, labels, y, y_labels, metric, normalize)
    alpha_p, alpha_n = (1 + margin - s.detach()).relu(), (s.detach() + margin).relu()
    positive_lse = (-scale * alpha_p * (s - 1 + margin)).masked_fill(~positive, -torch.inf).logsumexp(1)
    negative_lse = (scale * alpha_n * (s - margin)).masked_fill(~negative, -torch.inf).logsumexp(1)
    valid = positive.any(1) & negative.any(1)
    t = torch.where(valid, positive_lse + negative_lse, 0)
    return reduce(torch.where(valid, torch.logaddexp(t, t.new_zeros(())), 0), reduction)


def multi_similarity_loss(
    x: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = None,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    metric=None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Multi-similarity loss; see :func:`gssf_kernels.multi_similarity_loss`."""
    s, positive, negative = by_label(x, labels, y, y_labels, metric, normalize)
    if epsilon is not None and s.shape[1]:
        least_positive = s.detach().masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        largest_negative = s.detach().masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
        positive, negative = positive & ~(s >= largest_negative + epsilon), negative & ~(s <= least_positive - epsilon)
    zero = s.new_zeros(())
    positive_lse = (-alpha * (s - base)).masked_fill(~positive, -torch.inf).logsumexp(1)
    negative_lse = (beta * (s - base)).masked_fill(~negative, -torch.inf).logsumexp(1)
    return reduce(torch.logaddexp(positive_lse, zero) / alpha + torch.logaddexp(negative_lse, zero) / beta, reduction)
