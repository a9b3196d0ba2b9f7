"""row_score[i] = max_j s_ij, col_score[j] = max_i s_ij over negatives: j ≠ i and a_ids[i] ≠ b_ids[j]; s = a bᵀ.

With them where they lie, and the pairs' own s_ii, in one sweep. Ties go to the lowest index, NaN wins over all
scores and stays, and a row or column whose negatives all score -inf (or has none) gives -inf and -1.

Extra memory: one slab's partial results, 6 bytes for each of `tiles.SLAB_ENTRIES`, or at most 300 bytes per row of b
where that is more (16 row blocks); and a copy of a and b where their rows are not aligned.
"""

from __future__ import annotations

from types import NotImplementedType
from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels import plan
from gssf_kernels.kernels import certified, hopper, operands, tiles
from gssf_kernels.kernels.epilogues import best, only_negatives, tile_lines
from gssf_kernels.kernels.sweep import Sweep
from gssf_kernels.kernels.terms import hinge, store_sum
from gssf_kernels.plan import Scores


@triton.jit
def hardest_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's best negative of each row and column, by its position in the tile."""
    a_ids, b_ids, pair_score, row_score, row_place, col_score, col_place = state
    s = only_negatives(s, (first + tile_i) * BN, tile_j * BM, N, M, a_ids, b_ids, pair_score, BN, BM)

    row_at, col_at, inside = tile_lines(tile_i, tile_j, blocks, M, BN, BM)

    score, place = best(s, tl.arange(0, BM)[None, :], 1)  # [BN]
    tl.store(row_score + row_at, score)
    tl.store(row_place + row_at, place.to(tl.int16))

    score, place = best(s, tl.arange(0, BN)[:, None], 0)  # [BM]
    tl.store(col_score + col_at, score, mask=inside)
    tl.store(col_place + col_at, place.to(tl.int16), mask=inside)


@triton.jit
def fold(score, index, scores, places, lane, length, parts, start, WIDTH: tl.constexpr, BP: tl.constexpr):
    """(score, index) [BL] merged with the partial results scores, places [parts, length] at the given lanes.

    Part p covers positions start + p WIDTH onwards, all past those merged before it: an equal score never replaces.
    """
    for p0 in range(0, parts, BP):
        p = p0 + tl.arange(0, BP)
        at = p.to(tl.int64)[:, None] * length + lane[None, :]  # [BP, BL]
        inside = (p < parts)[:, None] & (lane < length)[None, :]
        s = tl.load(scores + at, mask=inside, other=float("-inf"))
        position = start + p[:, None] * WIDTH + tl.load(places + at, mask=inside, other=0)
        new_score, new_index = best(s, position, 0)  # [BL]
        better = (new_score > score) | ((new_score != new_score) & (score == score))
        index = tl.where(better, new_index, index)
        score = tl.where(better, new_score, score)
    return score, index


