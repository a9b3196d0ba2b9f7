"""Batch-hard triplet loss of one modality: every row with its hardest positive and its hardest negative.

    L_i = [m + max_{j: label_j ≠ label_i} s_ij − min_{j ≠ i: label_j = label_i} s_ij]₊,      s = x xᵀ

Source: arXiv 1703.07737. There it is a formula of distances, so hard positives are far and hard negatives are near.
"""

from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels.diagnostics import diagnose_hardest
from gssf_kernels.ops import batch_hard_of_factors, batch_hard_terms
from gssf_kernels.reference import Diagnostics
from gssf_kernels.similarity import StructuredSimilarity, check_metric, factors_with_itself, metric_of


def batch_hard_loss(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.2,
    reduction: str = "mean",
    normalize: bool = False,
    metric: StructuredSimilarity | None = None,
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Batch-hard loss ``[m + hardest negative − hardest positive]₊`` over the rows of x.

    Scores are the plain products ``x xᵀ`` (normalise first), or with ``metric`` its structured similarity. No N x N
    matrix is stored. Negatives come from the sweep of :func:`~gssf_kernels.hardest_negatives`, positives from tiles
    within each label.

    Args:
        x: [N, D] float.
        labels: [N] integers; rows of equal label are positives of one another.
        margin: m, a finite number >= 0, in units of the score.
        reduction: "mean", "sum" or "none" ([N]). A row without a positive or without a negative contributes 0; "mean"
            divides by N in any case.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare the rows by; of a symmetric one half of
            the scores are computed.
        normalize: compare by cosine: divide the rows by their L2 norms first, in the same pass as a metric would.
        diagnostics: return ``(loss, Diagnostics)``; see :mod:`gssf_kernels.diagnostics`.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). N = 0 gives a differentiable 0. NaN propagates. Ties go to
        the lowest index. Differentiable once.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, ``margin`` or ``reduction`` is out of range.

    Source: arXiv 1703.07737.
    """
    margin = _checks.non_negative(margin, "margin")
    metric = metric_of(metric, normalize, "batch_hard_loss", x)
    _checks.flag(diagnostics, "diagnostics")
    _checks.reduction(reduction)
    (x,) = _checks.autocast(x)
    _checks.embeddings(x, x, "x", "x")
    labels = _checks.labels(labels, "labels", x.shape[0], x.device)
    a, b = (x, x) if metric is None else factors_with_itself(metric, x)
    if a is b:
        results = batch_hard_terms(a, labels, margin, reduction)
    else:
        symmetric = metric is not None and metric.is_symmetric
        results = batch_hard_of_factors(a, b, labels, margin, reduction, symmetric)
    return (results.loss, diagnose_hardest(x, margin, results)) if diagnostics else results.loss


class BatchHardLoss(nn.Module):
    """:func:`batch_hard_loss` as a module.

    Args:
        margin, reduction: as in :func:`batch_hard_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this module's).
        normalize, diagnostics: as in the function.

    Raises:
        TypeError, ValueError: the setting that is wrong, what was expected and what came.
    """

    def __init__(
        self,
        margin: float = 0.2,
        reduction: str = "mean",
        metric: StructuredSimilarity | None = None,
        *,
        normalize: bool = False,
        diagnostics: bool = False,
    ):
        super().__init__()
        self.margin = _checks.non_negative(margin, "margin")
        _checks.reduction(reduction)
        check_metric(metric)
        _checks.flag(normalize, "normalize")
        _checks.flag(diagnostics, "diagnostics")
        self.normalize, self.diagnostics = normalize, diagnostics
        self.reduction, self.metric = reduction, metric

    def forward(self, x: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of x [N, D] with labels [N]; see :func:`batch_hard_loss`."""
        return batch_hard_loss(
            x,
            labels,
            margin=self.margin,
            reduction=self.reduction,
            metric=self.metric,
            normalize=self.normalize,
            diagnostics=self.diagnostics,
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}"


__all__ = ["BatchHardLoss", "batch_hard_loss"]
