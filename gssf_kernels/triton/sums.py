"""Σ_ij f(t_ij), or its sum per row, and the gradients; formulas: `gssf_kernels/ops/sums.py`.

    "sum"        a sweep leaves Σ f, Σ f' and Σ f' s of every tile and stores dscores: all of them [N, M] if they are
                 few, else a row panel at a time; one kernel, or PyTorch's matrix products, compute the sums, da and db
    "none"       forward, a sweep leaves Σ f of every tile's rows and columns, which one kernel adds up; backward, the
                 sweep of "sum" with grad_out as weights

The same epilogue runs on a chunk of scores that PyTorch's matrix product has stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels._library import outside_autocast
from gssf_kernels.ops.masks import UNPAIRED
from gssf_kernels.plan import Plan
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.epilogues import partial_offsets
from gssf_kernels.triton.gradients import gradients, logarithm_slope
from gssf_kernels.triton.pairs import pair_scores
from gssf_kernels.triton.reductions import merge_sums, merge_terms
from gssf_kernels.triton.score_functions import load_scalar, term, valid_and_positive
from gssf_kernels.triton.sweep import Chunk, Sweep, empty_dscores, gradients_by_row_panels


@triton.jit
def relative_bias(beta, positive_score, at, mask, AXIS: tl.constexpr):
    """β, or β - positive_score of the anchors at ``at``."""
    if positive_score is None:
        return beta
    else:
        return tl.expand_dims(beta - tl.load(positive_score + at, mask=mask, other=0.0), AXIS)


@triton.jit
def weighted(slope, weight, stride, at, mask, AXIS: tl.constexpr):
    """slope times the weights of the anchors at ``at``, if there are any."""
    if weight is not None:
        slope *= tl.expand_dims(tl.load(weight + at.to(tl.int64) * stride, mask=mask, other=0.0), AXIS)
    return slope


@triton.jit
def sums_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's sums of f, of f' and of f' s; and its dscores, if they are stored.

    state: ((KIND, POSITIVES, OUTPUT), logit, pairs, anchors, outputs) with
    logit: scale, constant, bias, offset
    pairs: a_ids, b_ids, diagonal: row i's positive is column i + diagonal
    anchors: row_positive, col_positive, columns, row_weight, col_weight, weight stride; where col_positive is not None,
    the first ``columns`` columns are anchors too, with terms relative to col_positive
    outputs: sums, row_slopes, col_slopes, dscores or None, stride of dscores. With OUTPUT "tile": sums [3, tiles] of f,
    f' and f' s, and, if columns are anchors, Σ f' of the tile's rows and columns. With "row": sums [3, column blocks,
    rows], and in col_slopes the columns' Σ f and Σ f' [2, row blocks, columns]. With "value": only Σ f of each.
    """
    KIND: tl.constexpr = state[0][0]
    POSITIVES: tl.constexpr = state[0][1]
    OUTPUT: tl.constexpr = state[0][2]
    scale, constant, bias, offset = state[1]
    a_ids, b_ids, diagonal = state[2]
    row_positive, col_positive, columns, row_weight, col_weight, weight_stride = state[3]
    sums, row_slopes, col_slopes, dscores, stride = state[4]
    i, j = (first + tile_i) * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    inside, positive = valid_and_positive(i, j, diagonal, a_ids, b_ids, N, M)
    row_at, _, _ = partial_offsets(tile_i, tile_j, blocks, M, BN, BM)
    t, beta = s * load_scalar(scale, constant), load_scalar(bias, offset)

    f, g = term(t + relative_bias(beta, row_positive, i, i < N, 1), positive, inside, KIND, POSITIVES)
    row_f = tl.sum(f, 1)
    length = tl.cdiv(M, BM).to(tl.int64) * blocks * BN
    if OUTPUT == "row":
        tl.store(sums + length + row_at, tl.sum(g, 1))
    if OUTPUT != "value":
        g = weighted(g, row_weight, weight_stride, i, i < N, 1)
    if OUTPUT == "tile" and row_slopes is not None:
        tl.store(row_slopes + row_at, tl.sum(g, 1))
    total = row_f
    if col_positive is not None:
        counts = inside & (j < columns)[None, :]
        f, h = term(t + relative_bias(beta, col_positive, j, j < columns, 0), positive, counts, KIND, POSITIVES)
        total += tl.sum(f, 1)
        col_at = tile_i.to(tl.int64) * columns + j
        if OUTPUT != "tile":
            tl.store(col_slopes + col_at, tl.sum(f, 0), mask=j < columns)
        if OUTPUT == "row":
            tl.store(col_slopes + blocks.to(tl.int64) * columns + col_at, tl.sum(h, 0), mask=j < columns)
        if OUTPUT != "value":
            h = weighted(h, col_weight, weight_stride, j, j < columns, 0)
            if OUTPUT == "tile":
                tl.store(col_slopes + tile_i.to(tl.int64) * M + j, tl.sum(h, 0), mask=j < M)
            g += h
    if OUTPUT == "value":
        tl.store(sums + row_at, row_f)
    else:
        dot = tl.sum(tl.where((j < M)[None, :], g * s, 0.0), 1)
        if OUTPUT == "row":
            tl.store(sums + row_at, row_f)
            tl.store(sums + 2 * length + row_at, dot)
        else:
            count = blocks * tl.cdiv(M, BM)
            at = sums + tile_i * tl.cdiv(M, BM) + tile_j
            tl.store(at, tl.sum(total, 0))
            tl.store(at + count, tl.sum(tl.sum(g, 1), 0))
            tl.store(at + 2 * count, tl.sum(tl.where(i < N, dot, 0.0), 0))
        if dscores is not None:
            rows = dscores - (first * BN).to(tl.int64) * stride  # dscores holds this slab's rows only
            at = rows + i.to(tl.int64)[:, None] * stride + j[None, :]
            tl.store(at, g.to(dscores.dtype.element_ty), mask=inside)


