"""What a loss makes of one score, in plain PyTorch, as in `triton/score_functions.py` and `csrc/vector_dense.h`.

pointwise   f(t) and f'(t) of losses that sum over scores
logit       t(s) and dt/ds of losses over log-sums
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("hinge", "softplus", "abs", "square")


def pointwise(t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``(f(t), f'(t))``."""
    if kind == "hinge":
        return torch.where(t < 0, 0, t), torch.where(t < 0, 0, torch.ones_like(t))
    if kind == "softplus":
        return torch.logaddexp(t, t.new_zeros(())), torch.sigmoid(t)
    if kind == "abs":
        return t.abs(), torch.where(t > 0, 1, torch.where(t < 0, -1, t))
    return t * t, 2 * t


class ByLabel(NamedTuple):
    """How scores become logits by label, and which of them count. Of all scores alike: ``ByLabel()``."""

    score: str = "scaled"  # "scaled": t = κ s; or one of LOGITS
    constants: list[float] = []  # noqa: RUF012  # of the score function
    row_labels: Tensor | None = None  # [R] int64
    col_labels: Tensor | None = None  # [M] int64
    row_bounds: Tensor | None = None  # [2, R]: of row i a positive counts below [0, i], a negative above [1, i]
    col_bounds: Tensor | None = None  # [2, M]: the same of the columns' anchors
    first: int = 0  # the column that is row 0's own
    leave_out: bool = False  # whether a row's own column does not count

    @property
    def classes(self) -> int:
        """Log-sums of a row: of all scores, or of positives and of negatives."""
        return 1 if self.score == "scaled" else 2

    def of(self, rows: slice, columns: slice, first: int) -> "ByLabel":
        """The same of a part of the scores, whose row 0 has its own column at ``first``."""
        if self.score == "scaled":
            return self
        bounds = (
            None if t is None else t[:, part] for t, part in ((self.row_bounds, rows), (self.col_bounds, columns))
        )
        assert self.row_labels is not None
        assert self.col_labels is not None
        labels = self.row_labels[rows], self.col_labels[columns]
        return ByLabel._make((self.score, self.constants, *labels, *bounds, first, self.leave_out))


def circle(s: Tensor, positive: Tensor, margin: float, scale: float) -> tuple[Tensor, Tensor]:
    """Of circle loss: the weight is the distance from the optimum."""
    weight = scale * torch.where(positive, (1 + margin) - s, s + margin).clamp_min(0)
    slope = torch.where(positive, -weight, weight)
    return slope * (s - torch.where(positive, 1 - margin, margin)), slope


def multi_similarity(s: Tensor, positive: Tensor, alpha: float, beta: float, base: float) -> tuple[Tensor, Tensor]:
    """Of multi-similarity loss."""
    slope = torch.where(positive, -alpha, beta).to(s.dtype)
    return slope * (s - base), slope


# t(s) and dt/ds of scores by label, of (s, positive, *constants); a loss's own weights are constants to autograd.
LOGITS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"circle": circle, "multi_similarity": multi_similarity}


def logit(s: Tensor, scale: Tensor, positive: Tensor | None, of: ByLabel) -> tuple[Tensor, Tensor]:
    """``(t, dt/ds)`` of s [R, M]; positive: [R, M] bool."""
    if positive is None:
        return s * scale, scale
    return LOGITS[of.score](s, positive, *of.constants)


def members(s: Tensor, of: ByLabel) -> tuple[Tensor | None, Tensor, Tensor]:
    """``(positive, row, col)`` [R, M] bool: which are positives, which count for their row and for their column."""
    inside = torch.ones_like(s, dtype=torch.bool)
    if of.row_labels is None or of.col_labels is None:
        return None, inside, inside
    if of.leave_out:
        inside.diagonal(of.first).fill_(False)
    positive = of.row_labels[:, None] == of.col_labels

    def counted(below, above):  # a NaN is
        return inside & torch.where(positive, ~(s >= below), ~(s <= above))

    row = inside if of.row_bounds is None else counted(of.row_bounds[0][:, None], of.row_bounds[1][:, None])
    col = inside if of.col_bounds is None else counted(of.col_bounds[0], of.col_bounds[1])
    return positive, row, col
