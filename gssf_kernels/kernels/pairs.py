"""score[e] = a[rows[e]] · b[cols[e]], and its gradient: da[i] = Σ_{e: rows[e] = i} grad[e] b[cols[e]], db alike.

An edge with -1 at either end scores -inf and gives no gradient. The gradient is a segment sum over edges sorted by
destination, in a fixed order and without atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gssf_kernels import plan
from gssf_kernels.kernels import operands, tiles


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
def side(
    i, pairs, dpair, down, dother, index, other_index, source, stride, out, K, D,
    NORMALIZE: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Row i of one side's gradient: from its pair, its own hardest negative, and all whose hardest negative it is."""
    d = tl.program_id(0) % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
    weight = tl.load(dpair + i, mask=i < pairs, other=0.0)
    total = add_row(tl.zeros([BD], tl.float32), source, stride, i, weight, d, D, NORMALIZE)
    total = add_row(total, source, stride, tl.load(index + i), tl.load(down + i), d, D, NORMALIZE)
    for e0 in range(0, K, BE):
        e = e0 + tl.arange(0, BE)
        mine = tl.load(other_index + e, mask=e < K, other=-1) == i
        if tl.max(mine.to(tl.int32), 0) > 0:
            weights = tl.load(dother + e, mask=mine, other=0.0)
            mine = mine & (weights != 0)
            if NORMALIZE:
                weights = tl.where(mine, weights / lengths(source, e.to(tl.int64) * stride, mine, D, BD), 0.0)
            inside = mine[:, None] & (d < D)[None, :]
            x = tl.load(source + e.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)
            total += tl.sum(weights[:, None] * x.to(tl.float32), 0)
    tl.store(out + i * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["N", "M"])
def scan_kernel(
    dpair, drow, dcol, row_index, col_index, a, b, da, db, norm, a_stride, b_stride, N, M, D: tl.int32,
    NORMALIZE: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A program for every row of da, then for every row of db; of one alone where the other is None.

    norm, or None: gets the lengths of a's rows, BE of them from each program after those.
    """
    p = (tl.program_id(0) // tl.cdiv(D, BD)).to(tl.int64)
    of_rows = (N if da is not None else 0) + (M if db is not None else 0)
    if norm is not None and p >= of_rows:
        if tl.program_id(0) % tl.cdiv(D, BD) == 0:
            i = (p - of_rows) * BE + tl.arange(0, BE)
            tl.store(norm + i, lengths(a, i * a_stride, i < N, D, BD), mask=i < N)
    elif da is None:
        side(p, N, dpair, dcol, drow, col_index, row_index, a, a_stride, db, N, D, NORMALIZE, BE, BD)
    elif db is None or p < N:
        side(p, N, dpair, drow, dcol, row_index, col_index, b, b_stride, da, M, D, NORMALIZE, BE, BD)
    else:
        side(p - N, N, dpair, dcol, drow, col_index, row_index, a, a_stride, db, N, D, NORMALIZE, BE, BD)


def pair_scores(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None, cols: torch.Tensor | None) -> torch.Tensor:
    """Return scores [E] fp32.

    a, b: [N, D], [M, D] fp32, bf16 or fp16
    rows, cols: [E] int64, -1 for no edge; both None: the pairs (i, i) of all rows of a

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("pair_scores", a, b)
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


def pair_scores_backward(
    grad: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, a: torch.Tensor, b: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (da [N, D], db [M, D]) in the dtypes of a and b, summed in fp32, each empty where needs says no.

    grad: [E] fp32, the gradient of the scores; needs: for a, b; the rest as for `pair_scores`

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("pair_scores_backward", grad, a, b)
    grad, rows, cols = grad.contiguous(), rows.contiguous(), cols.contiguous()
    with torch.cuda.device_of(a):
        da = segment_sum(grad, rows, cols, operands.rows(b), like=a) if needs[0] else a.new_empty(0)
        db = segment_sum(grad, cols, rows, operands.rows(a), like=b) if needs[1] else b.new_empty(0)
    return da, db


def hardest_negatives_backward(
    dpair: torch.Tensor,
    drow: torch.Tensor,
    dcol: torch.Tensor,
    row_index: torch.Tensor,
    col_index: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pair_scores_backward` of the pairs (i, i), (i, row_index[i]) and (col_index[j], j), in one launch if small.

    dpair, drow: [N] fp32; dcol: [M] fp32; row_index, col_index: [N], [M] int64, -1 for none

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("hardest_negatives_backward", dpair, drow, dcol, a, b)
    N, M = len(a), len(b)
    if M > plan.SCAN_ROWS:
        i, j = torch.arange(N, device=a.device), torch.arange(M, device=a.device)
        rows, cols = torch.cat((i, i, col_index)), torch.cat((i, row_index, j))
        return pair_scores_backward(torch.cat((dpair, drow, dcol)), rows, cols, a, b, needs)
    da, db = (a.new_empty(a.shape) if needs[0] else None), (b.new_empty(b.shape) if needs[1] else None)
    scan(dpair, drow, dcol, row_index, col_index, a, b, da, db, False)
    return da if da is not None else a.new_empty(0), db if db is not None else b.new_empty(0)


def scan(
    dpair: torch.Tensor,
    drow: torch.Tensor,
    dcol: torch.Tensor,
    row_index: torch.Tensor,
    col_index: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    da: torch.Tensor | None,
    db: torch.Tensor | None,
    normalize: bool,
    norm: torch.Tensor | None = None,
) -> None:
    """Write the gradients into da [N, D] and db [M, D], contiguous or None; with normalize of the units of a and b.

    norm: [N] fp32, gets the lengths of a's rows, at least 1e-12
    """
    (N, D), M = a.shape, len(b)
    programs = sum(len(x) for x in (da, db) if x is not None)
    if programs > 0:
        given = operands.contiguous(dpair, drow, dcol, row_index, col_index)
        a, b = operands.rows(a), operands.rows(b)
        BE, BD = tiles.SCAN_EDGES, tiles.EDGE_CHANNELS
        programs += triton.cdiv(N, BE) if norm is not None else 0
        with torch.cuda.device_of(a):
            scan_kernel[(programs * triton.cdiv(D, BD),)](
                *given, a, b, da, db, norm, a.stride(0), b.stride(0), N, M, D,
                NORMALIZE=normalize, BE=BE, BD=BD, num_warps=4, num_stages=2, enable_fp_fusion=True,
                maxnreg=255 if D == 1 else None,  # there ptxas would spill a value to fit in one block more
            )  # fmt: skip
