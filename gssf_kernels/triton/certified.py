"""Hardest negatives of the exact scores of fp32 inputs, at the cost of a bf16 product.

    |s - ŝ| ≤ ‖δx‖ ‖ŷ‖ + ‖x‖ ‖δy‖ + γ ‖x̂‖ ‖ŷ‖ + τ,   x = x̂ + δx, x̂ its rounding to bf16, ŝ = Σ x̂ ŷ as summed

as `csrc/certified.h` derives it, with the measured norms of the rows. A tensor core truncates the terms that it adds
where fp32 would round them (Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer
Science 7:e330, 2021), so γ counts four roundings of fp32 for each of D terms: twice what truncation can lose.

An anchor is a row of a or of b. Stored are, for each, the index and value of its maximum of the exact scores.

1. `round_kernel`: a and b rounded, with the norms of their rows and of their rows' rounding errors.
2. A sweep of the rounded a and b. A tile's partial for each anchor is its largest ŝ, the place of that, and its second
   largest ŝ.
3. `rescore_kernel`: an anchor's maximum is at least low = max over its tiles of (largest ŝ - bound). Where the exact
   score of a tile's largest ŝ may reach low, this one score is computed again in fp64, in which products of fp32
   numbers are exact; where that of the second largest may, all scores of the tile for this anchor are. Both are few:
   one or two scores per anchor, for embeddings in training.

Nothing is counted on the host and no buffer can overflow: in the worst case (copies of one row, lengths over many
decades, inputs that are not finite) all scores are computed again, correctly and slowly. Step 3 adds in the order of
`exact_dot` of `csrc/vector_certified.h`, so that winners and values have the same bits as the CPU's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.epilogues import only_negatives, partial_offsets
from gssf_kernels.triton.reductions import argmax
from gssf_kernels.triton.sweep import Sweep

MULTIPLE = 256  # norms are padded to a multiple of this, which every BN and BM divides

# dtype that holds the rounded a and b. Tests set fp32, which holds the same numbers: the interpreter's bf16 is wrong.
ROUNDED = torch.bfloat16


@triton.jit(do_not_specialize=["N"])
def round_kernel(
    x, stride, rounded, norms, low, exact, place, rescored, N, D: tl.int32, WIDTH, LENGTH,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """rounded [N, WIDTH] = x to bf16, ties to even, subnormals to zero; norms [2, LENGTH] of rows and rounding errors.

    Norms are never too small; +inf where a row, or its rounding, is not finite, and 0 past N. Also initialises each
    anchor's low, exact and place to -inf, -inf and -1, and rescored to 0.
    """
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    row = i.to(tl.int64)[:, None]
    squares = tl.zeros([BR], tl.float64)
    lost = tl.zeros([BR], tl.float64)
    for k in range(0, WIDTH, BK):
        c = k + tl.arange(0, BK)[None, :]
        v = tl.load(x + row * stride + c, mask=(i < N)[:, None] & (c < D), other=0.0)
        bits = v.to(tl.int32, bitcast=True)
        rounded_bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        nearest = tl.where((rounded_bits & 0x7F800000) == 0, 0, rounded_bits).to(tl.float32, bitcast=True)
        tl.store(rounded + row * WIDTH + c, nearest.to(rounded.dtype.element_ty), mask=(i < N)[:, None] & (c < WIDTH))
        wide = v.to(tl.float64)
        error = wide - nearest.to(tl.float64)
        squares += tl.sum(wide * wide, 1)
        lost += tl.sum(error * error, 1)
    upward = 1.0 + 9.5367431640625e-07  # 2⁻²⁰, for the roundings of these sums
    finite = lost < float("inf")  # False for NaN
    tl.store(norms + i, tl.where(finite, tl.sqrt(squares) * upward, float("inf")), mask=i < LENGTH)
    tl.store(norms + LENGTH + i, tl.where(finite, tl.sqrt(lost) * upward, float("inf")), mask=i < LENGTH)
    none = tl.full([BR], float("-inf"), tl.float64)
    tl.store(low + i, none, mask=i < N)
    tl.store(exact + i, none, mask=i < N)
    tl.store(place + i, tl.full([BR], -1, tl.int64), mask=i < N)
    if rescored is not None:
        tl.store(rescored + i, tl.zeros([BR], tl.int32), mask=i < N)


@triton.jit
def two_largest(s, position, partial, at, mask, axis: tl.constexpr):
    """Store, for a tile's rows or columns, the largest score, its position, and the second largest score."""
    scores, places, seconds = partial
    score, place = argmax(s, position, axis)
    tl.store(scores + at, score, mask=mask)
    tl.store(places + at, place.to(tl.int16), mask=mask)
    others = tl.where(position == tl.expand_dims(place, axis), float("-inf"), s)
    tl.store(seconds + at, tl.max(others, axis), mask=mask)


