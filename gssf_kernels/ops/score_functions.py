"""The functions of one score that dense losses are made of, in plain PyTorch.

pointwise   f(t) and f'(t) of losses that sum over scores
logit       t(s) and dt/ds of losses over log-sum-exps

`triton/score_functions.py` and `csrc/vector_dense.h` have the same functions. Sources: the losses' files.
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
    """How scores become logits, and which of them count. ``ByLabel()``: all scores count."""

    score: str = "scaled"  # "scaled": t = κ s; "limited": the same of fewer scores; or one of LOGITS
    constants: list[float] = []  # noqa: RUF012  # of the score function
    # [R] and [M] int64. For "limited" positives are pairs and equal labels, and labels may be None.
    row_labels: Tensor | None = None
    col_labels: Tensor | None = None
    # [2, R]: positives of row i count if less than [0, i], negatives if > [1, i]. "limited", [R]: negatives of row i
    # count if <= [i].
    row_bounds: Tensor | None = None
    col_bounds: Tensor | None = None  # [2, M] or [M]: the same for the columns as anchors
    first: int = 0  # the column of row 0's pair
    leave_out: bool = False  # whether the pair of each row is left out

    @property
    def classes(self) -> int:
        """How many log-sum-exps a row has: 1 over all scores, or 2 over positives and over negatives."""
        return 2 if self.score in LOGITS else 1

    def part(self, rows: slice, columns: slice, first: int) -> "ByLabel":
        """The same for the scores of these rows and columns, where the pair of row 0 is in column ``first``."""
        if self.score == "scaled":
            return self
        row_labels, col_labels, row_bounds, col_bounds = (
            None if t is None else t[..., part]
            for t, part in zip(self[2:6], (rows, columns, rows, columns), strict=True)
        )
        bundle = row_labels, col_labels, row_bounds, col_bounds, self.first + first, self.leave_out
        return ByLabel._make((self.score, self.constants, *bundle))


def _choose(positive: Tensor, for_positives: float, for_negatives: float, s: Tensor) -> Tensor:
    """One of two numbers for each score, in s's dtype: ``torch.where`` of two numbers would round them to fp32."""
    return torch.where(positive, s.new_full((), for_positives), s.new_full((), for_negatives))


def circle(s: Tensor, positive: Tensor, margin: float, scale: float) -> tuple[Tensor, Tensor]:
    """t(s) and dt/ds of circle loss: the weight of a score is its distance from the optimum."""
    weight = scale * torch.where(positive, (1 + margin) - s, s + margin).clamp_min(0)
    slope = torch.where(positive, -weight, weight)
    return slope * (s - _choose(positive, 1 - margin, margin, s)), slope


def multi_similarity(s: Tensor, positive: Tensor, alpha: float, beta: float, base: float) -> tuple[Tensor, Tensor]:
    """t(s) and dt/ds of multi-similarity loss."""
    slope = _choose(positive, -alpha, beta, s)
    return slope * (s - base), slope


# (s, positive, *constants) -> (t(s), dt/ds). The weights within t are constants to autograd.
LOGITS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"circle": circle, "multi_similarity": multi_similarity}


def logit(s: Tensor, scale: Tensor, positive: Tensor | None, by_label: ByLabel) -> tuple[Tensor, Tensor]:
    """``(t, dt/ds)`` of s [R, M]; positive: [R, M] bool, which only those of LOGITS read."""
    if by_label.score not in LOGITS or positive is None:
        return s * scale, scale
    return LOGITS[by_label.score](s, positive, *by_label.constants)


def members(s: Tensor, by_label: ByLabel) -> tuple[Tensor | None, Tensor, Tensor]:
    """``(positive, row, col)`` [R, M] bool: which are positives, which count for their row and for their column.

    positive: None where positives and negatives are in one log-sum.
    """
    inside = torch.ones_like(s, dtype=torch.bool)
    if by_label.score == "scaled":
        return None, inside, inside
    positive = torch.zeros_like(inside)
    if by_label.row_labels is not None and by_label.col_labels is not None:
        positive = by_label.row_labels[:, None] == by_label.col_labels
    row_bounds, col_bounds = by_label.row_bounds, by_label.col_bounds
    if by_label.score == "limited":
        positive.diagonal(by_label.first).fill_(True)
        row = inside if row_bounds is None else positive | ~(s > row_bounds[:, None])  # a NaN counts
        col = inside if col_bounds is None else positive | ~(s > col_bounds)
        return None, row, col
    if by_label.leave_out:
        inside.diagonal(by_label.first).fill_(False)

    def within(bounds):  # a NaN counts
        upper, lower = bounds
        return inside & torch.where(positive, ~(s >= upper), ~(s <= lower))

    row = inside if row_bounds is None else within(row_bounds[:, :, None])
    col = inside if col_bounds is None else within(col_bounds)
    return positive, row, col
