"""Late interaction of regions a [N, R, D] and words b [M, T, D], without a tensor [N, M, R, T].

    score[n, m] = Σ_t max_r a[n, r] · b[m, t]        or the mean over t

Of each picture and caption, T of its R T scores carry gradient: those of the words' best regions. Their indices are
kept as int16, or computed again in the backward, where only those of pairs with a gradient are needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan, reference
from gssf_kernels._library import Function, distinct, last_derivative, may_keep, register
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.reference import accumulate, maxima

MOST_REGIONS = torch.iinfo(torch.int16).max


class LateInteractionCall(NamedTuple):
    """(scores [N, M], best [N, M, T] int16: the best region of every word, -1 for none; empty without `keep`)."""

    a: Tensor  # [N, R, D]
    b: Tensor  # [M, T, D]
    a_mask: Tensor | None  # [N, R] bool: the regions that take part
    b_mask: Tensor | None  # [M, T] bool: the words that take part
    mean: bool  # over the words that take part, else their sum
    keep: bool


class LateInteractionBackwardCall(NamedTuple):
    """(da [N, R, D], db [M, T, D])."""

    grad_out: Tensor  # [N, M]
    best: Tensor | None  # [N, M, T] int16; None: best regions are computed again where grad_out is not 0
    a: Tensor
    b: Tensor
    a_mask: Tensor | None
    b_mask: Tensor | None
    mean: bool
    needs: list[bool]  # whether a and b need a gradient


def late_interaction_of_factors(
    a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, mean: bool, keep: bool = True
) -> Tensor:
    """The scores [N, M], differentiable once in a and b. keep: whether a backward may read stored indices."""
    a, b = distinct(a, b)
    a_mask, b_mask = distinct(a_mask, b_mask)
    return _LateInteraction.apply(a, b, a_mask, b_mask, mean, keep and may_keep(a, b))[0]


class _LateInteraction(Function):
    call = LateInteractionCall

    @staticmethod
    def forward(*arguments):
        return torch.ops.gssf.late_interaction(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, a_mask, b_mask, ctx.mean, keep = inputs
        best = output[1]
        ctx.mark_non_differentiable(best)
        ctx.save_for_backward(a, b, a_mask, b_mask, best if keep else None)

    @staticmethod
    def backward(ctx, grad_out, _grad_index):
        a, b, a_mask, b_mask, best = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        arguments = (grad_out, best, a, b, a_mask, b_mask, ctx.mean, needs)
        grads = last_derivative(torch.ops.gssf.late_interaction_backward, *arguments)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


def best_regions(a: Tensor, a_mask: Tensor | None, words: Tensor) -> tuple[Tensor, Tensor]:
    """(score, place) [n, W] of the best region in each picture a [n, R, D] for every word [W, D]; -inf and -1."""
    s = accumulate(a) @ words.mT  # [n, R, W]
    return maxima(s if a_mask is None else s.masked_fill(~a_mask[:, :, None], -torch.inf), 1)


def _words(call) -> tuple[Tensor, int]:
    """(all words [M T, D], how many pictures a chunk of their scores has)."""
    words = accumulate(call.b).flatten(0, 1)
    scores = max(call.a.shape[1] * words.shape[0], 1)
    return words, max(plan.chunk_scores(_checks.device_type(call.a)) // scores, 1)


def _late_interaction(call):
    a, b, a_mask, b_mask, mean, keep = call
    (N, R, _), (M, T, _) = a.shape, b.shape
    scores = a.new_zeros(N, M, dtype=accumulation_dtype(a.dtype))
    best = a.new_full((N, M, T) if keep else (0,), -1, dtype=torch.int16)
    if not (N and R and M and T):
        return scores, best
    words, step = _words(call)
    for first in plan.starts(N, step):
        rows = slice(first, first + step)
        mask = None if a_mask is None else a_mask[rows]
        score, place = best_regions(a[rows], mask, words)
        score = score.unflatten(1, (M, T))
        if b_mask is not None:
            score = torch.where(b_mask, score, 0)
        total = score.sum(2)
        scores[rows] = total if mask is None else torch.where(mask.any(1)[:, None], total, 0)
        if keep:
            best[rows] = place.to(torch.int16).unflatten(1, (M, T))
    if mean:
        scores /= T if b_mask is None else b_mask.sum(1).clamp_min(1)
    return scores, best


def _late_interaction_backward(call):
    grad_out, best, a, b, a_mask, b_mask, mean, needs = call
    (N, R, D), (M, T, _) = a.shape, b.shape
    dtype = accumulation_dtype(a.dtype)
    da = torch.zeros_like(a, dtype=dtype) if needs[0] else a.new_empty(0)
    db = torch.zeros_like(b, dtype=dtype) if needs[1] else b.new_empty(0)
    if N and R and M and T:
        words, step = _words(call)
        count = b_mask.sum(1).clamp_min(1) if mean and b_mask is not None else T if mean else 1
        weights = (grad_out.to(dtype) / count)[:, :, None].expand(N, M, T)
        if b_mask is not None:
            weights = torch.where(b_mask, weights, 0)
        word = torch.arange(M * T, device=a.device)
        step = max(step * R // (R + D), 1)  # a row of either side for every word and picture
        for first in plan.starts(N, step):
            rows = slice(first, min(first + step, N))
            if best is None:
                place = best_regions(a[rows], None if a_mask is None else a_mask[rows], words)[1]
            else:
                place = best[rows].flatten(1).long()  # [n, M T]
            regions = a[rows].flatten(0, 1)
            start = torch.arange(0, regions.shape[0], R, device=a.device)[:, None]
            of_region = torch.where(place < 0, -1, start + place).flatten()
            of_word = word.expand_as(place).flatten()
            g = weights[rows].flatten()
            if needs[0]:
                sums = reference.weighted_sums(g, of_region, of_word, words, regions.shape[0])
                da[rows] = sums.view(-1, R, D)
            if needs[1]:
                db += reference.weighted_sums(g, of_word, of_region, regions, M * T).view(M, T, D)
    return da.to(a.dtype), db.to(b.dtype)


def _fake(call):
    N, (M, T, _), dtype = call.a.shape[0], call.b.shape, accumulation_dtype(call.a.dtype)
    best = call.a.new_empty((N, M, T) if call.keep else (0,), dtype=torch.int16)
    return call.a.new_empty(N, M, dtype=dtype), best


def _fake_backward(call):
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((call.a, call.b), call.needs, strict=True))


register(
    "late_interaction",
    LateInteractionCall,
    "(Tensor, Tensor)",
    composite=_late_interaction,
    fake=_fake,
    launcher="late_interaction.late_interaction",
    plans=plan.kernel,
)
register(
    "late_interaction_backward",
    LateInteractionBackwardCall,
    "(Tensor, Tensor)",
    composite=_late_interaction_backward,
    fake=_fake_backward,
    launcher="late_interaction.late_interaction_backward",
    plans=plan.kernel,
)
