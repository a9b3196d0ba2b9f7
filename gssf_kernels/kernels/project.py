"""p = x̂ ∘ diag + scatter(permutation, blockdiag(gather(permutation, x̂), blocks)),  x̂ = x / max(‖x‖, 1e-12).

With q = x̂[:, permutation], channel c of block g gets t[c] = Σ_k q[k] blocks[g, k, c] and p[:, permutation] += t.
Backward, by the same kernel with blocks transposed and h = dL/dx̂:
    dx = (h − x̂ ⟨x̂, h⟩) / ‖x‖,  ddiag = Σ_n x̂ ∘ grad,  dblocks[g] = Σ_n q_gᵀ grad_g

Seen along the permutation, blocks is a band of the [D, D] matrix W with W[u, v] = blocks[u // b, u % b, v % b] where
u // b = v // b, else 0. Tiles of W are put together as they are loaded, so any block size takes the same path. Places
in blocks are 32-bit: 2³¹ numbers and more are declined (NotImplemented).
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels import plan
from gssf_kernels.kernels import operands, tiles
from gssf_kernels.kernels.pairs import pair_scores, scan, segment_sum

EPS = 1e-12


@triton.jit
def channels(permutation, c, D):
    """Where channel c of the block order lies in x."""
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
def besides(more, i, at, inside, D):
    """more [N, D] at rows i and channels at, fp32."""
    return tl.load(more + i[:, None] * D + at[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def project_rows(
    x, grad, more, out, diag, blocks, permutation, lengths, x_stride, grad_stride, N, D, eps, which, piece, pieces,
    B: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, NORMALIZE: tl.constexpr,
    BACKWARD: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """BN rows of p of x, or with BACKWARD of dx of grad: one of several pieces of their channels. TRANSPOSED: by Wᵀ.

    lengths [N] gets what rows are divided by, and more [N, D] is what x̂ gets besides, where they are not None.
    """
    i = which.to(tl.int64) * BN + tl.arange(0, BN)
    inside = i < N
    x_row = i * x_stride
    if BACKWARD:
        source = grad
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
                if more is not None:
                    h += besides(more, i, at, inside[:, None] & (c < D)[None, :], D)
                inner += tl.sum(y * h, 1)
    norm = tl.sqrt(squares)
    divisor = tl.where(norm < eps, eps, norm)[:, None]  # a NaN stays
    if lengths is not None:
        tl.store(lengths + i, tl.where(norm < eps, eps, norm), mask=inside & (piece == 0))

    for c0 in range(piece * BC, D, pieces * BC):
        c = c0 + tl.arange(0, BC)
        at = channels(permutation, c, D)
        t = mixed(source, row, inside, c0, diag, blocks, permutation, D, B, BN, BC, PRECISION, TRANSPOSED)
        if more is not None:
            t += besides(more, i, at, inside[:, None] & (c < D)[None, :], D)
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
    x, grad, out, diag, blocks, permutation, x_stride, grad_stride, N, D: tl.int32, eps, B: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, NORMALIZE: tl.constexpr, BACKWARD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """`project_rows` of all rows and pieces."""
    project_rows(
        x, grad, None, out, diag, blocks, permutation, None, x_stride, grad_stride, N, D, eps,
        tl.program_id(0), tl.program_id(1), tl.num_programs(1), B, BN, BC, PRECISION, NORMALIZE, BACKWARD, TRANSPOSED,
    )  # fmt: skip


@triton.jit
def sum_parameters(
    x, grad, norm, permutation, ddiag, dblocks, x_stride, grad_stride, N, D, column, piece, split, share,
    B: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums over a share of the rows of BC entries of ddiag, and of BC by BC of dblocks."""
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
            g = tl.load(grad + n[:, None] * grad_stride + k_at[None, :], mask=inside & (k < D)[None, :], other=0.0)
            g = g.to(tl.float32)
            if norm is not None:
                g = g / length
            diag_sum += tl.sum(q.to(tl.float32) * g, 0)
        if dblocks is not None:
            g = tl.load(grad + n[:, None] * grad_stride + c_at[None, :], mask=inside & (c < D)[None, :], other=0.0)
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
    x, grad, norm, permutation, ddiag, dblocks, x_stride, grad_stride, N, D: tl.int32, share, pieces, B: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`sum_parameters` of every share, whose number is the second index: ddiag, dblocks [splits, …] fp32."""
    sum_parameters(
        x, grad, norm, permutation, ddiag, dblocks, x_stride, grad_stride, N, D,
        tl.program_id(0) // pieces, tl.program_id(0) % pieces, tl.program_id(1).to(tl.int64), share,
        B, BR, BC, PRECISION,
    )  # fmt: skip


@triton.jit
def row_divisors(x, row, inside, D, eps, BN: tl.constexpr, BC: tl.constexpr):
    """What BN rows are divided by: their lengths, at least eps."""
    squares = tl.zeros([BN], tl.float32)
    for c0 in range(0, D, BC):
        c = c0 + tl.arange(0, BC)
        y = tl.load(x + row[:, None] + c[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(y * y, 1)
    norm = tl.sqrt(squares)
    return tl.where(norm < eps, eps, norm)  # a NaN stays


@triton.jit
def pair_rows(
    x, y, pair, diag, blocks, permutation, x_stride, y_stride, N, D, eps, which, B: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The scores of BN pairs (i, i), of factors rounded as they are stored."""
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
    tl.store(pair + i, total, mask=inside)


