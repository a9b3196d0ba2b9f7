"""score[e] = a[rows[e]] · b[cols[e]], and its gradient: da[i] = Σ_{e: rows[e] = i} grad[e] b[cols[e]], db alike.

An edge with -1 at either end scores -inf and gives no gradient. The gradient is a segment sum over edges sorted by
destination, in a fixed order and without atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gssf_kernels.kernels import operands, tiles


@triton.jit(do_not_specialize=["E"])
def pair_scores_kernel(
    a, b, rows, cols, scores, a_stride, b_stride, E, D, BE: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """BE edges to a program, BD channels at a time."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    i = tl.load(rows + e, mask=e < E, other=-1)
    j = tl.load(cols + e, mask=e < E, other=-1)
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
    grad, order, offsets, ends, source, out, stride, D, BE: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """out[i] = Σ grad[e] source[ends[e]] over e in order[offsets[i] : offsets[i + 1]], BE edges abreast."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
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


def pair_scores(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Return scores [E] fp32.

    a, b: [N, D], [M, D] fp32, bf16 or fp16
    rows, cols: [E] int64, -1 for no edge

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("pair_scores", a, b)
    a, b, rows, cols = operands.rows(a), operands.rows(b), rows.contiguous(), cols.contiguous()
    E = len(rows)
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
    segment_sum_kernel[(count, triton.cdiv(D, BD))](
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
