"""values[i] = the k largest s_ij of row i, with their columns; s = a bᵀ is never stored. See `ops/top_scores.py`.

A program takes BN rows and a range of columns, a split, and keeps the best LIST scores of each row in registers. Of a
tile the largest score of every row is offered, again and again, until none is better than the last of its list: after
the first tiles that is seldom so.

A list is stored as keys, int64: the score's bits in an order that integers have, then the column, the lower the larger.
So the larger key is the better one, no two are equal, and PyTorch's `topk` of keys merges splits with the ties that
are wanted. For k > LIST a split whose list may not hold all of its share is swept again, for what comes after its last
key; the others' programs end at once. Nothing synchronises.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.triton import operands, tiles

# The order of nothing: below that of every score. Kernels read it as a constexpr.
NOTHING = tl.constexpr(-(2**31))
LAST_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(s):
    """s fp32 as int32 in the same order: NaN is the largest, -0 equals 0, -inf is nothing."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(s != s, 0x7FC00000, order)
    return tl.where(s == float("-inf"), NOTHING, order)


@triton.jit
def key_of(order, column):
    return (order.to(tl.int64) << 32) - column.to(tl.int64) + LAST_COLUMN


@triton.jit(do_not_specialize=["N", "M", "blocks", "columns", "first_row"])
def top_scores_kernel(
    a, b, a_ids, b_ids, limit, column_limit, last_keys, least_key, keys, new_last_keys,
    N, M, D: tl.int32, blocks, columns, first_row,
    SELF: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, LIST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """last_keys [N, splits]: of the sweep before, or None; least_key [N]: the last of the k best so far."""
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    splits = tl.num_programs(0) // blocks
    i = block * BN + tl.arange(0, BN)
    row = tl.minimum(i, N - 1).to(tl.int64)
    at_list = (i.to(tl.int64) * splits + split)[:, None] * LIST + tl.arange(0, LIST)[None, :]
    top = tl.full([BN, LIST], NOTHING, tl.int32)
    place = tl.zeros([BN, 1], tl.int32) - 1 - tl.arange(0, LIST)[None, :]  # of empty places, all different
    worst = tl.full([BN], NOTHING, tl.int32)
    open_rows = i < N
    after = tl.full([BN], 2**63 - 1, tl.int64)
    if last_keys is not None:
        after = tl.load(last_keys + row * splits + split)
        open_rows = open_rows & (after > tl.load(least_key + row))
    after_order = (after >> 32).to(tl.int32)[:, None]
    after_column = (-(after & 0xFFFFFFFF) + LAST_COLUMN).to(tl.int32)[:, None]
    stop = tl.minimum(split * columns + columns, M)
    if tl.max(open_rows.to(tl.int32), 0) == 0:
        stop = 0
    for j0 in range(split * columns, stop, BM):
        j = j0 + tl.arange(0, BM)
        column = tl.minimum(j, M - 1).to(tl.int64)
        s = tl.zeros([BN, BM], tl.float32)
        for k in range(0, D, BK):
            c = k + tl.arange(0, BK)
            x = tl.load(a + row[:, None] * D + c[None, :], mask=(c < D)[None, :], other=0.0)
            y = tl.load(b + column[:, None] * D + c[None, :], mask=(c < D)[None, :], other=0.0)
            s = tl.dot(x, y.T, s, input_precision=PRECISION)
        candidate = open_rows[:, None] & (j < stop)[None, :]
        if SELF:
            candidate &= (first_row + i)[:, None] != j[None, :]
        if a_ids is not None:
            candidate &= tl.load(a_ids + row)[:, None] != tl.load(b_ids + column)[None, :]
        if limit is not None:
            candidate &= (s > tl.load(limit + row)[:, None]) == 0
        if column_limit is not None:
            candidate &= (s > tl.load(column_limit + column)[None, :]) == 0
        order = ordered(s)
        if last_keys is not None:
            candidate &= (order < after_order) | ((order == after_order) & (j[None, :] > after_column))
        order = tl.where(candidate, order, NOTHING)
        best = tl.max(order, 1)
        while tl.max((best > worst).to(tl.int32), 0) > 0:
            best_column = tl.min(tl.where(order == best[:, None], j[None, :], LAST_COLUMN), 1)
            enters = (best > worst)[:, None]
            is_worst = top == worst[:, None]
            leaves = enters & is_worst & (place == tl.max(tl.where(is_worst, place, NOTHING), 1)[:, None])
            top = tl.where(leaves, best[:, None], top)
            place = tl.where(leaves, best_column[:, None], place)
            worst = tl.min(top, 1)
            order = tl.where(enters & (j[None, :] == best_column[:, None]), NOTHING, order)
            best = tl.max(order, 1)
    key = key_of(top, place)
    inside = (i < N)[:, None]
    tl.store(keys + at_list, key, mask=inside)
    if new_last_keys is not None:
        tl.store(new_last_keys + row * splits + split, tl.min(key, 1), mask=i < N)


def top_scores(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """The launcher of the op: a sweep for rows and, with `columns`, one for columns."""
    a, b, k, *_ = call
    a_ids, b_ids = operands.contiguous(call.a_ids, call.b_ids)
    a, b = a.contiguous(), b.contiguous()
    limit = None if call.row_limit is None else call.row_limit.contiguous()
    results = [*best_of_rows(a, b, k, (a_ids, b_ids), limit, None, call.exclude_self)]
    if call.columns:
        results += best_of_rows(b, a, k, (b_ids, a_ids), None, limit, call.exclude_self)
    else:
        results += [t.new_empty(0, k) for t in results]
    return *results, results[1].new_empty(0)


def best_of_rows(
    a: torch.Tensor,
    b: torch.Tensor,
    k: int,
    ids: tuple,
    limit: torch.Tensor | None,
    column_limit: torch.Tensor | None,
    exclude_self: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices) [N, k]; at most one of the limits, which are those of rows and of columns."""
    N, M = len(a), len(b)
    values = a.new_full((N, k), -torch.inf, dtype=torch.float32)
    indices = torch.full((N, k), -1, dtype=torch.int64, device=a.device)
    if not (N and M):
        return values, indices
    tile = planning.top_tile(a.dtype, k)
    blocks = triton.cdiv(N, tile.BN)
    splits, columns = planning.top_splits(blocks, M, tile)
    step = max(tiles.TOP_KEYS // (splits * tile.LIST + k) // tile.BN, 1) * tile.BN  # rows whose keys are held at once
    with torch.cuda.device_of(a):
        for first in range(0, N, step):
            rows = slice(first, first + step)
            values[rows], indices[rows] = best_of_slab(a, b, k, ids, (limit, column_limit), exclude_self, first, step,
                                                       (tile, splits, columns))  # fmt: skip
    return values, indices


def best_of_slab(
    a: torch.Tensor,
    b: torch.Tensor,
    k: int,
    ids: tuple,
    limits: tuple,
    exclude_self: bool,
    first: int,
    step: int,
    sizes: tuple,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of ``step`` rows from ``first`` on; sizes: (tile, splits, columns of each)."""
    tile, splits, columns = sizes
    rows = slice(first, first + step)
    x = a[rows]
    N, D = x.shape
    row_ids = None if ids[0] is None else ids[0][rows]
    limit = None if limits[0] is None else limits[0][rows]
    blocks = triton.cdiv(N, tile.BN)
    sweeps = triton.cdiv(k, tile.LIST)
    last: torch.Tensor | None = None
    best: torch.Tensor = x.new_empty(N, 0, dtype=torch.int64)
    for sweep in range(sweeps):
        keys = x.new_empty(N, splits * tile.LIST, dtype=torch.int64)
        new_last = keys.new_empty(N, splits) if sweep + 1 < sweeps else None
        least = None if sweep == 0 else last_of_best(best, k)
        top_scores_kernel[(blocks * splits,)](
            x, b, row_ids, ids[1], limit, limits[1], last, least, keys, new_last, N, len(b), D, blocks, columns,
            first, SELF=exclude_self, BN=tile.BN, BM=tile.BM, BK=tile.BK, LIST=tile.LIST,
            PRECISION="ieee" if planning.kind(x.dtype) == "ieee" else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            **planning.most_registers(D, mixed=True),  # lists take registers
        )  # fmt: skip
        keys = keys if sweep == 0 else torch.cat((best, keys), 1)
        best = keys.topk(min(k, keys.shape[1]), dim=1).values
        last = new_last
    return decoded(best, k)


def last_of_best(best: torch.Tensor, k: int) -> torch.Tensor:
    """[N], the last of the k best keys, and of fewer a key that every list's last exceeds but nothing's."""
    if best.shape[1] < k:
        return best.new_full(best.shape[:1], (NOTHING.value + 1) << 32) - 1
    return best[:, -1].contiguous()


def decoded(keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices) [N, k] of keys, best first, of which some may be nothing."""
    if keys.shape[1] < k:
        keys = torch.nn.functional.pad(keys, (0, k - keys.shape[1]), value=NOTHING.value << 32)
    order = (keys >> 32).to(torch.int32)
    place = LAST_COLUMN.value - (keys & 0xFFFFFFFF)
    nothing = order == NOTHING.value
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order)
    return (
        torch.where(nothing, -torch.inf, bits.view(torch.float32)),
        torch.where(nothing, -1, place),
    )