@triton.jit(do_not_specialize=["N", "M", "first", "blocks"])
def merge_kernel(
    partial, row_score, row_index, col_score, col_index, N, M, first, blocks,
    BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Finish the slab's rows, and merge its columns into those of the slabs before."""
    row_scores, row_places, col_scores, col_places = partial
    slab_rows = blocks * BN
    row_programs = tl.cdiv(slab_rows, BL)
    if tl.program_id(0) < row_programs:
        lane = tl.program_id(0) * BL + tl.arange(0, BL)
        score = tl.full([BL], float("-inf"), tl.float32)
        index = tl.full([BL], -1, tl.int32)
        score, index = fold(score, index, row_scores, row_places, lane, slab_rows, tl.cdiv(M, BM), 0, BM, BP)
        i = first * BN + lane
        inside = (lane < slab_rows) & (i < N)
        tl.store(row_score + i, score, mask=inside)
        tl.store(row_index + i, index.to(tl.int64), mask=inside)
    else:
        j = (tl.program_id(0) - row_programs) * BL + tl.arange(0, BL)
        before = (j < M) & (first > 0)
        score = tl.load(col_score + j, mask=before, other=float("-inf"))
        index = tl.load(col_index + j, mask=before, other=-1).to(tl.int32)
        score, index = fold(score, index, col_scores, col_places, j, M, blocks, first * BN, BN, BP)
        tl.store(col_score + j, score, mask=j < M)
        tl.store(col_index + j, index.to(tl.int64), mask=j < M)


@triton.jit
def merge_lines(
    partial, positive, row_score, row_index, col_score, col_index, i, N, M, blocks,
    BN: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """What `merge_kernel` finds of the one slab there is, at rows and columns i: (p, row, col), pairs' own first."""
    row_scores, row_places, col_scores, col_places = partial
    low, none = tl.full([BL], float("-inf"), tl.float32), tl.full([BL], -1, tl.int32)
    row, at = fold(low, none, row_scores, row_places, i, blocks * BN, tl.cdiv(M, BM), 0, BM, BP)
    tl.store(row_score + i, row, mask=i < N)
    tl.store(row_index + i, at.to(tl.int64), mask=i < N)
    col, at = fold(low, none, col_scores, col_places, i, M, blocks, 0, BN, BP)
    tl.store(col_score + i, col, mask=i < M)
    tl.store(col_index + i, at.to(tl.int64), mask=i < M)
    return tl.load(positive + i, mask=i < N, other=0.0), row, col


@triton.jit(do_not_specialize=["N", "M", "blocks"])
def merge_hinge_kernel(
    partial, positive, out, row_score, row_index, col_score, col_index, margin, N, M, blocks, BN: tl.constexpr,
    BM: tl.constexpr, SUM: tl.constexpr, MEAN: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """`merge_kernel` of the one slab there is, and the hinge terms of what it finds; a sum is one program's."""
    total = tl.zeros([BL], tl.float32)
    for i0 in range(tl.program_id(0) * BL, M, tl.num_programs(0) * BL):
        i = i0 + tl.arange(0, BL)
        p, row, col = merge_lines(
            partial, positive, row_score, row_index, col_score, col_index, i, N, M, blocks, BN, BM, BP, BL
        )
        row, over_row = hinge(p, row, margin)
        col, over_col = hinge(p, col, margin)
        terms = tl.where(over_row, row, 0.0) + tl.where(over_col, col, 0.0)
        if SUM:
            total += tl.where(i < N, terms, 0.0)
        else:
            tl.store(out + i, terms, mask=i < N)
    if SUM:
        store_sum(out, total, N, MEAN)


def nothing_found(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """pair_score, row_score, row_index, col_score, col_index to be filled; the columns' as they are where N = 0."""
    N, M = len(a), len(b)
    pair_score, row_score = (a.new_empty(N, dtype=torch.float32) for _ in range(2))  # no two results share memory
    col_score, col_index = a.new_empty(M, dtype=torch.float32), a.new_empty(M, dtype=torch.int64)
    row_index = a.new_empty(N, dtype=torch.int64)
    if N == 0:
        col_score.fill_(float("-inf"))
        col_index.fill_(-1)
    return pair_score, row_score, row_index, col_score, col_index


def hardest_negatives(
    a: torch.Tensor, b: torch.Tensor, a_ids: torch.Tensor | None, b_ids: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Return (pair_score [N], row_score [N], row_index [N], col_score [M], col_index [M]).

    a: [N, D] fp32, bf16 or fp16
    b: [M, D] as a, M ≥ N
    a_ids, b_ids: [N], [M] int64, or both None

    Scores are fp32, indices int64. Raises TypeError for other dtypes. Where b is a, half of the tiles do.
    """
    operands.check_dtype("hardest_negatives", a, b)
    if hopper.takes_over("hardest_negatives", a, b):
        return hopper.hardest_negatives(a, b, a_ids, b_ids)
    if certified.pays(a, b):
        return certified.hardest_negatives(a, b, a_ids, b_ids)
    pair_score, *found = nothing_found(a, b)
    if len(a) > 0:
        with torch.cuda.device_of(a):
            half = operands.same(a, b) and (a_ids is None or b_ids is None or operands.same(a_ids, b_ids))
            half = half and len(a) * len(b) > plan.SMALL  # below, what halves save costs less than merging them
            sweep = Sweep(a, b, Scores(a, b).tile(), half=half)
            rows, cols = sweep.partial_results(torch.float32, torch.int16)
            state = (*operands.contiguous(a_ids, b_ids), pair_score, *rows, *cols)
            for first, blocks in sweep.slabs():
                for score in (rows[0], cols[0]):
                    if half and score is not None:
                        score.fill_(float("-inf"))
                sweep.run(hardest_tile, state, first, blocks)
                sweep.merge(merge_kernel, first, blocks, (*rows, *cols), *found)
            if half:
                found = merged_halves(*found)
    return pair_score, *found


def hardest_hinge(
    a: torch.Tensor,
    b: torch.Tensor,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    margin: float,
    reduction: str,
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return (the hinge terms [N] or their sum or mean, and what `hardest_negatives` gives), in two launches.

    The rest as for `hardest_negatives` and `terms.hinge_terms`. Declines more than `plan.SMALL` scores, none, and
    those that another kernel mines.
    """
    operands.check_dtype("hardest_hinge", a, b)
    return merged_terms(merge_hinge_kernel, a, b, a_ids, b_ids, (margin,), reduction)


def merged_terms(
    kernel: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    numbers: tuple[float, ...],
    reduction: str,
    **modes: str,
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """`hardest_hinge` for any kernel that merges as `merge_lines` does and makes terms by numbers and modes."""
    N, M, some = len(a), len(b), reduction != "none"
    if not 0 < N * M <= plan.SMALL or hopper.takes_over("hardest_negatives", a, b) or certified.pays(a, b):
        return NotImplemented
    pair_score, *found = nothing_found(a, b)
    out = pair_score.new_empty(() if some else N)
    with torch.cuda.device_of(a):
        sweep = Sweep(a, b, Scores(a, b).tile())
        ((_, blocks),) = sweep.slabs()  # so few scores are one
        rows, cols = sweep.partial_results(torch.float32, torch.int16)
        sweep.run(hardest_tile, (*operands.contiguous(a_ids, b_ids), pair_score, *rows, *cols), 0, blocks)
        BL = tiles.TERM_LANES
        kernel[(1 if some else triton.cdiv(M, BL),)](
            (*rows, *cols), pair_score, out, *found, *numbers, N, M, blocks, BN=sweep.tile.BN,
            BM=sweep.tile.BM, SUM=some, MEAN=reduction == "mean", BP=tiles.MERGE_PARTS, BL=BL, **modes,
            num_warps=8, num_stages=2,
        )  # fmt: skip
    return out, pair_score, *found


def merged_halves(
    row_score: torch.Tensor, row_index: torch.Tensor, col_score: torch.Tensor, col_index: torch.Tensor
) -> list[torch.Tensor]:
    """Rows' and columns' best of a symmetric s, of which tiles on and above the diagonal were seen."""
    tie = (row_score == col_score) | (row_score.isnan() & col_score.isnan())
    better = (col_score > row_score) | (col_score.isnan() & ~row_score.isnan())
    take = torch.where(tie, col_index < row_index, better)
    score, index = torch.where(take, col_score, row_score), torch.where(take, col_index, row_index)
    return [score, index, score.clone(), index.clone()]
