"""The projection, the scores and their statistics, defined on the stored matrix."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # smallest norm divided by, as in torch.nn.functional.normalize


class HardestNegatives(NamedTuple):
    """Best-scoring negative of every row and column; index -1 (and score -inf) where there is none."""

    row_score: Tensor  # [N]
    row_index: Tensor  # [N] int64, a row of b
    col_score: Tensor  # [M]
    col_index: Tensor  # [M] int64, a row of a


def accumulate(t: Tensor) -> Tensor:
    """fp16 and bf16 as fp32 (an exact conversion); fp32 and fp64 unchanged."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def project(
    x: Tensor,
    diag: Tensor | None = None,
    blocks: Tensor | None = None,
    *,
    permutation: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """``p = x W`` with ``W = diag(w) + blockdiag(B)``; see :func:`gssf_kernels.project`."""
    wide = accumulate(x)
    if normalize:
        wide = F.normalize(wide, dim=-1, eps=EPS)
    p = torch.zeros_like(wide) if (diag is not None or blocks is not None) else wide
    if diag is not None:
        p = p + wide * accumulate(diag)
    if blocks is not None:
        groups, width, _ = blocks.shape
        grouped = wide if permutation is None else wide[..., permutation]
        mixed = torch.einsum("...gk,gkc->...gc", grouped.unflatten(-1, (groups, width)), accumulate(blocks))
        mixed = mixed.flatten(-2)
        p = p + (mixed if permutation is None else mixed[..., torch.argsort(permutation)])
    return p.to(x.dtype)


def similarity(
    x: Tensor,
    y: Tensor,
    diag: Tensor | None = None,
    blocks: Tensor | None = None,
    *,
    permutation: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """``s = x W yᵀ [N, M]``; see :func:`gssf_kernels.similarity`."""
    return project(x, diag, blocks, permutation=permutation, normalize=normalize) @ project(y, normalize=normalize).mT


def scores(a: Tensor, b: Tensor) -> Tensor:
    """``s = a bᵀ [N, M]``, in fp32 (fp64 for fp64)."""
    return accumulate(a) @ accumulate(b).mT


def positives(a: Tensor, b: Tensor, a_ids: Tensor | None = None, b_ids: Tensor | None = None) -> Tensor:
    """``[N, M]`` bool: the pairs (i, i) and those of equal ids, which are never negatives."""
    same = torch.eye(a.shape[0], b.shape[0], dtype=torch.bool, device=a.device)
    rows, cols = (b_ids if a_ids is None else a_ids), (a_ids if b_ids is None else b_ids)
    return same if rows is None or cols is None else same | (rows[:, None] == cols[None, :])


def best(masked: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum and its index along dim; -1 where nothing is above -inf, and -inf too where there is nothing."""
    if masked.shape[dim] == 0:
        score = masked.new_full((masked.shape[1 - dim],), -torch.inf)
        return score, torch.full_like(score, -1, dtype=torch.int64)
    score, index = masked.max(dim)
    return score, torch.where(score == -torch.inf, -1, index)


def hardest_negatives(
    a: Tensor, b: Tensor, *, a_ids: Tensor | None = None, b_ids: Tensor | None = None
) -> HardestNegatives:
    """Row and column maxima of ``s`` over negatives; see :func:`gssf_kernels.hardest_negatives`."""
    masked = scores(a, b).masked_fill(positives(a, b, a_ids, b_ids), -torch.inf)
    return HardestNegatives(*best(masked, 1), *best(masked, 0))


def pair_scores(a: Tensor, b: Tensor, index: Tensor | None = None) -> Tensor:
    """``s_i = a_i · b_index[i]`` [N]; see :func:`gssf_kernels.pair_scores`."""
    if index is None:
        index = torch.arange(a.shape[0], device=a.device)
    if b.shape[0] == 0:
        return (accumulate(a) * 0).sum(-1) - torch.inf
    picked = (accumulate(a) * accumulate(b)[index.clamp_min(0)]).sum(-1)
    return torch.where(index < 0, -torch.inf, picked)


def weighted_sums(grad: Tensor, starts: Tensor, ends: Tensor, source: Tensor, count: int) -> Tensor:
    """``Σ_{e: starts_e = i} grad_e source[ends_e]`` [count, D], in the order of the edges; a zero edge adds nothing.

    Edges that are none stay, with a term of 0: how many there are is not looked at, which would wait for a GPU.
    """
    source = accumulate(source)
    sums = source.new_zeros(count, source.shape[1])
    if count == 0 or source.shape[0] == 0:
        return sums
    keep = (starts >= 0) & (ends >= 0) & (grad != 0)
    terms = torch.where(keep[:, None], grad[:, None].to(source.dtype) * source[ends.clamp_min(0)], 0)
    return sums.index_put_((starts.clamp_min(0),), terms, accumulate=True)


def relative_negatives(
    a: Tensor,
    b: Tensor,
    threshold: Tensor,
    *,
    beta: float | None,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GOAL's ``(r⁻ of the rows [N], r⁻ of the columns [M])``; see :mod:`gssf_kernels.ops.relative`."""
    masked = scores(a, b).masked_fill(positives(a, b, a_ids, b_ids), -torch.inf)
    return mean_distance(masked, threshold, beta), mean_distance(masked.mT, threshold, beta)


def mean_distance(masked: Tensor, threshold: Tensor, beta: float | None) -> Tensor:
    """``masked [N, K]``, -inf at positives -> [N]: mean distance of the close negatives to the hardest one."""
    if masked.shape[1] == 0:
        return masked.new_zeros(masked.shape[0])
    hardest, place = masked.max(1, keepdim=True)  # [N, 1]
    close = ~(masked < threshold) & (masked != -torch.inf)  # NaN is close to everything
    close = close & (torch.arange(masked.shape[1], device=masked.device) != place)
    if beta is None:
        close = close & (masked != hardest)  # the authors' divisor leaves out exact ties, whose term is 0
        terms = hardest - masked
    else:
        terms = torch.exp(beta * (masked - hardest))
    return torch.where(close, terms, 0).sum(1) / close.sum(1).clamp_min(1)
