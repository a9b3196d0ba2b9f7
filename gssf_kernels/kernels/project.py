"""p = x̂ ∘ diag + scatter(permutation, blockdiag(gather(permutation, x̂), blocks)),  x̂ = x / max(‖x‖, 1e-12).

With q = x̂[:, permutation], channel c of block g gets t[c] = Σ_k q[k] blocks[g, k, c] and p[:, permutation] += t.
Backward, by the same kernel with blocks transposed and h = dL/dx̂:
    dx = (h − x̂ ⟨x̂, h⟩) / ‖x‖,  ddiag = Σ_n x̂ ∘ grad,  dblocks[g] = Σ_n q_gᵀ grad_g

Seen along the permutation, blocks is a band of the [D, D] matrix W with W[u, v] = blocks[u // b, u % b, v % b] where
u // b = v // b, else 0. Tiles of W are put together as they are loaded, so any block size takes the same path.
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels.kernels import operands, tiles
from gssf_kernels.kernels.pairs import scan, segment_sum

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


@triton.jit(do_not_specialize=["N"])
def project_kernel(
    x, grad, out, lengths, diag, blocks, permutation, x_stride, grad_stride, N, D, eps, B: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, NORMALIZE: tl.constexpr, BACKWARD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """p of x, or with BACKWARD dx of grad; BN rows and a share of the channels to a program. TRANSPOSED: by Wᵀ."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
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
                inner += tl.sum(y * h, 1)
    norm = tl.sqrt(squares)
    divisor = tl.where(norm < eps, eps, norm)[:, None]  # a NaN stays
    if lengths is not None and tl.program_id(1) == 0:
        tl.store(lengths + tl.program_id(0) * BN + tl.arange(0, BN)[:, None], divisor, mask=inside[:, None])

    for c0 in range(tl.program_id(1) * BC, D, tl.num_programs(1) * BC):
        c = c0 + tl.arange(0, BC)
        at = channels(permutation, c, D)
        t = mixed(source, row, inside, c0, diag, blocks, permutation, D, B, BN, BC, PRECISION, TRANSPOSED)
        if NORMALIZE:
            if BACKWARD:
                y = tl.load(x + x_row[:, None] + at[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0)
                unit = y.to(tl.float32) / divisor
                t = tl.where(norm[:, None] > eps, t - unit * (inner[:, None] / divisor), t)
            t = t / divisor
        to = out + i[:, None] * D + at[None, :]
        tl.store(to, t.to(out.dtype.element_ty), mask=inside[:, None] & (c < D)[None, :])


@triton.jit(do_not_specialize=["N", "share"])
def parameter_kernel(
    x, grad, norm, permutation, ddiag, dblocks, x_stride, grad_stride, N, D, share, B: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program sums share rows: BC entries of ddiag, and BC by BC of dblocks; ddiag, dblocks [splits, …] fp32."""
    k = tl.program_id(0) * BC + tl.arange(0, BC)
    c = tl.program_id(0) * BC // B * B + tl.program_id(1) * BC + tl.arange(0, BC)
    split = tl.program_id(2).to(tl.int64)
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
        tl.store(ddiag + split * D + k_at, diag_sum, mask=(k < D) & (tl.program_id(1) == 0))
    if dblocks is not None:
        band = (k[:, None] // B == c[None, :] // B) & (k < D)[:, None]
        tl.store(dblocks + split * D * B + k[:, None] * B + c[None, :] % B, block_sum, mask=band)


def launch_project(
    x: torch.Tensor,
    grad: torch.Tensor | None,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool,
    flip: bool = False,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """p of x, or where grad is given dx of grad; all contiguous along channels.

    flip: by blocks transposed; lengths: [N] fp32, gets what normalize divides by
    """
    N, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_size = blocks.shape[1] if blocks is not None else 1
    tile = tiles.project_tile(x.dtype)
    programs, pieces = triton.cdiv(N, tile.BN), triton.cdiv(D, tile.BC)
    if normalize:  # every program reads whole rows for their norms: no more of them than fill a card
        pieces = min(pieces, triton.cdiv(tiles.TARGET_PROGRAMS, max(programs, 1)))
    project_kernel[(programs, pieces)](
        x, grad, out, lengths, diag, blocks, permutation, x.stride(0), grad.stride(0) if grad is not None else 0,
        N, D, EPS, B=block_size, BN=tile.BN, BC=tile.BC, PRECISION="ieee" if tiles.kind(x.dtype) == "ieee" else "tf32",
        NORMALIZE=normalize, BACKWARD=grad is not None, TRANSPOSED=(grad is not None) != flip,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def launch_parameters(
    x: torch.Tensor,
    grad: torch.Tensor,
    permutation: torch.Tensor | None,
    normalize: bool,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    norm: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ddiag, dblocks), each empty where its parameter is None; sums over fixed shares of the rows, then over them.

    norm: the lengths of x [N], where they are known
    """
    if diag is None and blocks is None:
        return x.new_empty(0), x.new_empty(0)
    N, D = x.shape
    block_size = blocks.shape[1] if blocks is not None else 1
    tile = tiles.project_tile(x.dtype)
    BC = tile.BC
    columns = triton.cdiv(D, BC)
    span = max(min(D, ((k0 + BC - 1) // block_size + 1) * block_size) - k0 // block_size * block_size
               for k0 in range(0, D, BC))  # fmt: skip
    pieces = triton.cdiv(span, BC)
    splits = max(1, min(tiles.TARGET_PROGRAMS // (columns * pieces), triton.cdiv(N, 4 * tile.BN)))
    share = triton.cdiv(triton.cdiv(N, splits), tile.BN) * tile.BN
    if normalize and norm is None:
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).clamp_min_(EPS)
    ddiag = x.new_empty(splits, D, dtype=torch.float32) if diag is not None else None
    dblocks = x.new_empty(splits, *blocks.shape, dtype=torch.float32) if blocks is not None else None
    parameter_kernel[(columns, pieces, splits)](
        x, grad, norm, permutation, ddiag, dblocks, x.stride(0), grad.stride(0), N, D, share,
        B=block_size, BR=tile.BN, BC=BC, PRECISION="ieee" if tiles.kind(x.dtype) == "ieee" else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return (
        ddiag.sum(0).to(diag.dtype) if ddiag is not None and diag is not None else x.new_empty(0),
        dblocks.sum(0).to(blocks.dtype) if dblocks is not None and blocks is not None else x.new_empty(0),
    )


def project(
    x: torch.Tensor,
    diag: torch.Tensor | None,
    blocks: torch.Tensor | None,
    permutation: torch.Tensor | None,
    normalize: bool,
) -> torch.Tensor:
    """Return p [N, D] in the dtype of x, summed in fp32 and rounded once.

    x: [N, D] fp32, bf16 or fp16
    diag, blocks: [D], [D / b, b, b] floating, or None; both None: p = x̂
    permutation: [D] int64 or None
    normalize: whether x̂ = x / max(‖x‖, 1e-12), else x̂ = x

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("project", x)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dx [N, D], ddiag [D], dblocks [D / b, b, b]), each empty where needs says no.

    grad: [N, D], the gradient of p; needs: for x, diag, blocks; the rest as for `project`

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("project_backward", grad, x)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`project_backward` of x for the gradient dp[i] = Σ_{e: rows[e] = i} grad[e] ŷ[cols[e]], gathered in fp32.

    grad: [E] fp32; rows, cols: [E] int64, -1 for no edge
    y: [M, D] as x; ŷ as x̂, by normalize

    Raises TypeError for other dtypes.
    """
    operands.check_dtype("pairs_project_backward", grad, x, y)
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

    Raises TypeError for other dtypes. Declines more than `tiles.SCAN_ROWS` rows, whose edges have to be sorted.
    """
    operands.check_dtype("hardest_project_backward", dpair, drow, dcol, x, y)
    if not 0 < len(x) <= len(y) <= tiles.SCAN_ROWS:
        return NotImplemented
    x, y = operands.rows(x), operands.rows(y)
    diag, blocks, permutation = operands.contiguous(diag, blocks, permutation)
    weights = (diag if needs[2] else None, blocks if needs[3] else None)
    some, dx, dy, norm = any(t is not None for t in weights), x.new_empty(0), y.new_empty(0), None
    above = x.new_empty(x.shape, dtype=torch.float32) if needs[0] or some else None
    below = y.new_empty(y.shape, dtype=torch.float32) if needs[1] else None
    with torch.cuda.device_of(x):
        scan(dpair, drow, dcol, row_index, col_index, x, y, above, below, normalize)
        if needs[0]:
            norm = x.new_empty(len(x), dtype=torch.float32) if normalize and some else None
            dx = launch_project(x, above, diag, blocks, permutation, normalize, lengths=norm)
        if below is not None:  # y's rows go through W where x's go through its transpose
            dy = launch_project(y, below, diag, blocks, permutation, normalize, flip=True)
        if above is not None:
            ddiag, dblocks = launch_parameters(x, above, permutation, normalize, *weights, norm)
        else:
            ddiag, dblocks = x.new_empty(0), x.new_empty(0)
    return dx, dy, ddiag, dblocks
