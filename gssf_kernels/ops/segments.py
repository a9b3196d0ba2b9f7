"""Sums over the rows of a segment, the rows of equal id: what the positives of an anchor add up to, in O((N + M) D).

    out_i = Σ_{k: id_k = id_i} values_k

Rows are sorted by id, and the rows of a segment are summed in order. There are no float atomics, so the same inputs
give the same bits. Nothing here synchronises.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels._library import Function, last_derivative


class Segments(NamedTuple):
    """The index of the segment of each row of a [N] and of each row of b [M], in 0..total-1, or -1 for none."""

    rows: Tensor
    cols: Tensor
    total: int

    def transposed(self) -> "Segments":
        """The same with a and b exchanged."""
        return Segments(self.cols, self.rows, self.total)

    def row_counts(self) -> Tensor:
        """For each row of a, how many rows of b share its id [N]."""
        return _gather(self._sizes(self.cols), self.rows)

    def col_counts(self) -> Tensor:
        """For each row of b, how many rows of a share its id [M]."""
        return _gather(self._sizes(self.rows), self.cols)

    def _sizes(self, segments: Tensor) -> Tensor:
        sizes = segments.new_zeros(self.total)
        return sizes.index_add(0, segments.clamp_min(0), (segments >= 0).to(segments.dtype))


def segments_of(a_ids: Tensor, b_ids: Tensor) -> Segments:
    """The segments of a_ids [N], N >= 1. An id of b_ids [M] that is not among them has none."""
    a_ids, b_ids = a_ids.contiguous(), b_ids.contiguous()  # searchsorted warns of strided ones
    sorted_ids = a_ids.sort().values
    cols = torch.searchsorted(sorted_ids, b_ids).clamp_max(sorted_ids.shape[0] - 1)
    cols = torch.where(sorted_ids[cols] == b_ids, cols, -1)
    return Segments(torch.searchsorted(sorted_ids, a_ids), cols, sorted_ids.shape[0])


def segment_tiles(a_ids: Tensor, b_ids: Tensor, rows: int) -> list[tuple[int, int, int, int]]:
    """``(i0, i1, j0, j1)`` for every ``rows`` rows i0 .. i1 of sorted a_ids: all columns of their ids are in j0 .. j1.

    Both are sorted. Where they cannot be read without synchronising, j0 .. j1 are all columns.
    """
    n, m = a_ids.shape[0], b_ids.shape[0]
    starts = range(0, n, rows)
    ends = [min(start + rows, n) for start in starts]
    if not (_checks.readable(a_ids) and _checks.readable(b_ids)):
        return [(i0, i1, 0, m) for i0, i1 in zip(starts, ends, strict=True)]
    first, last = a_ids[list(starts)], a_ids[[end - 1 for end in ends]]
    bounds = torch.searchsorted(b_ids, first).tolist(), torch.searchsorted(b_ids, last, right=True).tolist()
    return list(zip(starts, ends, *bounds, strict=True))


def segment_sums(values: Tensor, source: Tensor, target: Tensor, total: int) -> Tensor:
    """``out_i = Σ_{k: source_k = target_i} values_k``.

    Args:
        values: [K, D] float.
        source: [K] int64, the segment of each value; -1 adds to none.
        target: [T] int64, the segment of each result; -1 gives 0.
        total: how many segments there are.

    Returns:
        [T, D]. Differentiable once in values.
    """
    return _SegmentSums.apply(values, source, target, total)


class _SegmentSums(Function):
    @staticmethod
    def forward(values, source, target, total):
        return _sums(values, source, target, total)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, source, target, ctx.total = inputs
        ctx.save_for_backward(source, target)

    @staticmethod
    def backward(ctx, grad_out):
        source, target = ctx.saved_tensors
        return last_derivative(_sums, grad_out.contiguous(), target, source, ctx.total), None, None, None


def gather(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` [E] of values [N]; -1 gives -inf, without gradient. Deterministic, unlike indexing."""
    return _Gather.apply(values, index)


class _Gather(Function):
    @staticmethod
    def forward(values, index):
        if values.shape[0] == 0:
            return values.new_full(index.shape, -torch.inf)
        return torch.where(index < 0, -torch.inf, values[index.clamp_min(0)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, index = inputs
        ctx.count = values.shape[0]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx, grad_out):
        (index,) = ctx.saved_tensors
        return last_derivative(_gathered_gradient, grad_out.contiguous(), index, ctx.count), None


def _gathered_gradient(grad_out, index, count):
    target = torch.arange(count, device=index.device)
    return _sums(grad_out[:, None], index, target, count)[:, 0].clone()


def _sums(values, source, target, total):
    """The sum of listed rows is the gradient of listed scores, each of weight 1."""
    ones = values.new_ones(values.shape[0])
    table = values.new_empty(total, values.shape[1])
    order = torch.arange(values.shape[0], device=values.device)
    sums, _ = torch.ops.gssf.pair_scores_backward(ones, source, order, table, values, [True, False])
    return _gather(sums, target)


def _gather(table: Tensor, segments: Tensor) -> Tensor:
    """``table[segments]``, 0 where there is no segment."""
    rows = table[segments.clamp_min(0)]
    missing = (segments < 0).view(-1, *[1] * (table.dim() - 1))
    return torch.where(missing, 0, rows)  # in place, PyTorch 2.11 compiles wrong gradients
