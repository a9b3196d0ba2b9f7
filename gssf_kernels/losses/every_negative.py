"""Triplet loss over every negative, from one sweep: VSE0, with which VSE∞ warms up.

    L = Σ_i Σ_{j ∉ pos(i)} [m + s_ij − s_ii]₊ + Σ_{j < N} Σ_{i ∉ pos(j)} [m + s_ij − s_jj]₊,     s = x yᵀ

Source: VSE++, arXiv 1707.05612, which calls it its predecessor.
"""

from torch import Tensor

from gssf_kernels.ops.sums import Term, score_sums


def every_negative(
    x: Tensor, y: Tensor, margin: float, x_ids: Tensor | None, y_ids: Tensor | None, reduction: str,
    positive_score: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``triplet_loss(negatives="all")`` of x [N, D] and y [M, D], which `triplet_loss` has checked.

    positive_score: s_ii [N]; None: computed here.

    Returns:
        a scalar, or [N] for "none".
    """
    term = Term("hinge", "exclude", 1.0, margin)
    return score_sums(x, y, term, x_ids, y_ids, reduction, relative=True, positive_score=positive_score)
