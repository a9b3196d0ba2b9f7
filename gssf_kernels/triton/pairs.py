"""score[e] = a[rows[e]] · b[cols[e]], and its gradient: da[i] = Σ_{e: rows[e] = i} grad[e] b[cols[e]], db alike.

An edge with -1 at either end scores -inf and gives no gradient. The gradient is a segment sum over edges sorted by
destination, in a fixed order and without atomics: the same inputs give the same bits.
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
    """BE edges to a program, BD channels at a time."""
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
    grad, order, offsets, ends, source, out, stride, D: tl.int32, BE: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """out[i] = Σ grad[e] source[ends[e]] over e in order[offsets[i] : offsets[i + 1]], BE edges abreast."""
    pieces = tl.cdiv(D, BD)  # of a row, each a program's
    i = (tl.program_id(0) // pieces).to(tl.int64)
    d = tl.program_id(0) % pieces * BD + tl.arange(0, BD)
    stop = tl.load(offsets + i + 1)
    total = tl.zeros([BE, BD], tl.float32)
    for p0 in range(tl.load(offsets + i), stop, BE):
        p = p0 + tl.arange(0, BE)
        e = tl.load(order + p, mask=p < stop, other=0)
        end = tl.load(ends + e, mask=p < stop, other=-1)
        weight = tl.load(grad + e, mask=end >= 0, other=0.0)
        inside = (weight != 0)[:, None] & (d < D)[None, :]  # a zero gradient adds nothing, even to an infinite row
        x = tl.load(source + end[:, None] * stride + d[None, :], mask=inside, other=0.0)
        total += weight[:, None] * x.to(tl.float32)
    tl.store(out + i * D + d, tl.sum(total, 0).to(out.dtype.element_ty), mask=d < D)


@triton.jit
def lengths(source, at, inside, D, BD: tl.constexpr):
    """The lengths of the rows of source that start at at [K], at least 1e-12."""
    squares = tl.zeros([at.shape[0], BD], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(source + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        squares += x.to(tl.float32) * x.to(tl.float32)
    norm = tl.sqrt(tl.sum(squares, 1))
    return tl.where(norm < 1e-12, 1e-12, norm)  # a NaN stays


@triton.jit
def add_row(total, source, stride, row, weight, d, D, NORMALIZE: tl.constexpr):
    """total [BD] and weight times a row of source, or its unit; none at -1, and a zero weight adds nothing."""
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
    i, positives, dpositive, dself, dother, index, other_index, source, stride, out, K, D,
    NORMALIZE: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Row i of one side's gradient: from its positive, its hardest negative, and all whose hardest negative it is."""
    d = tl.program_id(0) % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
    weight = tl.load(dpositive + i, mask=i < positives, other=0.0)
    total = add_row(tl.zeros([BD], tl.float32), source, stride, i, weight, d, D, NORMALIZE)
    total = add_row(total, source, stride, tl.load(index + i), tl.load(dself + i), d, D, NORMALIZE)
    for e0 in range(0, K, BE):
        e = e0 + tl.arange(0, BE)
        hit = tl.load(other_index + e, mask=e < K, other=-1) == i
        if tl.max(hit.to(tl.int32), 0) > 0:
            weights = tl.load(dother + e, mask=hit, other=0.0)
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
    """A program for every row of da, then for every row of db; of one alone where the other is None.

    norm, or None: is set to the lengths of a's rows, BE of them by each program after those.
    """
    p = (tl.program_id(0) // tl.cdiv(D, BD)).to(tl.int64)
    of_rows = (N if da is not None else 0) + (M if db is not None else 0)
    if norm is not None and p >= of_rows:
        if tl.program_id(0) % tl.cdiv(D, BD) == 0:
            i = (p - of_rows) * BE + tl.arange(0, BE)
            tl.store(norm + i, lengths(a, i * a_stride, i < N, D, BD), mask=i < N)
    elif da is None:
        scan_row(p, N, dpositive, dcol, drow, col_index, row_index, a, a_stride, db, N, D, NORMALIZE, BE, BD)
    elif db is None or p < N:
        scan_row(p, N, dpositive, drow, dcol, row_index, col_index, b, b_stride, da, M, D, NORMALIZE, BE, BD)
    else:
        scan_row(p - N, N, dpositive, dcol, drow, col_index, row_index, a, a_stride, db, N, D, NORMALIZE, BE, BD)


def pair_scores(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None, cols: torch.Tensor | None) -> torch.Tensor:
    """Return scores [E] fp32 of the pairs of a and b; rows, cols: both None for the pairs (i, i) of all rows of a.

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
    """The op of `pair_scores`."""
    return pair_scores(*call)


def segment_sum(
    grad: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, source: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """out[i] = Σ_{e: starts[e] = i} grad[e] source[ends[e]], shaped and typed as like; edges with -1 are skipped."""
    starts, order = torch.sort(starts, stable=True)  # edges with -1 come first, before offsets[0]
    count, D = like.shape
    offsets = torch.searchsorted(starts, torch.arange(count + 1, device=starts.device))
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    BE, BD = tiles.SEGMENT_EDGES, tiles.EDGE_CHANNELS
    segment_sum_kernel[(count * triton.cdiv(D, BD),)](
        grad, order, offsets, ends, source, out, source.stride(0), D,
        BE=BE, BD=BD, num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def pair_scores_backward(call: Any, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (da [N, D], db [M, D]) in the dtypes of a and b, summed in fp32, each empty where needs says no.

    Raises TypeError unless grad, a and b are fp32, bf16 or fp16.
    """
    grad, rows, cols, a, b, needs = call
    grad, rows, cols = grad.contiguous(), rows.contiguous(), cols.contiguous()
    with torch.cuda.device_of(a):
        da = segment_sum(grad, rows, cols, operands.rows(b), like=a) if needs[0] else a.new_empty(0)
        db = segment_sum(grad, cols, rows, operands.rows(a), like=b) if needs[1] else b.new_empty(0)
    return da, db


def scan(
    call: Any, x: torch.Tensor, y: torch.Tensor, da: torch.Tensor | None, db: torch.Tensor | None,
    norm: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradients of `hardest_negatives_backward` into da [N, D] and db [M, D], contiguous or None.

    They are those of the rows of x and y that the scores are made of: with normalize of their units.
    norm: [N] fp32, is set to the lengths of x's rows, at least 1e-12
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
                maxnreg=255 if D == 1 else None,  # there ptxas would spill a value to fit in one block more
            )  # fmt: skip
