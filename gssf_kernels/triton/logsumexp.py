"""row log Σ_j e^(t_ij), column log Σ_i e^(t_ij), and their gradients; formulas: `gssf_kernels/ops/logsumexp.py`.

    forward    a sweep stores (max, Σ e^(t - max)) of the rows and columns of every tile; one kernel merges them
    backward   a sweep stores dscores: all of them [N, M] if they are few, else a row panel at a time; one kernel, or
               PyTorch's matrix products, compute da and db from them

The same two epilogues run on a chunk of scores that PyTorch's matrix product has stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gssf_kernels._library import outside_autocast
from gssf_kernels.plan import Plan
from gssf_kernels.triton import hopper, operands
from gssf_kernels.triton.epilogues import partial_offsets
from gssf_kernels.triton.gradients import gradients
from gssf_kernels.triton.reductions import log_sums, merge_kernel
from gssf_kernels.triton.score_functions import load_scalar, logits, logsumexp_slope
from gssf_kernels.triton.sweep import Chunk, Sweep, empty_dscores, gradients_by_row_panels, nothing_kept


@triton.jit
def log_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's log-sums of each row and column, by class; and t of the pairs (i, i) where the diagonal crosses it."""
    scale, constant, by_label, positive_logit, rows, cols = state[1]
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    i, j = i0 + tl.arange(0, BN), j0 + tl.arange(0, BM)
    t, _, positive, row, col = logits(s, i, j, N, M, load_scalar(scale, constant), state[0], by_label)
    if positive_logit is not None and (i0 < j0 + BM) & (j0 < i0 + BN):
        diagonal = tl.sum(tl.where(i[:, None] == j[None, :], t, 0.0), 1)
        tl.store(positive_logit + i, diagonal, mask=(i >= j0) & (i < j0 + BM) & (i < N) & (i < M))
    row_at, col_at, inside = partial_offsets(tile_i, tile_j, blocks, M, BN, BM)
    for c in tl.static_range(len(rows)):
        if len(rows) == 2:
            member = positive if c == 0 else positive == 0
            row_t = tl.where(row & member, t, float("-inf"))
        else:
            row_t = tl.where(row, t, float("-inf"))
        top, total = log_sums(row_t, 1)  # [BN]
        tl.store(rows[c][0] + row_at, top)
        tl.store(rows[c][1] + row_at, total)
        if cols is not None:
            if len(rows) == 2:
                col_t = tl.where(col & (positive if c == 0 else positive == 0), t, float("-inf"))
            else:
                col_t = row_t if state[0][0] == "scaled" else tl.where(col, t, float("-inf"))
            top, total = log_sums(col_t, 0)  # [BM]
            tl.store(cols[c][0] + col_at, top, mask=inside)
            tl.store(cols[c][1] + col_at, total, mask=inside)


@triton.jit
def softmax_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """Store the tile's dL/dt, or by label dL/ds; and Σ of it times s, of the tile or with BY_ROW of each row."""
    SCORE: tl.constexpr = state[0][0]
    BY_ROW: tl.constexpr = state[0][2]
    scale, constant, by_label, rows, cols, dpositive, dscores, stride, dscores_dot_s = state[1]
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    i, j = i0 + tl.arange(0, BN), j0 + tl.arange(0, BM)
    inside = (i < N)[:, None] & (j < M)[None, :]
    t, slope, positive, row, col = logits(s, i, j, N, M, load_scalar(scale, constant), state[0], by_label)
    g = tl.zeros([BN, BM], tl.float32)
    if rows is not None:
        g += logsumexp_slope(t, positive, row, rows, i, i < N, 1, SCORE == "scaled")
    if cols is not None:
        g += logsumexp_slope(t, positive, col, cols, j, j < M, 0, SCORE == "scaled")
    if SCORE != "scaled" and SCORE != "limited":
        g *= slope
    if dpositive is not None and (i0 < j0 + BM) & (j0 < i0 + BN):
        diagonal = tl.load(dpositive + i, mask=(i < N) & (i < M), other=0.0)
        g += tl.where(i[:, None] == j[None, :], diagonal[:, None], 0.0)
    if dscores is not None:
        rows_at = dscores - (first * BN).to(tl.int64) * stride  # dscores holds this slab's rows only
        at = rows_at + i.to(tl.int64)[:, None] * stride + j[None, :]
        tl.store(at, g.to(dscores.dtype.element_ty), mask=inside)
    sums = tl.sum(tl.where((j < M)[None, :], g * s, 0.0), 1)
    if BY_ROW:
        tl.store(dscores_dot_s + tile_j.to(tl.int64) * blocks * BN + tile_i * BN + tl.arange(0, BN), sums)
    else:
        tl.store(dscores_dot_s + tile_i * tl.cdiv(M, BM) + tile_j, tl.sum(tl.where(i < N, sums, 0.0), 0))


