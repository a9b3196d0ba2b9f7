"""Triplet loss over every negative, from one sweep: VSE0, with which VSE∞ warms up.

    L = Σ_i Σ_{j ∉ pos(i)} [m + s_ij − s_ii]₊ + Σ_{j < N} Σ_{i ∉ pos(j)} [m + s_ij − s_jj]₊,     s = x yᵀ

Source: VSE++, arXiv 1707.05612, which calls it its predecessor.
"""

import torch
from torch import Tensor

from gssf_kernels import reference
from gssf_kernels.ops.masks import Mask
from gssf_kernels.ops.mining import PairedInputs, reduce_listed
from gssf_kernels.ops.pairing import as_list, levels_of, one_level
from gssf_kernels.ops.pairs import scores_of_pairs
from gssf_kernels.ops.segments import gather
from gssf_kernels.ops.sums import Term, score_sums


def every_negative(inputs: PairedInputs, margin: float | Tensor, reduction: str) -> Tensor:
    """``triplet_loss(negatives="all")``: a scalar, or a vector for "none"."""
    x, y, pairing, symmetric, limits, positive_score = inputs
    ids = pairing.x_ids, pairing.y_ids
    if pairing.kind == "rows" and symmetric and limits == (None, None):
        term = Term("hinge", "exclude", 1.0, margin)
        return score_sums(x, y, term, *ids, reduction, relative=True, positive_score=positive_score)
    i = torch.arange(x.shape[0], device=x.device)
    listed = as_list(pairing).listed
    rows, cols = (i, i) if listed is None else (listed.rows, listed.cols)
    terms = _rows(x, y, margin, rows, cols, pairing.kind, ids, limits[0])
    if symmetric:
        terms = terms + _rows(y, x, margin, cols, rows, pairing.kind, ids[::-1], limits[1])
    if listed is None:
        return reference.reduce(terms, reduction)
    return reduce_listed(terms, listed, reduction, x.shape[0] if pairing.kind == "ids" else None)


def _rows(
    x: Tensor,
    y: Tensor,
    margin: float | Tensor,
    rows: Tensor,
    cols: Tensor,
    kind: str,
    ids: tuple,
    limit: Tensor | None,
) -> Tensor:
    """The terms of the rows' direction, of each pair (rows, cols) [P], -1 for one that does not count.

    One sweep, which compares each score of a row with all of the row's pairs: with K positive scores for each row.
    """
    n = x.shape[0]
    pairs = (rows, cols) if kind == "listed" else (None, None)
    mask = Mask(kind == "rows", False, pairs[0], pairs[1], limit)
    levels = one_level(rows.shape[0], n, x.device) if kind == "rows" else levels_of(rows, n)
    p = scores_of_pairs(x, y, rows, cols)
    if levels.most == 0:  # no pairs
        return p
    index = levels.pairs()
    # Of a row with fewer pairs the sums are not read, and +inf makes them 0.
    positive_score = torch.where(index < 0, torch.inf, gather(p, index.flatten()).view(index.shape))
    positive_score = positive_score[0] if levels.most == 1 else positive_score
    term = Term("hinge", "exclude", 1.0, margin)
    sums = score_sums(x, y, term, ids[0], ids[1], "none", True, positive_score, False, mask).flatten()
    return gather(torch.cat((sums.new_zeros(1), sums)), levels.places() + 1)
