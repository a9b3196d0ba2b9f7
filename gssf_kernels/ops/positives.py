"""Hardest positive of every row by label, without the N x N matrix.

    index_i = argmin_{j ≠ i, label_j = label_i} x_i · y_j,      y is x, or with a metric the other factor

Rows are sorted by label. Then all positives lie in blocks on the diagonal, and each block is compared in tiles of
bounded size. On CUDA this is a Triton kernel, which reads the bounds of the labels from memory.

Elsewhere it is plain PyTorch. Products are fp64 and rounded to the scores' dtype, so that the winner depends on neither
tile, thread count nor matmul precision. Where values cannot be read without synchronising (fp64 on CUDA), all rows are
compared.

Source: batch-hard, arXiv 1703.07737.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import plan
from gssf_kernels._library import register
from gssf_kernels.ops.segments import segment_tiles
from gssf_kernels.plan import accumulation_dtype

_ROWS, _COLS = 128, 1024  # the size of a tile: 1 MiB of fp64 scores


class HardestPositivesCall(NamedTuple):
    """The hardest positive of every row of s = x yᵀ."""

    x: Tensor  # [N, D]
    labels: Tensor  # [N] int64
    y: Tensor | None = None  # [N, D], the other factor; row i belongs to row i of x. None: y is x


def hardest_positives(x: Tensor, labels: Tensor, y: Tensor | None = None) -> Tensor:
    """The index of each row's hardest positive, [N] int64. Ties go to the lowest index; the first NaN wins.

    Args:
        x: [N, D] float.
        labels: [N] int64.
        y: [N, D] of x's dtype and device; None: y is x.

    -1 where no other row has the label, or all that have it score +inf.
    Time: the product of each row with the rows of its label. Extra memory: O(N) and a tile.
    """
    return torch.ops.gssf.hardest_positives(x.detach(), labels, None if y is None else y.detach())


def _hardest_positives(call):
    x, labels = call.x, call.labels
    y = x if call.y is None else call.y
    dtype = accumulation_dtype(x.dtype)
    label, order = labels.sort(stable=True)  # stable: within a label, the lowest index comes first
    index = torch.full_like(order, -1)
    for i0, i1, first, end in segment_tiles(label, label, _ROWS):
        rows = slice(i0, i1)
        anchors = x[order[rows]].double()  # [R, D]
        minimum = anchors.new_full((anchors.shape[0],), torch.inf, dtype=dtype)
        row_index = torch.full_like(order[rows], -1)
        for j0 in range(first, end, _COLS):
            cols = slice(j0, min(j0 + _COLS, end))
            s = (anchors @ y[order[cols]].double().mT).to(dtype)  # [R, C]
            s.masked_fill_(label[rows, None] != label[None, cols], torch.inf)
            s.diagonal(i0 - j0).fill_(torch.inf)  # a row and itself, if the tile holds them
            least, col = s.min(1)
            wins = (least < minimum) | (least.isnan() & ~minimum.isnan())  # later tiles win no tie; the first NaN stays
            minimum, row_index = torch.where(wins, least, minimum), torch.where(wins, order[cols][col], row_index)
        index[order[rows]] = row_index
    return index


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
