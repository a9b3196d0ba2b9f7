"""greater[l] = how many scores of the anchor of level l are greater, reaching[l] = how many are at least as great.

An epilogue of the sweep. Tiles add their counts up atomically: sums of whole numbers are the same in every order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.triton import operands
from gssf_kernels.triton.epilogues import only_negatives
from gssf_kernels.triton.hardest import negatives_of
from gssf_kernels.triton.sweep import Sweep


@triton.jit
def raised(s):
    """s with the lowest number for -inf, which is for what is left out."""
    return tl.where(s == float("-inf"), -3.4028234663852886e38, s)


@triton.jit
def add_counts(s, anchor, anchors, levels, starts, greater, reaching, axis: tl.constexpr):
    """Count s [BN, BM] over axis for every level of the anchors of the other axis."""
    exists = anchor < anchors
    if starts is None:
        first = anchor.to(tl.int64)
        count = exists.to(tl.int64)
    else:
        first = tl.load(starts + anchor, mask=exists, other=0)
        count = tl.load(starts + anchor + 1, mask=exists, other=0) - first
    place = 0
    while place < tl.max(count, 0):
        has = place < count
        level = tl.expand_dims(raised(tl.load(levels + first + place, mask=has, other=0.0)), axis)
        tl.atomic_add(greater + first + place, tl.sum((s > level).to(tl.int32), axis).to(tl.int64), mask=has)
        tl.atomic_add(reaching + first + place, tl.sum((s >= level).to(tl.int32), axis).to(tl.int64), mask=has)
        place += 1


@triton.jit
def count_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    negatives, row_levels, row_starts, row_greater, row_reaching, col_levels, col_starts, col_greater, col_reaching = (
        state
    )
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    s = tl.where(s != s, float("inf"), raised(s))  # NaN is ahead of every level
    s = only_negatives(s, i0, j0, N, M, negatives, None, BN, BM)  # -inf, which reaches none
    add_counts(s, i0 + tl.arange(0, BN), N, row_levels, row_starts, row_greater, row_reaching, 1)
    if col_levels is not None:
        add_counts(s, j0 + tl.arange(0, BM), M, col_levels, col_starts, col_greater, col_reaching, 0)


def score_counts(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """The launcher of the op."""
    a, b = call.a, call.b
    levels = (call.row_levels, call.col_levels)
    counts = [
        None if t is None else torch.zeros(t.shape, dtype=torch.int64, device=a.device) for t in levels for _ in "ab"
    ]
    of_rows, of_columns = (
        (*operands.contiguous(t, starts), *counts[2 * k : 2 * k + 2])
        for k, (t, starts) in enumerate(zip(levels, (call.row_starts, call.col_starts), strict=True))
    )
    if len(a) and len(b):
        negatives = negatives_of(call.exclude_self, call)
        with torch.cuda.device_of(a):
            sweep = Sweep(a, b, plan.tile, registers=planning.most_registers(a.shape[1], mixed=True))
            sweep.run(count_tile, (negatives, *of_rows, *of_columns), 0, sweep.row_blocks)
    return tuple(torch.empty(0, dtype=torch.int64, device=a.device) if t is None else t for t in counts)