@triton.jit
def two_largest_tile(s, tile_i, tile_j, first, blocks, N, M, state, BN: tl.constexpr, BM: tl.constexpr):
    """The tile's two hardest negatives of each row and column."""
    negatives, rows, cols = state
    s = only_negatives(s, (first + tile_i) * BN, tile_j * BM, N, M, negatives, None, BN, BM)
    row_at, col_at, inside = partial_offsets(tile_i, tile_j, blocks, M, BN, BM)
    two_largest(s, tl.arange(0, BM)[None, :], rows, row_at, None, 1)
    if cols is not None:
        two_largest(s, tl.arange(0, BN)[:, None], cols, col_at, inside, 0)


@triton.jit
def error_bound(norm, lost, block_norm, block_lost, depth):
    """A bound of |s - ŝ| for a row and every row of a block; fp64, +inf or NaN where there is none."""
    roundings = (depth + 32).to(tl.float64) * 2.384185791015625e-07  # 2⁻²², of s and of this bound
    gamma = tl.where(roundings < 0.5, roundings / (1.0 - roundings), float("inf"))
    size = (norm + lost) * (block_norm + block_lost)
    bound = lost * (block_norm + block_lost) + norm * block_lost + gamma * size
    flushed = depth.to(tl.float64) * 4.70197740328915e-38  # 2⁻¹²⁴: subnormal products may be flushed to zero
    in_range = size < 8.507059173023462e37  # 2¹²⁶: no sum can leave fp32's range
    return tl.where(in_range, bound * (1.0 + 9.5367431640625e-07) + flushed, float("inf"))


@triton.jit
def exact_scores(x, y, x_stride, y_stride, i, j, wanted, D, UNROLL: tl.constexpr):
    """x[i] · y[j] in fp64, of fp32 rows; i [A, 1], j [A, B], and 0 where wanted [A, B] is False.

    Channel c is added to sum c mod 32, and the 32 sums are added in halves: the same bits at every tile size.
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
def next_partial(
    after, low, norm, lost, scores, blocks, blocks_stride, lane, inside, length, partials, D,
    UNBOUNDED: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """([BL] the first partial after `after` whose score may reach low, or `partials`; [BL] low, raised by the scores).

    scores: [partials, length], the ŝ of each partial; UNBOUNDED: whether partials without a bound are returned
    """
    next_p = tl.zeros_like(after) + partials
    raised_low = low
    for p0 in range(0, partials, BP):
        p = p0 + tl.arange(0, BP)
        here = (p < partials)[:, None] & inside[None, :]
        s = tl.load(scores + p.to(tl.int64)[:, None] * length + lane[None, :], mask=here, other=float("-inf"))
        s = s.to(tl.float64)  # [BP, BL]
        block_norm = tl.load(blocks + p, mask=p < partials, other=0.0)[:, None]
        block_lost = tl.load(blocks + blocks_stride + p, mask=p < partials, other=0.0)[:, None]
        bound = error_bound(norm[None, :], lost[None, :], block_norm, block_lost, D)
        bounded = bound < float("inf")
        raised_low = tl.maximum(raised_low, tl.max(tl.where(bounded, s - bound, float("-inf")), 0))
        reaches = bounded & (s > float("-inf")) & (s + bound >= low[None, :])
        if UNBOUNDED:
            reaches = reaches | (bounded == 0)
        later = here & (p[:, None] > after[None, :])
        next_p = tl.minimum(next_p, tl.min(tl.where(later & reaches, p[:, None], partials), 0))
    return next_p, raised_low


@triton.jit
def add_scores(score, index, new, j, counted):
    """(score, index) [BL] merged with new scores at j [BL, B] where counted; NaN wins, ties go to the lowest index."""
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
        "anchors",
        "others",
        "first_anchor",
        "first_other",
        "length",
        "partials",
        "norms_stride",
        "blocks_stride",
    ]
)
def rescore_kernel(
    x, y, x_stride, y_stride, x_ids, y_ids, norms, blocks, norms_stride, blocks_stride, partial,
    low, exact, score, place, rescored, D: tl.int32, anchors, others, first_anchor, first_other, length, partials,
    ALL: tl.constexpr, PAIRED: tl.constexpr, WIDTH: tl.constexpr, BL: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Merge a slab's partials [partials, length] of the anchors x[first_anchor :] into (exact, score, place) [anchors].

    partial: (largest ŝ, its place, second largest ŝ), each of WIDTH rows of y, which begin at first_other
    ALL: compute every score of the partials whose second ŝ may reach low; else, in the launch before, the one score at
    place of those whose largest ŝ may
    norms: [2, at least anchors], of the rows of x and of their rounding errors; blocks: [2, partials], y's maxima of
    both per partial
    low: [anchors], a lower bound of the maximum, carried from slab to slab like exact and place; score: exact in fp32
    rescored: [anchors], how many scores were computed in fp64, or None
    """
    scores, places, seconds = partial
    lane = tl.program_id(0) * BL + tl.arange(0, BL)
    i = first_anchor + lane
    inside = (lane < length) & (i < anchors)
    norm = tl.load(norms + i, mask=inside, other=0.0)
    lost = tl.load(norms + norms_stride + i, mask=inside, other=0.0)
    least = tl.load(low + i, mask=inside, other=0.0)
    winner = tl.load(exact + i, mask=inside, other=0.0)
    index = tl.load(place + i, mask=inside, other=0).to(tl.int32)
    count = tl.zeros([BL], tl.int32)

    p = tl.full([BL], -1, tl.int32)
    if not ALL:
        scan = scores
        _, least = next_partial(
            p, least, norm, lost, scan, blocks, blocks_stride, lane, inside, length, partials, D, ALL, BP
        )  # fmt: skip
        tl.store(low + i, least, mask=inside)
    else:
        scan = seconds
    p, _ = next_partial(p, least, norm, lost, scan, blocks, blocks_stride, lane, inside, length, partials, D, ALL, BP)
    while tl.min(p, 0) < partials:
        active = p < partials
        begin = first_other + p * WIDTH
        if ALL:
            for c in range(0, WIDTH, BC):
                beside = c + tl.arange(0, BC)[None, :]
                j = begin[:, None] + beside  # [BL, BC]
                counted = active[:, None] & (beside < WIDTH) & (j < others)
                if PAIRED:
                    counted &= j != i[:, None]
                if x_ids is not None:
                    id_i = tl.load(x_ids + i, mask=inside, other=0)[:, None]
                    counted &= id_i != tl.load(y_ids + j, mask=counted, other=0)
                new = exact_scores(x, y, x_stride, y_stride, i[:, None], j, counted, D, UNROLL)
                winner, index = add_scores(winner, index, new, j, counted)
                count += tl.sum(counted.to(tl.int32), 1)
        else:
            at = places + p.to(tl.int64) * length + lane
            one = (begin + tl.load(at, mask=active, other=0))[:, None]  # [BL, 1]
            new_one = exact_scores(x, y, x_stride, y_stride, i[:, None], one, active[:, None], D, UNROLL)
            winner, index = add_scores(winner, index, new_one, one, active[:, None])
            count += active.to(tl.int32)
        p, _ = next_partial(
            p, least, norm, lost, scan, blocks, blocks_stride, lane, inside, length, partials, D, ALL, BP
        )  # fmt: skip
    tl.store(exact + i, winner, mask=inside)
    tl.store(score + i, winner.to(tl.float32), mask=inside)
    tl.store(place + i, index.to(tl.int64), mask=inside)
    if rescored is not None:
        tl.store(rescored + i, tl.load(rescored + i, mask=inside, other=0) + count, mask=inside)


