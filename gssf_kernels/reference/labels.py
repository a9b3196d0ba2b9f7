"""The definitions of losses of labelled embeddings; see :mod:`gssf_kernels.reference`."""

import torch
from torch import Tensor

from gssf_kernels.reference.statistics import scores
from gssf_kernels.reference.triplet import factors


def by_label(
    x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, metric
) -> tuple[Tensor, Tensor, Tensor]:
    """``(s [N, M], positive, negative)`` of x with y, or of x alone, whose rows never meet themselves."""
    s = scores(*factors(x, x if y is None else y, metric))
    same = labels[:, None] == (labels if y_labels is None else y_labels)
    itself = torch.eye(*s.shape, dtype=torch.bool, device=s.device) if y is None else torch.zeros_like(same)
    return s, same & ~itself, ~same
