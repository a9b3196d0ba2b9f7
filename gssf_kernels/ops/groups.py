"""Sums over rows of equal id: what the positives of a loss with ids add up to, in O((N + M) D).

    out_i = Σ_{k: id_k = id_i} values_k

Rows are sorted by id and each group's are summed in order: no float atomics, so the same inputs give the same bits,
and it never synchronises.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels._library import Function, last_derivative


class Groups(NamedTuple):
    """The group, of ``slots`` there are, of each id of the first side [N] and of the second [M], or -1."""

    rows: Tensor
    cols: Tensor
    slots: int

    def turned(self) -> "Groups":
        """The sides exchanged."""
        return Groups(self.cols, self.rows, self.slots)

    def row_counts(self) -> Tensor:
        """How many of the second side share the id of each row [N]."""
        return _gather(self._count(self.cols), self.rows)

    def col_counts(self) -> Tensor:
        """How many of the first side share the id of each column [M]."""
        return _gather(self._count(self.rows), self.cols)

    def _count(self, slots: Tensor) -> Tensor:
        counts = slots.new_zeros(self.slots)
        return counts.index_add(0, slots.clamp_min(0), (slots >= 0).to(slots.dtype))


def groups(a_ids: Tensor, b_ids: Tensor) -> Groups:
    """The groups of a_ids [N], N >= 1; an id of b_ids [M] that is not among them has none."""
    a_ids, b_ids = a_ids.contiguous(), b_ids.contiguous()  # searchsorted warns of others
    table = a_ids.sort().values
    places = torch.searchsorted(table, b_ids).clamp_max(table.shape[0] - 1)
    places = torch.where(table[places] == b_ids, places, -1)
    return Groups(torch.searchsorted(table, a_ids), places, table.shape[0])


def group_sums(values: Tensor, source: Tensor, target: Tensor, slots: int) -> Tensor:
    """``out_i = Σ_{k: source_k = target_i} values_k`` [T, D] of values [K, D], source [K], target [T]; -1 for none."""
    return _GroupSums.apply(values, source, target, slots)


class _GroupSums(Function):
    @staticmethod
    def forward(values, source, target, slots):
        return _sums(values, source, target, slots)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, source, target, ctx.slots = inputs
        ctx.save_for_backward(source, target)

    @staticmethod
    def backward(ctx, grad):
        source, target = ctx.saved_tensors
        return last_derivative(_sums, grad.contiguous(), target, source, ctx.slots), None, None, None


def _sums(values, source, target, slots):
    """The sum of listed rows is the gradient of listed scores, each of weight 1."""
    ones = values.new_ones(values.shape[0])
    table = values.new_empty(slots, values.shape[1])
    order = torch.arange(values.shape[0], device=values.device)
    sums, _ = torch.ops.gssf.pair_scores_backward(ones, source, order, table, values, [True, False])
    return _gather(sums, target)


def _gather(table: Tensor, slots: Tensor) -> Tensor:
    rows = table[slots.clamp_min(0)]
    missing = (slots < 0).view(-1, *[1] * (table.dim() - 1))
    return rows.masked_fill_(missing, 0)
