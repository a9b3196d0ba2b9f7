"""score[e] = a[rows[e]] · b[cols[e]], and its gradient: da[i] = Σ_{e: rows[e] = i} dscores[e] b[cols[e]], db alike.

An edge e is a pair (rows[e], cols[e]); one with -1 at either end scores -inf and has no gradient. Stored are the scores
[E], da and db. The gradient is a segment sum over edges sorted by destination, in a fixed order and without atomics:
the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels.triton import operands, tiles


@triton.jit(do_not_specialize=["E"])
def pair_scores_kernel(
    a, b, rows, cols, scores, a_stride, b_stride, E, D: tl.int32, BE: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """A program computes BE edges, BD channels at a time."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    i = tl.load(rows + e, mask=e < E, other=-1) if rows is not None else tl.where(e < E, e, -1)
    j = tl.load(cols + e, mask=e < E, other=-1) if cols is not None else i
    real = (i >= 0) & (j >= 0)
    products = tl.zeros([BE, BD], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        inside = real[:, None] & (d < D)[None, :]
        x = tl.load(a + i[:, None] * a_stride + d[None, :], mask=inside, other=0.0)
        y = tl.load(b + j[:, None] * b_stride + d[None, :], mask=inside, other=0.0)
        products += x.to(tl.float32) * y.to(tl.float32)
    tl.store(scores + e, tl.where(real, tl.sum(products, 1), float("-inf")), mask=e < E)


@triton.jit
def segment_sum_kernel(
    dscores, order, offsets, ends, source, out, stride, D: tl.int32, BE: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """out[i] = Σ dscores[e] source[ends[e]] over e in order[offsets[i] : offsets[i + 1]], BE edges at a time."""
    pieces = tl.cdiv(D, BD)  # programs per row
    i = (tl.program_id(0) // pieces).to(tl.int64)
    d = tl.program_id(0) % pieces * BD + tl.arange(0, BD)
    stop = tl.load(offsets + i + 1)
    total = tl.zeros([BE, BD], tl.float32)
    for p0 in range(tl.load(offsets + i), stop, BE):
        p = p0 + tl.arange(0, BE)
        e = tl.load(order + p, mask=p < stop, other=0)
        end = tl.load(ends + e, mask=p < stop, other=-1)
        weight = tl.load(dscores + e, mask=end >= 0, other=0.0)
        inside = (weight != 0)[:, None] & (d < D)[None, :]  # a zero gradient adds nothing, even if the row is infinite
        x = tl.load(source + end[:, None] * stride + d[None, :], mask=inside, other=0.0)
        total += weight[:, None] * x.to(tl.float32)
    tl.store(out + i * D + d, tl.sum(total, 0).to(out.dtype.element_ty), mask=d < D)


@triton.jit
def lengths(source, at, inside, D, BD: tl.constexpr):
    """max(‖row‖, 1e-12) of the rows of source that start at offsets at [K]."""
    squares = tl.zeros([at.shape[0], BD], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(source + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
    norm = tl.sqrt(tl.sum(squares, 1))
    return tl.where(norm < 1e-12, 1e-12, norm)  # a NaN stays


@triton.jit
def add_row(total, source, stride, row, weight, d, D, NORMALIZE: tl.constexpr):
    """total [BD] + weight · row of source, with NORMALIZE the unit row; row -1 and a zero weight add nothing."""
    weight = tl.where(row >= 0, weight, 0.0)
    if NORMALIZE:
        at = tl.zeros([1], tl.int64) + row * stride
        norm = tl.max(lengths(source, at, tl.zeros([1], tl.float32) + weight != 0, D, total.shape[0]), 0)
        weight = tl.where(weight == 0, weight, weight / norm)
    weight = tl.zeros_like(total) + weight
    x = tl.load(source + row * stride + d, mask=(weight != 0) & (d < D), other=0.0)
    return total + weight * x.to(tl.float32)


@triton.jit
def scan_row(
    i, positives, dpositive, dscore, other_dscore, index, other_index, source, stride, out, K, D,
    NORMALIZE: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Row i of da (or db): from its positive, its hardest negative, and all anchors whose hardest negative it is."""
    d = tl.program_id(0) % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
    weight = tl.load(dpositive + i, mask=i < positives, other=0.0)
    total = add_row(tl.zeros([BD], tl.float32), source, stride, i, weight, d, D, NORMALIZE)
    total = add_row(total, source, stride, tl.load(index + i), tl.load(dscore + i), d, D, NORMALIZE)
    for e0 in range(0, K, BE):
        e = e0 + tl.arange(0, BE)
        hit = tl.load(other_index + e, mask=e < K, other=-1) == i
        if tl.max(hit.to(tl.int32), 0) > 0:
            weights = tl.load(other_dscore + e, mask=hit, other=0.0)
            hit = hit & (weights != 0)
            if NORMALIZE:
                weights = tl.where(hit, weights / lengths(source, e.to(tl.int64) * stride, hit, D, BD), 0.0)
            inside = hit[:, None] & (d < D)[None, :]
            x = tl.load(source + e.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)
            total += tl.sum(weights[:, None] * x.to(tl.float32), 0)
    tl.store(out + i * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["N", "M"])
def scan_kernel(
    dpositive, drow, dcol, row_index, col_index, a, b, da, db, norm, a_stride, b_stride, N, M, D: tl.int32,
    NORMALIZE: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs for the rows of da, then for the rows of db; either may be None.

    norm: None, or [N], is set to max(‖row‖, 1e-12) of a's rows, by further programs of BE rows each
    """
    p = (tl.program_id(0) // tl.cdiv(D, BD)).to(tl.int64)
    row_programs = (N if da is not None else 0) + (M if db is not None else 0)
    if norm is not None and p >= row_programs:
        if tl.program_id(0) % tl.cdiv(D, BD) == 0:
            i = (p - row_programs) * BE + tl.arange(0, BE)
            tl.store(norm + i, lengths(a, i * a_stride, i < N, D, BD), mask=i < N)
    elif da is None:
        scan_row(p, N, dpositive, dcol, drow, col_index, row_index, a, a_stride, db, N, D, NORMALIZE, BE, BD)
    elif db is None or p < N:
        scan_row(p, N, dpositive, drow, dcol, row_index, col_index, b, b_stride, da, M, D, NORMALIZE, BE, BD)
    else:
        scan_row(p - N, N, dpositive, dcol, drow, col_index, row_index, a, a_stride, db, N, D, NORMALIZE, BE, BD)


def pair_scores(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None, cols: torch.Tensor | None) -> torch.Tensor:
    """Return scores [E] fp32 of the pairs (rows[e], cols[e]); with rows and cols None, of the pairs (i, i).

    Raises TypeError unless a and b are fp32, bf16 or fp16.
    """
    a, b, (rows, cols) = operands.rows(a), operands.rows(b), operands.contiguous(rows, cols)
    E = len(rows) if rows is not None else len(a)
    scores = a.new_empty(E, dtype=torch.float32)
    BE, BD = tiles.PAIR_EDGES, tiles.EDGE_CHANNELS
    with torch.cuda.device_of(a):
        pair_scores_kernel[(triton.cdiv(E, BE),)](
            a, b, rows, cols, scores, a.stride(0), b.stride(0), E, a.shape[1],
            BE=BE, BD=BD, num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    return scores


def launch_pair_scores(call: Any, plan: Any) -> torch.Tensor:
    """The launcher of the op: `pair_scores` of the call's arguments."""
    return pair_scores(*call[:4])


def segment_sum(
    dscores: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, source: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """out[i] = Σ_{e: starts[e] = i} dscores[e] source[ends[e]], shaped and typed as `like`; -1 adds nothing."""
    starts, order = torch.sort(starts, stable=True)  # edges with -1 come first, before offsets[0]
    count, D = like.shape
    offsets = torch.searchsorted(starts, torch.arange(count + 1, device=starts.device))
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    BE, BD = tiles.SEGMENT_EDGES, tiles.EDGE_CHANNELS
    segment_sum_kernel[(count * triton.cdiv(D, BD),)](
        dscores, order, offsets, ends, source, out, source.stride(0), D,
        BE=BE, BD=BD, num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def pair_scores_backward(call: Any, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (da [N, D], db [M, D]) in the dtypes of a and b, summed in fp32; each empty if `needs` is False.

    Raises TypeError unless grad_out, a and b are fp32, bf16 or fp16.
    """
    grad_out, rows, cols, a, b, needs = call
    dscores, rows, cols = grad_out.contiguous(), rows.contiguous(), cols.contiguous()
    with torch.cuda.device_of(a):
        da = segment_sum(dscores, rows, cols, operands.rows(b), like=a) if needs[0] else a.new_empty(0)
        db = segment_sum(dscores, cols, rows, operands.rows(a), like=b) if needs[1] else b.new_empty(0)
    return da, db


def scan(
    call: Any, x: torch.Tensor, y: torch.Tensor, da: torch.Tensor | None, db: torch.Tensor | None,
    norm: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradients of `hardest_negatives_backward` into da [N, D] and db [M, D], contiguous or None.

    With call.normalize they are the gradients of the unit rows x̂ and ŷ, else those of x and y.
    norm: None, or [N] fp32, is set to max(‖row‖, 1e-12) of x's rows
    """
    (N, D), M = x.shape, len(y)
    programs = sum(len(t) for t in (da, db) if t is not None)
    if programs > 0:
        statistics = operands.contiguous(call.dpositive, call.drow, call.dcol, call.row_index, call.col_index)
        BE, BD = tiles.SCAN_EDGES, tiles.EDGE_CHANNELS
        programs += triton.cdiv(N, BE) if norm is not None else 0
        with torch.cuda.device_of(x):
            scan_kernel[(programs * triton.cdiv(D, BD),)](
                *statistics, x, y, da, db, norm, x.stride(0), y.stride(0), N, M, D,
                NORMALIZE=call.normalize, BE=BE, BD=BD, num_warps=4, num_stages=2, enable_fp_fusion=True,
                maxnreg=255 if D == 1 else None,  # else ptxas spills a register for higher occupancy
            )  # fmt: skip
