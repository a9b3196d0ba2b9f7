"""Relational distillation, Σ_ij φ(e_ij), of a small problem in two launches; formulas: `gssf_kernels/ops/relations.py`.

    one kernel computes the three products of each tile of the upper triangle, stores the tile's Σ φ(e), Σ φ(w - u)
    and Σ φ'(e) (w - u), where tiles off the diagonal have weight 2, and φ'(e) [N, N] if a gradient is needed;
    the second computes Σ_j φ'(e_ij) h_j from it and, in fp64, the loss, dλ and dτ

A tile is summed in fp32, the tiles' sums in fp64, in order. Larger problems go in chunks, with the same terms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels import plan as planning
from gssf_kernels.plan import Plan
from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.gradients import products
from gssf_kernels.triton.score_functions import load_scalar, pointwise, relation_terms
from gssf_kernels.triton.sweep import empty_dscores, load_tile


@triton.jit
def upper_tile(t, blocks):
    """(row block, column block) of tile number t of the blocks (blocks + 1) / 2 tiles of the upper triangle.

    Row blocks r and blocks - 1 - r share the blocks + 1 numbers from r (blocks + 1) on; if blocks is odd, the middle
    row block has (blocks + 1) / 2 numbers to itself.
    """
    r, c = t // (blocks + 1), t % (blocks + 1)
    first = c < blocks - r
    return tl.where(first, r, blocks - 1 - r), tl.where(first, r + c, c - 1)


@triton.jit
def relations_of(x, stride, i0, j0, N, D, B: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """x[i] · x[j], [B, B], for B rows from i0 and from j0 on; arbitrary for rows past N."""
    s = tl.zeros([B, B], tl.float32)
    for k in range(0, D, BK):
        rows = load_tile(x, stride, i0, k, N, D, B, BK, False)
        others = load_tile(x, stride, j0, k, N, D, B, BK, False)
        s = tl.dot(rows, others.T, s, input_precision=PRECISION)
    return s


@triton.jit
def tile_sum(terms, counted):
    return tl.sum(tl.sum(tl.where(counted, terms, 0.0), 1), 0)


@triton.jit(do_not_specialize=["N", "blocks", "lam_number"])
def relation_tile_kernel(
    student, image, text, lam, lam_number, partial, dscores, strides, channels, stride, N, blocks,
    KIND: tl.constexpr, PRECISION: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the tile's sums to partial [3, tiles]; and φ'(e), 0 on the diagonal, to dscores [N, N] if not None."""
    t = tl.program_id(0)
    tile_i, tile_j = upper_tile(t, blocks)
    i, j = tile_i * B + tl.arange(0, B), tile_j * B + tl.arange(0, B)
    f = relations_of(student, strides[0], tile_i * B, tile_j * B, N, channels[0], B, BK, PRECISION)
    u = relations_of(image, strides[1], tile_i * B, tile_j * B, N, channels[1], B, BK, PRECISION)
    w = relations_of(text, strides[2], tile_i * B, tile_j * B, N, channels[2], B, BK, PRECISION)
    counted = (i < N)[:, None] & (j < N)[None, :] & (i[:, None] != j[None, :])
    phi, between, gap, slope = relation_terms(f, u, w, load_scalar(lam, lam_number), KIND)
    times = tl.where(tile_i == tile_j, 1.0, 2.0)  # a tile off the diagonal counts for its transpose too
    to, count = partial + t, tl.num_programs(0)
    tl.store(to, times * tile_sum(phi, counted))
    tl.store(to + count, times * tile_sum(between, counted))
    tl.store(to + 2 * count, times * tile_sum(slope * gap, counted))
    if dscores is not None:
        slope = tl.where(counted, slope, 0.0).to(dscores.dtype.element_ty)
        inside = (i < N)[:, None] & (j < N)[None, :]
        tl.store(dscores + i.to(tl.int64)[:, None] * stride + j[None, :], slope, mask=inside)
        inside = inside & (tile_i != tile_j)
        tl.store(dscores + j.to(tl.int64)[None, :] * stride + i[:, None], slope, mask=inside)


