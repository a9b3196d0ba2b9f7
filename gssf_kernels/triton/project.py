"""p = x̂ ∘ diag + scatter(permutation, blockdiag(gather(permutation, x̂), blocks)),  x̂ = x / max(‖x‖, 1e-12).

With q = x̂[:, permutation], channel c of block g gets t[c] = Σ_k q[k] blocks[g, k, c] and p[:, permutation] += t.
Backward, by the same kernel with blocks transposed and h = dL/dx̂:
    dx = (h − x̂ ⟨x̂, h⟩) / ‖x‖,  ddiag = Σ_n x̂ ∘ grad_out,  dblocks[g] = Σ_n q_gᵀ grad_out_g

Stored are p, and with y its unit rows ŷ, neither x̂ nor W. In the order of the permutation, blocks is a band of the
[D, D] matrix W with W[u, v] = blocks[u // b, u % b, v % b] where u // b = v // b, else 0. Tiles of W are assembled as
they are loaded, so every block size takes the same path. Indices into blocks are 32-bit: fewer than 2³¹ entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.pairs import pair_scores, scan, segment_sum

EPS = 1e-12


@triton.jit
def channels(permutation, c, D):
    """The channel of x that is channel c in the order of the blocks."""
    if permutation is not None:
        return tl.load(permutation + c, mask=c < D, other=0).to(tl.int32)
    else:
        return c


@triton.jit
def mixed(
    x, row, inside, c0, diag, blocks, permutation, D,
    B: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The product of rows of x with columns c0 : c0 + BC of diag + W, or of Wᵀ, [BN, BC] fp32."""
    c = c0 + tl.arange(0, BC)
    at = channels(permutation, c, D)
    t = tl.zeros([BN, BC], tl.float32)
    if blocks is not None:
        stop = tl.minimum(D, ((c0 + BC - 1) // B + 1) * B)
        for k0 in range(c0 // B * B, stop, BC):
            k = k0 + tl.arange(0, BC)
            lane = channels(permutation, k, D)
            q = tl.load(x + row[:, None] + lane[None, :], mask=inside[:, None] & (k < D)[None, :], other=0.0)
            entry = c[None, :] * B + k[:, None] % B if TRANSPOSED else k[:, None] * B + c[None, :] % B
            band = (k[:, None] // B == c[None, :] // B) & (k < D)[:, None]
            w = tl.load(blocks + entry, mask=band, other=0.0)  # [BC in, BC out]
            if q.dtype != w.dtype:
                q = q.to(tl.float32)
                w = w.to(tl.float32)
            t = tl.dot(q, w, t, input_precision=PRECISION)
    if diag is not None or blocks is None:
        scaled = tl.load(x + row[:, None] + at[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0)
        scaled = scaled.to(tl.float32)
        if diag is not None:
            scaled *= tl.load(diag + at, mask=c < D, other=0.0).to(tl.float32)[None, :]
        t += scaled
    return t


@triton.jit
def load_addend(addend, i, at, inside, D):
    """addend [N, D] at rows i and channels at, fp32."""
    return tl.load(addend + i[:, None] * D + at[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def project_rows(
    x, grad_out, addend, out, diag, blocks, permutation, lengths, x_stride, grad_stride, N, D, eps, which, piece,
    pieces, B: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, NORMALIZE: tl.constexpr,
    BACKWARD: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """BN rows of p, or with BACKWARD of dx from grad_out: one of several pieces of their channels. TRANSPOSED: by Wᵀ.

    lengths: None, or [N], is set to the rows' divisors; addend: None, or [N, D], is added to the gradient of x̂
    """
    i = which.to(tl.int64) * BN + tl.arange(0, BN)
    inside = i < N
    x_row = i * x_stride
    if BACKWARD:
        source = grad_out
        row = i * grad_stride
    else:
        source = x
        row = x_row

    squares = tl.zeros([BN], tl.float32)
    inner = tl.zeros([BN], tl.float32)  # <x, h>
    if NORMALIZE:
        for c0 in range(0, D, BC):
            c = c0 + tl.arange(0, BC)
            at = channels(permutation, c, D)
            y = tl.load(x + x_row[:, None] + at[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0)
            y = y.to(tl.float32)
            squares += tl.sum(y * y, 1)
            if BACKWARD:
                h = mixed(source, row, inside, c0, diag, blocks, permutation, D, B, BN, BC, PRECISION, TRANSPOSED)
                if addend is not None:
                    h += load_addend(addend, i, at, inside[:, None] & (c < D)[None, :], D)
                inner += tl.sum(y * h, 1)
    norm = tl.sqrt(squares)
    divisor = tl.where(norm < eps, eps, norm)[:, None]  # a NaN stays
    if lengths is not None:
        tl.store(lengths + i, tl.where(norm < eps, eps, norm), mask=inside & (piece == 0))

    for c0 in range(piece * BC, D, pieces * BC):
        c = c0 + tl.arange(0, BC)
        at = channels(permutation, c, D)
        t = mixed(source, row, inside, c0, diag, blocks, permutation, D, B, BN, BC, PRECISION, TRANSPOSED)
        if addend is not None:
            t += load_addend(addend, i, at, inside[:, None] & (c < D)[None, :], D)
        if NORMALIZE:
            if BACKWARD:
                y = tl.load(x + x_row[:, None] + at[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0)
                unit = y.to(tl.float32) / divisor
                t = tl.where(norm[:, None] > eps, t - unit * (inner[:, None] / divisor), t)
            t = t / divisor
        to = out + i[:, None] * D + at[None, :]
        tl.store(to, t.to(out.dtype.element_ty), mask=inside[:, None] & (c < D)[None, :])


@triton.jit(do_not_specialize=["N"])
def project_kernel(
    x, grad_out, out, diag, blocks, permutation, x_stride, grad_stride, N, D: tl.int32, eps, B: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, NORMALIZE: tl.constexpr, BACKWARD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """`project_rows` for all rows and pieces."""
    project_rows(
        x, grad_out, None, out, diag, blocks, permutation, None, x_stride, grad_stride, N, D, eps,
        tl.program_id(0), tl.program_id(1), tl.num_programs(1), B, BN, BC, PRECISION, NORMALIZE, BACKWARD, TRANSPOSED,
    )  # fmt: skip


@triton.jit
def sum_parameters(
    x, grad_out, norm, permutation, ddiag, dblocks, x_stride, grad_stride, N, D, column, piece, split, share,
    B: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BC entries of ddiag and BC x BC of dblocks, summed over a share of the rows."""
    k = column * BC + tl.arange(0, BC)
    c = column * BC // B * B + piece * BC + tl.arange(0, BC)
    k_at = channels(permutation, k, D)
    c_at = channels(permutation, c, D)
    diag_sum = tl.zeros([BC], tl.float32)
    block_sum = tl.zeros([BC, BC], tl.float32)
    for n0 in range(split * share, tl.minimum(split * share + share, N), BR):
        n = n0 + tl.arange(0, BR)
        inside = (n < tl.minimum(split * share + share, N))[:, None]
        q = tl.load(x + n[:, None] * x_stride + k_at[None, :], mask=inside & (k < D)[None, :], other=0.0)  # [BR, BC]
        if norm is not None:
            length = tl.load(norm + n, mask=inside.reshape([BR]), other=1.0)[:, None]
        if ddiag is not None:
            g = tl.load(grad_out + n[:, None] * grad_stride + k_at[None, :], mask=inside & (k < D)[None, :], other=0.0)
            g = g.to(tl.float32)
            if norm is not None:
                g = g / length
            diag_sum += tl.sum(q.to(tl.float32) * g, 0)
        if dblocks is not None:
            g = tl.load(grad_out + n[:, None] * grad_stride + c_at[None, :], mask=inside & (c < D)[None, :], other=0.0)
            if norm is not None:
                g = g.to(tl.float32) / length
            if g.dtype != q.dtype:
                block_sum = tl.dot(q.to(tl.float32).T, g.to(tl.float32), block_sum, input_precision=PRECISION)
            else:
                block_sum = tl.dot(q.T, g, block_sum, input_precision=PRECISION)
    if ddiag is not None:
        tl.store(ddiag + split * D + k_at, diag_sum.to(ddiag.dtype.element_ty), mask=(k < D) & (piece == 0))
    if dblocks is not None:
        band = (k[:, None] // B == c[None, :] // B) & (k < D)[:, None]
        at = split * D * B + k[:, None] * B + c[None, :] % B
        tl.store(dblocks + at, block_sum.to(dblocks.dtype.element_ty), mask=band)


@triton.jit(do_not_specialize=["N", "share", "pieces"])
def parameter_kernel(
    x, grad_out, norm, permutation, ddiag, dblocks, x_stride, grad_stride, N, D: tl.int32, share, pieces,
    B: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`sum_parameters` for every share, numbered by the second grid index: ddiag, dblocks [splits, …] fp32."""
    sum_parameters(
        x, grad_out, norm, permutation, ddiag, dblocks, x_stride, grad_stride, N, D,
        tl.program_id(0) // pieces, tl.program_id(0) % pieces, tl.program_id(1).to(tl.int64), share,
        B, BR, BC, PRECISION,
    )  # fmt: skip


@triton.jit
def row_divisors(x, row, inside, D, eps, BN: tl.constexpr, BC: tl.constexpr):
    """The divisors of BN rows: max(‖row‖, eps)."""
    squares = tl.zeros([BN], tl.float32)
    for c0 in range(0, D, BC):
        c = c0 + tl.arange(0, BC)
        y = tl.load(x + row[:, None] + c[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(y * y, 1)
    norm = tl.sqrt(squares)
    return tl.where(norm < eps, eps, norm)  # a NaN stays


@triton.jit
def positive_rows(
    x, y, positive_score, diag, blocks, permutation, x_stride, y_stride, N, D, eps, which, B: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The scores of BN pairs (i, i), of p and ŷ rounded to their dtypes."""
    i = which.to(tl.int64) * BN + tl.arange(0, BN)
    inside = i < N
    x_row, y_row = i * x_stride, i * y_stride
    if NORMALIZE:
        x_length = row_divisors(x, x_row, inside, D, eps, BN, BC)[:, None]
        y_length = row_divisors(y, y_row, inside, D, eps, BN, BC)[:, None]
    total = tl.zeros([BN], tl.float32)
    for c0 in range(0, D, BC):
        c = c0 + tl.arange(0, BC)
        at = channels(permutation, c, D)
        p = mixed(x, x_row, inside, c0, diag, blocks, permutation, D, B, BN, BC, PRECISION, False)
        other = tl.load(y + y_row[:, None] + at[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0)
        if NORMALIZE:
            p = p / x_length
            other = (other.to(tl.float32) / y_length).to(y.dtype.element_ty)
        p = tl.where((c < D)[None, :], p.to(x.dtype.element_ty).to(tl.float32), 0.0)
        total += tl.sum(p * other.to(tl.float32), 1)
    tl.store(positive_score + i, total, mask=inside)


@triton.jit(do_not_specialize=["N", "M"])
def sides_kernel(
    x, y, dp, dunit, x_out, y_out, positive_score, diag, blocks, permutation, norm, ddiag, dblocks, x_stride, y_stride,
    N, M, D: tl.int32, eps, B: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr, BACKWARD: tl.constexpr, WEIGHTED: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """x̂ W and ŷ; or with BACKWARD dx, dy and the parameters' gradients from dp and dunit. What is None is not computed.

    Programs for the rows of x, then of y, whose channels the second grid index divides in pieces; then for the
    parameters, each over all rows, or for positive_score. norm [N]: the divisors of x's rows, written forward and read
    backward. WEIGHTED: dunit is the gradient of ŷ Wᵀ, not of ŷ. Backward with y None, y is x, and dx is the sum of the
    gradients through dp and dunit.
    """
    p, piece, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    x_programs = tl.cdiv(N, BN) if x_out is not None else 0
    y_programs = tl.cdiv(M, BN) if y_out is not None else 0
    if x_out is not None and p < x_programs:
        project_rows(
            x, dp, dunit if y is None else None, x_out, diag, blocks, permutation, None if BACKWARD else norm,
            x_stride, D, N, D, eps, p, piece, pieces, B, BN, BC, PRECISION, NORMALIZE, BACKWARD, BACKWARD,
        )  # fmt: skip
    if y_out is not None and (p >= x_programs) & (p < x_programs + y_programs):
        if WEIGHTED:  # W for y's rows, where x's rows have its transpose
            project_rows(
                y, dunit, None, y_out, diag, blocks, permutation, None, y_stride, D, M, D, eps, p - x_programs, piece,
                pieces, B, BN, BC, PRECISION, NORMALIZE, True, False,
            )  # fmt: skip
        else:
            project_rows(
                y, dunit, None, y_out, None, None, None, None, y_stride, D, M, D, eps, p - x_programs, piece, pieces,
                B, BN, BC, PRECISION, NORMALIZE, BACKWARD, False,
            )  # fmt: skip
    if positive_score is not None and p >= x_programs + y_programs:
        q = (p - x_programs - y_programs) * pieces + piece
        if q < tl.cdiv(N, BN):
            positive_rows(
                x, y, positive_score, diag, blocks, permutation, x_stride, y_stride, N, D, eps, q,
                B, BN, BC, PRECISION, NORMALIZE,
            )  # fmt: skip
    if (ddiag is not None or dblocks is not None) and p >= x_programs + y_programs:
        q, split = (p - x_programs - y_programs) * pieces + piece, tl.full([], 0, tl.int64)
        if q < tl.cdiv(D, BC) * SPANS:
            sum_parameters(
                x, dp, norm, permutation, ddiag, dblocks, x_stride, D, N, D, q // SPANS, q % SPANS, split, N,
                B, BN, BC, PRECISION,
            )  # fmt: skip


class Weights(NamedTuple):
    """What an input is multiplied by, and whether its rows are normalised first."""

    diag: torch.Tensor | None
    blocks: torch.Tensor | None
    permutation: torch.Tensor | None
    normalize: bool

    @classmethod
    def of(cls, call: Any) -> Weights:
        diag, blocks, permutation = operands.contiguous(call.diag, call.blocks, call.permutation)
        return cls(diag, blocks, permutation, call.normalize)

    @property
    def block_size(self) -> int:
        return self.blocks.shape[1] if self.blocks is not None else 1

    def transposed(self) -> Weights:
        return self._replace(blocks=self.blocks.mT.contiguous() if self.blocks is not None else None)


NORMALIZED = Weights(None, None, None, True)  # p = x̂


def precision(x: torch.Tensor) -> str:
    return "ieee" if planning.kind(x.dtype) == "ieee" else "tf32"


def launch_project(x: torch.Tensor, grad_out: torch.Tensor | None, weights: Weights) -> torch.Tensor:
    """p of x, or with grad_out dx; channels are adjacent in all tensors."""
    N, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = planning.project_tile(x.dtype)
    programs, pieces = triton.cdiv(N, tile.BN), min(triton.cdiv(D, tile.BC), tiles.GRID_SECOND)
    if weights.normalize:  # every program reads whole rows for their norms: only as many programs as fill a card
        pieces = min(pieces, triton.cdiv(tiles.TARGET_PROGRAMS, max(programs, 1)))
    project_kernel[(programs, pieces)](
        x, grad_out, out, weights.diag, weights.blocks, weights.permutation, x.stride(0),
        grad_out.stride(0) if grad_out is not None else 0, N, D, EPS, B=weights.block_size, BN=tile.BN, BC=tile.BC,
        PRECISION=precision(x), NORMALIZE=weights.normalize, BACKWARD=grad_out is not None,
        TRANSPOSED=grad_out is not None,
        **planning.most_registers(D, mixed=grad_out is not None and grad_out.dtype != x.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def spans(D: int, block_size: int, BC: int) -> int:
    """The most steps of BC channels that the band of BC rows of W takes."""
    first = range(0, D, BC)
    ends = (min(D, ((k0 + BC - 1) // block_size + 1) * block_size) for k0 in first)
    return triton.cdiv(max(end - k0 // block_size * block_size for end, k0 in zip(ends, first, strict=True)), BC)


def launch_parameters(
    x: torch.Tensor, grad_out: torch.Tensor, weights: Weights, need_diag: bool, need_blocks: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ddiag, dblocks), each empty if not needed; summed over fixed shares of the rows, then over the shares."""
    diag, blocks = weights.diag if need_diag else None, weights.blocks if need_blocks else None
    if diag is None and blocks is None:
        return x.new_empty(0), x.new_empty(0)
    N, D = x.shape
    block_size = blocks.shape[1] if blocks is not None else 1
    tile = planning.project_tile(x.dtype)
    BC = tile.BC
    columns, pieces = triton.cdiv(D, BC), spans(D, block_size, BC)
    splits = max(1, min(tiles.TARGET_PROGRAMS // (columns * pieces), triton.cdiv(N, 4 * tile.BN)))
    share = triton.cdiv(triton.cdiv(N, splits), tile.BN) * tile.BN
    norm = row_lengths(x) if weights.normalize else None
    ddiag = x.new_empty(splits, D, dtype=torch.float32) if diag is not None else None
    dblocks = x.new_empty(splits, *blocks.shape, dtype=torch.float32) if blocks is not None else None
    parameter_kernel[(columns * pieces, splits)](
        x, grad_out, norm, weights.permutation, ddiag, dblocks, x.stride(0), grad_out.stride(0), N, D, share, pieces,
        B=block_size, BR=tile.BN, BC=BC, PRECISION=precision(x), **planning.most_registers(D),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return (
        ddiag.sum(0).to(diag.dtype) if ddiag is not None and diag is not None else x.new_empty(0),
        dblocks.sum(0).to(blocks.dtype) if dblocks is not None and blocks is not None else x.new_empty(0),
    )


def row_lengths(x: torch.Tensor) -> torch.Tensor:
    """The divisors of the rows of x, max(‖row‖, EPS), fp32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).clamp_min_(EPS)


def launch_sides(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weights: Weights,
    wanted: tuple[bool, bool, bool, bool],
    gradients: tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
    norm: torch.Tensor | None = None,
    positive_score: torch.Tensor | None = None,
    weighted: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(p of x, ŷ, empty, empty), or with gradients (dp, dunit) (dx, dy, ddiag, dblocks), in one launch.

    wanted: which of the four to compute; the others are empty
    norm: [N], the divisors of x's rows, written forward; read backward for ddiag and dblocks, with normalize
    positive_score: [N] fp32, is set to the scores of the pairs (i, i); weighted: dunit is the gradient of ŷ Wᵀ
    y: None in a backward in which y is x
    """
    (N, D), M = x.shape, len(y) if y is not None else 0
    out = [torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and is_wanted else None
           for t, is_wanted in zip((x, y, weights.diag, weights.blocks), wanted, strict=True)]  # fmt: skip
    dp, dunit = operands.contiguous(*gradients) if gradients else (None, None)
    tile = planning.project_tile(x.dtype)
    programs = sum(triton.cdiv(len(t), tile.BN) for t in out[:2] if t is not None)
    columns = triton.cdiv(D, tile.BC)
    most_pieces = triton.cdiv(tiles.TARGET_PROGRAMS, max(programs, 1)) if weights.normalize else tiles.GRID_SECOND
    pieces = min(columns, most_pieces)
    across = spans(D, weights.block_size, tile.BC)
    programs += triton.cdiv(columns * across, pieces) if any(t is not None for t in out[2:]) else 0
    programs += triton.cdiv(triton.cdiv(N, tile.BN), pieces) if positive_score is not None else 0
    if programs:
        sides_kernel[(programs, pieces)](
            x, y, dp, dunit, *out[:2], positive_score, weights.diag, weights.blocks, weights.permutation, norm,
            *out[2:], x.stride(0), y.stride(0) if y is not None else 0, N, M, D, EPS, B=weights.block_size, BN=tile.BN,
            BC=tile.BC, PRECISION=precision(x), NORMALIZE=weights.normalize, BACKWARD=gradients is not None,
            WEIGHTED=weighted, SPANS=across,
            maxnreg=255,  # else ptxas spills a register for higher occupancy
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    first, second, ddiag, dblocks = (x.new_empty(0) if t is None else t for t in out)
    return first, second, ddiag, dblocks


def project(call: Any, plan: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (p [N, D], ŷ [M, D], norm [N], positive_score [N]).

    p and ŷ are summed in fp32 and rounded once, to the dtypes of x and y; the others are fp32. norm: divisors of x's
    rows; like ŷ, empty without normalize or y. positive_score: of the pairs (i, i), empty without `pairs`. Raises
    TypeError unless x and y are fp32, bf16 or fp16.
    """
    weights, x = Weights.of(call), operands.rows(call.x)
    if call.y is None:
        with torch.cuda.device_of(x):
            p = launch_project(x, None, weights)
        return p, x.new_empty(0), x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    y, N = operands.rows(call.y), len(x)
    together = call.pairs and plan.route == "small"
    norm, positive_score = (
        x.new_empty(N if needed else 0, dtype=torch.float32) for needed in (weights.normalize, together)
    )
    with torch.cuda.device_of(x):
        p, unit, *_ = launch_sides(
            x, y, weights, (True, weights.normalize, False, False), norm=norm if weights.normalize else None,
            positive_score=positive_score if together else None,
        )  # fmt: skip
    if call.pairs and not together:
        positive_score = pair_scores(p, unit if weights.normalize else y, None, None)
    return p, unit, norm, positive_score


def project_backward(call: Any, plan: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dx, dy, ddiag, dblocks) in their tensors' dtypes, from dp and dunit, the gradients of p and ŷ.

    Each is empty if `needs` is False, or if it depends on neither dp nor dunit. Raises TypeError for fp64.
    """
    weights, needs, dp = Weights.of(call), call.needs, call.dp
    x, y = operands.rows(call.x), operands.rows(call.y) if call.y is not None else None
    dunit = call.dunit if weights.normalize else None
    if plan.route == "small":
        has_dp = dp is not None
        wanted = has_dp and needs[0], dunit is not None and needs[1], has_dp and needs[2], has_dp and needs[3]
        with torch.cuda.device_of(x):
            return launch_sides(x, y, weights, wanted, (dp, dunit), norm=call.norm if weights.normalize else None)
    dx, dy, ddiag, dblocks = (x.new_empty(0) for _ in range(4))
    with torch.cuda.device_of(x):
        if dp is not None:
            dx, ddiag, dblocks = side_backward(x, dp, weights, (needs[0], needs[2], needs[3]))
        if dunit is not None and needs[0 if y is None else 1]:
            unit_grad = launch_project(x if y is None else y, operands.rows(dunit), NORMALIZED)
            if y is not None:
                dy = unit_grad
            else:
                dx = unit_grad if dp is None else dx + unit_grad
    return dx, dy, ddiag, dblocks


def side_backward(
    x: torch.Tensor, grad_out: torch.Tensor, weights: Weights, needs: tuple[bool, bool, bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, ddiag, dblocks) from grad_out, the gradient of x̂ W; each empty if `needs` is False."""
    grad_out = operands.rows(grad_out)
    dx = launch_project(x, grad_out, weights) if needs[0] else x.new_empty(0)
    return dx, *launch_parameters(x, grad_out, weights, needs[1], needs[2])


def pairs_backward(
    edges: tuple[torch.Tensor, torch.Tensor, torch.Tensor], x: torch.Tensor, y: torch.Tensor, weights: Weights,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`side_backward` of grad_out[i] = Σ_{e: rows[e] = i} dscores[e] ŷ[cols[e]], gathered in fp32.

    edges: (dscores [E] fp32, rows [E], cols [E]); -1 for no edge
    """
    dscores, rows, cols = edges
    if weights.normalize and len(y):
        # A zero gradient stays zero, even if the row is infinite or zero.
        dscores = torch.where(dscores == 0, 0.0, dscores / row_lengths(y)[cols.clamp_min(0)])
    gathered = segment_sum(dscores.contiguous(), rows, cols, y, x.new_empty(x.shape, dtype=torch.float32))
    return side_backward(x, gathered, weights, needs)


def hardest_negatives_backward(call: Any, plan: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dx, dy, ddiag, dblocks) of the scores x̂ W ŷᵀ at (i, i), (i, row_index[i]) and (col_index[j], j).

    Without weights and normalize the scores are x yᵀ. Each is empty if `needs` is False. With few rows every row scans
    all indices for its own; with many the edges are sorted. Raises TypeError unless gradients, x and y are fp32, bf16
    or fp16.
    """
    weights, needs = Weights.of(call), call.needs
    x, y = operands.rows(call.x), operands.rows(call.y)
    plain = weights.diag is None and weights.blocks is None and not weights.normalize
    ddiag, dblocks = x.new_empty(0), x.new_empty(0)
    if plan.route == "small" and plain:
        da, db = (t.new_empty(t.shape) if need else None for t, need in zip((x, y), needs, strict=False))
        scan(call, x, y, da, db)
        return da if da is not None else x.new_empty(0), db if db is not None else y.new_empty(0), ddiag, dblocks
    if plan.route == "small":
        learned = any(t is not None and need for t, need in zip(weights[:2], needs[2:], strict=True))
        norm = x.new_empty(len(x), dtype=torch.float32) if weights.normalize and learned else None
        dp = x.new_empty(x.shape, dtype=torch.float32) if needs[0] or learned else None
        dunit = y.new_empty(y.shape, dtype=torch.float32) if needs[1] else None
        with torch.cuda.device_of(x):
            scan(call, x, y, dp, dunit, norm)
            return launch_sides(x, y, weights, tuple(needs), (dp, dunit), norm=norm, weighted=True)
    i, j = torch.arange(len(x), device=x.device), torch.arange(len(y), device=x.device)
    rows, cols = torch.cat((i, i, call.col_index)), torch.cat((i, call.row_index, j))
    dscores = torch.cat((call.dpositive, call.drow, call.dcol))
    dx, dy = x.new_empty(0), y.new_empty(0)
    with torch.cuda.device_of(x):
        if plain:
            dx = segment_sum(dscores, rows, cols, y, like=x) if needs[0] else dx
            dy = segment_sum(dscores, cols, rows, x, like=y) if needs[1] else dy
            return dx, dy, ddiag, dblocks
        if needs[0] or needs[2] or needs[3]:
            dx, ddiag, dblocks = pairs_backward((dscores, rows, cols), x, y, weights, (needs[0], needs[2], needs[3]))
        if needs[1]:  # W for y's rows, where x's rows have its transpose
            dy, _, _ = pairs_backward((dscores, cols, rows), y, x, weights.transposed(), (True, False, False))
    return dx, dy, ddiag, dblocks
