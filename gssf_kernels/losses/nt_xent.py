"""NT-Xent and supervised contrastive loss: one set of rows with labels, from one sweep.

    L = mean_i −1/|P(i)| Σ_{p ∈ P(i)} [κ s_ip − log Σ_{j ≠ i} e^{κ s_ij}],     s = x xᵀ

P(i) holds the other rows of row i's label. With two views of each sample, labelled by the sample, this is the loss of
SimCLR. The mean is over the rows that have a positive. A row never meets itself: the diagonal is left out of the
log-sum, and not subtracted from it, so the loss is exact at small temperatures too.

Source: NT-Xent, SimCLR, arXiv 2002.05709; many positives, SupCon (L_out), arXiv 2004.11362. Anchors from x and
candidates from y are ours.
"""

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels._modules import ScaledLoss
from gssf_kernels.diagnostics import diagnose_means
from gssf_kernels.ops.labels import labelled_factors
from gssf_kernels.ops.logsumexp import paired_logsumexp
from gssf_kernels.ops.masks import Selection
from gssf_kernels.ops.pairing import Pairing
from gssf_kernels.ops.positive_means import positive_means
from gssf_kernels.reference import Diagnostics
from gssf_kernels.similarity import StructuredSimilarity, check_metric, metric_of


def nt_xent_loss(
    x: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    metric: StructuredSimilarity | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """NT-Xent (SupCon) of labelled embeddings, without the matrix of logits ``κ x xᵀ``.

    Args:
        x: [N, D] float, anchors, usually normalised.
        labels: [N] integers; rows of equal label are positives of one another.
        scale: κ, the inverse temperature: a number > 0 or a scalar tensor on x's device; never synchronises.
        y: [M, D] of x's dtype and device, any M, with y_labels: the candidates. Then anchors are the rows of x alone,
            and no score is left out. None: the rows of x are compared with one another, without themselves.
        y_labels: [M] integers.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by; without y best a symmetric one.
        normalize: compare by cosine: divide the rows by their L2 norms first, in the same pass as a metric would.
        reduction: "mean" over the anchors that have a positive, "sum" or "none" ([N]). Other anchors contribute 0.
        diagnostics: return ``(loss, Diagnostics)``; see :mod:`gssf_kernels.diagnostics`.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). Without positives a differentiable 0. NaN and Inf in the
        inputs propagate. Differentiable once, in x, y, scale and the metric's weights.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product forward, three backward; half of each without y, unless W is not symmetric. Extra memory: as
    :func:`~gssf_kernels.logsumexp_scores`, and three N x D matrices.

    Source: arXiv 2002.05709, 2004.11362.
    """
    _checks.flag(diagnostics, "diagnostics")
    _checks.reduction(reduction)
    metric = metric_of(metric, normalize, "nt_xent_loss", x, y)
    factors = labelled_factors(x, labels, y, y_labels, metric)
    a, b = factors.a, factors.b
    kappa = _checks.scale(scale, a)
    kappa = kappa.tensor.exp() if isinstance(kappa, _checks.Logarithm) else kappa
    left, right, other = factors.operands()
    selection = Selection(columns=False, exclude_self=factors.leave_out)
    row_max, row_log, *_ = paired_logsumexp(left, right, kappa, selection, other)
    pairing = Pairing("ids", factors.a_labels, factors.b_labels)
    means = positive_means(a, b, pairing, ids=True, rows=True, exclude_self=factors.leave_out)
    assert means.present is not None  # only pairs (i, i) are there in any case
    terms = torch.where(means.present, (row_max - kappa * means.score) + row_log, 0)
    loss = terms if reduction == "none" else terms.sum()
    if reduction == "mean":
        loss = loss / means.present.sum().clamp_min(1)
    return (loss, diagnose_means(x, y, means)) if diagnostics else loss


class NTXentLoss(ScaledLoss):
    """:func:`nt_xent_loss` as a module, with a scale that is learned through its logarithm.

    Args:
        scale: the initial κ, or the constant one.
        learnable: whether ``log_scale`` is a parameter. SimCLR's temperature is constant, so it is not by default.
        max_scale: the largest κ, or None; see :class:`~gssf_kernels.InfoNCELoss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this module's).
        normalize, diagnostics: as in the function.
        reduction: as in :func:`nt_xent_loss`.
        device, dtype: of ``log_scale``.

    Attributes:
        log_scale: scalar parameter, or buffer if not learnable; it stays fp32 when the module is cast to 16 bits.
    """

    def __init__(
        self,
        scale: float = 1 / 0.07,
        learnable: bool = False,
        metric: StructuredSimilarity | None = None,
        reduction: str = "mean",
        *,
        max_scale: float | None = None,
        device=None,
        dtype=None,
        normalize: bool = False,
        diagnostics: bool = False,
    ):
        super().__init__()
        _checks.reduction(reduction)
        check_metric(metric)
        _checks.flag(normalize, "normalize")
        _checks.flag(diagnostics, "diagnostics")
        self.normalize, self.diagnostics = normalize, diagnostics
        self._learn_scale(scale, learnable, max_scale, device, dtype)
        self.metric, self.reduction = metric, reduction

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        y: Tensor | None = None,
        y_labels: Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of x [N, D] with labels [N]; ``scale`` in place of the module's own; see :func:`nt_xent_loss`."""
        return nt_xent_loss(
            x,
            labels,
            scale=self._kappa(scale),
            y=y,
            y_labels=y_labels,
            metric=self.metric,
            normalize=self.normalize,
            diagnostics=self.diagnostics,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        learnable = isinstance(self.log_scale, nn.Parameter)
        return f"learnable={learnable}, max_scale={self.max_scale}, reduction={self.reduction!r}"


__all__ = ["NTXentLoss", "nt_xent_loss"]
