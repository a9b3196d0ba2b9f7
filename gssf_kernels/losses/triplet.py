"""Triplet loss with hardest negatives in both directions, from one sweep.

    L = Σ_i [m + max_{j ∉ pos(i)} s_ij − s_ii]₊ + Σ_j [m + max_{i ∉ pos(j)} s_ij − s_jj]₊,     s = x yᵀ

Source: VSE++, arXiv 1707.05612 (summed, m = 0.2), as in VSE∞, SGRAF and DBL. "all" is its predecessor VSE0, with the
sum over negatives in place of the maximum. "semihard" takes the hardest negative that scores less than the positive
(FaceNet, arXiv 1503.03832), or the hardest if there is none.
"""

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels.diagnostics import diagnose, diagnose_pairs
from gssf_kernels.losses.every_negative import every_negative
from gssf_kernels.ops import anchor_terms, hardest_terms, hinge_terms, paired_hardest_negatives
from gssf_kernels.ops.mining import (
    Mined,
    PairedInputs,
    check_reduction,
    mine,
    pair_terms,
    paired_inputs,
    reduce_listed,
    semihard,
)
from gssf_kernels.ops.pairing import as_list
from gssf_kernels.reference import Diagnostics
from gssf_kernels.similarity import StructuredSimilarity, check_metric, metric_of

NEGATIVES = ("hardest", "all", "semihard")
_NAMES = ("x", "y", "x_ids", "y_ids")


