"""Which scores of a chunk take no part in a dense loss: neither positives nor negatives.

    left out    scores of equal id that are no pair, if ids do not make positives ("ignore");
                negatives above the limit of their anchor

A score that takes no part is overwritten with LEAST before the passes over the chunk, where every dense loss has value
and slope 0: e^{κ LEAST} = 0, and a hinge or softplus of it is 0. Passes over log-sums compare with limits themselves,
without listed pairs and biases (`Selection.limited`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The pair of a row is in no column: the argument `first` of passes where (i, i) is nothing special.
UNPAIRED = -(1 << 30)


class Mask(NamedTuple):
    """``Mask()``: positives are (i, i) and equal ids, and every score takes part."""

    paired: bool = True  # (i, i) is a positive
    ignore: bool = False  # scores of equal id that are no pair are left out; else they are positives
    # The listed pairs (pair_rows[e], pair_cols[e]); (-1, -1) for a pair that was listed before.
    pair_rows: Tensor | None = None  # [P] int64
    pair_cols: Tensor | None = None  # [P] int64
    row_limit: Tensor | None = None  # [N], of the scores' dtype
    col_limit: Tensor | None = None  # [M]

    @property
    def plain(self) -> bool:
        """Whether every score takes part, and no pairs are listed."""
        return not self.ignore and self.pair_rows is None and self.row_limit is None and self.col_limit is None

    def chunk(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """The listed pairs in rows first .. first + count: (row in the chunk [P], column, whether it is one of them).

        The others are at (0, 0), with False. None: no pairs are listed.
        """
        if self.pair_rows is None or self.pair_cols is None:
            return None
        here = (self.pair_rows >= first) & (self.pair_rows < first + count)
        return torch.where(here, self.pair_rows - first, 0), torch.where(here, self.pair_cols, 0), here


def least(dtype: torch.dtype) -> float:
    """LEAST: finite, so that 0 times it is 0."""
    return torch.finfo(dtype).min


def left_out(
    s: Tensor, first: int, row_ids: Tensor | None, col_ids: Tensor | None, mask: Mask, directions: str = "both"
) -> Tensor | None:
    """Which scores of the chunk s [R, M], whose first row is row ``first``, take no part [R, M]; None: all take part.

    row_ids: [R]; directions: whose limits hold, "rows", "cols", or "both": a score that either limit leaves out.
    """
    if not mask.ignore and mask.row_limit is None and mask.col_limit is None:
        return None
    same = None if row_ids is None or col_ids is None else row_ids[:, None] == col_ids
    out = same if mask.ignore else None
    rows = slice(first, first + s.shape[0])
    for limit, which in ((mask.row_limit, "rows"), (mask.col_limit, "cols")):
        if limit is None or directions not in ("both", which):
            continue
        over = s > (limit[rows, None] if which == "rows" else limit)
        if same is not None and not mask.ignore:
            over &= ~same
        out = over if out is None else out | over
    if out is None:
        return None
    if mask.paired:
        out.diagonal(first)[:] = False
    listed = mask.chunk(first, s.shape[0])
    if listed is not None:
        lower_listed(out.view(torch.uint8), listed, 0)
    return out


def lower_listed(x: Tensor, listed: tuple[Tensor, Tensor, Tensor], value: float) -> None:
    """Write ``value``, which is at most what is there, to x [R, M] at the listed pairs of a chunk."""
    row, col, here = listed
    highest = torch.iinfo(x.dtype).max if not x.is_floating_point() else torch.inf
    values = torch.full_like(row, highest, dtype=x.dtype).masked_fill_(here, value)
    x.view(-1).scatter_reduce_(0, row * x.shape[1] + col, values, "amin")


class Selection(NamedTuple):
    """Which scores take part in the log-sums of ``t = κ s``, and of which direction. ``Selection()``: all, in both."""

    columns: bool = True  # columns have statistics too
    exclude_self: bool = False  # (i, i) takes no part
    a_ids: Tensor | None = None  # [N] int64
    b_ids: Tensor | None = None  # [M] int64
    col_bias: Tensor | None = None  # [M], added to the logits of candidate j in the rows' direction; constant
    # The rest is `Mask`.
    paired: bool = True
    ignore: bool = False
    pair_rows: Tensor | None = None
    pair_cols: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None

    @property
    def mask(self) -> Mask:
        return Mask._make(self[5:])

    @property
    def plain(self) -> bool:
        """Whether every score takes part in both directions."""
        ordinary = self.columns and not self.exclude_self and self.col_bias is None
        return ordinary and not self.ignore and self.row_limit is None and self.col_limit is None

    @property
    def limited(self) -> bool:
        """Whether the passes leave out the scores above limits: they know no listed pairs and no biases."""
        limits = self.row_limit is not None or self.col_limit is not None
        return limits and self.pair_rows is None and self.col_bias is None

    @property
    def apart(self) -> bool:
        """Whether the logits of the two directions differ, so that each takes a pass."""
        one_sided = (self.col_bias, self.row_limit, self.col_limit)
        return self.columns and not self.limited and any(t is not None for t in one_sided)

    def logits(self, s: Tensor, first: int, direction: str, kappa: Tensor) -> Tensor:
        """s [R, M], or a copy where directions are apart, so that κ times it are the direction's logits.

        Where the passes apply the limits (`limited`), they are not applied here.
        """
        rows = slice(first, first + s.shape[0])
        row_ids = None if self.a_ids is None else self.a_ids[rows]
        mask = self.mask._replace(row_limit=None, col_limit=None) if self.limited else self.mask
        out = left_out(s, first, row_ids, self.b_ids, mask, direction)
        result = s.clone() if self.apart else s
        if self.col_bias is not None and direction == "rows":
            result += self.col_bias / kappa
        if out is not None:
            result.masked_fill_(out, least(s.dtype))
        if self.exclude_self:
            result.diagonal(first).fill_(least(s.dtype))
        return result
