"""InfoNCE in both directions, the loss of CLIP, from one sweep.

    L = ½ mean_i [lse_j(t_ij) − Σ_j Y_ij t_ij] + ½ mean_j [lse_i(t_ij) − Σ_i Y'_ij t_ij],     t = κ x yᵀ

Y is the identity; with ids, Y_ij = 1[positive]/(positives of row i). Y' is the same by columns. Since t is linear in y,
Σ_j Y_ij t_ij is κ x_i times the mean of row i's positives, which costs O((N + M) D). With label smoothing ε, the target
is (1 − ε) Y + ε/M.

Source: InfoNCE, arXiv 1807.03748; both directions and the learnable scale, CLIP, arXiv 2103.00020. Soft targets by id
as in arXiv 2412.10761.
"""

from functools import partial

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels._modules import ScaledLoss
from gssf_kernels.diagnostics import diagnose_means, share_first
from gssf_kernels.ops.info_nce import Options, info_nce_of_factors, mean_scores
from gssf_kernels.ops.logsumexp import SAME_ID, paired_logsumexp
from gssf_kernels.ops.masks import Mask, Selection
from gssf_kernels.ops.mining import PairedInputs, paired_inputs
from gssf_kernels.ops.pairing import Pairing
from gssf_kernels.ops.positive_means import PositiveMeans, positive_means
from gssf_kernels.reference import Diagnostics
from gssf_kernels.similarity import StructuredSimilarity, check_metric, metric_of


def info_nce_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    pairs: str | Tensor | None = None,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same_id: str = "positive",
    y_bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    symmetric: bool = True,
    false_negative_margin: float | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    metric: StructuredSimilarity | None = None,
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """InfoNCE of paired embeddings, without the matrix of logits ``κ x yᵀ``.

    The positives of an anchor have equal targets. Without ``pairs``, row i of x pairs with row i of y, equal ids are
    positives too, and rows of y past N are further candidates for the rows of x, but no anchors. With ``pairs`` the
    rows' direction is a mean over the rows that have a positive, and the columns' over the columns that have one.

    Args:
        x: [N, D] float.
        y: [M, D] of x's dtype and device, M >= N without ``pairs``.
        scale: κ, the inverse temperature: a number > 0 or a scalar tensor on x's device; never synchronises.
        pairs: None, "ids" or [P, 2] integers, as in :func:`~gssf_kernels.triplet_loss`. With a list, scores of equal id
            that are no pair are left out.
        x_ids: [N] integers. If N = M, the ids of one input serve both.
        y_ids: [M] integers.
        same_id: "positive": without ``pairs``, equal ids are positives. "ignore": scores of equal id that are no pair
            are left out, as for duplicates.
        y_bias: [M] float, added to the logits of each candidate in the rows' direction, of positives too; constant to
            autograd. The log-Q correction passes −log q of candidates that are drawn with probability q.
        label_smoothing: ε in [0, 1), the part of the target that is uniform over all candidates; 0 where scores may be
            left out.
        symmetric: the mean of both directions; False: only the rows' direction, as for queries against a queue.
        false_negative_margin: >= 0. A score that is no positive is left out of its anchor's log-sum where it is above
            the anchor's lowest positive score plus this, both without scale and bias.
        reduction: "mean" over the N pairs, "sum" or "none" ([N]); with ``pairs`` see above, "sum" is half the sum of
            both directions, and "none" requires symmetric=False.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by.
        normalize: compare by cosine: divide the rows by their L2 norms first, in the same pass as a metric would.
        diagnostics: return ``(loss, Diagnostics)``; see :mod:`gssf_kernels.diagnostics`.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). N = 0 gives a differentiable 0. NaN and Inf in the inputs
        propagate. Differentiable once, in x, y, scale and the metric's weights.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product forward, three backward; two in all with symmetric=False if y has no gradient. Extra memory:
    as :func:`~gssf_kernels.logsumexp_scores`; with ids also a few N x D matrices. With few queries, whose scores are
    one chunk, no fp32 y is copied.
    """
    epsilon = _checks.fraction(label_smoothing, "label_smoothing")
    _checks.flag(symmetric, "symmetric")
    _checks.flag(diagnostics, "diagnostics")
    _checks.reduction(reduction)
    _checks.choice(same_id, "same_id", SAME_ID)
    if metric is None and normalize is False:
        _checks.norms("info_nce_loss", x, y)
    else:
        metric = metric_of(metric, normalize, "info_nce_loss", x, y)
    if pairs is not None or same_id == "ignore" or y_bias is not None or false_negative_margin is not None:
        inputs = paired_inputs(
            x,
            y,
            pairs,
            x_ids,
            y_ids,
            metric=metric,
            symmetric=symmetric,
            false_negative_margin=false_negative_margin,
            same_id=same_id,
        )
        kappa, options = _checks.scale(scale, inputs.a), Options(epsilon, symmetric, reduction)
        y_bias = _checks.bias_of_candidates(y_bias, "y_bias", inputs.b)
        loss, means, *first = _with_options(inputs, kappa, same_id == "ignore", y_bias, options)
        return (loss, diagnose_means(x, y, means, *_accuracies(symmetric, *first))) if diagnostics else loss
    a, b = _checks.autocast(*((x, y) if metric is None else metric.factors(x, y)))
    _checks.embeddings(a, b, "x", "y")
    x_ids, y_ids = _checks.ids_of_pairs(x_ids, y_ids, a, b, "x_ids", "y_ids")
    kappa = _checks.scale(scale, a)
    loss, *first = info_nce_of_factors(a, b, kappa, x_ids, y_ids, Options(epsilon, symmetric, reduction))
    if not diagnostics:
        return loss
    means = positive_means(a.detach(), b.detach(), Pairing("rows", x_ids, y_ids), ids=True, rows=True)
    accuracies = _accuracies(symmetric, *first) if x_ids is None else ()
    return loss, diagnose_means(x, y, means, *accuracies)


