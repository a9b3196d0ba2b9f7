"""Hardest negatives of the exact scores of fp32 inputs, at the price of a product of bf16 numbers.

    |s - ŝ| ≤ ‖δx‖ ‖ŷ‖ + ‖x‖ ‖δy‖ + γ ‖x̂‖ ‖ŷ‖ + τ,   x = x̂ + δx, x̂ its rounding to bf16, ŝ = Σ x̂ ŷ as summed

as `csrc/certified.h` derives it; all norms are those of the rows at hand. A tensor core cuts the terms that it adds
where fp32 would round them (Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer
Science 7:e330, 2021), so γ counts four roundings of fp32 for each of D terms: twice what cutting can lose.

1. `round_kernel`: both sides rounded, with the norms of their rows and of what the rows lost.
2. A sweep of the rounded sides. Of each row and column of a tile it leaves the best ŝ, its place, and the second best.
3. `rescore_kernel`: the best of a line is at least low = max over its tiles of (best ŝ - bound). Where a tile's best ŝ
   may reach that, this one score is made again in fp64, in which products of fp32 numbers are exact; where its second
   may, all the tile's scores of that line are. Both are few: of embeddings in training one or two scores a line.

Nothing is counted on the host, nothing has a capacity: in the worst case (copies of one row, lengths over many decades,
what is not finite) all scores are made again, correctly and slowly. The sums of step 3 are added in the order of
`exact_dot` of `csrc/vector_certified.h`, so that winners and values are the CPU's to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.epilogues import only_negatives, tile_lines
from gssf_kernels.triton.reductions import argmax
from gssf_kernels.triton.sweep import Sweep

MULTIPLE = 256  # of rows: of every tile's sides

# What sides are rounded to bf16 into. The interpreter, whose bf16 is wrong, takes the same numbers in fp32.
ROUNDED = torch.bfloat16


@triton.jit(do_not_specialize=["N"])
def round_kernel(
    x, stride, rounded, norms, low, exact, place, made, N, D: tl.int32, WIDTH, LENGTH,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """rounded [N, WIDTH] = x to bf16, ties to even, subnormals to zero; norms [2, LENGTH], of rows and what they lost.

    Norms are never too small; +inf where a row, or its rounding, is not finite, and 0 past N. Of each line's best
    nothing is known yet.
    """
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    row = i.to(tl.int64)[:, None]
    whole = tl.zeros([BR], tl.float64)
    lost = tl.zeros([BR], tl.float64)
    for k in range(0, WIDTH, BK):
        c = k + tl.arange(0, BK)[None, :]
        v = tl.load(x + row * stride + c, mask=(i < N)[:, None] & (c < D), other=0.0)
        bits = v.to(tl.int32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        near = tl.where((kept & 0x7F800000) == 0, 0, kept).to(tl.float32, bitcast=True)
        tl.store(rounded + row * WIDTH + c, near.to(rounded.dtype.element_ty), mask=(i < N)[:, None] & (c < WIDTH))
        wide = v.to(tl.float64)
        rest = wide - near.to(tl.float64)
        whole += tl.sum(wide * wide, 1)
        lost += tl.sum(rest * rest, 1)
    upward = 1.0 + 9.5367431640625e-07  # 2⁻²⁰, for the roundings of these sums
    finite = lost < float("inf")  # NaN is not
    tl.store(norms + i, tl.where(finite, tl.sqrt(whole) * upward, float("inf")), mask=i < LENGTH)
    tl.store(norms + LENGTH + i, tl.where(finite, tl.sqrt(lost) * upward, float("inf")), mask=i < LENGTH)
    none = tl.full([BR], float("-inf"), tl.float64)
    tl.store(low + i, none, mask=i < N)
    tl.store(exact + i, none, mask=i < N)
    tl.store(place + i, tl.full([BR], -1, tl.int64), mask=i < N)
    if made is not None:
        tl.store(made + i, tl.zeros([BR], tl.int32), mask=i < N)


@triton.jit
def two_best(s, position, partial, at, mask, axis: tl.constexpr):
    """Store, of a tile's rows or columns, the best score, its position, and the best of the others."""
    scores, places, seconds = partial
    score, place = argmax(s, position, axis)
    tl.store(scores + at, score, mask=mask)
    tl.store(places + at, place.to(tl.int16), mask=mask)
    others = tl.where(position == tl.expand_dims(place, axis), float("-inf"), s)
    tl.store(seconds + at, tl.max(others, axis), mask=mask)


