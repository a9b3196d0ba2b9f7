"""Scores of pictures and captions from their fragments: regions [N, R, D] and words [M, T, D].

    late interaction     score[n, m] = Σ_t max_r s(v_r, w_t), or the mean over t
    attention pooling    c_t = Σ_r softmax_r(λ s(v_r, w_t)) v_r,      score[n, m] = mean_t s(c_t, w_t)

s is a product, a cosine or a structured similarity. No tensor [N, M, R, T] is stored.

Sources: ColBERT (arXiv 2004.12832) and SCAN's max pooling (arXiv 1803.08024) for late interaction, SCAN for attention
pooling. The structured similarity between fragments is GSSF's (arXiv 2410.15266).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels._library import outside_autocast
from gssf_kernels.ops.attention_pooling import attention_pooling_of_factors
from gssf_kernels.ops.late_interaction import MOST_REGIONS, late_interaction_of_factors
from gssf_kernels.project import project
from gssf_kernels.reference import accumulate
from gssf_kernels.similarity import StructuredSimilarity, metric_of

REDUCE = ("mean", "sum")


def late_interaction(
    regions: Tensor,
    words: Tensor,
    *,
    regions_mask: Tensor | None = None,
    words_mask: Tensor | None = None,
    reduce: str = "mean",
    metric: StructuredSimilarity | None = None,
    normalize: bool = False,
) -> Tensor:
    """``score[n, m] = mean_t max_r s(v_nr, w_mt)``: for each word its best region, over all pictures and captions.

    Args:
        regions: v [N, R, D] float, R < 32,768 regions of each of N pictures.
        words: w [M, T, D] of regions' dtype and device.
        regions_mask: [N, R] bool, True for regions that take part; None: all. What is masked is not read as a number:
            it may be NaN.
        words_mask: [M, T] bool, the same for words.
        reduce: "mean" or "sum" over the words that take part.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` for s; its weights are applied to the regions.
        normalize: s is the cosine; not with a metric, which has its own. With neither s is the product v · w.

    Returns:
        [N, M] fp32 (fp64 for fp64). A picture without regions and a caption without words score 0, without gradient.
        NaN propagates. Differentiable once in regions, words and the metric; among equal best regions the first gets
        the gradient. Deterministic.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product of all regions with all words; the backward reads one region for each word. Extra memory: copies
    of regions and words; for the backward 2 bytes for each word and picture. What a metric makes of regions and words
    has their dtype.

    Source: the docstring of this file.
    """
    return scores_of_fragments("late_interaction", regions, words, regions_mask, words_mask, reduce, metric, normalize)


def scores_of_fragments(
    name: str, regions, words, regions_mask, words_mask, reduce, metric, normalize, keep: bool = True
) -> Tensor:
    """:func:`late_interaction` for the function ``name``. keep: whether best regions are stored for a backward."""
    _checks.choice(reduce, "reduce", REDUCE)
    inputs = _inputs(name, regions, words, regions_mask, words_mask, metric, normalize)
    if inputs.regions.shape[1] > MOST_REGIONS:
        raise ValueError(f"regions: expected at most {MOST_REGIONS:,} regions, got {list(inputs.regions.shape)}")
    a, b = inputs.regions, inputs.words
    if inputs.metric is not None:
        rows, columns = inputs.metric.factors(a.flatten(0, 1), b.flatten(0, 1))
        a, b = rows.view(a.shape), columns.view(b.shape)
    return late_interaction_of_factors(a, b, inputs.regions_mask, inputs.words_mask, reduce == "mean", keep)


def attention_pooling(
    regions: Tensor,
    words: Tensor,
    *,
    over: str = "regions",
    scale: float = 9.0,
    regions_mask: Tensor | None = None,
    words_mask: Tensor | None = None,
    metric: StructuredSimilarity | None = None,
) -> Tensor:
    """Score of each picture and caption by attention from the fragments of one to those of the other.

        over="regions":   c_t = Σ_r softmax_r(λ s(v_r, w_t)) v_r,      score = mean_t s(c_t, w_t)
        over="words":     c_r = Σ_t softmax_t(λ s(v_r, w_t)) w_t,      score = mean_r s(v_r, c_r)

    Args:
        regions: v [N, R, D] float.
        words: w [M, T, D] of regions' dtype and device.
        over: what the softmax is over, "regions" (each word attends to regions) or "words".
        scale: λ > 0; SCAN takes 9 over regions and 4 over words.
        regions_mask: [N, R] bool, True for regions that take part; None: all. What is masked may be NaN.
        words_mask: [M, T] bool, the same for words.
        metric: a :class:`~gssf_kernels.StructuredSimilarity` for s; None: the cosine.

    Returns:
        [N, M] fp32 (fp64 for fp64). A picture without regions and a caption without words score 0, without gradient.
        NaN propagates. Differentiable once in regions, words and the metric.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: two products of all regions with all words; the backward six. Extra memory: copies of regions and words, and
    what one block of pictures and captions needs, about 20 MiB on the CPU and 300 MiB on a GPU (half as much again in
    the backward, which computes each block again). In plain PyTorch and fp32 (fp64 for fp64) on every device.

    Source: SCAN, arXiv 1803.08024; with a metric ours.
    """
    _checks.choice(over, "over", ("regions", "words"))
    scale = _checks.positive(scale, "scale")
    inputs = _inputs("attention_pooling", regions, words, regions_mask, words_mask, metric, metric is None)
    of = inputs.metric
    assert of is not None
    v, w = accumulate(inputs.regions), accumulate(inputs.words)
    diag, blocks = (None if t is None else t.to(v.dtype) for t in of.weights)
    masks = inputs.regions_mask, inputs.words_mask
    order, cosine = of.permutation, of.normalize
    with outside_autocast(v.device):
        if over == "regions":
            transposed = None if blocks is None else blocks.mT.contiguous()  # the words are multiplied by Wᵀ
            unit = project(v, normalize=cosine)
            asking = project(w, diag, transposed, permutation=order, normalize=cosine)
            return attention_pooling_of_factors(v, unit, asking, *masks, scale, cosine)
        unit, asking = project(w, normalize=cosine), project(v, diag, blocks, permutation=order, normalize=cosine)
        return attention_pooling_of_factors(w, unit, asking, masks[1], masks[0], scale, cosine).mT


class _Inputs(NamedTuple):
    regions: Tensor
    words: Tensor
    regions_mask: Tensor | None
    words_mask: Tensor | None
    metric: StructuredSimilarity | None


def _inputs(name: str, regions, words, regions_mask, words_mask, metric, normalize) -> _Inputs:
    """The inputs, checked, in the dtype of autocast. Where something normalises or mixes rows, masked ones are 0."""
    _checks.floating(regions, "regions", "[N, R, D]")
    _checks.floating(words, "words", "[M, T, D]")
    _checks.alike(words, "words", regions, "regions")
    dim = regions.shape[2]
    if words.shape[2] != dim:
        raise ValueError(f"words: expected the {dim} channels of regions, got {list(words.shape)}")
    if dim == 0:
        raise ValueError(f"regions: expected at least one channel, got {list(regions.shape)}")
    for mask, of_what, t in ((regions_mask, "regions_mask", regions), (words_mask, "words_mask", words)):
        if mask is not None:
            _checks.mask(mask, of_what, t.shape[:2], t.device)
    unmasked = [t.flatten(0, 1) for t, mask in ((regions, regions_mask), (words, words_mask)) if mask is None]
    metric = metric_of(metric, normalize, name, *unmasked)
    if metric is not None:
        diag, blocks = metric.weights
        _checks.metric_weights(regions, diag, blocks, metric.permutation, "regions")
    regions, words = _checks.autocast(regions, words)
    if metric is not None:
        regions, words = (
            t if mask is None else torch.where(mask[:, :, None], t, 0)
            for t, mask in ((regions, regions_mask), (words, words_mask))
        )
    return _Inputs(regions, words, regions_mask, words_mask, metric)


__all__ = ["attention_pooling", "late_interaction"]
