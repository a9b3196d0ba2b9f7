"""Triplet loss over every negative, from one sweep: VSE0, what VSE∞ warms up with.

    L = Σ_i Σ_{j ∉ pos(i)} [m + s_ij − s_ii]₊ + Σ_{j < N} Σ_{i ∉ pos(j)} [m + s_ij − s_jj]₊,     s = x yᵀ

Source: VSE++, arXiv 1707.05612, which names it as its predecessor.
"""

from torch import Tensor

from gssf_kernels.statistics.sums import row_terms, total_score


def every_negative(
    x: Tensor, y: Tensor, margin: float, x_ids: Tensor | None, y_ids: Tensor | None, reduction: str,
    pair: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``triplet_loss(negatives="all")`` of x [N, D] and y [M, D], checked there; scalar, or [N] for "none".

    pair: the pairs' scores [N], if known.
    """
    options = ("hinge", 1.0, margin, "exclude", x_ids, y_ids)
    if reduction == "none":
        return row_terms(x, y, *options, relative=True, pair=pair)
    share = 1 / max(x.shape[0], 1) if reduction == "mean" else 1.0
    return total_score(x, y, *options, share, relative=True, pair=pair)
