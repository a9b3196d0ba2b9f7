"""The fp64 truth of a whole problem, in chunks of rows: what a variant is held to at the shape that is timed.

No matrix is stored, so that it fits wherever the problem does. Losses in which every score carries gradient would need
two more N x N x D products in fp64 for their gradients; of those only `DIRECTIONS` random combinations of the channels
are made, for every row. Nothing is sampled: one wrong row of a million shows.

What it cannot show: a row that is off by less than the tolerance, which is in norms of a typical row; and a row whose
gradient hangs on a choice among scores that are nearly equal, or on a hinge that nearly opens. A variant in few bits
may choose otherwise there and be right, so that such rows are held to their size alone (:class:`Rows`). With the
triplet loss in bf16 they are most rows (80 % at N = 4096, D = 512), in fp32 a few in a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DIRECTIONS = 8
CHUNK_SCORES = {"cpu": 1 << 21, "cuda": 1 << 25}  # of fp64, of which a handful are held at once
# Two numbers rounded to dtype may change places if they are closer than this part of them: two halves of the last bit
# of 16-bit numbers; of fp32 and fp64 what sums over the channels lose, too.
TIES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
UNSURE = 8.0  # norms of a typical row, that a row may be off by where it hangs on a near-tie


class Rows(NamedTuple):
    """What must come out for each of N rows."""

    truth: Tensor  # [N], [N, D], or [N, K]: the rows' products with the directions
    directions: Tensor | None = None  # [D, K]
    sure: Tensor | None = None  # [N] bool: rows that hang on no near-tie; None: all

    def error(self, result: Tensor) -> float:
        """The largest error of a row, in norms of a typical one; infinite for another shape, NaN, or a wild row."""
        result = result.double()
        if self.directions is not None and result.dim() == 2 and result.shape[1] == len(self.directions):
            result = result @ self.directions
        if result.shape != self.truth.shape:
            return float("inf")
        off, size = (
            (t if t.dim() > 1 else t[:, None]).flatten(1).norm(dim=1) for t in (result - self.truth, self.truth)
        )
        off = off.nan_to_num(nan=float("inf")) / size.square().mean().sqrt().clamp_min(1e-300)
        if self.sure is not None:
            if (off[~self.sure] > UNSURE).any():
                return float("inf")
            off = off[self.sure]
        return float(off.max()) if len(off) else 0.0


Expected = list[Tensor | Rows]  # outputs, then the gradient of every leaf


def error(result: Tensor, expected: Tensor | Rows) -> float:
    """Of rows the largest, of other results the relative error in norm."""
    if isinstance(expected, Rows):
        return expected.error(result)
    if result.shape != expected.shape:
        return float("inf")
    off = float((result.double() - expected).norm() / expected.norm().clamp_min(1e-300))
    return off if off == off else float("inf")


def chunks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their scores a bᵀ [·, M]) for all rows of a."""
    step = max(CHUNK_SCORES[a.device.type] // max(len(b), 1), 1)
    for first in range(0, len(a), step):
        rows = slice(first, min(first + step, len(a)))
        yield rows, a[rows] @ b.mT


def directions(channels: int, device: torch.device) -> Tensor:
    """[D, K], which keep a row's norm on average."""
    g = torch.Generator().manual_seed(7)
    return torch.randn(channels, DIRECTIONS, generator=g, dtype=torch.float64).to(device) / DIRECTIONS**0.5


class Seen(NamedTuple):
    """Of the gradients of a and b, what the directions show."""

    da: Tensor  # [N, K]
    db: Tensor  # [M, K]
    sums: list[Tensor]
    directions: Tensor


def sweep(a: Tensor, b: Tensor, slope: Callable[[Tensor, slice], tuple[Tensor, list[Tensor]]]) -> Seen:
    """Σ_j ds_ij b_j and Σ_i ds_ij a_i for slope(s, rows) -> (ds of these rows, numbers to be summed up)."""
    u = directions(a.shape[1], a.device)
    left, right = a @ u, b @ u
    da, db = torch.zeros_like(left), torch.zeros_like(right)
    sums: list[Tensor] = []
    for rows, s in chunks(a, b):
        ds, numbers = slope(s, rows)
        da[rows] = ds @ right
        db += ds.mT @ left[rows]
        sums = [x + y for x, y in zip(sums, numbers, strict=True)] if sums else numbers
    return Seen(da, db, sums, u)


class Anchors(NamedTuple):
    """Of one direction's anchors, the hardest negative."""

    score: Tensor  # [N]
    place: Tensor  # [N]
    close: Tensor  # [N] bool: another is nearly as hard


def pairs_out(s: Tensor, rows: slice) -> Tensor:
    """s with -inf at its pairs, in place."""
    s.diagonal(rows.start).fill_(-torch.inf)
    return s


Window = Callable[[Tensor], Tensor]  # of hardest scores, how far below them a score is nearly as hard


def hardest(a: Tensor, b: Tensor, window: Window) -> tuple[Anchors, Anchors]:
    """Of every row of a, among the rows of b but its pair; and of every row of b, among those of a."""
    rows_best, rows_second, rows_place = a.new_empty(len(a)), a.new_empty(len(a)), _places(a)
    best, second, place = b.new_full((len(b),), -torch.inf), b.new_full((len(b),), -torch.inf), _places(b)
    for rows, s in chunks(a, b):
        pairs_out(s, rows)
        rows_best[rows], rows_place[rows] = s.max(1)
        col_score, col_place = s.max(0)
        row_place = rows_place[rows, None]
        rows_second[rows] = s.scatter_(1, row_place, -torch.inf).amax(1)
        s.scatter_(1, row_place, rows_best[rows, None])
        next_best = s.scatter_(0, col_place[None], -torch.inf).amax(0)
        second = torch.maximum(torch.minimum(best, col_score), torch.maximum(second, next_best))
        place = torch.where(col_score > best, col_place + rows.start, place)
        best = torch.maximum(best, col_score)
    statistics = (rows_best, rows_second, rows_place), (best, second, place)
    of_a, of_b = (Anchors(score, at, score - second <= window(score)) for score, second, at in statistics)
    return of_a, of_b


def _places(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def touched(a: Tensor, b: Tensor, of_a: Anchors, of_b: Anchors, window: Window) -> tuple[Tensor, Tensor]:
    """([N], [M] bool): rows that are nearly the hardest of a row on the other side which has several such."""
    level_a, level_b = (torch.where(of.close, of.score - window(of.score), torch.inf) for of in (of_a, of_b))
    of_columns, of_rows = torch.zeros_like(of_a.close), torch.zeros_like(of_b.close)
    for rows, s in chunks(a, b):
        pairs_out(s, rows)
        of_columns[rows] = (s >= level_b).any(1)
        of_rows |= (s >= level_a[rows, None]).any(0)
    return of_columns, of_rows


Terms = Callable[[Tensor, Tensor, Tensor, Tensor, Anchors], tuple[Tensor, Tensor | None]]


def by_choice(leaves: list[Tensor], a: Tensor, b: Tensor, window: Window, terms: Terms) -> Expected:
    """A loss of pairs and hardest negatives: its value, and the gradients of leaves, x's and y's before all others.

    terms(p, n, q, k, anchors): for one direction, anchors q against k, detached: a term [N] for each, to be summed and
    differentiated by p and n [N], and [N] bool where it nearly has a kink (None: it has none).
    """
    q, k = a.detach(), b.detach()
    of_a, of_b = hardest(q, k, window)
    positive_score = (a * b).sum(1)
    row_terms, row_kink = terms(positive_score, (a * b[of_a.place]).sum(1), q, k, of_a)
    col_terms, col_kink = terms(positive_score, (b * a[of_b.place]).sum(1), k, q, of_b)
    total = row_terms.sum() + col_terms.sum()
    gradients = torch.autograd.grad(total, leaves)
    if row_kink is not None and col_kink is not None:
        of_a, of_b = (of._replace(close=of.close | kink) for of, kink in ((of_a, row_kink), (of_b, col_kink)))
        of_pair = row_kink | col_kink  # a pair's two rows are in both of its terms
    else:
        of_pair = torch.zeros_like(of_a.close)
    by_b, by_a = touched(q, k, of_a, of_b, window)
    of_sides = [
        Rows(g, sure=~(of.close | of_pair | by))
        for g, of, by in zip(gradients, (of_a, of_b), (by_b, by_a), strict=False)
    ]
    return [total.detach(), *of_sides, *gradients[2:]]
