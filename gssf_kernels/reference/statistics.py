"""The definitions of the projection, the scores and their row and column statistics, on the stored matrix.

Formulas and sources: the docstrings in :mod:`gssf_kernels.project` and :mod:`gssf_kernels.ops`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # the least norm that rows are divided by, as in torch.nn.functional.normalize


class HardestNegatives(NamedTuple):
    """The highest-scoring negative of every row and column; score -inf and index -1 where there is none."""

    row_score: Tensor  # [N]
    row_index: Tensor  # [N] int64, a row of b
    col_score: Tensor  # [M]
    col_index: Tensor  # [M] int64, a row of a
    pair_score: Tensor | None = None  # [N] of the pairs (i, i), [P] of listed pairs; None for pairs by id


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
    unit = accumulate(x)
    if normalize:
        unit = F.normalize(unit, dim=-1, eps=EPS)
    p = torch.zeros_like(unit) if (diag is not None or blocks is not None) else unit
    if diag is not None:
        p = p + unit * accumulate(diag)
    if blocks is not None:
        permuted = unit if permutation is None else unit[..., permutation]
        mixed = torch.einsum("...gk,gkc->...gc", permuted.unflatten(-1, blocks.shape[:2]), accumulate(blocks))
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


def positives(
    a: Tensor, b: Tensor, a_ids: Tensor | None = None, b_ids: Tensor | None = None, pairs: Tensor | str | None = None
) -> Tensor:
    """``[N, M]`` bool: whether (i, j) is a positive, or of equal ids. Neither is ever a negative.

    Positives are i = j (pairs=None), those of equal ids (pairs="ids"), or the listed ``pairs`` [P, 2].
    """
    n, m = a.shape[0], b.shape[0]
    same = torch.zeros(n, m, dtype=torch.bool, device=a.device)
    if pairs is None:
        same = torch.eye(n, m, dtype=torch.bool, device=a.device)
    elif isinstance(pairs, Tensor):
        same[pairs[:, 0], pairs[:, 1]] = True
    rows, cols = (b_ids if a_ids is None else a_ids), (a_ids if b_ids is None else b_ids)
    return same if rows is None or cols is None else same | (rows[:, None] == cols[None, :])


def paired(
    a: Tensor, b: Tensor, a_ids: Tensor | None = None, b_ids: Tensor | None = None, pairs: Tensor | str | None = None
) -> Tensor:
    """``[N, M]`` bool: whether (i, j) is a pair. Equal ids alone make none, unless ``pairs`` is "ids"."""
    by_ids = isinstance(pairs, str)
    return positives(a, b, a_ids if by_ids else None, b_ids if by_ids else None, pairs)


def maxima(masked: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum over ``dim`` and its index. The index is -1 if the maximum is -inf, also that of no scores."""
    if masked.shape[dim] == 0:
        score = masked.new_full(masked.sum(dim).shape, -torch.inf)
        return score, torch.full_like(score, -1, dtype=torch.int64)
    score, index = masked.max(dim)
    return score, torch.where(score == -torch.inf, -1, index)


def hardest_negatives(
    a: Tensor,
    b: Tensor,
    *,
    pairs: str | Tensor | None = None,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
) -> HardestNegatives:
    """Row and column maxima of ``s`` over negatives; see :func:`gssf_kernels.hardest_negatives`."""
    s = scores(a, b)
    masked = s.masked_fill(positives(a, b, a_ids, b_ids, pairs), -torch.inf)
    pair_score = None if isinstance(pairs, str) else s.diagonal() if pairs is None else s[pairs[:, 0], pairs[:, 1]]
    return HardestNegatives(*maxima(masked, 1), *maxima(masked, 0), pair_score)


def pair_scores(a: Tensor, b: Tensor, index: Tensor | None = None) -> Tensor:
    """``s_i = a_i · b_index[i]`` [N]; see :func:`gssf_kernels.pair_scores`."""
    if index is None:
        index = torch.arange(a.shape[0], device=a.device)
    if b.shape[0] == 0:
        return (accumulate(a) * 0).sum(-1) - torch.inf
    products = (accumulate(a) * accumulate(b)[index.clamp_min(0)]).sum(-1)
    return torch.where(index < 0, -torch.inf, products)


def weighted_sums(weights: Tensor, starts: Tensor, ends: Tensor, source: Tensor, count: int) -> Tensor:
    """``out_i = Σ_{e: starts_e = i} weights_e source[ends_e]`` [count, D], in the order of the edges.

    An edge with weight 0 adds 0, even if source is not finite there. So does an edge with an index of -1. Such edges
    are not removed, because counting them would synchronise on a GPU.
    """
    source = accumulate(source)
    sums = source.new_zeros(count, source.shape[1])
    if count == 0 or source.shape[0] == 0:
        return sums
    valid = (starts >= 0) & (ends >= 0) & (weights != 0)
    terms = torch.where(valid[:, None], weights[:, None].to(source.dtype) * source[ends.clamp_min(0)], 0)
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
    """r⁻ [N] of N anchors: the mean of how far the close negatives are from the hardest one.

    masked: [N, K], the scores of the anchors, -inf at positives.
    """
    if masked.shape[1] == 0:
        return masked.new_zeros(masked.shape[0])
    hardest, hardest_index = masked.max(1, keepdim=True)  # [N, 1]
    close = ~(masked < threshold) & (masked != -torch.inf)  # NaN is close to everything
    close = close & (torch.arange(masked.shape[1], device=masked.device) != hardest_index)
    if beta is None:
        close = close & (masked != hardest)  # the authors' divisor leaves out exact ties, whose term is 0
        terms = hardest - masked
    else:
        terms = torch.exp(beta * (masked - hardest))
    return torch.where(close, terms, 0).sum(1) / close.sum(1).clamp_min(1)