@triton.jit
def whole_sum(partial, count, BT: tl.constexpr):
    """Σ partial [count] in fp64."""
    total = tl.zeros([BT], tl.float64)
    for t0 in range(0, count, BT):
        t = t0 + tl.arange(0, BT)
        total += tl.load(partial + t, mask=t < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def wide(tensor, constant):
    """A scalar tensor or a number, in fp64."""
    return tl.zeros([], tl.float64) + load_scalar(tensor, constant)


@triton.jit(do_not_specialize=["N", "count", "lam_number", "tau_number", "to_student", "to_image", "to_text"])
def relation_loss_kernel(
    dscores, student, dh, partial, lam, tau, lam_number, tau_number, to_student, to_image, to_text, loss, dlam, dtau,
    slope, means, stride, student_stride, N, D: tl.int32, count, KIND: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Programs for the tiles of dh = dscores h, if it is not None, then one for the loss, dλ, dτ and slope."""
    p = tl.program_id(0)
    columns = tl.cdiv(D, BC)
    last = tl.cdiv(N, BR) * columns if dh is not None else 0
    if dh is not None and p < last:
        r, c = p // columns * BR + tl.arange(0, BR), p % columns * BC + tl.arange(0, BC)
        total = tl.zeros([BR, BC], tl.float32)
        total = products(total, dscores, student, r, c, stride, student_stride, N, N, D, False, BK, PRECISION)
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(dh + at, total, mask=(r < N)[:, None] & (c < D)[None, :])
    if p == last:
        pairs = tl.maximum(N.to(tl.float64) * (N - 1), 1.0)
        share, at_share = pointwise(1.0 / wide(tau, tau_number), KIND)
        size, at_size = pointwise(wide(lam, lam_number), KIND)
        rest, at_rest = pointwise(1.0 - wide(lam, lam_number), KIND)
        from_student, between = whole_sum(partial, count, BT), whole_sum(partial + count, count, BT)
        total = (to_student * from_student + (to_image * size + to_text * rest) * between) / pairs
        toward_text = to_student * whole_sum(partial + 2 * count, count, BT)
        by_lam = ((to_image * at_size - to_text * at_rest) * between - toward_text) / pairs
        by_tau = -total * at_share / (wide(tau, tau_number) * wide(tau, tau_number))
        tl.store(loss, (share * total).to(tl.float32))
        tl.store(dlam, (share * by_lam).to(tl.float32))
        tl.store(dtau, by_tau.to(tl.float32))
        tl.store(slope, (2.0 * to_student * share / pairs).to(tl.float32))
        tl.store(means, (from_student / pairs).to(tl.float32))
        tl.store(means + 1, (between / pairs).to(tl.float32))


def relation_loss(call: Any, plan: Plan) -> tuple[torch.Tensor, ...]:
    """Return the loss, dλ, dτ, two factors of dh, and the means of φ(e) and φ(w - u) over pairs [2].

    The factors are a scalar, and Σ_j φ'(e_ij) h_j [N, D], empty if not needed.
    """
    student, image, text = call.student, call.image, call.text
    N, D = student.shape
    product = planning.kind(student.dtype)
    precision = "ieee" if product == "ieee" else "tf32"
    tile, ending = tiles.RELATIONS[product], planning.gradients_tile(student.dtype)
    blocks = triton.cdiv(N, tile.BN)
    count = blocks * (blocks + 1) // 2
    inputs = [operands.rows(x) for x in (student, image, text)]
    partial = student.new_empty(3, count, dtype=torch.float32)
    dscores = empty_dscores(student, N) if call.need else None
    dh = partial.new_empty(N, D) if call.need else None
    scalars, means = tuple(partial.new_empty(()) for _ in range(4)), partial.new_empty(2)
    stride = dscores.stride(0) if dscores is not None else 0
    with torch.cuda.device_of(student):
        strides, channels = tuple(x.stride(0) for x in inputs), tuple(x.shape[1] for x in inputs)
        relation_tile_kernel[(count,)](
            *inputs, call.lam, call.lam_number, partial, dscores, strides, channels, stride, N, blocks,
            KIND=call.kind, PRECISION=precision, B=tile.BN, BK=tile.BK,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        programs = triton.cdiv(N, ending.BR) * triton.cdiv(D, ending.BC) if call.need else 0
        relation_loss_kernel[(programs + 1,)](
            dscores, inputs[0], dh, partial, call.lam, call.tau, call.lam_number, call.tau_number, *call.weights,
            *scalars, means, stride, inputs[0].stride(0), N, D, count, KIND=call.kind, BR=ending.BR, BC=ending.BC,
            BK=ending.BK, PRECISION=precision, BT=tiles.TERMS,
            num_warps=ending.num_warps, num_stages=ending.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return *scalars, dh if dh is not None else partial.new_empty(0), means


@triton.jit(do_not_specialize=["R", "M"])
def relation_pass_kernel(
    f, u, w, lam, rows, stride, R, M, KIND: tl.constexpr, GRADIENT: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    down = tl.cdiv(R, BR)
    tile_i, tile_j = tl.program_id(0) % down, tl.program_id(0) // down
    i, j = tile_i * BR + tl.arange(0, BR), tile_j * BM + tl.arange(0, BM)
    inside = (i < R)[:, None] & (j < M)[None, :]
    at = i.to(tl.int64)[:, None] * stride + j[None, :]
    scores = tl.load(f + at, mask=inside, other=0.0)
    image, text = tl.load(u + at, mask=inside, other=0.0), tl.load(w + at, mask=inside, other=0.0)
    phi, between, gap, slope = relation_terms(scores, image, text, tl.load(lam), KIND)
    counted = inside & (i[:, None] != j[None, :])
    times = tl.where(j < R, 1.0, 2.0)[None, :]  # columns from R on count for their transpose too
    to = rows + tile_j.to(tl.int64) * 3 * R + i  # [column block, 3, R]
    tl.store(to, tl.sum(tl.where(counted, times * phi, 0.0), 1), mask=i < R)
    tl.store(to + R, tl.sum(tl.where(counted, times * between, 0.0), 1), mask=i < R)
    tl.store(to + 2 * R, tl.sum(tl.where(counted, times * slope * gap, 0.0), 1), mask=i < R)
    if GRADIENT:
        tl.store(f + at, tl.where(counted, slope, 0.0), mask=inside)


def relation_pass(call: Any, plan: Plan) -> None:
    """Write sums [3, R] over the rows of three chunks of scores [R, M] fp32; with gradient overwrite s with φ'(e)."""
    f, tile = call.s, tiles.PASS
    (R, M), across = f.shape, triton.cdiv(f.shape[1], tile.BM)
    partial = f.new_empty(across, 3, R)
    with torch.cuda.device_of(f):
        relation_pass_kernel[(triton.cdiv(R, tile.BR) * across,)](
            f, call.image, call.text, call.lam, partial, f.stride(0), R, M, KIND=call.kind, GRADIENT=call.gradient,
            BR=tile.BR, BM=tile.BM, num_warps=tile.num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    torch.sum(partial, 0, out=call.rows)