@triton.jit
def two_best_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's two best negatives of each row and column."""
    a_ids, b_ids, rows, cols = state
    s = only_negatives(s, (first + tile_i) * BN, tile_j * BM, N, M, a_ids, b_ids, None, BN, BM)
    row_at, col_at, inside = tile_lines(tile_i, tile_j, blocks, M, BN, BM)
    two_best(s, tl.arange(0, BM)[None, :], rows, row_at, None, 1)
    two_best(s, tl.arange(0, BN)[:, None], cols, col_at, inside, 0)


@triton.jit
def error_bound(norm, lost, block_norm, block_lost, depth):
    """What |s - ŝ| does not exceed between a row and a block of rows; fp64, +inf or NaN where there is no bound."""
    roundings = (depth + 32).to(tl.float64) * 2.384185791015625e-07  # 2⁻²², with those of this bound
    gamma = tl.where(roundings < 0.5, roundings / (1.0 - roundings), float("inf"))
    size = (norm + lost) * (block_norm + block_lost)
    bound = lost * (block_norm + block_lost) + norm * block_lost + gamma * size
    flushed = depth.to(tl.float64) * 4.70197740328915e-38  # 2⁻¹²⁴: subnormals that a product may lose
    in_range = size < 8.507059173023462e37  # 2¹²⁶: no sum can leave fp32's range
    return tl.where(in_range, bound * (1.0 + 9.5367431640625e-07) + flushed, float("inf"))