def triplet_loss(
    x: Tensor,
    y: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "hardest",
    pairs: str | Tensor | None = None,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    symmetric: bool = True,
    false_negative_margin: float | None = None,
    reduction: str = "sum",
    normalize: bool = False,
    metric: StructuredSimilarity | None = None,
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Triplet loss of paired embeddings, ``Σ [m + negative − positive]₊`` over the pairs, in both directions.

        Σ_{(i, j) ∈ P} [m + n_i − s_ij]₊ + [m + n'_j − s_ij]₊

    n_i is the hardest negative of row i of x, n'_j that of row j of y. A pair is never a negative, nor is a score of
    equal id. Where an anchor has no negative the term is 0. Scores are the plain products ``x yᵀ`` (normalise first),
    or with ``metric`` its structured similarity.

    Args:
        x: [N, D] float.
        y: [M, D] of x's dtype and device. M >= N without ``pairs``; then rows of y past N are further negatives.
        margin: m, a finite number >= 0, in units of the score.
        negatives: "hardest", "all" or "semihard". "hardest" and "all" are sweeps that never store the N x M matrix; for
            their memory see :func:`~gssf_kernels.hardest_negatives` and :func:`~gssf_kernels.sum_scores`. So is
            "semihard", by two sweeps: the hardest negative that scores less than the pair, or the hardest if there is
            none. With ``pairs``, "all" and "semihard" list the pairs of equal id and synchronise with the GPU. The
            second sweep of "semihard" compares with up to 16 pairs of each anchor; more pairs take further sweeps.
        pairs: P. None: (i, i), row i of x and row i of y. "ids": every (i, j) of equal id, so that pictures and their
            captions need no repeated rows; (i, i) is then nothing special. Or a tensor [P, 2] of integers, (row of x,
            row of y) each: exactly these; a pair that is listed again counts once.
        x_ids: [N] integers. If N = M, the ids of one input serve both.
        y_ids: [M] integers.
        symmetric: False leaves the second term out. Columns then cost nothing, as for rows of one rank against those of
            all.
        false_negative_margin: >= 0. A negative that scores more than its anchor's lowest positive score plus this is
            left out, as a likely false negative (Qwen3-Embedding); an anchor without a positive leaves nothing out.
        reduction: "sum", "mean" (the sum over the number of pairs) or "none": [N], with listed pairs [P], with
            pairs="ids" (and symmetric=False) [N], the sum of each row's pairs.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare x and y by. The result is the same as with
            ``metric.factors(x, y)`` in place of x and y. With "hardest" and no further option the factors live only
            while the forward runs, and x and y are all of N x D that is kept for the backward.
        normalize: compare by cosine: divide the rows by their L2 norms first, in the same pass as a metric would.
        diagnostics: return ``(loss, Diagnostics)``; see :mod:`gssf_kernels.diagnostics`. "hardest" has the statistics
            that they need; "all" and "semihard" take a further sweep.

    Returns:
        a scalar, or a vector for "none"; fp32 (fp64 for fp64). No pair gives a differentiable 0. NaN and Inf
        in the inputs propagate. Differentiable once.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, ``margin``, ``negatives``, ``reduction`` or (on the CPU) a pair is out of range.

    Source: VSE++, arXiv 1707.05612; several positives for each anchor are ours.
    """
    margin = _checks.non_negative(margin, "margin")
    _checks.choice(negatives, "negatives", NEGATIVES)
    metric = metric_of(metric, normalize, "triplet_loss", x, y)
    _checks.flag(diagnostics, "diagnostics")
    _checks.flag(symmetric, "symmetric")
    check_reduction(reduction, pairs, symmetric)
    if negatives == "hardest" and pairs is None and symmetric and false_negative_margin is None:
        return _paired(x, y, margin, x_ids, y_ids, reduction, metric, diagnostics)
    inputs = paired_inputs(
        x,
        y,
        pairs,
        x_ids,
        y_ids,
        metric=metric,
        symmetric=symmetric,
        false_negative_margin=false_negative_margin,
        scores=negatives == "all",
        mined=negatives == "hardest",
    )
    mined = None
    if negatives == "hardest":
        mined = mine(inputs)
        loss = pair_terms(inputs, mined, "hinge", [margin], reduction)
    elif negatives == "semihard":
        loss, mined = _semihard(inputs, margin, reduction)
    else:
        loss = every_negative(inputs, margin, reduction)
    if not diagnostics:
        return loss
    if mined is None:
        with torch.no_grad():
            mined = mine(inputs)
    return loss, diagnose_pairs(x, y, margin, inputs, mined)


def _semihard(inputs: PairedInputs, margin: float, reduction: str) -> tuple[Tensor, Mined]:
    by_ids = inputs.pairing.kind == "ids"
    inputs = inputs._replace(pairing=as_list(inputs.pairing))
    positive_score, row, col, mined = semihard(inputs)
    listed = inputs.pairing.listed
    if listed is None:
        return anchor_terms(positive_score, row, col, "hinge", [margin], reduction), mined
    terms = anchor_terms(positive_score, row, col, "hinge", [margin], "none")
    return reduce_listed(terms, listed, reduction, inputs.a.shape[0] if by_ids else None), mined


def _paired(x, y, margin, x_ids, y_ids, reduction, metric, diagnostics):
    """Hardest negatives of pairs (i, i), both directions: nothing of N x D is kept but x and y."""
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
        margin, negatives, reduction, symmetric, false_negative_margin: as in :func:`triplet_loss`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` to compare by (its parameters become this
            module's). None: the scores are x yᵀ.
        normalize: as in the function.
        warmup: the number of warm-up steps, calls in training mode; only for negatives="hardest". During warm-up the
            loss is ``(1 − r) L_all + r L_hardest`` with r = step / warmup, step = 0, 1, …, and afterwards
            ``L_hardest``. A step of warm-up is slower: L_all takes three products, L_hardest one. A module inside
            torch.compile stays slower until the next call of ``train()``, for example at the start of an epoch. In
            evaluation mode, and without gradients, the loss is that of the next step, and the step does not change. The
            step is the buffer ``step`` and part of the state_dict; a state_dict without it loads too.
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
        symmetric: bool = True,
        false_negative_margin: float | None = None,
        warmup: int = 0,
        diagnostics: bool = False,
        normalize: bool = False,
    ):
        super().__init__()
        self.margin = _checks.non_negative(margin, "margin")
        _checks.choice(negatives, "negatives", NEGATIVES)
        _checks.reduction(reduction)
        check_metric(metric)
        _checks.flag(normalize, "normalize")
        self.normalize = normalize
        _checks.whole(warmup, "warmup", 0)
        if warmup and negatives != "hardest":
            raise ValueError(f"warmup: expected 0 with negatives={negatives!r} (it leads to 'hardest'), got {warmup}")
        _checks.flag(diagnostics, "diagnostics")
        _checks.flag(symmetric, "symmetric")
        self.symmetric = symmetric
        self.false_negative_margin = _checks.optional_non_negative(false_negative_margin, "false_negative_margin")
        self.negatives, self.reduction, self.metric = negatives, reduction, metric
        self.warmup, self.diagnostics = warmup, diagnostics
        if warmup:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
            self._steps_seen, self._warm = 0, False
            self.register_load_state_dict_post_hook(_read_step)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_ids: Tensor | None = None,
        y_ids: Tensor | None = None,
        pairs: str | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of x [N, D] and y [M, D]; see :func:`triplet_loss`."""
        inputs = x, y, x_ids, y_ids, pairs
        result = self._loss(*inputs, self.negatives, self.diagnostics)
        if not self.warmup or self._warm or self.negatives != "hardest":
            return result
        hardest, *diagnostics = result if self.diagnostics else (result,)
        share = (self.step.to(hardest.dtype) / self.warmup).clamp(max=1)
        loss = (1 - share) * self._loss(*inputs, "all", False) + share * hardest
        if self.training and torch.is_grad_enabled():  # an evaluation without eval() is no step
            self.step.add_(1)
            if not torch.compiler.is_compiling():  # it would compile again for every value of the count
                self._steps_seen += 1
                self._warm = self._steps_seen >= self.warmup
        return (loss, *diagnostics) if self.diagnostics else loss

    def set_negatives(self, negatives: str) -> None:
        """Choose "hardest", "all" or "semihard" from now on, for a schedule of your own.

        Raises:
            ValueError: no such negatives, or others than "hardest" during a warm-up, which has its own schedule.
        """
        _checks.choice(negatives, "negatives", NEGATIVES)
        if self.warmup and not self._warm and negatives != "hardest":
            raise ValueError(
                f"negatives: expected 'hardest' during the {self.warmup} steps of warm-up, got {negatives!r}"
            )
        self.negatives = negatives

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """A state with a step loads into a loss without warm-up, and one without a step leaves the step as it is."""
        key = prefix + "step"
        if not self.warmup:
            state_dict.pop(key, None)
        elif key not in state_dict:
            state_dict[key] = self.step
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.warmup:
            _read_step(self)
        return self

    def _loss(self, x, y, x_ids, y_ids, pairs, negatives, diagnostics):
        return triplet_loss(
            x,
            y,
            margin=self.margin,
            negatives=negatives,
            pairs=pairs,
            x_ids=x_ids,
            y_ids=y_ids,
            symmetric=self.symmetric,
            false_negative_margin=self.false_negative_margin,
            reduction=self.reduction,
            metric=self.metric,
            normalize=self.normalize,
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
