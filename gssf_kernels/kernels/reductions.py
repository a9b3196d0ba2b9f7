"""How the tiles' partial results become one: each reduction's tile, and its merge in the tiles' order.

log-sum-exp   kept as (max, Σ e^(t - max)); NaN alone leaves +inf for the maximum
sum           fp32
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_sums(t, axis: tl.constexpr):
    """Of axis the largest of t and Σ e^(t - largest); an infinite one is not taken off, NaN alone leaves +inf."""
    top = tl.max(t, axis)  # NaN is passed over
    shift = tl.where((top == float("inf")) | (top == float("-inf")), 0.0, top)
    total = tl.sum(tl.exp(t - tl.expand_dims(shift, axis)), axis)
    return tl.where((total != total) & (top == float("-inf")), float("inf"), top), total


@triton.jit
def merge_logs(top, total, tops, totals, lane, length, parts, BP: tl.constexpr):
    """(max, Σ e^(· - max)) [BL] merged with the partial ones tops, totals [parts, length] at the given lanes."""
    for p0 in range(0, parts, BP):
        p = p0 + tl.arange(0, BP)
        at = p.to(tl.int64)[:, None] * length + lane[None, :]  # [BP, BL]
        inside = (p < parts)[:, None] & (lane < length)[None, :]
        t = tl.load(tops + at, mask=inside, other=float("-inf"))
        sums = tl.load(totals + at, mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(t, 0))
        factor = tl.where(t == new[None, :], 1.0, tl.exp(t - new[None, :]))  # infinite ones too
        merged = tl.sum(tl.where(t == float("-inf"), 0.0, sums * factor), 0)
        before = tl.where(top == float("-inf"), 0.0, total * tl.where(top == new, 1.0, tl.exp(top - new)))
        top, total = new, before + merged
    return top, total


@triton.jit
def merge_sums(source, lane, length, count, parts, BP: tl.constexpr):
    """Σ of source [parts, length] over the parts at the lanes, 0 from count on."""
    total = tl.zeros(lane.shape, tl.float32)
    for p0 in range(0, parts, BP):
        p = p0 + tl.arange(0, BP)
        inside = (p < parts)[:, None] & (lane < count)[None, :]
        total += tl.sum(tl.load(source + p.to(tl.int64)[:, None] * length + lane[None, :], mask=inside, other=0.0), 0)
    return total
