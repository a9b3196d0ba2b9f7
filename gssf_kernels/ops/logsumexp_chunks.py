"""The log-sums of :mod:`gssf_kernels.ops.logsumexp`, and their gradients, by a loop over chunks of scores.

If the forward keeps the softmax's means, ``mean_i = Σ_j p_ij b_j``, then ``da_i = κ (g_i mean_i + h_i b_i)`` and
``dκ = Σ_i a_i · (g_i mean_i + h_i b_i)``, with g and h the gradients of row_log and positive_logit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gssf_kernels.dense import chunks, kept_shape, triangle, unit_of
from gssf_kernels.ops.masks import least
from gssf_kernels.plan import accumulation_dtype

if TYPE_CHECKING:
    from gssf_kernels.ops.logsumexp import BackwardCall, Call


def by_chunks(call: Call) -> tuple[Tensor, ...]:
    a, dtype, scale, by_label = call.a, accumulation_dtype(call.a.dtype), call.kappa, call.by_label
    row_shape, _, pairs = call.sizes()
    n, m = a.shape[0], a.shape[0] if call.b is None else call.b.shape[0]
    row_max, row_sum = (a.new_empty(row_shape, dtype=dtype) for _ in range(2))
    positive_logit = a.new_empty(pairs, dtype=dtype)
    columns = (*row_shape[:-1], m)  # by label they are used only if b is a, where columns and rows are the same anchors
    needs_columns = call.b is None or (by_label.classes == 1 and call.columns)
    selection = call.selection
    col_max, col_sum = a.new_full(columns, -torch.inf, dtype=dtype), a.new_zeros(columns, dtype=dtype)
    shape = kept_shape(a, call.b, call.keep)
    means = call.keep == "means" and shape[0] > 0
    kept = a.new_empty((0, a.shape[1]) if means else shape, dtype=dtype)
    one, ignored = (a.new_full((n if means else 0,), value, dtype=dtype) for value in (1, 0))

    def statistics(s, rows, columns, first, out, col_out):
        torch.ops.gssf.logsumexp_pass(s, scale, *by_label.part(rows, columns, first), *out, *col_out)

    def visit(s, first):
        rows, columns = slice(first, first + s.shape[0]), slice(0, m)
        if kept.numel():
            kept[rows] = s
        if pairs:
            torch.mul(s.diagonal(first), scale, out=positive_logit[rows])
        col_out, row_out = (col_max, col_sum) if needs_columns else (None, None), _parts((row_max, row_sum), rows)
        if selection.apart:  # the columns' pass overwrites statistics of rows that nobody reads
            statistics(selection.logits(s, first, "cols", scale), rows, columns, first, row_out, col_out)
            col_out = (None, None)
        s = s if selection.plain else selection.logits(s, first, "rows", scale)
        statistics(s, rows, columns, first, row_out, col_out)
        if means:  # s becomes the rows' softmax
            top, log = _finite(row_out[0], row_out[1].log())
            unit, dot = _parts((one, ignored), rows)
            of_chunk = by_label.part(rows, columns, first)
            torch.ops.gssf.softmax_pass(s, scale, *of_chunk, top, log, unit, None, None, None, dot)

    def visit_half(scores, first):
        (s,) = scores
        count = s.shape[0]
        rows, beyond = slice(first, first + count), slice(first + count, n)
        if pairs:
            torch.mul(s.diagonal(), scale, out=positive_logit[rows])
        if selection.exclude_self:
            s.diagonal().fill_(least(s.dtype))
        # The scores of a row come in three parts: right of the square on the diagonal, the square, and left of it. The
        # last were columns of earlier chunks.
        square, right = (row_max.new_empty(2, *row_shape[:-1], count) for _ in range(2))
        statistics(s[:, :count], rows, rows, 0, square, (None, None))
        statistics(s[:, count:], rows, beyond, -count, right, (col_max[..., beyond], col_sum[..., beyond]))
        left = col_max[..., rows], col_sum[..., rows]
        row_max[..., rows], row_sum[..., rows] = _merged(
            *(torch.stack(t) for t in zip(right, square, left, strict=True))
        )

    if call.b is None:
        triangle((a,), visit_half, False, call.other)
        col_max, col_sum = row_max.clone(), row_sum.clone()
    else:
        softmax_b, _ = chunks(a, call.b, visit, (means, False))
        kept = kept if softmax_b is None else softmax_b
    if by_label.classes > 1 or not call.columns:
        col_max, col_sum = col_max.new_empty(0), col_sum.new_empty(0)
    return row_max, row_sum.log(), col_max, col_sum.log(), positive_logit, kept


def _parts(statistics, part: slice):
    """``t[..., part]`` of each, or t itself if that is all of it: a small batch is one chunk, where slicing shows."""
    count = part.stop - part.start
    return [t if t is None or t.shape[-1] == count else t.narrow(-1, part.start, count) for t in statistics]


def _merged(maxima, sums):
    """Merge (maximum, Σ e^{t − maximum}) of P parts, [P, …] each. A maximum of +inf stands for NaN too."""
    maximum = maxima.amax(0)
    shift = torch.where(maximum.isfinite(), maximum, 0)
    return maximum, torch.where(maxima == maximum, sums, sums * torch.exp(maxima - shift)).sum(0)


def _finite(*statistics: Tensor) -> list[Tensor]:
    """Statistics for softmax_pass, maxima or log-sums.

    If all logits of a row are -inf, its maximum and log-sum are -inf too. Clamped to the lowest finite number l, they
    give e^{t − l − l} = 0 for its scores.
    """
    return [t.clamp_min(least(t.dtype)) for t in statistics]


def _gradients_of_means(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a and κ from the means that the forward kept."""
    a, b, means, kappa = call.a, call.b, call.kept, call.forward.kappa
    assert b is not None
    assert means is not None
    da, wide = torch.zeros_like(means), a.to(means.dtype)
    if call.drow is not None:
        torch.mul(means, call.drow[:, None], out=da)
    if call.dpositive is not None:
        count = call.dpositive.shape[0]
        da[:count].addcmul_(call.dpositive[:, None], b[:count].to(means.dtype))
    dscale = (wide * da).sum(dtype=torch.float64).to(kappa.dtype) if call.needs[2] else kappa.new_empty(0)
    return da.mul_(kappa).to(a.dtype) if call.needs[0] else a.new_empty(0), a.new_empty(0), dscale


