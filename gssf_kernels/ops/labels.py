"""The scores of anchors by label: each anchor's positives have its label, its negatives another.

s = x yᵀ, anchors the rows of x;   without y  s = x xᵀ, where a row never meets itself
"""

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels.ops.logsumexp import LabelledSides, logsumexp_by_label
from gssf_kernels.similarity import StructuredSimilarity, check_metric


def labelled_sides(
    x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, metric: StructuredSimilarity | None
) -> LabelledSides:
    """x [N, D], labels [N], y [M, D] and y_labels [M] or neither, as the user gave them."""
    check_metric(metric)
    if (y is None) != (y_labels is None):
        missing, there = ("y", "y_labels") if y is None else ("y_labels", "y")
        raise ValueError(f"{missing}: expected it too, because {there} is given, got None")
    alone = y is None
    x, other = _checks.autocast(x, x if y is None else y)
    _checks.sides(x, other, "x", "x" if alone else "y", paired=False)
    _checks.index(labels, "labels", x.shape[0], x.device)
    if y_labels is not None:
        _checks.index(y_labels, "y_labels", other.shape[0], x.device)
    a, b = (x, other) if metric is None else _checks.autocast(*metric.factors(x, other))
    return LabelledSides(a, b, labels, labels if y_labels is None else y_labels, alone)


def log_sums(
    sides: LabelledSides, score: str, constants: list[float], bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(log Σ e^t over positives, log Σ e^t over negatives)`` [N], t the logit of ``score``; -inf of none.

    bounds: [2, N], a positive counts only if it scores below bounds[0, i], a negative above bounds[1, i].
    Differentiable once. Time: one product, three backward; where b is a, half of them.
    """
    row_max, row_log = logsumexp_by_label(sides, score, constants, bounds)
    positive, negative = (row_max + row_log).unbind()
    return positive, negative


def largest_logits(sides: LabelledSides, score: str, constants: list[float]) -> tuple[Tensor, Tensor]:
    """The largest logit of each anchor's positives and of its negatives [N], -inf of none; constants to autograd."""
    with torch.no_grad():
        row_max, _ = logsumexp_by_label(sides, score, constants)
    positive, negative = row_max.unbind()
    return positive, negative
