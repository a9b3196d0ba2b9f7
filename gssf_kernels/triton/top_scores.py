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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.epilogues import only_negatives, within
from gssf_kernels.triton.sweep import load_tile

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
    a, b, negatives, limits, last_keys, least_key, keys, new_last_keys, N, M, D: tl.int32, blocks, columns, first_row,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, LIST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows from first_row on, to which keys [rows, splits, LIST], last_keys and least_key belong.

    negatives: as `only_negatives` takes them; limits: of rows and of columns; last_keys [rows, splits]: of the sweep
    before, or None; least_key [rows]: the last of the k best so far.
    """
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    splits = tl.num_programs(0) // blocks
    i0 = first_row + block * BN
    i = i0 + tl.arange(0, BN)
    place_of_row = (i - first_row).to(tl.int64) * splits + split
    row_limit, col_limit = limits
    top = tl.full([BN, LIST], NOTHING, tl.int32)
    place = tl.zeros([BN, 1], tl.int32) - 1 - tl.arange(0, LIST)[None, :]  # of empty places, all different
    worst = tl.full([BN], NOTHING, tl.int32)
    stop = tl.minimum(split * columns + columns, M)
    if last_keys is not None:
        after = tl.load(last_keys + place_of_row, mask=i < N, other=-(2**63))
        is_open = (i < N) & (after > tl.load(least_key + i - first_row, mask=i < N, other=0))
        after_order = (after >> 32).to(tl.int32)[:, None]
        after_column = (-(after & 0xFFFFFFFF) + LAST_COLUMN).to(tl.int32)[:, None]
        stop = tl.where(tl.max(is_open.to(tl.int32), 0) > 0, stop, 0)
    for j0 in range(split * columns, stop, BM):
        j = j0 + tl.arange(0, BM)
        s = tl.zeros([BN, BM], tl.float32)
        for k in range(0, D, BK):
            x = load_tile(a, D, i0, k, N, D, BN, BK, False)  # [BN, BK]
            y = load_tile(b, D, j0, k, M, D, BM, BK, False)  # [BM, BK]
            s = tl.dot(x, y.T, s, input_precision=PRECISION)
        s = only_negatives(s, i0, j0, N, M, negatives, None, BN, BM)
        s = within(within(s, row_limit, i, N, 1), col_limit, j, M, 0)
        order = ordered(s)
        if last_keys is not None:
            comes_after = (order < after_order) | ((order == after_order) & (j[None, :] > after_column))
            order = tl.where(is_open[:, None] & comes_after, order, NOTHING)
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
    tl.store(keys + place_of_row[:, None] * LIST + tl.arange(0, LIST)[None, :], key, mask=(i < N)[:, None])
    if new_last_keys is not None:
        tl.store(new_last_keys + place_of_row, tl.min(key, 1), mask=i < N)


class Search(NamedTuple):
    """Rows a [N, D], their candidates b [M, D], and what is left out."""

    a: torch.Tensor
    b: torch.Tensor
    k: int
    negatives: tuple  # as `only_negatives` takes them
    limits: tuple  # of rows and of columns, or None


def top_scores(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """The launcher of the op: a sweep for rows and, with `columns`, one for columns."""
    a, b = call.a.contiguous(), call.b.contiguous()
    a_ids, b_ids, limit = operands.contiguous(call.a_ids, call.b_ids, call.row_limit)
    without_self = tl.constexpr(call.exclude_self)
    results = [*best_of_rows(Search(a, b, call.k, (without_self, (a_ids, b_ids, None)), (limit, None)))]
    if call.columns:
        results += best_of_rows(Search(b, a, call.k, (without_self, (b_ids, a_ids, None)), (None, limit)))
    else:
        results += [t.new_empty(0, call.k) for t in results]
    return *results, results[1].new_empty(0)


def best_of_rows(search: Search) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices) [N, k], for as many rows at a time as their keys may be held."""
    (N, M), k, device = (len(search.a), len(search.b)), search.k, search.a.device
    values = torch.full((N, k), -torch.inf, device=device)
    indices = torch.full((N, k), -1, dtype=torch.int64, device=device)
    if not (N and M):
        return values, indices
    tile = planning.top_tile(search.a.dtype, k)
    splits, columns = planning.top_splits(triton.cdiv(N, tile.BN), M, tile)
    step = max(tiles.TOP_KEYS // (splits * tile.LIST + k) // tile.BN, 1) * tile.BN
    with torch.cuda.device_of(search.a):
        for first in range(0, N, step):
            rows = slice(first, min(first + step, N))
            values[rows], indices[rows] = decoded(best_keys(search, rows, tile, splits, columns), k)
    return values, indices


def best_keys(search: Search, rows: slice, tile: tiles.Top, splits: int, columns: int) -> torch.Tensor:
    """The keys of the k best of these rows, or of all their candidates if those are fewer, best first."""
    a, b, k, negatives, limits = search
    count, D = rows.stop - rows.start, a.shape[1]
    blocks, sweeps = triton.cdiv(count, tile.BN), triton.cdiv(k, tile.LIST)
    last: torch.Tensor | None = None
    best = torch.empty(count, 0, dtype=torch.int64, device=a.device)
    for sweep in range(sweeps):
        keys = best.new_empty(count, splits * tile.LIST)
        new_last = best.new_empty(count, splits) if sweep + 1 < sweeps else None
        least = None if last is None else last_of_best(best, k)
        top_scores_kernel[(blocks * splits,)](
            a, b, negatives, limits, last, least, keys, new_last, len(a), len(b), D, blocks, columns, rows.start,
            BN=tile.BN, BM=tile.BM, BK=tile.BK, LIST=tile.LIST,
            PRECISION="ieee" if planning.kind(a.dtype) == "ieee" else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            **planning.most_registers(D, mixed=True),  # lists take registers
        )  # fmt: skip
        best = torch.cat((best, keys), 1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
        last = new_last
    return best


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
