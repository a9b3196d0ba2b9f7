"""The definitions: plain PyTorch that stores the whole similarity matrix.

Every public function has a twin of the same name and arguments here. It is differentiated by
PyTorch itself, runs on any device and dtype, and is what tests and fallbacks compare with. Read it
as the formula; use it for small problems only, since it takes several matrices of N x M.
"""

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


def _accumulate(t: Tensor) -> Tensor:
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
    wide = _accumulate(x)
    if normalize:
        wide = F.normalize(wide, dim=-1, eps=EPS)
    p = torch.zeros_like(wide) if (diag is not None or blocks is not None) else wide
    if diag is not None:
        p = p + wide * _accumulate(diag)
    if blocks is not None:
        groups, width, _ = blocks.shape
        grouped = wide if permutation is None else wide[..., permutation]
        mixed = torch.einsum("...gk,gkc->...gc", grouped.unflatten(-1, (groups, width)), _accumulate(blocks))
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
    return _accumulate(a) @ _accumulate(b).mT


def positives(a: Tensor, b: Tensor, a_ids: Tensor | None = None, b_ids: Tensor | None = None) -> Tensor:
    """``[N, M]`` bool: the pairs (i, i) and those of equal ids, which are never negatives."""
    same = torch.eye(a.shape[0], b.shape[0], dtype=torch.bool, device=a.device)
    rows, cols = (b_ids if a_ids is None else a_ids), (a_ids if b_ids is None else b_ids)
    return same if rows is None or cols is None else same | (rows[:, None] == cols[None, :])


def _best(masked: Tensor, dim: int) -> tuple[Tensor, Tensor]:
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
    return HardestNegatives(*_best(masked, 1), *_best(masked, 0))


def pair_scores(a: Tensor, b: Tensor, index: Tensor | None = None) -> Tensor:
    """``s_i = a_i · b_index[i]`` [N]; see :func:`gssf_kernels.pair_scores`."""
    if index is None:
        index = torch.arange(a.shape[0], device=a.device)
    if b.shape[0] == 0:
        return (_accumulate(a) * 0).sum(-1) - torch.inf
    picked = (_accumulate(a) * _accumulate(b)[index.clamp_min(0)]).sum(-1)
    return torch.where(index < 0, -torch.inf, picked)


def relative_negatives(
    a: Tensor,
    b: Tensor,
    threshold: Tensor,
    *,
    beta: float | None,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GOAL's ``(r⁻ of the rows [N], r⁻ of the columns [M])``; see :mod:`gssf_kernels.statistics.relative`."""
    masked = scores(a, b).masked_fill(positives(a, b, a_ids, b_ids), -torch.inf)
    return _relative(masked, threshold, beta), _relative(masked.mT, threshold, beta)


def _relative(masked: Tensor, threshold: Tensor, beta: float | None) -> Tensor:
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


def triplet_loss(
    x: Tensor,
    y: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "hardest",
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    reduction: str = "sum",
    metric=None,
) -> Tensor:
    """Triplet loss over rows and columns; see :func:`gssf_kernels.triplet_loss`."""
    if metric is not None:
        x = project(x, metric.diag, metric.blocks, permutation=metric.permutation, normalize=metric.normalize)
        y = project(y, normalize=metric.normalize)
    count = x.shape[0]
    s = scores(x, y)  # [N, M]
    same = positives(x, y, x_ids, y_ids)  # [N, M]
    positive = s.diagonal()  # [N]

    def terms(s, same):  # [N, K] scores of N anchors -> [N]
        if s.shape[1] == 0:
            return positive * 0
        if negatives == "all":
            return hinge(margin + s - positive[:, None]).masked_fill(same, 0).sum(1)
        masked = s.masked_fill(same, -torch.inf)
        hardest = masked.max(1).values
        if negatives == "semihard":
            below = masked.masked_fill(masked >= positive[:, None], -torch.inf).max(1).values
            hardest = torch.where(below == -torch.inf, hardest, below)
        return hinge(margin + hardest - positive)

    per_pair = terms(s, same) + terms(s[:, :count].mT, same[:, :count].mT)
    return reduce(per_pair, reduction)


def hinge(t: Tensor) -> Tensor:
    """``[t]₊``, with gradient 1 at 0 as in ``clamp(min=0)``, but NaN passes both ways (clamp stops its gradient)."""
    return torch.where(t < 0, 0, t)


def reduce(per_pair: Tensor, reduction: str) -> Tensor:
    """``per_pair [N]`` summed, averaged over the N pairs, or as it is. The mean of none is 0."""
    if reduction == "none":
        return per_pair
    total = per_pair.sum()
    return total / max(per_pair.shape[0], 1) if reduction == "mean" else total
