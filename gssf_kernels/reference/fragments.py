"""The definitions of scores between fragments, on tensors [N, M, R, T] and [N, M, T, D].

Formulas and sources: :mod:`gssf_kernels.fragments`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels.reference.statistics import EPS, accumulate, project
from gssf_kernels.reference.triplet import factors, triplet_from_scores


def late_interaction(
    regions: Tensor,
    words: Tensor,
    *,
    regions_mask: Tensor | None = None,
    words_mask: Tensor | None = None,
    reduce: str = "mean",
    metric=None,
    normalize: bool = False,
) -> Tensor:
    """``mean_t max_r s(v_nr, w_mt)`` [N, M]; see :func:`gssf_kernels.late_interaction`."""
    regions, words, v_mask, w_mask = _masked(regions, words, regions_mask, words_mask)
    a, b = (accumulate(t) for t in factors(regions, words, metric, normalize))
    if a.shape[1] == 0:
        return a.new_zeros(a.shape[0], b.shape[0]) + (a.sum() + b.sum()) * 0
    s = torch.einsum("nrd,mtd->nrmt", a, b)
    best = s.masked_fill(~v_mask[:, :, None, None], -torch.inf).max(1).values  # [N, M, T]
    best = torch.where(v_mask.any(1)[:, None, None] & w_mask, best, 0)
    total = best.sum(2)
    return total / w_mask.sum(1).clamp_min(1) if reduce == "mean" else total


def attention_pooling(
    regions: Tensor,
    words: Tensor,
    *,
    over: str = "regions",
    scale: float = 9.0,
    regions_mask: Tensor | None = None,
    words_mask: Tensor | None = None,
    metric=None,
) -> Tensor:
    """Attention from words to regions, or back, [N, M]; see :func:`gssf_kernels.attention_pooling`."""
    v, w, v_mask, w_mask = _masked(regions, words, regions_mask, words_mask)
    v, w = accumulate(v), accumulate(w)
    cosine = metric is None or metric.normalize
    a, b = factors(v, w, metric, metric is None)
    logits = scale * torch.einsum("nrd,mtd->nmrt", a, b)
    pairs = v_mask[:, None, :, None] & w_mask[None, :, None, :]  # [N, M, R, T]
    axis, pooled, asking = (2, v, w) if over == "regions" else (3, w, v)
    attention = torch.where(pairs, logits.exp(), 0)
    if logits.numel():
        shift = logits.masked_fill(~pairs, -torch.inf).detach().amax(axis, keepdim=True)
        attention = torch.where(pairs, (logits - torch.where(shift.isinf(), 0, shift)).exp(), 0)
    attention = attention / attention.sum(axis, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
    if over == "regions":
        context = torch.einsum("nmrt,nrd->nmtd", attention, pooled)
        x, y = context, asking[None]
    else:
        context = torch.einsum("nmrt,mtd->nmrd", attention, pooled)
        x, y = asking[:, None], context
    if metric is not None:
        x = project(x, *metric.weights, permutation=metric.permutation, normalize=metric.normalize)
    elif cosine:
        x = F.normalize(x, dim=-1, eps=EPS)
    y = F.normalize(y, dim=-1, eps=EPS) if cosine else y
    each = (x * y).sum(-1)  # [N, M, T] or [N, M, R]
    taken = (pairs.any(axis) & (w_mask[None] if over == "regions" else v_mask[:, None])).to(each.dtype)
    return torch.where(taken != 0, each, 0).sum(2) / taken.sum(2).clamp_min(1)


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
    metric=None,
    normalize: bool = False,
) -> Tensor:
    """Triplet loss of the scores of fragments; see :func:`gssf_kernels.late_interaction_triplet_loss`."""
    scores = late_interaction(
        regions,
        words,
        regions_mask=regions_mask,
        words_mask=words_mask,
        reduce=reduce,
        metric=metric,
        normalize=normalize,
    )
    return triplet_from_scores(
        scores,
        margin=margin,
        negatives=negatives,
        x_ids=x_ids,
        y_ids=y_ids,
        symmetric=symmetric,
        reduction=reduction,
    )


def _masked(regions: Tensor, words: Tensor, regions_mask, words_mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(regions, words) with 0 where they take no part, and their masks."""
    v_mask, w_mask = (
        torch.ones(t.shape[:2], dtype=torch.bool, device=t.device) if mask is None else mask
        for t, mask in ((regions, regions_mask), (words, words_mask))
    )
    return torch.where(v_mask[:, :, None], regions, 0), torch.where(w_mask[:, :, None], words, 0), v_mask, w_mask
