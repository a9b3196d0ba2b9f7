"""Triplet loss with hardest negatives in both directions, from one sweep.

    L = Σ_i [m + max_{j ∉ pos(i)} s_ij − s_ii]₊ + Σ_j [m + max_{i ∉ pos(j)} s_ij − s_jj]₊,     s = x yᵀ

Source: VSE++, arXiv 1707.05612 (summed, m = 0.2), as in VSE∞, SGRAF and DBL. "all" is its predecessor
with the maximum replaced by the sum over negatives (VSE0); "semihard" takes the hardest negative
scored below the positive (FaceNet, arXiv 1503.03832), or the hardest where there is none.
"""

from torch import Tensor, nn

from gssf_kernels import _checks, reference
from gssf_kernels.similarity import StructuredSimilarity
from gssf_kernels.statistics import paired_hardest_negatives

NEGATIVES = ("hardest", "all", "semihard")
REDUCTIONS = ("sum", "mean", "none")
_NAMES = ("x", "y", "x_ids", "y_ids")


def triplet_loss(
    x: Tensor,
    y: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "hardest",
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    reduction: str = "sum",
    metric: StructuredSimilarity | None = None,
) -> Tensor:
    """Triplet loss of paired embeddings, ``Σ [m + negative − positive]₊`` over rows and columns.

    Row i of x pairs with row i of y. Equal ids are positives too: they are never negatives. An anchor
    without any valid negative contributes 0. Rows of y past N are extra negatives: they have no
    positive and add no term of their own. Scores are the plain products ``x yᵀ`` (normalise first), or
    with ``metric`` its structured similarity.

    Args:
        x: [N, D] float, anchors.
        y: [M, D] of x's dtype and device, M >= N.
        margin: m, a finite number >= 0, in units of the score.
        negatives: "hardest" is the fused sweep, which never stores the N x M matrix (see
            :func:`~gssf_kernels.hardest_negatives` for its memory). "all" and "semihard" are plain PyTorch and
            store it.
        x_ids: [N] int64. Ids of one side alone serve both when N = M.
        y_ids: [M] int64.
        reduction: "sum", "mean" (the sum over N) or "none" ([N]: row term i + column term i).
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by. The result is that of
            ``metric.factors(x, y)`` in place of x and y; but with "hardest" the factors live only while the
            forward runs, and nothing of N x D but x and y is held for the backward.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). N = 0 gives a differentiable 0. NaN and Inf
        in the inputs propagate. Differentiable once.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, ``margin``, ``negatives`` or ``reduction`` is out of range.

    Source: VSE++, arXiv 1707.05612; see this file's head.
    """
    margin = _checks.non_negative(margin, "margin")
    _checks.choice(negatives, "negatives", NEGATIVES)
    _checks.choice(reduction, "reduction", REDUCTIONS)
    _check_metric(metric)
    if negatives != "hardest":
        if metric is not None:
            x, y = metric.factors(x, y)
        x, y = _checks.autocast(x, y)
        _checks.sides(x, y, *_NAMES[:2])
        x_ids, y_ids = _checks.ids(x_ids, y_ids, x, y, *_NAMES[2:])
        return reference.triplet_loss(
            x, y, margin=margin, negatives=negatives, x_ids=x_ids, y_ids=y_ids, reduction=reduction
        )
    positive, hardest = paired_hardest_negatives(x, y, x_ids, y_ids, names=_NAMES, metric=metric)
    count = positive.shape[0]
    rows = reference.hinge(margin + hardest.row_score - positive)  # [N]
    cols = reference.hinge(margin + hardest.col_score[:count] - positive)  # [N]
    return reference.reduce(rows + cols, reduction)


def _check_metric(metric) -> None:
    if metric is not None and not isinstance(metric, StructuredSimilarity):
        raise TypeError(f"metric: expected a StructuredSimilarity or None, got {type(metric).__name__}")


class TripletLoss(nn.Module):
    """:func:`triplet_loss` as a module; with ``metric``, on its structured similarity.

    Args:
        margin, negatives, reduction: as in :func:`triplet_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this
            module's); absent, x and y are compared as they come.
    """

    def __init__(
        self,
        margin: float = 0.2,
        negatives: str = "hardest",
        reduction: str = "sum",
        metric: StructuredSimilarity | None = None,
    ):
        super().__init__()
        self.margin = _checks.non_negative(margin, "margin")
        _checks.choice(negatives, "negatives", NEGATIVES)
        _checks.choice(reduction, "reduction", REDUCTIONS)
        _check_metric(metric)
        self.negatives, self.reduction, self.metric = negatives, reduction, metric

    def forward(self, x: Tensor, y: Tensor, x_ids: Tensor | None = None, y_ids: Tensor | None = None) -> Tensor:
        """The loss of x [N, D] and y [M, D], M >= N; see :func:`triplet_loss`."""
        return triplet_loss(
            x,
            y,
            margin=self.margin,
            negatives=self.negatives,
            x_ids=x_ids,
            y_ids=y_ids,
            reduction=self.reduction,
            metric=self.metric,
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, negatives={self.negatives!r}, reduction={self.reduction!r}"


__all__ = ["TripletLoss", "triplet_loss"]
