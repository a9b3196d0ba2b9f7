"""The pairwise sigmoid loss of SigLIP, from one sweep.

    L = −(1/N) Σ_ij log σ(z_ij (κ s_ij + β)),     s = x yᵀ,   z_ij = +1 for positives, −1 for all others

Source: SigLIP, arXiv 2303.15343 (κ starts at 10 and β at −10; κ is learned through its logarithm).
"""

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels._modules import ScaledLoss
from gssf_kernels.diagnostics import diagnose_means
from gssf_kernels.ops.logsumexp import SAME_ID
from gssf_kernels.ops.masks import Mask
from gssf_kernels.ops.mining import PairedInputs, paired_inputs
from gssf_kernels.ops.pairing import Pairing
from gssf_kernels.ops.positive_means import positive_means
from gssf_kernels.ops.segments import segments_of
from gssf_kernels.ops.sums import Term, score_sums
from gssf_kernels.reference import Diagnostics
from gssf_kernels.similarity import StructuredSimilarity, check_metric, metric_of


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
    metric: StructuredSimilarity | None = None,
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Pairwise sigmoid loss of paired embeddings, without the matrix of logits ``κ x yᵀ + β``.

    Without ``pairs``, row i of x pairs with row i of y, equal ids are positives too, and rows of y past N are extra
    negatives. With ``pairs`` a row without a positive has no terms.

    Args:
        x: [N, D] float.
        y: [M, D] of x's dtype and device, M >= N without ``pairs``.
        scale, bias: κ and β, numbers (κ > 0) or scalar tensors on x's device; never synchronises.
        pairs: None, "ids" or [P, 2] integers, as in :func:`~gssf_kernels.triplet_loss`. With a list, scores of equal id
            that are no pair are left out.
        x_ids: [N] integers. If N = M, the ids of one input serve both.
        y_ids: [M] integers.
        same_id: "positive": without ``pairs``, equal ids are positives. "ignore": scores of equal id that are no pair
            are left out, as for duplicates.
        false_negative_margin: >= 0. A negative is left out where it scores above the lowest positive score of its row,
            or of its column, plus this.
        reduction: "mean" (the sum over N; with ``pairs`` over the rows that have a positive), "sum" or "none" ([N]: the
            terms of row i).
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by.
        normalize: compare by cosine: divide the rows by their L2 norms first, in the same pass as a metric would.
        diagnostics: return ``(loss, Diagnostics)``; see :mod:`gssf_kernels.diagnostics`.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). N = 0 gives a differentiable 0. NaN and Inf in the inputs
        propagate. Differentiable once, in x, y, scale, bias and the metric's weights.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product, and two further ones for the gradient. Extra memory: as :func:`~gssf_kernels.sum_scores`.
    """
    _checks.flag(diagnostics, "diagnostics")
    _checks.reduction(reduction)
    _checks.choice(same_id, "same_id", SAME_ID)
    metric = metric_of(metric, normalize, "sigmoid_loss", x, y)
    if pairs is not None or same_id == "ignore" or false_negative_margin is not None:
        inputs = paired_inputs(
            x,
            y,
            pairs,
            x_ids,
            y_ids,
            metric=metric,
            false_negative_margin=false_negative_margin,
            same_id=same_id,
        )
        kappa, beta = _checks.scale(scale, inputs.a), _checks.scalar_or_number(bias, "bias", inputs.a)
        loss = _with_options(inputs, Term("softplus", "negate", kappa, beta), same_id == "ignore", reduction)
        return (loss, _diagnose(x, y, *inputs[:3], same_id != "ignore")) if diagnostics else loss
    a, b = _checks.autocast(*((x, y) if metric is None else metric.factors(x, y)))
    _checks.embeddings(a, b, "x", "y")
    x_ids, y_ids = _checks.ids_of_pairs(x_ids, y_ids, a, b, "x_ids", "y_ids")
    kappa = _checks.scale(scale, a)
    bias = _checks.scalar_or_number(bias, "bias", a)
    # −log σ(z t) is softplus(t) for negatives and softplus(−t) for positives.
    loss = score_sums(a, b, Term("softplus", "negate", kappa, bias), x_ids, y_ids, reduction)
    return (loss, _diagnose(x, y, a, b, Pairing("rows", x_ids, y_ids), True)) if diagnostics else loss


def _diagnose(x: Tensor, y: Tensor, a: Tensor, b: Tensor, pairing: Pairing, ids: bool) -> Diagnostics:
    return diagnose_means(x, y, positive_means(a.detach(), b.detach(), pairing, ids, rows=True))


def _with_options(inputs: PairedInputs, term: Term, ignore: bool, reduction: str) -> Tensor:
    """The loss with pairs of any kind and scores that are left out. A row without a positive has no terms."""
    a, b, pairing, _, limits, _ = inputs
    ids = pairing.x_ids, pairing.y_ids
    left_out = pairing.x_ids is not None and (ignore or pairing.kind == "listed")
    listed = (None, None) if pairing.listed is None else pairing.listed[:2]
    mask = Mask(pairing.kind == "rows", left_out, listed[0], listed[1], *limits)
    if pairing.kind == "rows":
        return score_sums(a, b, term, *ids, reduction, mask=mask)
    present = _has_positive(pairing, a.shape[0])
    if reduction != "none" and _checks.readable(present) and bool(present.all()):
        return score_sums(a, b, term, *ids, reduction, mask=mask)
    terms = torch.where(present, score_sums(a, b, term, *ids, "none", mask=mask), 0)
    if reduction == "none":
        return terms
    return terms.sum() / present.sum().clamp_min(1) if reduction == "mean" else terms.sum()


def _has_positive(pairing: Pairing, n: int) -> Tensor:
    """Which of n rows have a positive."""
    if pairing.listed is not None:
        return pairing.listed.starts.diff() > 0
    assert pairing.x_ids is not None
    assert pairing.y_ids is not None
    if n == 0:
        return torch.ones_like(pairing.x_ids, dtype=torch.bool)
    return segments_of(pairing.x_ids, pairing.y_ids).row_counts() > 0


class SigmoidLoss(ScaledLoss):
    """:func:`sigmoid_loss` as a module with a bias, and a scale that is learned through its logarithm.

    Args:
        scale, bias: the initial κ and β, or the constant ones.
        learnable: whether ``log_scale`` and ``bias`` are parameters.
        max_scale: the largest κ, or None; see :class:`~gssf_kernels.InfoNCELoss`.
        same_id, false_negative_margin, reduction: as in :func:`sigmoid_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this module's).
        normalize, diagnostics: as in the function.
        device, dtype: of ``log_scale`` and ``bias``.

    Attributes:
        log_scale, bias: scalar parameters, or buffers if not learnable; they stay fp32 when the module is cast to 16
            bits.
    """

    bias: Tensor

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        learnable: bool = True,
        reduction: str = "mean",
        metric: StructuredSimilarity | None = None,
        *,
        max_scale: float | None = None,
        same_id: str = "positive",
        false_negative_margin: float | None = None,
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
        _checks.choice(same_id, "same_id", SAME_ID)
        self.same_id = same_id
        self.false_negative_margin = _checks.optional_non_negative(false_negative_margin, "false_negative_margin")
        self._learn_scale(scale, learnable, max_scale, device, dtype)
        self._learn("bias", _checks.finite(bias, "bias"), learnable, device, dtype)
        self.reduction, self.metric = reduction, metric

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_ids: Tensor | None = None,
        y_ids: Tensor | None = None,
        pairs: str | Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        bias: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of x [N, D] and y [M, D]; ``scale`` and ``bias`` in place of the module's own.

        See :func:`sigmoid_loss`.
        """
        return sigmoid_loss(
            x,
            y,
            scale=self._kappa(scale),
            bias=self.bias if bias is None else bias,
            pairs=pairs,
            x_ids=x_ids,
            y_ids=y_ids,
            same_id=self.same_id,
            false_negative_margin=self.false_negative_margin,
            reduction=self.reduction,
            metric=self.metric,
            normalize=self.normalize,
            diagnostics=self.diagnostics,
        )

    def extra_repr(self) -> str:
        learnable = isinstance(self.bias, nn.Parameter)
        return f"learnable={learnable}, max_scale={self.max_scale}, reduction={self.reduction!r}"


__all__ = ["SigmoidLoss", "sigmoid_loss"]
