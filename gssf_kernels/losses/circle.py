"""Circle loss: every score is weighted by its distance from its optimum.

    L_i = log(1 + Σ_n e^{γ α_n (s_in − m)} Σ_p e^{−γ α_p (s_ip − 1 + m)}),     α_n = [s_in + m]₊,  α_p = [1 + m − s_ip]₊

p runs over the positives of anchor i, n over its negatives. α are constants to autograd.

Source: arXiv 2002.10857 (m = 0.4, γ = 80 in pytorch-metric-learning).
"""

import torch
from torch import Tensor, nn

from gssf_kernels import _checks, reference
from gssf_kernels.diagnostics import diagnose_labels
from gssf_kernels.ops.labels import labelled_factors, log_sums
from gssf_kernels.reference import Diagnostics
from gssf_kernels.similarity import StructuredSimilarity, check_metric, metric_of


def circle_loss(
    x: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.4,
    scale: float = 80.0,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    metric: StructuredSimilarity | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Circle loss of labelled embeddings, without the matrix of scores.

    Anchors are the rows of x. With y they are compared with the rows of y, without y with all other rows of x. Scores
    are the plain products (normalise first), or with ``metric`` its structured similarity.

    Args:
        x: [N, D] float.
        labels: [N] integers; rows of equal label are positives.
        margin: m >= 0, in units of the score.
        scale: γ > 0.
        y: [M, D] of x's dtype and device, any M, with y_labels; or None.
        y_labels: [M] integers.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by; without y best a symmetric one.
        normalize: compare by cosine: divide the rows by their L2 norms first, in the same pass as a metric would.
        reduction: "mean" over all N anchors, "sum" or "none" ([N]). An anchor without a positive or without a negative
            contributes 0.
        diagnostics: return ``(loss, Diagnostics)``; see :mod:`gssf_kernels.diagnostics`.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). N = 0 gives a differentiable 0. NaN and Inf in the inputs
        propagate. Differentiable once, in x, y and the metric's weights.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product forward, three backward; half of each without y, unless W is not symmetric. Extra memory: as
    :func:`~gssf_kernels.logsumexp_scores`.
    """
    constants = [_checks.non_negative(margin, "margin"), _checks.positive(scale, "scale")]
    _checks.flag(diagnostics, "diagnostics")
    _checks.reduction(reduction)
    metric = metric_of(metric, normalize, "circle_loss", x, y)
    factors = labelled_factors(x, labels, y, y_labels, metric)
    positive_lse, negative_lse = log_sums(factors, "circle", constants)
    valid = (positive_lse != -torch.inf) & (negative_lse != -torch.inf)
    logit = torch.where(valid, positive_lse + negative_lse, -torch.inf)
    loss = reference.reduce(torch.logaddexp(logit, logit.new_zeros(())), reduction)
    return (loss, diagnose_labels(x, y, factors)) if diagnostics else loss


class CircleLoss(nn.Module):
    """:func:`circle_loss` as a module.

    Args:
        margin, scale, reduction: as in :func:`circle_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this module's).
        normalize, diagnostics: as in the function.

    Raises:
        TypeError, ValueError: the setting that is wrong, what was expected and what came.
    """

    def __init__(
        self,
        margin: float = 0.4,
        scale: float = 80.0,
        metric: StructuredSimilarity | None = None,
        reduction: str = "mean",
        *,
        normalize: bool = False,
        diagnostics: bool = False,
    ):
        super().__init__()
        self.margin, self.scale = _checks.non_negative(margin, "margin"), _checks.positive(scale, "scale")
        check_metric(metric)
        _checks.flag(normalize, "normalize")
        _checks.flag(diagnostics, "diagnostics")
        self.normalize, self.diagnostics = normalize, diagnostics
        _checks.reduction(reduction)
        self.metric, self.reduction = metric, reduction

    def forward(
        self, x: Tensor, labels: Tensor, y: Tensor | None = None, y_labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of x [N, D] with labels [N], and y [M, D] with y_labels [M]; see :func:`circle_loss`."""
        return circle_loss(
            x,
            labels,
            margin=self.margin,
            scale=self.scale,
            y=y,
            y_labels=y_labels,
            metric=self.metric,
            normalize=self.normalize,
            diagnostics=self.diagnostics,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, scale={self.scale}, reduction={self.reduction!r}"


__all__ = ["CircleLoss", "circle_loss"]
