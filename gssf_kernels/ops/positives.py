"""Hardest positives of every row by label, ``argmin_{j ≠ i, label_j = label_i} x_i · y_j``, without the N x N matrix.

y is x, or with a metric the other factor.

Rows are sorted by label; then only blocks on the diagonal hold positives, and each is compared in tiles of bounded
size. On CUDA that is a Triton kernel, which reads the bounds of the labels where they lie. Elsewhere it is plain
PyTorch, with products in fp64 that are rounded to the scores' dtype, so that the winner depends on neither tile, thread
count nor matmul precision; where values cannot be read without synchronising (fp64 on CUDA), all rows are compared.

Source of the statistic: batch-hard, arXiv 1703.07737.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import register
from gssf_kernels.plan import accumulation_dtype

_ROWS, _COLS = 128, 1024  # of a tile: 1 MiB of fp64 scores


class HardestPositivesCall(NamedTuple):
    """The hardest positive of every row of s = x yᵀ."""

    x: Tensor  # [N, D]
    labels: Tensor  # [N] int64
    y: Tensor | None = None  # [N, D], row i is what row i of x is; or None: x


def hardest_positives(x: Tensor, labels: Tensor, y: Tensor | None = None) -> Tensor:
    """x, y [N, D], labels [N] int64 -> [N] int64, the lowest index on ties, the first NaN if there is one; y None: x.

    -1 where no other row has the label, or none of them scores below +inf.
    Time: one product of each row with those of its label. Memory: O(N) and a tile.
    """
    return torch.ops.gssf.hardest_positives(x.detach(), labels, None if y is None else y.detach())


def _hardest_positives(call):
    x, labels = call.x, call.labels
    y = x if call.y is None else call.y
    count, dtype = x.shape[0], accumulation_dtype(x.dtype)
    label, order = labels.sort(stable=True)  # stable: within a label, the lowest index comes first
    heads = range(0, count, _ROWS)
    index = torch.full_like(order, -1)
    for i0, first, end in zip(heads, *_bounds(label, heads), strict=True):
        rows = slice(i0, i0 + _ROWS)
        wide = x[order[rows]].double()  # [R, D]
        best = wide.new_full((wide.shape[0],), torch.inf, dtype=dtype)
        place = torch.full_like(order[rows], -1)
        for j0 in range(first, end, _COLS):
            cols = slice(j0, min(j0 + _COLS, end))
            s = (wide @ y[order[cols]].double().mT).to(dtype)  # [R, C]
            s.masked_fill_(label[rows, None] != label[None, cols], torch.inf)
            s.diagonal(i0 - j0).fill_(torch.inf)  # a row and itself, where the tile holds them
            least, at = s.min(1)
            wins = (least < best) | (least.isnan() & ~best.isnan())  # later tiles win no tie; the first NaN stays
            best, place = torch.where(wins, least, best), torch.where(wins, order[cols][at], place)
        index[order[rows]] = place
    return index


def _bounds(label, heads):
    """For each tile's rows, where their labels begin and end among the sorted ones."""
    count = label.shape[0]
    if not _checks.readable(label):
        return [0] * len(heads), [count] * len(heads)
    first = torch.tensor(heads, dtype=torch.int64)
    last = (first + _ROWS).clamp_max(count) - 1
    return torch.searchsorted(label, label[first]).tolist(), torch.searchsorted(label, label[last], right=True).tolist()


def _fake(call):
    return call.labels.new_empty(call.labels.shape)


register(
    "hardest_positives",
    HardestPositivesCall,
    "Tensor",
    composite=_hardest_positives,
    fake=_fake,
    launcher="positives.hardest_positives",
    plans=plan.kernel,
)
