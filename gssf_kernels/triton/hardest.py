"""row_score[i] = max_j s_ij, col_score[j] = max_i s_ij over negatives: j ≠ i and a_ids[i] ≠ b_ids[j]; s = a bᵀ.

Stored are these maxima, their indices and positive_score[i] = s_ii, in one sweep. Ties go to the lowest index, NaN wins
over every score, and a row or column without a negative above -inf gives -inf and -1.

Extra memory: the partials of one slab, 6 bytes for each of `tiles.SLAB_ENTRIES`, or at most 300 bytes per row of b if
that is larger (16 row blocks); and a copy of a and b where their rows are not aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels.ops.negatives import Negatives, fake_results
from gssf_kernels.triton import certified, hopper, operands
from gssf_kernels.triton.epilogues import only_negatives, partial_offsets, within
from gssf_kernels.triton.reductions import argmax, merge_columns, merge_kernel, merge_rows
from gssf_kernels.triton.sweep import EdgeSweep, Sweep


@triton.jit
def hardest_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's hardest negative of each row and column: its score, and its position in the tile.

    several: None, or (K, the number of row partials, of column partials): each anchor has K limits, and as many results
    """
    negatives, limits, several, positive_score, row_score, row_place, col_score, col_place = state
    i0, j0 = (first + tile_i) * BN, tile_j * BM
    s = only_negatives(s, i0, j0, N, M, negatives, positive_score, BN, BM)
    row_limit, col_limit = limits
    row_at, col_at, inside = partial_offsets(tile_i, tile_j, blocks, M, BN, BM)
    if several is None:
        store_hardest(s, i0, row_limit, row_score, row_place, row_at, None, N, 1)
        if col_score is not None:
            store_hardest(s, j0, col_limit, col_score, col_place, col_at, inside, M, 0)
    else:
        count, row_partials, col_partials = several
        for _ in range(count):
            store_hardest(s, i0, row_limit, row_score, row_place, row_at, None, N, 1)
            row_limit += N
            row_at += row_partials
            if col_score is not None:
                store_hardest(s, j0, col_limit, col_score, col_place, col_at, inside, M, 0)
                col_limit += M
                col_at += col_partials


@triton.jit
def store_hardest(s, anchor0, limit, scores, places, at, mask, anchors, axis: tl.constexpr):
    """Store the maximum over axis of the scores s within the limits of the other axis, and its position."""
    anchor = tl.arange(0, s.shape[1 - axis])
    position = tl.arange(0, s.shape[axis])
    s = within(s, limit, anchor0 + anchor, anchors, axis)
    score, place = argmax(s, tl.expand_dims(position, 1 - axis), axis)
    tl.store(scores + at, score, mask=mask)
    tl.store(places + at, place.to(tl.int16), mask=mask)


def empty_results(a: torch.Tensor, b: torch.Tensor, negatives: Negatives | None = None) -> tuple[torch.Tensor, ...]:
    """Empty positive_score, row_score, row_index, col_score, col_index; filled where there are no scores."""
    results = fake_results(a, b, negatives)  # no two share memory
    if len(a) == 0 or len(b) == 0:
        for t in results[1:]:
            t.fill_(float("-inf") if t.is_floating_point() else -1)
    return results


def negatives_of(paired: bool, call: Any) -> tuple:
    """The argument ``negatives`` of `only_negatives`, from an op's ids and listed pairs."""
    listed = None
    if call.pair_starts is not None:
        listed = tuple(operands.contiguous(call.pair_starts, call.pair_cols))
    return tl.constexpr(paired), (*operands.contiguous(call.a_ids, call.b_ids), listed)


def negatives_state(call: Any) -> tuple[tuple, tuple]:
    """The arguments (negatives, limits) of epilogues, from an op's `Negatives` and its ids."""
    return negatives_of(call.paired, call), tuple(operands.contiguous(call.row_limit, call.col_limit))


NO_LIMITS = (None, None), None  # of rows and of columns, and not several


