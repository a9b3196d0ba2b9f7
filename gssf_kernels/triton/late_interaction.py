"""score[n, m] = Σ_t max_r a[n, r] · b[m, t], or the mean over t, and its gradients.

Stored are the scores [N, M] and, if asked for, each word's best region [N, M, T] in int16. A program of the forward
takes one picture and a few captions: a tile [BR, BW] of scores has BR regions and BW words, those of BW / BT captions.

Gradients have no atomics. A word's is a sum over pictures, in order, of its best regions; a region's is a sum over
captions, in order, of products of the 0/1 matrix [regions, words] that says which region is best, which are exact.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.reductions import argmax, take_larger


@triton.jit
def int64(x):
    """x, the variable of a loop, which the interpreter has as Python's number."""
    return tl.max(tl.zeros([1], tl.int64) + x, 0)


@triton.jit
def best_regions(
    a, a_mask, b, n, words, inside, R, D,
    BR: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(score, place) [BW] of the best region of picture n for each of the words, rows of b; -inf and -1 for none."""
    score = tl.full([BW], float("-inf"), tl.float32)
    place = tl.full([BW], -1, tl.int32)
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        row = n * R + r  # int64
        s = tl.zeros([BR, BW], tl.float32)
        for k in range(0, D, BK):
            c = k + tl.arange(0, BK)
            x = tl.load(a + row[:, None] * D + c[None, :], mask=(r < R)[:, None] & (c < D)[None, :], other=0.0)
            y = tl.load(b + words[:, None] * D + c[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0)
            s = tl.dot(x, y.T, s, input_precision=PRECISION)
        takes_part = r < R
        if a_mask is not None:
            takes_part = tl.load(a_mask + row, mask=takes_part, other=0) != 0
        s = tl.where(takes_part[:, None], s, float("-inf"))
        new_score, new_place = argmax(s, r[:, None], 0)
        score, place = take_larger(score, place, new_score, new_place)
    return score, place


@triton.jit
def has_region(a_mask, n, R, BR: tl.constexpr):
    """Whether a region of picture n takes part."""
    count = 0
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        count += tl.sum(tl.load(a_mask + n * R + r, mask=r < R, other=0).to(tl.int32), 0)
    return count > 0


@triton.jit
def words_of(b_mask, m, T, BT: tl.constexpr):
    """What the sum over the words of caption m is divided by in a mean."""
    if b_mask is None:
        return T
    else:
        count = 0
        for t0 in range(0, T, BT):
            t = t0 + tl.arange(0, BT)
            count += tl.sum(tl.load(b_mask + m * T + t, mask=t < T, other=0).to(tl.int32), 0)
        return tl.maximum(count, 1)


@triton.jit(do_not_specialize=["N", "M", "R", "T"])
def late_interaction_kernel(
    a, b, a_mask, b_mask, scores, best, N, M, R, T, D: tl.int32, MEAN: tl.constexpr,
    BR: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """best: [N, M, T] int16 or None."""
    CAPTIONS: tl.constexpr = BW // BT
    n = (tl.program_id(0) % N).to(tl.int64)
    first = (tl.program_id(0) // N).to(tl.int64) * CAPTIONS
    word = tl.arange(0, BW)
    caption = first + word // BT
    total = tl.zeros([CAPTIONS], tl.float32)
    count = tl.zeros([CAPTIONS], tl.int32)
    for t0 in range(0, T, BT):
        t = t0 + word % BT
        inside = (caption < M) & (t < T)
        score, place = best_regions(a, a_mask, b, n, caption * T + t, inside, R, D, BR, BW, BK, PRECISION)
        if best is not None:
            tl.store(best + (n * M + caption) * T + t, place.to(tl.int16), mask=inside)
        if b_mask is not None:
            inside = tl.load(b_mask + caption * T + t, mask=inside, other=0) != 0
        total += tl.sum(tl.reshape(tl.where(inside, score, 0.0), [CAPTIONS, BT]), 1)
        count += tl.sum(tl.reshape(inside.to(tl.int32), [CAPTIONS, BT]), 1)
    if a_mask is not None:
        total = tl.where(has_region(a_mask, n, R, BR), total, 0.0)
    if MEAN:
        total = total / tl.maximum(count, 1).to(tl.float32)
    m = first + tl.arange(0, CAPTIONS)
    tl.store(scores + n * M + m, total, mask=m < M)


@triton.jit
def places_of(
    best, a, a_mask, b, n, m, t, inside, M, R, T, D,
    BR: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best regions [BT] of words t of caption m in picture n, loaded, or without an best computed again."""
    if best is None:
        _, place = best_regions(a, a_mask, b, n, m * T + t, inside, R, D, BR, BT, BK, PRECISION)
        return place
    else:
        return tl.load(best + (n * M + m) * T + t, mask=inside, other=-1).to(tl.int32)


@triton.jit(do_not_specialize=["N", "M", "R", "T"])
def regions_gradient_kernel(
    grad, best, a, b, a_mask, b_mask, da, N, M, R, T, D: tl.int32, MEAN: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes BC channels of BR regions of one picture."""
    pieces, blocks = tl.cdiv(D, BC), tl.cdiv(R, BR)
    n = (tl.program_id(0) // (pieces * blocks)).to(tl.int64)
    r = tl.program_id(0) // pieces % blocks * BR + tl.arange(0, BR)
    c = tl.program_id(0) % pieces * BC + tl.arange(0, BC)
    total = tl.zeros([BR, BC], tl.float32)
    for caption in range(0, M):
        m = int64(caption)
        weight = tl.load(grad + n * M + m)
        if weight != 0:
            if MEAN:
                weight = weight / words_of(b_mask, m, T, BT)
            for t0 in range(0, T, BT):
                t = t0 + tl.arange(0, BT)
                inside = t < T
                if b_mask is not None:
                    inside = tl.load(b_mask + m * T + t, mask=inside, other=0) != 0
                place = places_of(best, a, a_mask, b, n, m, t, inside, M, R, T, D, BR, BT, BK, PRECISION)
                at = (m * T + t)[:, None] * D + c[None, :]
                y = tl.load(b + at, mask=inside[:, None] & (c < D)[None, :], other=0.0)  # [BT, BC]
                chosen = (place[None, :] == r[:, None]) & inside[None, :]  # [BR, BT]
                total += weight * tl.dot(chosen.to(y.dtype), y, input_precision="ieee")
    at = (n * R + r)[:, None] * D + c[None, :]
    tl.store(da + at, total.to(da.dtype.element_ty), mask=(r < R)[:, None] & (c < D)[None, :])


@triton.jit(do_not_specialize=["N", "M", "R", "T"])
def words_gradient_kernel(
    grad, best, a, b, a_mask, b_mask, db, N, M, R, T, D: tl.int32, MEAN: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes BC channels of BT words of one caption."""
    pieces, blocks = tl.cdiv(D, BC), tl.cdiv(T, BT)
    m = (tl.program_id(0) // (pieces * blocks)).to(tl.int64)
    t = tl.program_id(0) // pieces % blocks * BT + tl.arange(0, BT)
    c = tl.program_id(0) % pieces * BC + tl.arange(0, BC)
    inside = t < T
    if b_mask is not None:
        inside = tl.load(b_mask + m * T + t, mask=inside, other=0) != 0
    count = 1
    if MEAN:
        count = words_of(b_mask, m, T, BT)
    total = tl.zeros([BT, BC], tl.float32)
    for picture in range(0, N):
        n = int64(picture)
        weight = tl.load(grad + n * M + m)
        if weight != 0:
            place = places_of(best, a, a_mask, b, n, m, t, inside, M, R, T, D, BR, BT, BK, PRECISION)
            chosen = inside & (place >= 0)
            at = (n * R + place)[:, None] * D + c[None, :]
            x = tl.load(a + at, mask=chosen[:, None] & (c < D)[None, :], other=0.0)  # [BT, BC]
            total += weight / count * x.to(tl.float32)
    at = (m * T + t)[:, None] * D + c[None, :]
    tl.store(db + at, total.to(db.dtype.element_ty), mask=(t < T)[:, None] & (c < D)[None, :])


def _options(a: torch.Tensor, tile: Any) -> dict[str, Any]:
    """The options of a launch. Masks of channels and products of fp32 take registers."""
    registers = planning.most_registers(a.shape[2], mixed=a.dtype == torch.float32)
    options = {"BK": tile.BK, "PRECISION": "ieee" if planning.kind(a.dtype) == "ieee" else "tf32"}
    return options | {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True, **registers}


def late_interaction(call: Any, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The launcher of the op: scores [N, M] fp32, and best [N, M, T] int16, empty without `keep`."""
    a, b = call.a.contiguous(), call.b.contiguous()
    a_mask, b_mask = operands.contiguous(call.a_mask, call.b_mask)
    (N, R, D), (M, T, _) = a.shape, b.shape
    scores = a.new_empty(N, M, dtype=torch.float32)
    best = a.new_empty((N, M, T) if call.keep else (0,), dtype=torch.int16)
    if not (N and R and M and T):
        return scores.zero_(), best.fill_(-1)
    tile = planning.fragments_tile(a.dtype, D)
    BT = min(max(triton.next_power_of_2(T), 16), tile.BM)
    programs = triton.cdiv(M, tile.BM // BT)
    step = min(N, tiles.GRID_FIRST // programs)
    with torch.cuda.device_of(a):
        for first in range(0, N, step):  # once, but for scores of many GiB
            rows = slice(first, first + step)
            x, mask = a[rows], None if a_mask is None else a_mask[rows]
            late_interaction_kernel[(len(x) * programs,)](
                x, b, mask, b_mask, scores[rows], best[rows] if call.keep else None, len(x), M, R, T, D,
                MEAN=call.mean, BR=tile.BN, BW=tile.BM, BT=BT, **_options(a, tile),
            )  # fmt: skip
    return scores, best


def late_interaction_backward(call: Any, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The launcher of the op: (da, db) in the dtypes of a and b, summed in fp32; each empty if `needs` is False."""
    a, b = call.a.contiguous(), call.b.contiguous()
    grad, best, a_mask, b_mask = operands.contiguous(call.grad_out, call.best, call.a_mask, call.b_mask)
    (N, R, D), (M, T, _) = a.shape, b.shape
    da, db = (torch.empty_like(t) if need else t.new_empty(0) for t, need in zip((a, b), call.needs, strict=True))
    if not (N and R and M and T):
        return da.zero_(), db.zero_()
    tile = planning.fragment_gradients_tile(a.dtype, D)
    pieces = triton.cdiv(D, tile.BC)
    with torch.cuda.device_of(a):
        for kernel, out, programs in (
            (regions_gradient_kernel, da, N * triton.cdiv(R, tile.BR)),
            (words_gradient_kernel, db, M * triton.cdiv(T, tile.BT)),
        ):
            if out.numel():
                kernel[(programs * pieces,)](
                    grad, best, a, b, a_mask, b_mask, out, N, M, R, T, D,
                    MEAN=call.mean, BR=tile.BR, BT=tile.BT, BC=tile.BC, **_options(a, tile),
                )  # fmt: skip
    return da, db