@triton.jit(do_not_specialize=["N"])
def exact_positives_kernel(
    a, b, a_stride, b_stride, positive_score, N, D: tl.int32, BL: tl.constexpr, UNROLL: tl.constexpr
):
    i = tl.program_id(0) * BL + tl.arange(0, BL)
    exact = exact_scores(a, b, a_stride, b_stride, i[:, None], i[:, None], (i < N)[:, None], D, UNROLL)
    tl.store(positive_score + i, tl.sum(exact, 1).to(tl.float32), mask=i < N)


class Slab(NamedTuple):
    """A slab's partials: `length` anchors from first_anchor on, and the other input's rows from first_other on."""

    first_anchor: int
    first_other: int
    length: int
    width: int  # rows of the other input per partial


class Side(NamedTuple):
    """One input of the sweep, a or b; and for each of its rows, as an anchor, the maximum over the slabs so far."""

    values: torch.Tensor  # [N, D] fp32
    ids: torch.Tensor | None
    rounded: torch.Tensor  # [N, D padded], values in bf16
    norms: torch.Tensor  # [2, N and zeros up to a multiple of MULTIPLE] fp64
    low: torch.Tensor  # [N] fp64
    exact: torch.Tensor  # [N] fp64
    score: torch.Tensor  # [N] fp32
    place: torch.Tensor  # [N] int64
    rescored: torch.Tensor | None  # [N] int32

    @classmethod
    def of(cls, x: torch.Tensor, ids: torch.Tensor | None, counted: bool) -> Side:
        """Round x [N, D] fp32, which has adjacent channels; no slab is merged yet."""
        (N, D), width, tile = x.shape, triton.cdiv(x.shape[1], 16) * 16, tiles.ROUND
        length = triton.cdiv(N, MULTIPLE) * MULTIPLE
        rounded, norms = x.new_empty(N, width, dtype=ROUNDED), x.new_empty(2, length, dtype=torch.float64)
        low, exact = x.new_empty(2, N, dtype=torch.float64)
        score, place = x.new_empty(N), x.new_empty(N, dtype=torch.int64)
        rescored = x.new_empty(N, dtype=torch.int32) if counted else None
        round_kernel[(triton.cdiv(length, tile.BR),)](
            x, x.stride(0), rounded, norms, low, exact, place, rescored, N, D, width, length,
            BR=tile.BR, BK=tile.BM, num_warps=tile.num_warps,
        )  # fmt: skip
        return cls(x, ids, rounded, norms, low, exact, score, place, rescored)

    def blocks(self, size: int) -> torch.Tensor:
        """[2, blocks]: over each block of `size` rows the largest norm, and the largest norm of a rounding error."""
        return self.norms.view(2, -1, size).amax(2)[:, : triton.cdiv(len(self.values), size)]

    def rescore(self, other: Side, blocks: torch.Tensor, partial: tuple, place: Slab, paired: bool) -> None:
        """Merge a slab's partials into the anchors' maxima; blocks: [2, partials], `other.blocks` of the slab.

        paired: the pair (i, i) is no negative.
        """
        D = self.values.shape[1]
        for which, tile in tiles.RESCORE.items():
            rescore_kernel[(triton.cdiv(place.length, tile.BL),)](
                self.values, other.values, self.values.stride(0), other.values.stride(0), self.ids, other.ids,
                self.norms, blocks, self.norms.stride(0), blocks.stride(0), partial,
                self.low, self.exact, self.score, self.place, self.rescored,
                D, len(self.values), len(other.values), *place[:3], blocks.shape[1],
                ALL=which == "all", PAIRED=paired, WIDTH=place.width,
                BL=tile.BL, BP=tile.BP, BC=tile.BC, UNROLL=tile.unroll, num_warps=tile.num_warps,
                **planning.most_registers(D),
            )  # fmt: skip