def by_class(*statistics: torch.Tensor | None) -> tuple[tuple[torch.Tensor, ...], ...] | None:
    """Statistics [N] or [2, N] as the kernels take them: one tuple per class; None if the last statistic is None."""
    if statistics[-1] is None:
        return None
    return tuple(zip(*([t] if t.dim() == 1 else [*t] for t in statistics if t is not None), strict=True))


class Merged(NamedTuple):
    """What log-sums are merged from and into, two tensors [·] each, or by label [2, ·]; None: no columns are wanted."""

    row_partial: tuple[Any, ...]
    col_partial: tuple[Any, ...] | None
    row_results: tuple[Any, ...]
    col_results: tuple[Any, ...] | None

    @property
    def classes(self) -> tuple[Any, Any]:
        """The partials as `log_tile` takes them."""
        return by_class(*self.row_partial), by_class(*self.col_partial) if self.col_partial is not None else None

    @property
    def arguments(self) -> tuple:
        """The first arguments of `merge_kernel`."""
        by_label = self.row_results[0].dim() > 1
        return *self, tuple(t[0].stride(0) if t is not None else 0 for t in self) if by_label else None


SCALED = (tl.constexpr("scaled"), tl.constexpr(False))  # of losses without labels: t = κ s


def score_options(call: Any, *flags: bool) -> tuple:
    """The argument `OPTIONS` of `logits`, then the tile's own flags."""
    return tuple(tl.constexpr(option) for option in (call.score, call.leave_out, *flags))


def by_label(call: Any, row_labels, col_labels, row_bounds, col_bounds, first: int) -> tuple | None:
    """The argument `by_label` of `logits`."""
    if call.score == "scaled":
        return None
    constants = (*map(float, call.constants), 0.0, 0.0)[:3]
    bounds = (x for t in (row_bounds, col_bounds) for x in (t, t.stride(0) if t is not None and t.dim() == 2 else 0))
    return constants, row_labels, col_labels, *bounds, first


def _by_label(call: Any) -> tuple | None:
    if call.score == "scaled":
        return None
    row_labels, col_labels, bounds = operands.contiguous(call.a_labels, call.b_labels, call.bounds)
    return by_label(call, row_labels, col_labels, bounds, bounds if call.b is None else None, 0)


def logsumexp_scores(call: Any, plan: Plan) -> tuple[torch.Tensor, ...]:
    """Return (row_max, row_log [N], col_max, col_log [M], positive_logit [min(N, M)], an empty tensor), all fp32.

    By label the rows' statistics are [2, N] and the others are empty. Columns' statistics are empty if they are not
    wanted. The last would be what is kept: this route keeps nothing.
    """
    a, b = call.a, call.a if call.b is None else call.b
    if plan.route == "hopper":
        return *hopper.logsumexp_scores(a, b, call.scale, call.constant), a.new_empty(0, dtype=torch.float32)
    row_shape, col_shape, pairs = call.sizes()
    row_max, row_log = (a.new_empty(row_shape, dtype=torch.float32) for _ in range(2))
    col_max, col_log = (row_max.new_empty(col_shape) for _ in range(2))
    positive_logit = row_max.new_empty(pairs)
    labelled = call.score != "scaled"
    count, columns = 1 + labelled, call.columns and not labelled
    assert plan.tile is not None
    with torch.cuda.device_of(a):
        sweep = Sweep(a, b, plan.tile, results=count)
        rows, cols = sweep.empty_partials(torch.float32, torch.float32, columns=columns)
        col_results = (col_max, col_log) if columns else None
        merged = Merged(rows, cols if columns else None, (row_max, row_log), col_results)
        score, label_state = score_options(call), _by_label(call)
        for first, blocks in sweep.slabs():
            outputs = (None if labelled else positive_logit, *merged.classes)
            sweep.run(log_tile, (score, (call.scale, call.constant, label_state, *outputs)), first, blocks)
            sweep.merge(merge_kernel, first, blocks, *merged.arguments, repeats=count, REDUCTION="log-sum-exp")
    return row_max, row_log, col_max, col_log, positive_logit, nothing_kept(positive_logit, a, call.keep)