@triton.jit
def exact_scores(x, y, x_stride, y_stride, i, j, wanted, D, UNROLL: tl.constexpr):
    """x[i] · y[j] in fp64 of fp32 rows, for i [A, 1] and j, wanted [A, B]; elsewhere 0.

    Channel c is added to sum c mod 32, and those are folded in halves: the same bits at every tile size.
    """
    lane = tl.arange(0, 32)[None, None, :]
    x_row = x + i.to(tl.int64)[:, :, None] * x_stride + lane
    y_row = y + j.to(tl.int64)[:, :, None] * y_stride + lane
    total = tl.zeros([j.shape[0], j.shape[1], 32], tl.float64)
    for k in tl.range(0, D, 32, loop_unroll_factor=UNROLL):
        inside = wanted[:, :, None] & (k + lane < D)
        left = tl.load(x_row + k, mask=inside, other=0.0)
        right = tl.load(y_row + k, mask=inside, other=0.0)
        total += left.to(tl.float64) * right.to(tl.float64)
    for _ in tl.static_range(5):
        total = tl.sum(tl.reshape(total, [j.shape[0], j.shape[1], 2, total.shape[2] // 2]), 2)
    return tl.reshape(total, [j.shape[0], j.shape[1]])


@triton.jit
def next_part(
    after, low, norm, lost, scores, blocks, blocks_stride, lane, inside, length, parts, D,
    UNBOUNDED: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """(the first part past `after` of which a score may reach low, else `parts`; what the best is at least) [BL].

    scores: [parts, length], the ŝ of each part to look at; UNBOUNDED: whether parts without a bound count, or are left
    """
    next_p = tl.zeros_like(after) + parts
    sure = low
    for p0 in range(0, parts, BP):
        p = p0 + tl.arange(0, BP)
        here = (p < parts)[:, None] & inside[None, :]
        s = tl.load(scores + p.to(tl.int64)[:, None] * length + lane[None, :], mask=here, other=float("-inf"))
        s = s.to(tl.float64)  # [BP, BL]
        block_norm = tl.load(blocks + p, mask=p < parts, other=0.0)[:, None]
        block_lost = tl.load(blocks + blocks_stride + p, mask=p < parts, other=0.0)[:, None]
        bound = error_bound(norm[None, :], lost[None, :], block_norm, block_lost, D)
        bounded = bound < float("inf")
        sure = tl.maximum(sure, tl.max(tl.where(bounded, s - bound, float("-inf")), 0))
        reaches = bounded & (s > float("-inf")) & (s + bound >= low[None, :])
        if UNBOUNDED:
            reaches = reaches | (bounded == 0)
        later = here & (p[:, None] > after[None, :])
        next_p = tl.minimum(next_p, tl.min(tl.where(later & reaches, p[:, None], parts), 0))
    return next_p, sure


@triton.jit
def improved(score, index, new, j, counted):
    """(score, index) [BL] with new scores at j [BL, B] where counted: NaN above all, of equals the lowest index."""
    nan = (new != new) & counted
    any_nan = tl.max(nan.to(tl.int32), 1) > 0
    new = tl.where(counted & (nan == 0), new, float("-inf"))
    top = tl.max(new, 1)
    hit = tl.where(any_nan[:, None], nan, (new == top[:, None]) & (new > float("-inf")))
    at = tl.min(tl.where(hit, j, 0x7FFFFFFF), 1)
    was_nan = score != score
    better = tl.where(any_nan, was_nan == 0, (was_nan == 0) & (top > score))
    equal = tl.where(any_nan, was_nan, (was_nan == 0) & (top == score) & (top > float("-inf")))
    index = tl.where(better | (equal & (at < index)), at, index)
    score = tl.where(any_nan, float("nan"), tl.where(better, top, score))
    return score, index


@triton.jit(
    do_not_specialize=[
        "lines",
        "others",
        "first_line",
        "first_other",
        "length",
        "parts",
        "norms_stride",
        "blocks_stride",
    ]
)
def rescore_kernel(
    x, y, x_stride, y_stride, x_ids, y_ids, norms, blocks, norms_stride, blocks_stride, partial,
    low, exact, score, place, made, D: tl.int32, lines, others, first_line, first_other, length, parts,
    ALL: tl.constexpr, WIDTH: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Take a slab's parts [parts, length] of the lines x[first_line :] into their best: (exact, score, place) [lines].

    partial: (best ŝ, place, second ŝ), by part of WIDTH rows of y, which begin at first_other
    ALL: make all scores of the parts whose second ŝ may reach, else, and first, the best of those where it may
    norms: [2, at least lines], of the rows of x and of what they lost; blocks: [2, parts], the largest of y's
    low: [lines], what the line's best is at least, carried from slab to slab as exact and place are; score: exact, fp32
    made: [lines], how many scores were made, or None
    """
    scores, places, seconds = partial
    lane = tl.program_id(0) * BL + tl.arange(0, BL)
    i = first_line + lane
    inside = (lane < length) & (i < lines)
    norm = tl.load(norms + i, mask=inside, other=0.0)
    lost = tl.load(norms + norms_stride + i, mask=inside, other=0.0)
    least = tl.load(low + i, mask=inside, other=0.0)
    winner = tl.load(exact + i, mask=inside, other=0.0)
    index = tl.load(place + i, mask=inside, other=0).to(tl.int32)
    count = tl.zeros([BL], tl.int32)

    part = tl.full([BL], -1, tl.int32)
    if not ALL:
        scan = scores
        _, least = next_part(
            part, least, norm, lost, scan, blocks, blocks_stride, lane, inside, length, parts, D, ALL, BP
        )  # fmt: skip
        tl.store(low + i, least, mask=inside)
    else:
        scan = seconds
    part, _ = next_part(part, least, norm, lost, scan, blocks, blocks_stride, lane, inside, length, parts, D, ALL, BP)
    while tl.min(part, 0) < parts:
        active = part < parts
        begin = first_other + part * WIDTH
        if ALL:
            for c in range(0, WIDTH, BC):
                beside = c + tl.arange(0, BC)[None, :]
                j = begin[:, None] + beside  # [BL, BC]
                counted = active[:, None] & (beside < WIDTH) & (j < others) & (j != i[:, None])
                if x_ids is not None:
                    mine = tl.load(x_ids + i, mask=inside, other=0)[:, None]
                    counted &= mine != tl.load(y_ids + j, mask=counted, other=0)
                new = exact_scores(x, y, x_stride, y_stride, i[:, None], j, counted, D, UNROLL)
                winner, index = improved(winner, index, new, j, counted)
                count += tl.sum(counted.to(tl.int32), 1)
        else:
            at = places + part.to(tl.int64) * length + lane
            one = (begin + tl.load(at, mask=active, other=0))[:, None]  # [BL, 1]
            new_one = exact_scores(x, y, x_stride, y_stride, i[:, None], one, active[:, None], D, UNROLL)
            winner, index = improved(winner, index, new_one, one, active[:, None])
            count += active.to(tl.int32)
        part, _ = next_part(
            part, least, norm, lost, scan, blocks, blocks_stride, lane, inside, length, parts, D, ALL, BP
        )  # fmt: skip
    tl.store(exact + i, winner, mask=inside)
    tl.store(score + i, winner.to(tl.float32), mask=inside)
    tl.store(place + i, index.to(tl.int64), mask=inside)
    if made is not None:
        tl.store(made + i, tl.load(made + i, mask=inside, other=0) + count, mask=inside)


@triton.jit(do_not_specialize=["N"])
def exact_positives_kernel(
    a, b, a_stride, b_stride, positive_score, N, D: tl.int32, BL: tl.constexpr, UNROLL: tl.constexpr
):
    i = tl.program_id(0) * BL + tl.arange(0, BL)
    exact = exact_scores(a, b, a_stride, b_stride, i[:, None], i[:, None], (i < N)[:, None], D, UNROLL)
    tl.store(positive_score + i, tl.sum(exact, 1).to(tl.float32), mask=i < N)


class Slab(NamedTuple):
    """Where a slab's parts lie: of `length` lines from first_line on, and of the other side's from first_other on."""

    first_line: int
    first_other: int
    length: int
    width: int  # of a part, in rows of the other side


class Side(NamedTuple):
    """One side of the sweep, and what is known so far of the best of each of its lines."""

    values: torch.Tensor  # [N, D] fp32
    ids: torch.Tensor | None
    rounded: torch.Tensor  # [N, D padded], with the rows of `values` in bf16
    norms: torch.Tensor  # [2, N and zeros up to a multiple of MULTIPLE] fp64
    low: torch.Tensor  # [N] fp64
    exact: torch.Tensor  # [N] fp64
    score: torch.Tensor  # [N] fp32
    place: torch.Tensor  # [N] int64
    made: torch.Tensor | None  # [N] int32

    @classmethod
    def of(cls, x: torch.Tensor, ids: torch.Tensor | None, counted: bool) -> Side:
        """x [N, D] fp32 with adjacent channels, rounded."""
        (N, D), width, tile = x.shape, triton.cdiv(x.shape[1], 16) * 16, tiles.ROUND
        length = triton.cdiv(N, MULTIPLE) * MULTIPLE
        rounded, norms = x.new_empty(N, width, dtype=ROUNDED), x.new_empty(2, length, dtype=torch.float64)
        low, exact = x.new_empty(2, N, dtype=torch.float64)
        score, place = x.new_empty(N), x.new_empty(N, dtype=torch.int64)
        made = x.new_empty(N, dtype=torch.int32) if counted else None
        round_kernel[(triton.cdiv(length, tile.BR),)](
            x, x.stride(0), rounded, norms, low, exact, place, made, N, D, width, length,
            BR=tile.BR, BK=tile.BM, num_warps=tile.num_warps,
        )  # fmt: skip
        return cls(x, ids, rounded, norms, low, exact, score, place, made)

    def blocks(self, size: int) -> torch.Tensor:
        """[2, blocks] of `size` rows: the largest norm, and the largest of what was lost."""
        return self.norms.view(2, -1, size).amax(2)[:, : triton.cdiv(len(self.values), size)]

    def rescore(self, other: Side, blocks: torch.Tensor, partial: tuple, place: Slab) -> None:
        """Take a slab's partial results into the best of its lines; blocks: of the slab's rows of other, [2, parts]."""
        D = self.values.shape[1]
        for which, tile in tiles.RESCORE.items():
            rescore_kernel[(triton.cdiv(place.length, tile.BL),)](
                self.values, other.values, self.values.stride(0), other.values.stride(0), self.ids, other.ids,
                self.norms, blocks, self.norms.stride(0), blocks.stride(0), partial,
                self.low, self.exact, self.score, self.place, self.made,
                D, len(self.values), len(other.values), *place[:3], blocks.shape[1],
                ALL=which == "all", WIDTH=place.width,
                BL=tile.BL, BP=tile.BP, BC=tile.BC, UNROLL=tile.unroll, num_warps=tile.num_warps,
                **planning.most_registers(D),
            )  # fmt: skip


def hardest_negatives(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """Return what `hardest.hardest_negatives` does, of the exact scores; a [N, D] fp32, N ≥ 1.

    Only a call that asks for this route by its name counts how many scores were made in fp64.
    """
    a, b, a_ids, b_ids, route = call
    symmetric, counted = plan.upper_triangle, route == "certified"
    with torch.cuda.device_of(a):
        a_ids, b_ids = operands.contiguous(a_ids, b_ids)
        rows = Side.of(operands.rows(a), a_ids, counted)
        cols = rows if symmetric else Side.of(operands.rows(b), b_ids, counted)
        sweep = Sweep(rows.rounded, cols.rounded, plan.tile, half=symmetric)
        BN, BM = sweep.tile.BN, sweep.tile.BM
        row_blocks, col_blocks = rows.blocks(BN), cols.blocks(BM)
        by_row, by_col = sweep.partial_results(torch.float32, torch.int16, torch.float32)
        for first, blocks in sweep.slabs():
            for partial in (by_row, by_col):
                for t in partial:
                    if symmetric and t is not None and t.is_floating_point():  # tiles that are left out have nothing
                        t.fill_(float("-inf"))
            sweep.run(two_best_tile, (a_ids, b_ids, by_row, by_col), first, blocks)
            rows.rescore(cols, col_blocks, by_row, Slab(first * BN, 0, blocks * BN, BM))
            cols.rescore(rows, row_blocks[:, first : first + blocks], by_col, Slab(0, first * BN, len(b), BN))
        positive_score, tile = a.new_empty(len(a), dtype=torch.float32), tiles.RESCORE["best"]
        exact_positives_kernel[(triton.cdiv(len(a), tile.BL),)](
            rows.values, cols.values, rows.values.stride(0), cols.values.stride(0), positive_score, len(a), a.shape[1],
            BL=tile.BL, UNROLL=tile.unroll, num_warps=tile.num_warps,
        )  # fmt: skip
    results = (rows.score, rows.place, *((t.clone() if symmetric else t) for t in (cols.score, cols.place)))
    made = [side.made.sum() for side in ((rows,) if symmetric else (rows, cols)) if side.made is not None]
    return positive_score, *results, torch.stack(made).sum() if counted else a.new_empty(0, dtype=torch.int64)