def hardest_negatives(call: Any, plan: Any) -> tuple[torch.Tensor, ...]:
    """Return what `hardest.hardest_negatives` does, but of the exact scores; a [N, D] fp32, N ≥ 1.

    Only a call that names this route counts how many scores were computed in fp64.
    """
    a, b, a_ids, b_ids, route = call[:5]
    symmetric, counted = plan.upper_triangle, route == "certified"
    columns = call.columns or symmetric
    with torch.cuda.device_of(a):
        a_ids, b_ids = operands.contiguous(a_ids, b_ids)
        rows = Side.of(operands.rows(a), a_ids, counted)
        cols = rows if symmetric else Side.of(operands.rows(b), b_ids, counted)
        sweep = Sweep(rows.rounded, cols.rounded, plan.tile, upper_triangle=symmetric)
        BN, BM = sweep.tile.BN, sweep.tile.BM
        row_blocks, col_blocks = rows.blocks(BN), cols.blocks(BM)
        by_row, by_col = sweep.empty_partials(torch.float32, torch.int16, torch.float32, columns=columns)
        negatives = (tl.constexpr(call.paired), (a_ids, b_ids, None))
        for first, blocks in sweep.slabs():
            for partial in (by_row, by_col):
                for t in partial:
                    if symmetric and t is not None and t.is_floating_point():  # partials of tiles below the diagonal
                        t.fill_(float("-inf"))
            sweep.run(two_largest_tile, (negatives, by_row, by_col if columns else None), first, blocks)
            rows.rescore(cols, col_blocks, by_row, Slab(first * BN, 0, blocks * BN, BM), call.paired)
            if columns:
                slab = Slab(0, first * BN, len(b), BN)
                cols.rescore(rows, row_blocks[:, first : first + blocks], by_col, slab, call.paired)
        positives, tile = call.negatives.positives(len(a)), tiles.RESCORE["one"]
        positive_score = a.new_empty(positives, dtype=torch.float32)
        if positives:
            exact_positives_kernel[(triton.cdiv(len(a), tile.BL),)](
                rows.values, cols.values, rows.values.stride(0), cols.values.stride(0), positive_score, len(a),
                a.shape[1], BL=tile.BL, UNROLL=tile.unroll, num_warps=tile.num_warps,
            )  # fmt: skip
    col_results = (cols.score, cols.place)
    if not call.columns:
        col_results = (cols.score.new_empty(0), cols.place.new_empty(0))
    elif symmetric:
        col_results = (cols.score.clone(), cols.place.clone())
    results = (rows.score, rows.place, *col_results)
    sides = (rows, cols) if columns and not symmetric else (rows,)
    counts = [side.rescored.sum() for side in sides if side.rescored is not None]
    return positive_score, *results, torch.stack(counts).sum() if counted else a.new_empty(0, dtype=torch.int64)
