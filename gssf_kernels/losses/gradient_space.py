"""Losses designed by their gradient: weights on the positive and on the hardest negative of every anchor.

    dL/dp_i = −w⁺_i,   dL/dn_i = +w⁻_i      over rows, and the same over columns;  w are constants,

with ``s = x yᵀ``, ``p_i = s_ii`` and ``n_i`` the hardest negative of the anchor. So ``dx = G y`` and ``dy = Gᵀ x`` with
a sparse G = dL/ds of at most 3 entries a pair. A loss need not exist whose derivative this is.

Source: GOAL, arXiv 2210.13188; the general form with functions as arguments is ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gssf_kernels import _checks, reference
from gssf_kernels._library import Function
from gssf_kernels.diagnostics import diagnose
from gssf_kernels.ops import paired_hardest_negatives, paired_relative_negatives, relative_positives
from gssf_kernels.reference import AnchorStatistics, Diagnostics, RelativeTerms
from gssf_kernels.similarity import StructuredSimilarity, check_metric

KINDS = ("exponential", "linear")
_NAMES = ("x", "y", "x_ids", "y_ids")


def gradient_space_loss(
    x: Tensor,
    y: Tensor,
    weights: Callable[[AnchorStatistics], tuple[Tensor, Tensor]],
    *,
    value: Callable[[AnchorStatistics], Tensor] | None = None,
    relative: RelativeTerms | None = None,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    reduction: str = "sum",
    metric: StructuredSimilarity | None = None,
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """A loss with ``dL/dp = −positive_weight`` and ``dL/dn = +negative_weight``, whatever its value says.

    Pairs, ids, extra rows of y and ``metric`` are as in :func:`~gssf_kernels.triplet_loss`, and the N x M matrix
    is as little stored. An anchor without any valid negative has value 0 and no gradient.

        loss = gk.gradient_space_loss(x, y, lambda anchor: (1 - anchor.positive, anchor.negative.relu()))

    Args:
        x: [N, D] float, anchors.
        y: [M, D] of x's dtype and device, M >= N.
        weights: called once for the rows and once for the columns with :class:`~gssf_kernels.AnchorStatistics`:
            detached [N] tensors ``positive``, ``negative`` (-inf where there is none) and, where asked for,
            ``relative_positive`` and ``relative_negative``. Gives (positive_weight, negative_weight), floating [N]
            each. They are constants: no gradient flows through them.
        value: called with the same, gives the [N] terms that the loss is reported as. Absent, they are
            ``n − p``: a monitor that falls as training succeeds, not the objective.
        relative: :class:`~gssf_kernels.RelativeTerms` to have the relative terms too (in fp64 by sorting, and from
            the same sweep).
        x_ids: [N] int64. Ids of one side alone serve both when N = M.
        y_ids: [M] int64.
        reduction: "sum", "mean" (the sum over N) or "none" ([N]: row term i + column term i).
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by.
        diagnostics: return ``(loss, Diagnostics)`` with margin 0; see :mod:`gssf_kernels.diagnostics`.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64), as are all statistics. NaN and Inf propagate.
        Differentiable once.

    Raises:
        TypeError: an argument, or what ``weights`` or ``value`` gives, has the wrong type or dtype.
        ValueError: a shape, device, ``reduction`` or field of ``relative`` is out of range.

    Source: GOAL, arXiv 2210.13188; see this file's head.
    """
    _checks.function(weights, "weights")
    if value is not None:
        _checks.function(value, "value")
    _check_relative(relative)
    _checks.reduction(reduction)
    check_metric(metric)
    _checks.flag(diagnostics, "diagnostics")
    close: tuple[Tensor | None, Tensor | None] = (None, None)
    if relative is None:
        positive, hardest = paired_hardest_negatives(x, y, x_ids, y_ids, names=_NAMES, metric=metric)
    else:
        positive, hardest, close = paired_relative_negatives(x, y, x_ids, y_ids, relative, names=_NAMES, metric=metric)
    count = positive.shape[0]
    rows = _terms(positive, hardest.row_score, close[0], weights, value, relative)
    cols = _terms(positive, hardest.col_score[:count], close[1], weights, value, relative)
    loss = reference.reduce(rows + cols, reduction)
    return (loss, diagnose(x, y, 0.0, positive, hardest)) if diagnostics else loss


def _terms(positive, negative, close, weights, value, relative) -> Tensor:
    """One direction's terms [N], which carry the designed gradient."""
    p, n = positive.detach(), negative.detach()
    anchor = AnchorStatistics(p, n)
    if relative is not None:
        anchor = AnchorStatistics(p, n, relative_positives(p, n, relative), close[: p.shape[0]])
    given = weights(anchor)
    if not isinstance(given, tuple | list) or len(given) != 2:
        got = f"{len(given)} of them" if isinstance(given, tuple | list) else type(given).__name__
        raise TypeError(f"weights: expected it to give two tensors (positive_weight, negative_weight), got {got}")
    positive_weight, negative_weight = (_checks.anchors(w, "weights", p) for w in given)
    term = n - p if value is None else _checks.anchors(value(anchor), "value", p)
    found = n != -torch.inf  # whatever the functions make of anchors without a negative is dropped
    term, *both = (torch.where(found, t, 0) for t in (term, positive_weight, negative_weight))
    return _Designed.apply(term, positive, negative, *both)


class _Designed(Function):
    """A value of its own, and of p and n the gradients −w⁺ and w⁻, times what comes from above."""

    @staticmethod
    def forward(value, positive, negative, positive_weight, negative_weight):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx, grad):
        positive_weight, negative_weight = ctx.saved_tensors
        return None, -grad * positive_weight, grad * negative_weight, None, None


def _check_relative(relative) -> None:
    if relative is None:
        return
    if not isinstance(relative, RelativeTerms):
        raise TypeError(f"relative: expected RelativeTerms or None, got {type(relative).__name__}")
    _checks.choice(relative.kind, "relative.kind", KINDS)
    for name in ("alpha", "beta"):
        _checks.positive(getattr(relative, name), f"relative.{name}")
    for name in ("positive_threshold", "negative_threshold"):
        _checks.non_negative(getattr(relative, name), f"relative.{name}")


__all__ = ["gradient_space_loss"]