@triton.jit(do_not_specialize=["N", "M"])
def sides_kernel(
    x, y, above, below, x_out, y_out, pair, diag, blocks, permutation, norm, ddiag, dblocks, x_stride, y_stride,
    N, M, D: tl.int32, eps, B: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    NORMALIZE: tl.constexpr, BACKWARD: tl.constexpr, WEIGHTED: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """x̂ W and ŷ; or with BACKWARD dx of above, dy of below and the parameters' gradients. None for what is not wanted.

    Programs for the rows of x, then of y, by the second index in pieces; then for the parameters, each for all rows, or
    for the pairs' scores. norm [N]: the lengths of x, written forward and read backward. WEIGHTED: below is the
    gradient of ŷ Wᵀ, not of ŷ. Backward without y: x is both, and dx of above and below.
    """
    p, piece, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    of_x = tl.cdiv(N, BN) if x_out is not None else 0
    of_y = tl.cdiv(M, BN) if y_out is not None else 0
    if x_out is not None and p < of_x:
        project_rows(
            x, above, below if y is None else None, x_out, diag, blocks, permutation, None if BACKWARD else norm,
            x_stride, D, N, D, eps, p, piece, pieces, B, BN, BC, PRECISION, NORMALIZE, BACKWARD, BACKWARD,
        )  # fmt: skip
    if y_out is not None and (p >= of_x) & (p < of_x + of_y):
        if WEIGHTED:  # y's rows go through W where x's go through its transpose
            project_rows(
                y, below, None, y_out, diag, blocks, permutation, None, y_stride, D, M, D, eps, p - of_x, piece, pieces,
                B, BN, BC, PRECISION, NORMALIZE, True, False,
            )  # fmt: skip
        else:
            project_rows(
                y, below, None, y_out, None, None, None, None, y_stride, D, M, D, eps, p - of_x, piece, pieces,
                B, BN, BC, PRECISION, NORMALIZE, BACKWARD, False,
            )  # fmt: skip
    if pair is not None and p >= of_x + of_y:
        q = (p - of_x - of_y) * pieces + piece
        if q < tl.cdiv(N, BN):
            pair_rows(
                x, y, pair, diag, blocks, permutation, x_stride, y_stride, N, D, eps, q,
                B, BN, BC, PRECISION, NORMALIZE,
            )  # fmt: skip
    if (ddiag is not None or dblocks is not None) and p >= of_x + of_y:
        q, split = (p - of_x - of_y) * pieces + piece, tl.full([], 0, tl.int64)
        if q < tl.cdiv(D, BC) * SPANS:
            sum_parameters(
                x, above, norm, permutation, ddiag, dblocks, x_stride, D, N, D, q // SPANS, q % SPANS, split, N,
                B, BN, BC, PRECISION,
            )  # fmt: skip


def too_many(blocks: torch.Tensor | None) -> bool:
    """Whether blocks hold more numbers than 32-bit places reach."""
    return blocks is not None and blocks.numel() >= 1 << 31


def launch_project(
    x: torch.Tensor,
    grad: torch.Tensor | None,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool,
) -> torch.Tensor:
    """p of x, or where grad is given dx of grad; all contiguous along channels."""
    N, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_size = blocks.shape[1] if blocks is not None else 1
    tile = tiles.project_tile(x.dtype)
    programs, pieces = triton.cdiv(N, tile.BN), min(triton.cdiv(D, tile.BC), tiles.GRID_SECOND)
    if normalize:  # every program reads whole rows for their norms: no more of them than fill a card
        pieces = min(pieces, triton.cdiv(tiles.TARGET_PROGRAMS, max(programs, 1)))
    project_kernel[(programs, pieces)](
        x, grad, out, diag, blocks, permutation, x.stride(0), grad.stride(0) if grad is not None else 0,
        N, D, EPS, B=block_size, BN=tile.BN, BC=tile.BC, PRECISION="ieee" if tiles.kind(x.dtype) == "ieee" else "tf32",
        NORMALIZE=normalize, BACKWARD=grad is not None, TRANSPOSED=grad is not None,
        **tiles.most_registers(D, mixed=grad is not None and grad.dtype != x.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def spans(D: int, block_size: int, BC: int) -> int:
    """How many steps of BC channels the widest band of BC rows of W takes."""
    first = range(0, D, BC)
    ends = (min(D, ((k0 + BC - 1) // block_size + 1) * block_size) for k0 in first)
    return triton.cdiv(max(end - k0 // block_size * block_size for end, k0 in zip(ends, first, strict=True)), BC)


def launch_parameters(
    x: torch.Tensor,
    grad: torch.Tensor,
    permutation: torch.Tensor | None,
    normalize: bool,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ddiag, dblocks), each empty where its parameter is None; sums over fixed shares of the rows, then over them."""
    if diag is None and blocks is None:
        return x.new_empty(0), x.new_empty(0)
    N, D = x.shape
    block_size = blocks.shape[1] if blocks is not None else 1
    tile = tiles.project_tile(x.dtype)
    BC = tile.BC
    columns, pieces = triton.cdiv(D, BC), spans(D, block_size, BC)
    splits = max(1, min(tiles.TARGET_PROGRAMS // (columns * pieces), triton.cdiv(N, 4 * tile.BN)))
    share = triton.cdiv(triton.cdiv(N, splits), tile.BN) * tile.BN
    norm = None
    if normalize:
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).clamp_min_(EPS)
    ddiag = x.new_empty(splits, D, dtype=torch.float32) if diag is not None else None
    dblocks = x.new_empty(splits, *blocks.shape, dtype=torch.float32) if blocks is not None else None
    parameter_kernel[(columns * pieces, splits)](
        x, grad, norm, permutation, ddiag, dblocks, x.stride(0), grad.stride(0), N, D, share, pieces,
        B=block_size, BR=tile.BN, BC=BC, PRECISION="ieee" if tiles.kind(x.dtype) == "ieee" else "tf32",
        **tiles.most_registers(D),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return (
        ddiag.sum(0).to(diag.dtype) if ddiag is not None and diag is not None else x.new_empty(0),
        dblocks.sum(0).to(blocks.dtype) if dblocks is not None and blocks is not None else x.new_empty(0),
    )


def launch_sides(
    x: torch.Tensor,
    y: torch.Tensor | None,
    above: torch.Tensor | None,
    below: torch.Tensor | None,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool,
    backward: bool,
    wanted: tuple[bool, bool, bool, bool],
    norm: torch.Tensor | None = None,
    pair: torch.Tensor | None = None,
    weighted: bool = False,
) -> tuple[torch.Tensor, ...]:
    """(p of x, ŷ), or with backward (dx, dy, ddiag, dblocks), empty where wanted says no; one launch.

    above, below: contiguous; norm: the lengths of x [N], written, or read where parameters are wanted and normalize is
    pair: [N] fp32, gets the pairs' scores; weighted: below is the gradient of ŷ Wᵀ, not of ŷ
    y: None backward where x is both
    """
    (N, D), M = x.shape, len(y) if y is not None else 0
    given = (x, y, diag, blocks)
    out = [torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and want else None
           for t, want in zip(given, wanted, strict=True)]  # fmt: skip
    block_size = blocks.shape[1] if blocks is not None else 1
    tile = tiles.project_tile(x.dtype)
    programs = sum(triton.cdiv(len(t), tile.BN) for t in out[:2] if t is not None)
    columns = triton.cdiv(D, tile.BC)
    most = triton.cdiv(tiles.TARGET_PROGRAMS, max(programs, 1)) if normalize else tiles.GRID_SECOND
    pieces = min(columns, most)
    across = spans(D, block_size, tile.BC)
    programs += triton.cdiv(columns * across, pieces) if any(t is not None for t in out[2:]) else 0
    programs += triton.cdiv(triton.cdiv(N, tile.BN), pieces) if pair is not None else 0
    if programs:
        sides_kernel[(programs, pieces)](
            x, y, above, below, *out[:2], pair, diag, blocks, permutation, norm, *out[2:],
            x.stride(0), y.stride(0) if y is not None else 0, N, M, D, EPS, B=block_size, BN=tile.BN, BC=tile.BC,
            PRECISION="ieee" if tiles.kind(x.dtype) == "ieee" else "tf32", NORMALIZE=normalize, BACKWARD=backward,
            WEIGHTED=weighted, SPANS=across,
            maxnreg=255,  # which keeps ptxas from spilling a value to fit in one block more
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return tuple(x.new_empty(0) if t is None else t for t in out)


def project_sides(
    x: torch.Tensor,
    y: torch.Tensor,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool = True,
    pairs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | NotImplementedType:
    """Return (p of x [N, D], ŷ [M, D], the lengths of x [N], the pairs' scores [N]) in one launch.

    The last two are fp32. ŷ and the lengths are empty without normalize, the pairs without pairs; with them M >= N. The
    rest as for `project`.

    Raises TypeError for other dtypes. Pairs of more than `plan.SMALL` scores take a launch of their own.
    """
    operands.check_dtype("project_sides", x, y)
    if too_many(blocks):
        return NotImplemented
    N, M = len(x), len(y)
    apart = pairs and N * M > plan.SMALL
    pairs = pairs and not apart
    diag, blocks, permutation = operands.contiguous(diag, blocks, permutation)
    x, y = operands.rows(x), operands.rows(y)
    norm, pair = (x.new_empty(N if some else 0, dtype=torch.float32) for some in (normalize, pairs))
    with torch.cuda.device_of(x):
        p, unit, *_ = launch_sides(
            x, y, None, None, diag, blocks, permutation, normalize, False, (True, normalize, False, False),
            norm if normalize else None, pair if pairs else None,
        )  # fmt: skip
    return p, unit, norm, pair_scores(p, unit if normalize else y, None, None) if apart else pair


def project_sides_backward(
    dp: torch.Tensor | None,
    dunit: torch.Tensor | None,
    norm: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | NotImplementedType:
    """Return (dx, dy, ddiag, dblocks) of dp [N, D] and dunit [M, D], what p and ŷ get, in one launch.

    norm: [N] fp32, the lengths of x; y: None where x is both, and dx then of dp and dunit
    needs: for x, y, diag, blocks; empty where it says no, and where there is nothing to make it of; the rest as for
    `project`

    Raises TypeError for other dtypes. Declines more than `plan.SCAN_ROWS` rows of x, whose sums have to be split, and
    one side twice of which but one factor is used.
    """
    operands.check_dtype("project_sides_backward", x)
    if not 0 < len(x) <= plan.SCAN_ROWS or (y is None and (dp is None or dunit is None)) or too_many(blocks):
        return NotImplemented
    x, y = operands.rows(x), operands.rows(y) if y is not None else None
    above, below, diag, blocks, permutation = operands.contiguous(dp, dunit, diag, blocks, permutation)
    of_x = dp is not None
    wanted = of_x and needs[0], dunit is not None and normalize and needs[1], of_x and needs[2], of_x and needs[3]
    with torch.cuda.device_of(x):
        found = launch_sides(
            x, y, above, below, diag, blocks, permutation, normalize, True, wanted, norm if normalize else None
        )
    dx, dy, ddiag, dblocks = found
    return dx, dy, ddiag, dblocks


def project(
    x: torch.Tensor,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool,
) -> torch.Tensor | NotImplementedType:
    """Return p [N, D] in the dtype of x, summed in fp32 and rounded once.

    x: [N, D] fp32, bf16 or fp16
    diag, blocks: [D], [D / b, b, b] floating, or None; both None: p = x̂
    permutation: [D] int64 or None
    normalize: whether x̂ = x / max(‖x‖, 1e-12), else x̂ = x

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("project", x)
    if too_many(blocks):
        return NotImplemented
    diag, blocks, permutation = operands.contiguous(diag, blocks, permutation)
    with torch.cuda.device_of(x):
        return launch_project(operands.rows(x), None, diag, blocks, permutation, normalize)


def project_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | NotImplementedType:
    """Return (dx [N, D], ddiag [D], dblocks [D / b, b, b]), each empty where needs says no.

    grad: [N, D], the gradient of p; needs: for x, diag, blocks; the rest as for `project`

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("project_backward", grad, x)
    if too_many(blocks):
        return NotImplemented
    x, grad = operands.rows(x), operands.rows(grad)
    diag, blocks, permutation = operands.contiguous(diag, blocks, permutation)
    with torch.cuda.device_of(x):
        dx = launch_project(x, grad, diag, blocks, permutation, normalize) if needs[0] else x.new_empty(0)
        ddiag, dblocks = launch_parameters(
            x, grad, permutation, normalize, diag if needs[1] else None, blocks if needs[2] else None
        )
    return dx, ddiag, dblocks


def pairs_project_backward(
    grad: torch.Tensor,
    rows: torch.Tensor,
    cols: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | NotImplementedType:
    """`project_backward` of x for the gradient dp[i] = Σ_{e: rows[e] = i} grad[e] ŷ[cols[e]], gathered in fp32.

    grad: [E] fp32; rows, cols: [E] int64, -1 for no edge
    y: [M, D] as x; ŷ as x̂, by normalize

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("pairs_project_backward", grad, x, y)
    if too_many(blocks):
        return NotImplemented
    rows, cols, y = rows.contiguous(), cols.contiguous(), operands.rows(y)
    with torch.cuda.device_of(x):
        if normalize and len(y):
            norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float32).clamp_min_(EPS)
            grad = torch.where(grad == 0, 0.0, grad / norm[cols.clamp_min(0)])  # a zero edge stays one
        upstream = segment_sum(grad.contiguous(), rows, cols, y, x.new_empty(x.shape, dtype=torch.float32))
    return project_backward(upstream, x, diag, blocks, permutation, normalize, needs)


def hardest_project_backward(
    dpair: torch.Tensor,
    drow: torch.Tensor,
    dcol: torch.Tensor,
    row_index: torch.Tensor,
    col_index: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | NotImplementedType:
    """Return (dx, dy, ddiag, dblocks) of x̂ W ŷᵀ at the pairs (i, i), (i, row_index[i]) and (col_index[j], j).

    dpair, drow: [N] fp32; dcol: [M] fp32; row_index, col_index: [N], [M] int64, -1 for none; the rest as for `project`
    needs: for x, y, diag, blocks; empty where it says no

    Raises TypeError for other dtypes. Declines more than `plan.SCAN_ROWS` rows, whose edges have to be sorted.
    """
    operands.check_dtype("hardest_project_backward", dpair, drow, dcol, x, y)
    if not 0 < len(x) <= len(y) <= plan.SCAN_ROWS or too_many(blocks):
        return NotImplemented
    x, y = operands.rows(x), operands.rows(y)
    diag, blocks, permutation = operands.contiguous(diag, blocks, permutation)
    some = any(t is not None and need for t, need in zip((diag, blocks), needs[2:], strict=True))
    norm = x.new_empty(len(x), dtype=torch.float32) if normalize and some else None
    above = x.new_empty(x.shape, dtype=torch.float32) if needs[0] or some else None
    below = y.new_empty(y.shape, dtype=torch.float32) if needs[1] else None
    with torch.cuda.device_of(x):
        scan(dpair, drow, dcol, row_index, col_index, x, y, above, below, normalize, norm)
        wanted = (needs[0], needs[1], needs[2], needs[3])
        found = launch_sides(
            x, y, above, below, diag, blocks, permutation, normalize, True, wanted, norm, weighted=True
        )
    dx, dy, ddiag, dblocks = found
    return dx, dy, ddiag, dblocks
