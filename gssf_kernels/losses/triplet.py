"""Triplet loss with hardest negatives in both directions, from one sweep.

    L = Σ_i [m + max_{j ∉ pos(i)} s_ij − s_ii]₊ + Σ_j [m + max_{i ∉ pos(j)} s_ij − s_jj]₊,     s = x yᵀ

Source: VSE++, arXiv 1707.05612 (summed, m = 0.2), as in VSE∞, SGRAF and DBL. "all" is its predecessor VSE0, with the
sum over negatives in place of the maximum. "semihard" takes the hardest negative that scores less than the positive
(FaceNet, arXiv 1503.03832), or the hardest if there is none.
"""

import torch
from torch import Tensor, nn

from gssf_kernels import _checks, reference
from gssf_kernels._library import outside_autocast
from gssf_kernels.diagnostics import diagnose
from gssf_kernels.losses.every_negative import every_negative
from gssf_kernels.ops import hardest_terms, hinge_terms, paired_hardest_negatives
from gssf_kernels.reference import Diagnostics
from gssf_kernels.similarity import StructuredSimilarity, check_metric, paired_factors

NEGATIVES = ("hardest", "all", "semihard")
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
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Triplet loss of paired embeddings, ``Σ [m + negative − positive]₊`` over rows and columns.

    Row i of x pairs with row i of y. Equal ids are positives too, and so never negatives. An anchor without a negative
    contributes 0. Rows of y past N are extra negatives, but no anchors. Scores are the plain products ``x yᵀ``
    (normalise first), or with ``metric`` its structured similarity.

    Args:
        x: [N, D] float, anchors.
        y: [M, D] of x's dtype and device, M >= N.
        margin: m, a finite number >= 0, in units of the score.
        negatives: "hardest", "all" or "semihard". "hardest" and "all" are sweeps that never store the N x M matrix; for
            their memory see :func:`~gssf_kernels.hardest_negatives` and :func:`~gssf_kernels.sum_scores`. "semihard" is
            plain PyTorch and stores it.
        x_ids: [N] integers. If N = M, the ids of one input serve both.
        y_ids: [M] integers.
        reduction: "sum", "mean" (the sum over N) or "none" ([N]: row term i + column term i).
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by. The result is the same as with
            ``metric.factors(x, y)`` in place of x and y. With "hardest" the factors live only while the forward runs,
            and x and y are all of N x D that is kept for the backward.
        diagnostics: return ``(loss, Diagnostics)``; see :mod:`gssf_kernels.diagnostics`. "hardest" has the statistics
            that they need; "all" and "semihard" take a further sweep.

    Returns:
        a scalar, or [N] for "none"; fp32 (fp64 for fp64). N = 0 gives a differentiable 0. NaN and Inf
        in the inputs propagate. Differentiable once.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, ``margin``, ``negatives`` or ``reduction`` is out of range.

    Source: VSE++, arXiv 1707.05612.
    """
    margin = _checks.non_negative(margin, "margin")
    _checks.choice(negatives, "negatives", NEGATIVES)
    _checks.reduction(reduction)
    check_metric(metric)
    _checks.flag(diagnostics, "diagnostics")
    if negatives != "hardest":
        a, b, positive_score = (x, y, None) if metric is None else paired_factors(metric, x, y, negatives == "all")
        a, b = _checks.autocast(a, b)
        _checks.embeddings(a, b, *_NAMES[:2])
        x_ids, y_ids = _checks.ids(x_ids, y_ids, a, b, *_NAMES[2:])
        if negatives == "all":
            loss = every_negative(a, b, margin, x_ids, y_ids, reduction, positive_score)
        else:
            with outside_autocast(a.device):
                loss = reference.triplet_loss(
                    a, b, margin=margin, negatives=negatives, x_ids=x_ids, y_ids=y_ids, reduction=reduction
                )
        if not diagnostics:
            return loss
        positive_score, hardest = paired_hardest_negatives(a.detach(), b.detach(), x_ids, y_ids, names=_NAMES)
        return loss, diagnose(x, y, margin, positive_score, hardest)
    if metric is None:
        positive_score, hardest = paired_hardest_negatives(x, y, x_ids, y_ids, names=_NAMES)
        loss = hinge_terms(positive_score, hardest.row_score, hardest.col_score, margin, reduction)
    else:
        options = ("hinge", [margin], reduction)
        loss, positive_score, hardest = hardest_terms(x, y, x_ids, y_ids, *options, names=_NAMES, metric=metric)
    return (loss, diagnose(x, y, margin, positive_score, hardest)) if diagnostics else loss


class TripletLoss(nn.Module):
    """:func:`triplet_loss` as a module; with ``metric``, on its structured similarity.

    Args:
        margin, negatives, reduction: as in :func:`triplet_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this
            module's). None: the scores are x yᵀ.
        warmup: the number of warm-up steps, calls in training mode; only for negatives="hardest". During warm-up the
            loss is ``(1 − r) L_all + r L_hardest`` with r = step / warmup, step = 0, 1, …, and afterwards
            ``L_hardest``. A step of warm-up is slower: L_all takes three products, L_hardest one. A module inside
            torch.compile stays slower until the next call of ``train()``, for example at the start of an epoch. In
            evaluation mode the loss is that of the next step, and the step does not change. The step is the buffer
            ``step`` and part of the state_dict.
        diagnostics: return ``(loss, Diagnostics)``; during warm-up they are those of the hardest negatives.

    Raises:
        TypeError, ValueError: the setting that is wrong, what was expected and what came.

    Why warm-up: the hardest negatives of an untrained model are noise, and training on them can collapse the embeddings
    into one point. VSE∞ (arXiv 2011.04305) takes all negatives for one epoch. The gradual change is ours.
    """

    step: Tensor

    def __init__(
        self,
        margin: float = 0.2,
        negatives: str = "hardest",
        reduction: str = "sum",
        metric: StructuredSimilarity | None = None,
        *,
        warmup: int = 0,
        diagnostics: bool = False,
    ):
        super().__init__()
        self.margin = _checks.non_negative(margin, "margin")
        _checks.choice(negatives, "negatives", NEGATIVES)
        _checks.reduction(reduction)
        check_metric(metric)
        _checks.whole(warmup, "warmup", 0)
        if warmup and negatives != "hardest":
            raise ValueError(f"warmup: expected 0 with negatives={negatives!r} (it leads to 'hardest'), got {warmup}")
        _checks.flag(diagnostics, "diagnostics")
        self.negatives, self.reduction, self.metric = negatives, reduction, metric
        self.warmup, self.diagnostics = warmup, diagnostics
        if warmup:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
            self._steps_seen, self._warm = 0, False
            self.register_load_state_dict_post_hook(_read_step)

    def forward(
        self, x: Tensor, y: Tensor, x_ids: Tensor | None = None, y_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of x [N, D] and y [M, D], M >= N; see :func:`triplet_loss`."""
        result = self._loss(x, y, x_ids, y_ids, self.negatives, self.diagnostics)
        if not self.warmup or self._warm:
            return result
        hardest, *diagnostics = result if self.diagnostics else (result,)
        share = (self.step.to(hardest.dtype) / self.warmup).clamp(max=1)
        loss = (1 - share) * self._loss(x, y, x_ids, y_ids, "all", False) + share * hardest
        if self.training:
            self.step.add_(1)
            if not torch.compiler.is_compiling():  # it would compile again for every value of the count
                self._steps_seen += 1
                self._warm = self._steps_seen >= self.warmup
        return (loss, *diagnostics) if self.diagnostics else loss

    def train(self, mode: bool = True):
        super().train(mode)
        if self.warmup:
            _read_step(self)
        return self

    def _loss(self, x, y, x_ids, y_ids, negatives, diagnostics):
        return triplet_loss(
            x,
            y,
            margin=self.margin,
            negatives=negatives,
            x_ids=x_ids,
            y_ids=y_ids,
            reduction=self.reduction,
            metric=self.metric,
            diagnostics=diagnostics,
        )

    def extra_repr(self) -> str:
        shown = f"margin={self.margin}, negatives={self.negatives!r}, reduction={self.reduction!r}"
        return shown + (f", warmup={self.warmup}" if self.warmup else "")


def _read_step(module: TripletLoss, _incompatible_keys=None) -> None:
    """Set whether warm-up is over, from the buffer. Reading it synchronises, so this is not done at every call."""
    if not module.step.is_meta:
        module._steps_seen = int(module.step)
        module._warm = module._steps_seen >= module.warmup


__all__ = ["TripletLoss", "triplet_loss"]
