"""Triplet loss of a matrix of scores that are no product of embeddings: of cross-attention, of fragments.

The formula of :func:`~gssf_kernels.triplet_loss`, whose docstring has its sources. Plain PyTorch: the caller holds the
matrix, and its gradient is a matrix too.
"""

import torch
from torch import Tensor

from gssf_kernels import _checks, reference
from gssf_kernels.losses.triplet import NEGATIVES
from gssf_kernels.ops import anchor_terms


def triplet_from_scores(
    scores: Tensor,
    *,
    margin: float = 0.2,
    negatives: str = "hardest",
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    symmetric: bool = True,
    reduction: str = "sum",
) -> Tensor:
    """``Σ_i [m + n_i − s_ii]₊ + [m + n'_i − s_ii]₊`` of scores s that were computed in any way.

    n_i is the hardest negative of row i, n'_i that of column i < N. Where there is none the term is 0.

    Args:
        scores: s [N, M] float, M >= N. Pairs are on the diagonal; columns past N are further negatives.
        margin: m, a finite number >= 0.
        negatives: "hardest", "semihard" or "all", as in :func:`~gssf_kernels.triplet_loss`.
        x_ids: [N] integers, of the rows: scores of equal id are no negatives. If N = M, those of one side serve both.
        y_ids: [M] integers, of the columns.
        symmetric: False leaves the second term out.
        reduction: "sum", "mean" (the sum over N) or "none": [N].

    Returns:
        a scalar, or [N]; fp32 (fp64 for fp64). No pair gives a differentiable 0. NaN propagates. Differentiable in
        scores.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Extra memory: a copy of the scores with -inf where they are no negatives, and with "all" the terms.

    Source: VSE++, arXiv 1707.05612.
    """
    margin = _checks.non_negative(margin, "margin")
    _checks.choice(negatives, "negatives", NEGATIVES)
    _checks.flag(symmetric, "symmetric")
    _checks.reduction(reduction)
    _checks.floating(scores, "scores", "[N, M]")
    _checks.score_matrix(scores, "scores")
    x_ids, y_ids = _checks.ids(x_ids, y_ids, scores, scores.mT, "x_ids", "y_ids")
    s = reference.accumulate(scores)
    n = s.shape[0]
    positive_score, same = s.diagonal(), reference.positives(s, s.mT, x_ids, y_ids)
    directions = [(s, same), (s[:, :n].mT, same[:, :n].mT)][: 1 + symmetric]
    if negatives == "all":
        terms = [
            torch.where(no_negative, 0, reference.hinge(margin + scores - positive_score[:, None])).sum(1)
            for scores, no_negative in directions
        ]
        return reference.reduce(sum(terms, torch.zeros_like(positive_score)), reduction)
    rows, *cols = (_negative(*side, positive_score, negatives == "semihard") for side in directions)
    return anchor_terms(positive_score, rows, cols[0] if cols else None, "hinge", [margin], reduction)


def _negative(s: Tensor, no_negative: Tensor, positive_score: Tensor, semihard: bool) -> Tensor:
    """The negative score that each row of s [N, K] is compared with [N]; -inf for none, without gradient."""
    with torch.no_grad():
        masked = s.masked_fill(no_negative, -torch.inf)
        _, index = reference.maxima(masked, 1)
        if semihard:
            below, lower = reference.maxima(masked.masked_fill(masked >= positive_score[:, None], -torch.inf), 1)
            index = torch.where(below == -torch.inf, index, lower)
    if not s.shape[1]:
        return s.new_full(s.shape[:1], -torch.inf)
    score = s.gather(1, index.clamp_min(0)[:, None])[:, 0]
    return torch.where(index < 0, -torch.inf, score)


__all__ = ["triplet_from_scores"]