def _accuracies(symmetric: bool, *first: Tensor) -> list[Tensor]:
    """From the logits of the pairs (i, i), and the maxima of rows and of columns; [] from nothing."""
    if not first:
        return []
    positive_logit, *maxima = first
    return [share_first(positive_logit, maximum) for maximum in maxima[: 1 + symmetric]]


def _with_options(inputs: PairedInputs, kappa, ignore: bool, y_bias: Tensor | None, options: Options) -> tuple:
    """The loss with pairs of any kind and scores that are left out, from log-sums and means over positives.

    Behind it the means of rows; and if (i, i) is the one positive of row i, and biases do not count, what
    `_accuracies` takes.
    """
    a, b, pairing, columns, limits, _ = inputs
    by_row, limited = pairing.kind == "rows", limits[0] is not None
    left_out = pairing.x_ids is not None and (ignore or pairing.kind == "listed")
    if options.epsilon and (left_out or limited):
        raise ValueError(f"label_smoothing: expected 0 where scores may be left out, got {options.epsilon}")
    if options.reduction == "none" and not by_row and columns:
        raise ValueError('reduction: expected "sum" or "mean" with pairs and symmetric=True, got "none"')
    kappa = kappa.tensor.exp() if isinstance(kappa, _checks.Logarithm) else kappa
    ids = (pairing.x_ids, pairing.y_ids) if left_out or limited else (None, None)
    listed = (None, None) if pairing.listed is None else pairing.listed[:2]
    mask = Mask(by_row, left_out, listed[0], listed[1], *limits)
    selection = Selection(columns, False, ids[0], ids[1], y_bias, *mask)
    row_max, row_log, col_max, col_log, positive_logit = paired_logsumexp(a, b, kappa, selection)
    count, mean_bias = a.shape[0], None if y_bias is None else y_bias.mean()

    def direction(top, log, means: PositiveMeans, others: Tensor, anchors: Tensor, bias) -> tuple[Tensor, Tensor]:
        """(the sum of the terms, or with "none" the terms; how many there are)"""
        target = kappa * means.score if means.bias is None else kappa * means.score + means.bias
        if options.epsilon:
            uniform = kappa * mean_scores(anchors, others)
            target = torch.lerp(target, uniform if bias is None else uniform + bias, options.epsilon)
        terms = (top - target) + log
        if means.present is None:
            return terms, terms.new_full((), terms.shape[0])
        return torch.where(means.present, terms, 0), means.present.sum()

    positives = partial(positive_means, a, b, pairing, not ignore)
    row_means = positives(True, y_bias)
    to_diagnose: tuple = (row_means,)
    if by_row and y_bias is None and (ignore or pairing.x_ids is None):
        to_diagnose = row_means, positive_logit, row_max, col_max
    terms, size = direction(row_max, row_log, row_means, b, a, mean_bias)
    if columns:
        anchors = b[:count] if by_row else b
        col_max, col_log = (t[:count] if by_row else t for t in (col_max, col_log))
        col_terms, col_size = direction(col_max, col_log, positives(False), a, anchors, None)
        if by_row:
            terms = (terms + col_terms) / 2
        elif options.reduction == "mean":
            return (terms.sum() / size.clamp_min(1) + col_terms.sum() / col_size.clamp_min(1)) / 2, *to_diagnose
        else:
            return (terms.sum() + col_terms.sum()) / 2, *to_diagnose
    if options.reduction == "none":
        return terms, *to_diagnose
    return (terms.sum() / size.clamp_min(1) if options.reduction == "mean" else terms.sum()), *to_diagnose