@triton.jit
def sums_merged_terms(
    merged, loss, i, N, M, blocks, FUNCTION: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Σ of the partials of rows i, plus Σ of those of columns i < N unless these are None; nothing else is stored."""
    row_partial, col_partial, _, _ = merged
    total = merge_sums(row_partial, i, blocks * BN, N, tl.cdiv(M, BM), BP)
    if col_partial is not None:
        total += merge_sums(col_partial, i, N, N, blocks, BP)
    return total


def _options(call: Any, output: str) -> tuple:
    return tl.constexpr(call.kind), tl.constexpr(call.positives), tl.constexpr(output)


def _state(call: Any, output: str, positive_score: torch.Tensor | None, weight: torch.Tensor | None = None) -> tuple:
    """The state of `sums_tile` for a call on a and b, without its outputs."""
    ids = operands.contiguous(call.a_ids, call.a_ids if call.b_ids is None else call.b_ids)
    relative = (positive_score, positive_score, len(call.a)) if call.relative else (None, None, 0)
    weights = (weight, weight if call.relative else None, weight.stride(0) if weight is not None else 0)
    logit = (call.scale, call.constant, call.bias, call.offset)
    return _options(call, output), logit, (*ids, 0 if call.paired else UNPAIRED), (*relative, *weights)


def _positive_score(call: Any) -> torch.Tensor | None:
    """positive_score [N] if terms are relative to it, else None."""
    if not call.relative or call.positive_score is not None:
        return call.positive_score
    return pair_scores(call.a, call.other, None, None)


def score_sums(call: Any, plan: Plan) -> tuple[torch.Tensor, ...]:
    """Return (value, dκ, dβ, Σ_j f'_ij b_j [N, D], Σ_i f'_ij a_i [M, D], positive_score [N]), fp32.

    With reduction "sum" the last is empty. With "none" value is [N], and all others are empty but positive_score, if
    terms are relative to it and the call does not bring it.
    """
    a, b, empty = call.a, call.other, call.a.new_empty(0, dtype=torch.float32)
    assert plan.tile is not None
    with torch.cuda.device_of(a):
        if plan.route == "row panels":
            state = _state(call, "tile", None)

            def launch(sweep, first, blocks, dscores, sums):
                stride = dscores.stride(0) if dscores is not None else 0
                sweep.run(sums_tile, (*state, (sums, None, None, dscores, stride)), first, blocks)

            with outside_autocast(a.device):
                da, db, sums = gradients_by_row_panels(a, b, plan.tile, call.needs, 3, launch)
            value, dbias, dscale = (call.factor * sums).float().unbind()
            return value.clone(), dscale.clone(), dbias.clone(), da, db, empty
        positive_score = _positive_score(call)
        if call.reduction == "none":
            rows = _row_sums(call, plan, positive_score)
            new = positive_score if call.positive_score is None and positive_score is not None else empty
            return rows, *(empty.new_empty(0) for _ in range(4)), new
        dscores, sums, slopes = _sweep(call, plan, positive_score, None)
        da, db, ends = gradients(
            dscores, a, call.b, call.needs, sums, share=call.factor, slopes=slopes, dtype=torch.float32
        )
    value, dbias, dscale = ends
    return value, dscale, dbias, da, db, empty


def _row_sums(call: Any, plan: Plan, positive_score: torch.Tensor | None) -> torch.Tensor:
    a, b = call.a, call.other
    assert plan.tile is not None
    sweep, N = Sweep(a, b, plan.tile), len(a)
    down, across = sweep.row_blocks, sweep.column_blocks
    out = a.new_empty(N, dtype=torch.float32)
    rows, cols = out.new_empty(across, down * sweep.BN), out.new_empty(down, N) if call.relative else None
    sweep.run(sums_tile, (*_state(call, "value", positive_score), (rows, None, cols, None, 0)), 0, down)
    merge_terms(sweep, (rows, cols, None, None), (), out, "none", sums_merged_terms)
    return out


def _sweep(
    call: Any, plan: Plan, positive_score: torch.Tensor | None, weight: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """(dscores [N, M] or None, sums [3, tiles], partials of Σ f' per row and per column or None); weight: [N]."""
    a, b = call.a, call.other
    assert plan.tile is not None
    sweep = Sweep(a, b, plan.tile)
    down, across = sweep.row_blocks, sweep.column_blocks
    sums = a.new_empty(3, down * across, dtype=torch.float32)
    slopes = None
    if call.relative:
        slopes = sums.new_empty(across, down * sweep.tile.BN), sums.new_empty(down, len(b))
    dscores = empty_dscores(a, len(b)) if any(call.needs) else None
    outputs = (sums, *(slopes or (None, None)), dscores, dscores.stride(0) if dscores is not None else 0)
    sweep.run(sums_tile, (*_state(call, "tile", positive_score, weight), outputs), 0, down)
    return dscores, sums, slopes


@triton.jit
def scaled(x, out, factor, lane, count):
    """out = factor x, rounded to out's dtype, at the lanes."""
    value = tl.load(x + lane, mask=lane < count, other=0.0)
    tl.store(out + lane, (value * factor).to(out.dtype.element_ty), mask=lane < count)


@triton.jit
def scaled_kernel(
    grad_out, da, db, dscale, dbias, scale, constant, share, a_out, b_out, scale_out, bias_out, a_count, b_count,
    BT: tl.constexpr,
):  # fmt: skip
    """grad_out share κ times da and db, BT entries per program; and grad_out times the gradients of κ and β."""
    lane = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    g = tl.load(grad_out)
    factor = g * share * load_scalar(scale, constant)
    if a_out is not None:
        scaled(da, a_out, factor, lane, a_count)
    if b_out is not None:
        scaled(db, b_out, factor, lane, b_count)
    if tl.program_id(0) == 0:
        tl.store(scale_out, g * tl.load(dscale) * logarithm_slope(scale, constant))
        tl.store(bias_out, g * tl.load(dbias))


def score_sums_backward(call: Any, plan: Plan) -> tuple[torch.Tensor, ...]:
    """Return the gradients of a, b, κ and β, and an empty tensor; b=None: b is a."""
    a = call.a
    with torch.cuda.device_of(a):
        if call.reduction == "none":
            forward = call.forward
            dscores, sums, slopes = _sweep(forward, plan, call.positive_score, call.grad_out)
            logit_scale = {"scale": call.scale, "constant": call.constant}
            da, db, ends = gradients(dscores, a, call.b, call.needs, sums, **logit_scale, slopes=slopes)
            _, dbias, dscale = ends
            return da, db, dscale, dbias, dscale.new_empty(0)
        da, db = call.da.contiguous(), call.db.contiguous()
        out = torch.empty_like(da, dtype=a.dtype), torch.empty_like(db, dtype=a.dtype)
        ends = torch.empty_like(call.dscale), torch.empty_like(call.dbias)
        needed = [t if t.numel() else None for t in out]
        BT = tiles.TERMS
        programs = max(triton.cdiv(max(da.numel(), db.numel()), BT), 1)
        scaled_kernel[(programs,)](
            call.grad_out, da, db, call.dscale, call.dbias, call.scale, call.constant, call.factor, *needed, *ends,
            da.numel(), db.numel(), BT=BT, num_warps=4, num_stages=2,
        )  # fmt: skip
    return *out, *ends, ends[0].new_empty(0)


def score_sums_pass(call: Any, plan: Plan) -> None:
    """Write call.rows [3, R], add to call.cols [2, K]; with call.gradient overwrite s [R, M] with dscores."""
    s, K = call.s, call.cols.shape[1]
    if s.numel() == 0:
        call.rows.zero_()
        return
    chunk = Chunk(s)
    rows, cols = chunk.row_partials(3), s.new_empty(2, chunk.row_blocks, K) if K else None
    logit, ids = (call.scale, 1.0, call.bias, 0.0), (call.row_ids, call.col_ids, call.first)
    anchors = (call.row_positive, call.col_positive, K, call.row_weight, call.col_weight, 1)
    outputs = (rows, None, cols, s if call.gradient else None, s.stride(0))
    with torch.cuda.device_of(s):
        chunk.run(sums_tile, (_options(call, "row"), logit, ids, anchors, outputs))
    torch.sum(rows[..., : chunk.N], 1, out=call.rows)
    if cols is not None:
        call.cols.add_(cols.sum(1))