def hardest_negatives(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """Return (positive_score [N], row_score [N], row_index [N], col_score [M], col_index [M], rescored).

    Scores are fp32, indices int64. rescored: int64, how many scores were computed in fp64 if the call names the route
    "certified", else empty.
    Raises TypeError unless a and b are fp32, bf16 or fp16.
    """
    a, b, a_ids, b_ids, route = call[:5]
    rescored = a.new_empty(0, dtype=torch.int64)
    if call.edges is not None:
        return hardest_of_edges(call, plan)
    if plan.route == "hopper":
        return *hopper.hardest_negatives(a, b, a_ids, b_ids), rescored
    if len(a) == 0 or len(b) == 0:
        return *empty_results(a, b, call.negatives), rescored if route != "certified" else rescored.new_zeros(())
    if plan.route == "certified":
        return certified.hardest_negatives(call, plan)
    columns = call.columns or plan.upper_triangle  # whose columns are its rows
    positive_score, *results = empty_results(a, b, call.negatives._replace(columns=columns))
    several = call.negatives.several_limits
    count = len(call.row_limit) if several else 1
    with torch.cuda.device_of(a):
        sweep = Sweep(a, b, plan.tile, upper_triangle=plan.upper_triangle, results=count)
        rows, cols = sweep.empty_partials(torch.float32, torch.int16, columns=columns)
        positive = positive_score if len(positive_score) else None
        state = *negatives_state(call), sweep.partial_counts if several else None, positive, *rows, *cols
        for first, blocks in sweep.slabs():
            for score in (rows[0], cols[0]):
                if plan.upper_triangle and score is not None:  # partials of tiles below the diagonal
                    score.fill_(float("-inf"))
            sweep.run(hardest_tile, state, first, blocks)
            strides = (*sweep.partial_counts[1:], sweep.N, sweep.M) if several else None
            merge_hardest(sweep, first, blocks, (rows, cols), results, strides, count)
        if plan.upper_triangle:
            results = symmetric_results(*results)
        if not call.columns:
            results[2:] = (t.new_empty(0) for t in results[2:])
    return positive_score, *results, rescored


def merge_hardest(
    sweep: Sweep,
    first: int,
    blocks: int,
    partials: Sequence[tuple[torch.Tensor | None, ...]],
    results: Sequence[torch.Tensor],
    strides: tuple[int, ...] | None = None,
    repeats: int = 1,
) -> None:
    """Merge a slab into the row_score, row_index, col_score and col_index of all rows, once or ``repeats`` times."""
    rows, cols = partials
    columns = cols[0] is not None
    sweep.merge(
        merge_kernel, first, blocks, rows, cols if columns else None, tuple(results[:2]),
        tuple(results[2:]) if columns else None, strides, repeats=repeats, REDUCTION="argmax",
    )  # fmt: skip


@triton.jit
def edge_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """`hardest_tile` for one edge. Partials, limits and scores of pairs are in the order of the edges."""
    inner, sizes = state
    negatives, limits, positive_score, row_score, row_place, col_score, col_place = inner
    edge_blocks, row_partials, col_partials = sizes
    edge = (tile_i // edge_blocks).to(tl.int64)  # of the slab
    anchors = (first // edge_blocks + edge) * N  # N is M
    row_limit, col_limit = limits
    if row_limit is not None:
        row_limit, col_limit = row_limit + anchors, col_limit + anchors
    row_score, row_place = row_score + edge * row_partials, row_place + edge * row_partials
    col_score, col_place = col_score + edge * col_partials, col_place + edge * col_partials
    limits = row_limit, col_limit
    of_edge = negatives, limits, None, positive_score + anchors, row_score, row_place, col_score, col_place
    hardest_tile(s, tile_i % edge_blocks, tile_j, 0, edge_blocks, N, M, of_edge, BN, BM)


def hardest_of_edges(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """The same results [E, N] of every edge of a graph; a [L, N, D], b [R, N, D]."""
    count = len(call.edges)
    positive_score, *results = (t.new_empty(count, *t.shape) for t in fake_results(call.a[0], call.b[0]))
    if count and len(call.a[0]):
        with torch.cuda.device_of(call.a):
            sweep = EdgeSweep(call.a, call.b, call.edges, plan.tile)
            rows, cols = sweep.empty_partials(torch.float32, torch.int16)
            sizes, blocks_of_edge = sweep.edge_partials, sweep.edge_blocks
            strides = (*sizes, sweep.N, sweep.M)
            inner = *negatives_state(call), positive_score, *rows, *cols
            for first, blocks in sweep.slabs():
                sweep.run(edge_tile, (inner, (blocks_of_edge, *sizes)), first, blocks)
                edge, repeats = first // blocks_of_edge, blocks // blocks_of_edge
                of_slab = [t[edge:] for t in results]
                merge_hardest(sweep, 0, blocks_of_edge, (rows, cols), of_slab, strides, repeats)
    return positive_score, *results, call.a.new_empty(0, dtype=torch.int64)


def symmetric_results(
    row_score: torch.Tensor, row_index: torch.Tensor, col_score: torch.Tensor, col_index: torch.Tensor
) -> list[torch.Tensor]:
    """Results for a symmetric s, merged from those of the rows and columns of its upper triangle."""
    tie = (row_score == col_score) | (row_score.isnan() & col_score.isnan())
    better = (col_score > row_score) | (col_score.isnan() & ~row_score.isnan())
    take = torch.where(tie, col_index < row_index, better)
    score, index = torch.where(take, col_score, row_score), torch.where(take, col_index, row_index)
    return [score, index, score.clone(), index.clone()]


@triton.jit
def hardest_merged_terms(
    merged, loss, i, N, M, blocks, FUNCTION: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """FUNCTION of the rows' hardest negatives plus that of the columns'; loss: (positive_score [N], constants)."""
    row_partial, col_partial, row_results, col_results = merged
    positive_score, constants = loss
    row, _ = merge_rows(row_partial, row_results, i, N, M, 0, blocks, "argmax", BN, BM, BP)
    col, _ = merge_columns(col_partial, col_results, i, N, M, 0, blocks, "argmax", BN, BP)
    p = tl.load(positive_score + i, mask=i < N, other=0.0)
    return FUNCTION(p, row, constants, TRIPLET, PAIR) + FUNCTION(p, col, constants, TRIPLET, PAIR)
