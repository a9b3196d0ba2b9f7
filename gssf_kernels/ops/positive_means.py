"""Means over the positives of each anchor: the targets of contrastive losses, without the matrix.

    row_mean_i = Σ_{j ∈ P(i)} s_ij / |P(i)|,     s = a bᵀ

s is linear in b, so by id a mean costs O((N + M) D): the score with the mean of the positives' rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels.ops.pairing import Pairing
from gssf_kernels.ops.pairs import scores_of_pairs
from gssf_kernels.ops.segments import segment_sums, segments_of
from gssf_kernels.plan import accumulation_dtype


class PositiveMeans(NamedTuple):
    """Of the anchors of one direction, [N] each; of columns with pairs (i, i) only the first N."""

    score: Tensor  # 0 where an anchor has no positive
    bias: Tensor | None  # the mean of the biases of the positives
    present: Tensor | None  # whether an anchor has a positive; None: every one has


def positive_means(
    a: Tensor,
    b: Tensor,
    pairing: Pairing,
    ids: bool,
    rows: bool,
    bias: Tensor | None = None,
    exclude_self: bool = False,
) -> PositiveMeans:
    """The means of the rows' direction, or of the columns'. Differentiable once in a and b.

    ids: with pairs (i, i), whether equal ids are positives too. bias: [M], of the rows of b, constant. exclude_self: by
    ids, row i of b is no positive of row i of a, as for one set of rows compared with itself.
    """
    n, dtype = a.shape[0], accumulation_dtype(a.dtype)
    x, y = (a, b) if rows else (b, a)
    listed, i = pairing.listed, torch.arange(n, device=a.device)
    if listed is not None:
        anchor, other = (listed.rows, listed.cols) if rows else (listed.cols, listed.rows)
        scores = torch.where(listed.counted, scores_of_pairs(a, b, listed.rows, listed.cols), 0)
        values = [scores, listed.counted.to(dtype)]
        if bias is not None:
            values.append(torch.where(listed.counted, bias[other.clamp_min(0)], 0))
        places = torch.arange(x.shape[0], device=a.device)
        sums, counts, *biases = segment_sums(torch.stack(values, 1), anchor, places, x.shape[0]).unbind(1)
        return _means(sums, counts, biases[0] if biases else None)
    if pairing.kind == "rows" and (pairing.x_ids is None or not ids):
        return PositiveMeans(scores_of_pairs(a, b, i, i), None if bias is None else bias[:n], None)
    assert pairing.x_ids is not None
    assert pairing.y_ids is not None
    x_ids, y_ids = (pairing.x_ids, pairing.y_ids) if rows else (pairing.y_ids, pairing.x_ids)
    if x.shape[0] == 0 or y.shape[0] == 0:
        zero = x.sum(1).to(dtype) * 0
        return _means(zero, torch.zeros_like(zero), None if bias is None else torch.zeros_like(zero))
    segments, count = segments_of(x_ids, y_ids), n if pairing.kind == "rows" else x.shape[0]
    rows_of = segments.rows[:count]
    tables = [y.to(dtype)] if bias is None else [y.to(dtype), bias[:, None].to(dtype)]
    totals = [segment_sums(table, segments.cols, rows_of, segments.total) for table in tables]
    counts = segments.row_counts()[:count]
    if pairing.kind == "rows":  # the pair too, if its ids differ
        missing = x_ids[:count] != y_ids[:count]
        pairs = [torch.where(missing[:, None], table[:count], 0) for table in tables]
        totals = [total + pair for total, pair in zip(totals, pairs, strict=True)]
        counts = counts + missing
    if exclude_self:
        totals = [total - table for total, table in zip(totals, tables, strict=True)]
        counts = counts - 1
    places = torch.arange(count, device=x.device)
    score = scores_of_pairs(x[:count].to(dtype), totals[0], places, places)
    return _means(score, counts.to(dtype), None if bias is None else totals[1][:, 0].detach())


def _means(sums: Tensor, counts: Tensor, biases: Tensor | None) -> PositiveMeans:
    size = counts.clamp_min(1)
    return PositiveMeans(sums / size, None if biases is None else biases / size, counts > 0)