class InfoNCELoss(ScaledLoss):
    """:func:`info_nce_loss` as a module with a scale that is learned through its logarithm, as in CLIP.

    Args:
        scale: the initial κ, or the constant one.
        learnable: whether ``log_scale`` is a parameter.
        max_scale: the largest κ, 100 in CLIP; None: any. There the gradient of ``log_scale`` is zero only where a step
            would raise it further.
        label_smoothing, symmetric, same_id, false_negative_margin, reduction: as in :func:`info_nce_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this module's).
        normalize, diagnostics: as in the function.
        device, dtype: of ``log_scale``.

    Attributes:
        log_scale: scalar parameter, or buffer if not learnable; it stays fp32 when the module is cast to 16 bits.
    """

    def __init__(
        self,
        scale: float = 1 / 0.07,
        learnable: bool = True,
        label_smoothing: float = 0.0,
        symmetric: bool = True,
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
        self.label_smoothing = _checks.fraction(label_smoothing, "label_smoothing")
        _checks.flag(symmetric, "symmetric")
        _checks.reduction(reduction)
        check_metric(metric)
        _checks.flag(normalize, "normalize")
        _checks.flag(diagnostics, "diagnostics")
        self.normalize, self.diagnostics = normalize, diagnostics
        _checks.choice(same_id, "same_id", SAME_ID)
        self.same_id = same_id
        self.false_negative_margin = _checks.optional_non_negative(false_negative_margin, "false_negative_margin")
        self._learn_scale(scale, learnable, max_scale, device, dtype)
        self.symmetric, self.reduction, self.metric = symmetric, reduction, metric

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_ids: Tensor | None = None,
        y_ids: Tensor | None = None,
        pairs: str | Tensor | None = None,
        *,
        y_bias: Tensor | None = None,
        scale: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of x [N, D] and y [M, D]; ``scale`` in place of the module's own; see :func:`info_nce_loss`."""
        return info_nce_loss(
            x,
            y,
            scale=self._kappa(scale),
            pairs=pairs,
            x_ids=x_ids,
            y_ids=y_ids,
            same_id=self.same_id,
            y_bias=y_bias,
            false_negative_margin=self.false_negative_margin,
            label_smoothing=self.label_smoothing,
            symmetric=self.symmetric,
            reduction=self.reduction,
            metric=self.metric,
            normalize=self.normalize,
            diagnostics=self.diagnostics,
        )

    def extra_repr(self) -> str:
        learnable = isinstance(self.log_scale, nn.Parameter)
        parts = [f"learnable={learnable}", f"max_scale={self.max_scale}", f"label_smoothing={self.label_smoothing}"]
        parts.append(f"symmetric={self.symmetric}")
        return ", ".join([*parts, f"reduction={self.reduction!r}"])


__all__ = ["InfoNCELoss", "info_nce_loss"]