def logsumexp_scores_backward(call: Any, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of a [N, D], b [M, D] and κ, each empty if `needs` is False; b=None: b is a."""
    a, b, needs = call.a, call.a if call.b is None else call.b, call.needs
    grads = (call.drow, call.dcol, call.dpositive)
    drow, dcol, dpositive = (grad.contiguous() if grad is not None else None for grad in grads)
    if call.score != "scaled":
        dcol = dpositive = None
    if not call.columns:
        dcol = None
    rows = by_class(call.row_max, call.row_log, drow)
    cols = by_class(call.col_max, call.col_log, dcol)
    gradient = (call.scale, call.constant, _by_label(call), rows, cols, dpositive)
    score = score_options(call, False)
    assert plan.tile is not None
    with torch.cuda.device_of(a):
        if plan.route == "row panels":

            def launch(sweep, first, blocks, dscores, sums):
                stride = dscores.stride(0) if dscores is not None else 0
                sweep.run(softmax_tile, (score, (*gradient, dscores, stride, sums)), first, blocks)

            with outside_autocast(a.device):
                da, db, (total,) = gradients_by_row_panels(a, b, plan.tile, needs, 1, launch)
            kappa = call.constant if call.scale is None else call.scale
            dscale = total.float() if needs[2] else da.new_empty(0)
            return da.mul_(kappa).to(a.dtype), db.mul_(kappa).to(b.dtype), dscale
        sweep = Sweep(a, b, plan.tile)
        dscores = empty_dscores(a, len(b))
        sums = a.new_empty(1, sweep.row_blocks * sweep.column_blocks, dtype=torch.float32)
        state = (score, (*gradient, dscores, dscores.stride(0), sums))
        sweep.run(softmax_tile, state, 0, sweep.row_blocks)
        logit_scale = {"scale": call.scale, "constant": call.constant}
        da, db, ends = gradients(dscores, a, call.b, needs, sums if needs[2] else None, **logit_scale)
    return da, db, ends[0] if ends else sums.new_empty(0)


def logsumexp_pass(call: Any, plan: Plan) -> None:
    """Write (max, Σ e^(t - max)) of the rows of s [R, M] fp32, and merge its columns' into col_max, col_sum."""
    if call.s.numel() == 0:
        call.row_max.fill_(float("-inf"))
        call.row_sum.zero_()
        return
    chunk, count = Chunk(call.s), call.by_label.classes
    classes = call.row_max.shape[:-1]  # 2 of scores by label
    row_partial, col_partial, col_results = tuple(chunk.row_partials(2, *classes).flatten(-2)), None, None
    if call.col_max is not None:
        col_partial = tuple(chunk.column_partials(2, *classes).flatten(-2))
        col_results = call.col_max, call.col_sum
    merged = Merged(row_partial, col_partial, (call.row_max, call.row_sum), col_results)
    labels = by_label(call, call.row_labels, call.col_labels, call.row_bounds, call.col_bounds, call.first)
    with torch.cuda.device_of(call.s):
        chunk.run(log_tile, (score_options(call), (call.scale, 1.0, labels, None, *merged.classes)))
        chunk.merge(merge_kernel, 0, chunk.row_blocks, *merged.arguments, repeats=count, REDUCTION="exp-sum")


def softmax_pass(call: Any, plan: Plan) -> None:
    """Overwrite s [R, M] fp32 with dL/dt, or by label dL/ds; and write Σ_j of it times s [R]."""
    if call.s.numel() == 0:
        call.dscores_dot_s.zero_()
        return
    chunk = Chunk(call.s)
    rows = by_class(call.row_max, call.row_log, call.row_grad)
    cols = by_class(call.col_max, call.col_log, call.col_grad)
    labels = by_label(call, call.row_labels, call.col_labels, call.row_bounds, call.col_bounds, call.first)
    sums = chunk.row_partials()
    with torch.cuda.device_of(call.s):
        gradient = (call.scale, 1.0, labels, rows, cols, None)
        state = (score_options(call, True), (*gradient, call.s, call.s.stride(0), sums))
        chunk.run(softmax_tile, state)
    torch.sum(sums[:, : chunk.N], 0, out=call.dscores_dot_s)