def gradients_by_chunks(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    a, b, needs, forward = call.a, call.b, call.needs, call.forward
    if call.keep == "means" and call.kept is not None and call.kept.numel() and not needs[1]:
        return _gradients_of_means(call)
    scale, by_label = forward.kappa, forward.by_label
    row_max, row_log, col_max, col_log = _finite(*call[7:11])
    drow, dcol, dpositive = call.drow, call.dcol, call.dpositive
    selection = forward.selection
    if by_label.classes > 1:
        dcol = dpositive = None  # by label there are only row statistics
    if not selection.columns:
        dcol = None
    unit = unit_of(a.dtype, drow, dcol, dpositive)
    if unit is not None:
        drow, dcol, dpositive = (g / unit if g is not None else None for g in (drow, dcol, dpositive))
    if b is None and (drow is not None or dcol is not None):  # rows and columns are the same anchors
        directions = [g for g in (drow, dcol) if g is not None]
        drow = dcol = directions[0] if len(directions) == 1 else directions[0] + directions[1]
        col_max, col_log = row_max, row_log
    drow, dcol = (g.contiguous() if g is not None else None for g in (drow, dcol))

    dscores_dot_s = a.new_zeros(a.shape[0], dtype=scale.dtype)  # Σ_j ds_ij s_ij [N]; their sum is dL/dκ

    row_statistics = row_max, row_log, drow
    col_statistics = (col_max, col_log, dcol) if dcol is not None else (None, None, None)

    def visit(s, rows, columns, first, dot):
        """Replace s by dscores; write Σ_j ds_ij s_ij of its rows to dot."""
        row_part, col_part = _parts(row_statistics, rows), _parts(col_statistics, columns)
        torch.ops.gssf.softmax_pass(s, scale, *by_label.part(rows, columns, first), *row_part, *col_part, dot)
        return dot

    def visit_apart(s, rows, first, dot):
        """The same where the logits of the two directions differ: a pass for each."""
        columns, ds = slice(0, s.shape[1]), torch.zeros_like(s)
        for direction, statistics in (("rows", row_statistics), ("cols", col_statistics)):
            if statistics[2] is None:
                continue
            t, of_direction = selection.logits(s, first, direction, scale), torch.zeros_like(dot)
            by_direction = (statistics, None) if direction == "rows" else (None, statistics)
            row_part, col_part = (
                (None, None, None) if x is None else _parts(x, part)
                for x, part in zip(by_direction, (rows, columns), strict=True)
            )
            row_part = (*_parts(row_statistics[:2], rows), None) if row_part[2] is None else row_part
            torch.ops.gssf.softmax_pass(t, scale, *by_label, *row_part, *col_part, of_direction)
            dot += of_direction
            if selection.col_bias is not None and direction == "rows":
                dot -= t @ (selection.col_bias / scale)
            ds += t
        s.copy_(ds)

    def visit_chunk(s, first):
        rows = slice(first, first + s.shape[0])
        diagonal = s.diagonal(first)
        pairs = slice(first, first + diagonal.shape[0])
        pairs_dot = diagonal * dpositive[pairs] if dpositive is not None else None
        if selection.apart or selection.col_bias is not None:
            dot = torch.zeros_like(dscores_dot_s[rows])
            visit_apart(s, rows, first, dot)
            dscores_dot_s[rows] = dot
        else:
            s = s if selection.plain else selection.logits(s, first, "rows", scale)
            visit(s, rows, slice(0, s.shape[1]), first, dscores_dot_s[rows])
        if pairs_dot is not None and dpositive is not None:
            diagonal.add_(dpositive[pairs])
            dscores_dot_s[pairs] += pairs_dot

    def visit_half(scores, first):  # leaves dscores + dscoresᵀ
        (s,) = scores
        count = s.shape[0]
        rows, beyond = slice(first, first + count), slice(first + count, first + s.shape[1])
        pairs_dot = s.diagonal() * dpositive[rows] if dpositive is not None else None
        if selection.exclude_self:
            s.diagonal().fill_(least(s.dtype))
        dot, dot_beyond = dscores_dot_s.new_empty(2, count)
        dscores_dot_s[rows] = visit(s[:, :count], rows, rows, 0, dot) / 2
        if count < s.shape[1]:
            dscores_dot_s[rows] += visit(s[:, count:], rows, beyond, -count, dot_beyond)
        if pairs_dot is not None and dpositive is not None:
            s.diagonal().add_(dpositive[rows], alpha=2)
            dscores_dot_s[rows] += pairs_dot

    if b is None:
        da, db = triangle((a,), visit_half, needs[0], call.other), None
    else:
        kept = call.kept if call.keep == "scores" and call.kept is not None and call.kept.numel() else None
        da, db = chunks(a, b, visit_chunk, needs[:2], kept)  # from dL/dt; multiplied by κ below
    factor, total = scale, dscores_dot_s.sum(dtype=torch.float64)
    if unit is not None:
        factor, total = scale * unit, total * unit
    return (
        da.mul_(factor).to(a.dtype) if da is not None else a.new_empty(0),
        db.mul_(factor).to(a.dtype) if db is not None else a.new_empty(0),
        total.to(scale.dtype) if needs[2] else scale.new_empty(0),
    )
