"""Triplet loss of the late-interaction scores of pictures and captions.

    Σ_i [m + n_i − s_ii]₊ + [m + n'_i − s_ii]₊,      s_nm = mean_t max_r s(v_nr, w_mt)

The scores [N, M] are the largest tensor that is held. Best regions are computed twice: for all scores in the forward,
and in the backward for those that carry gradient, of which there are at most 3 N with the hardest negatives.
"""

from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels.fragments import REDUCE, scores_of_fragments
from gssf_kernels.losses.from_scores import checked_settings, triplet_from_scores
from gssf_kernels.similarity import StructuredSimilarity, check_metric


def late_interaction_triplet_loss(
    regions: Tensor,
    words: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "hardest",
    regions_mask: Tensor | None = None,
    words_mask: Tensor | None = None,
    reduce: str = "mean",
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    symmetric: bool = True,
    reduction: str = "sum",
    metric: StructuredSimilarity | None = None,
    normalize: bool = False,
) -> Tensor:
    """:func:`~gssf_kernels.triplet_from_scores` of :func:`~gssf_kernels.late_interaction`, in less memory.

    Args:
        regions: [N, R, D] float: picture i pairs with caption i.
        words: [M, T, D] of regions' dtype and device, M >= N; captions past N are further negatives.
        margin, negatives, x_ids, y_ids, symmetric, reduction: as in :func:`~gssf_kernels.triplet_from_scores`; x_ids
            [N] are those of the pictures, y_ids [M] of the captions.
        regions_mask, words_mask, reduce, metric, normalize: as in :func:`~gssf_kernels.late_interaction`.

    Returns:
        a scalar, or with reduction="none" [N]; fp32 (fp64 for fp64). Differentiable once in regions, words and the
        metric.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Extra memory: copies of regions and words, and a few matrices [N, M]; no best regions are kept.

    Source: VSE++, arXiv 1707.05612, on the scores of ColBERT, arXiv 2004.12832, and SCAN, arXiv 1803.08024.
    """
    margin = checked_settings(margin, negatives, symmetric, reduction)
    for t, name, shape in ((regions, "regions", "[N, R, D]"), (words, "words", "[M, T, D]")):
        _checks.floating(t, name, shape)
    if words.shape[0] < regions.shape[0]:
        raise ValueError(
            f"words: expected at least {regions.shape[0]} captions (picture i pairs with caption i), "
            f"got {list(words.shape)}"
        )
    x_ids, y_ids = _checks.ids(x_ids, y_ids, regions, words, "x_ids", "y_ids")
    name = "late_interaction_triplet_loss"
    scores = scores_of_fragments(name, regions, words, regions_mask, words_mask, reduce, metric, normalize, keep=False)
    return triplet_from_scores(
        scores,
        margin=margin,
        negatives=negatives,
        x_ids=x_ids,
        y_ids=y_ids,
        symmetric=symmetric,
        reduction=reduction,
    )


class LateInteractionTripletLoss(nn.Module):
    """:func:`late_interaction_triplet_loss` as a module.

    Args:
        margin, negatives, reduction, metric, reduce, symmetric, normalize: as in :func:`late_interaction_triplet_loss`;
            the metric's parameters become this module's.

    Raises:
        TypeError, ValueError: the setting that is wrong, what was expected and what came.
    """

    def __init__(
        self,
        margin: float = 0.2,
        negatives: str = "hardest",
        reduction: str = "sum",
        metric: StructuredSimilarity | None = None,
        *,
        reduce: str = "mean",
        symmetric: bool = True,
        normalize: bool = False,
    ):
        super().__init__()
        self.margin = checked_settings(margin, negatives, symmetric, reduction)
        _checks.choice(reduce, "reduce", REDUCE)
        _checks.flag(normalize, "normalize")
        check_metric(metric)
        if normalize and metric is not None:
            raise ValueError("normalize: expected False with a metric, which has its own, got True")
        self.negatives, self.reduce, self.metric, self.reduction = negatives, reduce, metric, reduction
        self.symmetric, self.normalize = symmetric, normalize

    def forward(
        self,
        regions: Tensor,
        words: Tensor,
        regions_mask: Tensor | None = None,
        words_mask: Tensor | None = None,
        x_ids: Tensor | None = None,
        y_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of regions [N, R, D] and words [M, T, D]; see :func:`late_interaction_triplet_loss`."""
        return late_interaction_triplet_loss(
            regions,
            words,
            margin=self.margin,
            negatives=self.negatives,
            regions_mask=regions_mask,
            words_mask=words_mask,
            reduce=self.reduce,
            x_ids=x_ids,
            y_ids=y_ids,
            symmetric=self.symmetric,
            reduction=self.reduction,
            metric=self.metric,
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        return (
            f"margin={self.margin}, negatives={self.negatives!r}, reduce={self.reduce!r}, reduction={self.reduction!r}"
        )


__all__ = ["LateInteractionTripletLoss", "late_interaction_triplet_loss"]
