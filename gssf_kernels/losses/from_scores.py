"""Triplet loss of a matrix of scores that are no product of embeddings: of cross-attention, of fragments.

The formula of :func:`~gssf_kernels.triplet_loss`, whose docstring has its sources. It is computed as it is defined: the
caller holds the matrix anyway, and its gradient is a matrix too.
"""

from torch import Tensor

from gssf_kernels import _checks, reference
from gssf_kernels.losses.triplet import NEGATIVES


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

    Extra memory: a copy of the scores with -inf where they are no negatives; with "semihard" and "all" a few.

    Source: VSE++, arXiv 1707.05612.
    """
    margin = checked_settings(margin, negatives, symmetric, reduction)
    _checks.floating(scores, "scores", "[N, M]")
    _checks.score_matrix(scores, "scores")
    x_ids, y_ids = _checks.ids(x_ids, y_ids, scores, scores.mT, "x_ids", "y_ids")
    return reference.triplet_from_scores(
        scores,
        margin=margin,
        negatives=negatives,
        x_ids=x_ids,
        y_ids=y_ids,
        symmetric=symmetric,
        reduction=reduction,
    )


def checked_settings(margin, negatives, symmetric, reduction) -> float:
    """The margin as a number; all four are checked."""
    margin = _checks.non_negative(margin, "margin")
    _checks.choice(negatives, "negatives", NEGATIVES)
    _checks.flag(symmetric, "symmetric")
    _checks.reduction(reduction)
    return margin


__all__ = ["triplet_from_scores"]
