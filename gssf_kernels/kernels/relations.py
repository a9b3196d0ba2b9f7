"""Relational distillation of a small problem in two launches: `gssf_kernels/statistics/relations.py` has the formulas.

    one kernel makes the three products of each tile on and above the diagonal, leaves the tile's Σ φ(e), Σ φ(w - u)
    and Σ φ'(e) (w - u), others' mirrors counted in, and stores φ'(e) [N, N] where a gradient is wanted; another makes
    Σ_j φ'(e_ij) h_j of it and, in fp64, the loss and what λ and τ get

A sum is a tile's in fp32, then over the tiles in fp64, in order. Larger problems are declined (NotImplemented).
"""

from __future__ import annotations

from types import NotImplementedType

import torch
import triton
import triton.language as tl

from gssf_kernels import plan
from gssf_kernels.kernels import operands, tiles
from gssf_kernels.kernels.dense import pointwise
from gssf_kernels.kernels.gradients import number, products, room
from gssf_kernels.kernels.sweep import load_tile


@triton.jit
def upper_tile(t, blocks):
    """(row block, column block) of number t of the blocks (blocks + 1) / 2 tiles on and above the diagonal.

    Row blocks r and blocks - 1 - r share the numbers from r (blocks + 1) on; the middle one of an odd number has half.
    """
    r, c = t // (blocks + 1), t % (blocks + 1)
    above = c < blocks - r
    return tl.where(above, r, blocks - 1 - r), tl.where(above, r + c, c - 1)


@triton.jit
def relations_of(x, stride, i0, j0, N, D, B: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """x[i] · x[j], [B, B]; of rows past N arbitrary."""
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
    student, image, text, lam, lam_number, parts, ds, strides, channels, stride, N, blocks,
    KIND: tl.constexpr, PRECISION: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts [3, tiles]: the tile's sums; ds [N, N], or None: φ'(e), 0 on the diagonal."""
    t = tl.program_id(0)
    tile_i, tile_j = upper_tile(t, blocks)
    i, j = tile_i * B + tl.arange(0, B), tile_j * B + tl.arange(0, B)
    f = relations_of(student, strides[0], tile_i * B, tile_j * B, N, channels[0], B, BK, PRECISION)
    u = relations_of(image, strides[1], tile_i * B, tile_j * B, N, channels[1], B, BK, PRECISION)
    w = relations_of(text, strides[2], tile_i * B, tile_j * B, N, channels[2], B, BK, PRECISION)
    counted = (i < N)[:, None] & (j < N)[None, :] & (i[:, None] != j[None, :])
    gap = w - u
    phi, slope = pointwise((f - u) - number(lam, lam_number) * gap, KIND)
    between, _ = pointwise(gap, KIND)
    times = tl.where(tile_i == tile_j, 1.0, 2.0)  # a tile off the diagonal stands for its mirror too
    to, count = parts + t, tl.num_programs(0)
    tl.store(to, times * tile_sum(phi, counted))
    tl.store(to + count, times * tile_sum(between, counted))
    tl.store(to + 2 * count, times * tile_sum(slope * gap, counted))
    if ds is not None:
        slope = tl.where(counted, slope, 0.0).to(ds.dtype.element_ty)
        inside = (i < N)[:, None] & (j < N)[None, :]
        tl.store(ds + i.to(tl.int64)[:, None] * stride + j[None, :], slope, mask=inside)
        inside = inside & (tile_i != tile_j)
        tl.store(ds + j.to(tl.int64)[None, :] * stride + i[:, None], slope, mask=inside)


@triton.jit
def whole_sum(parts, count, BT: tl.constexpr):
    """Σ parts [count] in fp64."""
    total = tl.zeros([BT], tl.float64)
    for t0 in range(0, count, BT):
        t = t0 + tl.arange(0, BT)
        total += tl.load(parts + t, mask=t < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def wide(tensor, constant):
    """A scalar tensor or a number, in fp64."""
    return tl.zeros([], tl.float64) + number(tensor, constant)


@triton.jit(do_not_specialize=["N", "count", "lam_number", "tau_number", "own", "to_image", "to_text"])
def relation_loss_kernel(
    ds, student, dh, parts, lam, tau, lam_number, tau_number, own, to_image, to_text, loss, dlam, dtau, slope,
    stride, student_stride, N, D: tl.int32, count, KIND: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A program for every tile of dh = ds h, if it is wanted, then one for the loss, what λ and τ get, and slope."""
    p = tl.program_id(0)
    columns = tl.cdiv(D, BC)
    last = tl.cdiv(N, BR) * columns if dh is not None else 0
    if dh is not None and p < last:
        r, c = p // columns * BR + tl.arange(0, BR), p % columns * BC + tl.arange(0, BC)
        total = tl.zeros([BR, BC], tl.float32)
        total = products(total, ds, student, r, c, stride, student_stride, N, N, D, False, BK, PRECISION)
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        tl.store(dh + at, total, mask=(r < N)[:, None] & (c < D)[None, :])
    if p == last:
        pairs = tl.maximum(N.to(tl.float64) * (N - 1), 1.0)
        share, at_share = pointwise(1.0 / wide(tau, tau_number), KIND)
        size, at_size = pointwise(wide(lam, lam_number), KIND)
        rest, at_rest = pointwise(1.0 - wide(lam, lam_number), KIND)
        between = whole_sum(parts + count, count, BT)
        total = (own * whole_sum(parts, count, BT) + (to_image * size + to_text * rest) * between) / pairs
        along = own * whole_sum(parts + 2 * count, count, BT)
        by_lam = ((to_image * at_size - to_text * at_rest) * between - along) / pairs
        by_tau = -total * at_share / (wide(tau, tau_number) * wide(tau, tau_number))
        tl.store(loss, (share * total).to(tl.float32))
        tl.store(dlam, (share * by_lam).to(tl.float32))
        tl.store(dtau, by_tau.to(tl.float32))
        tl.store(slope, (2.0 * own * share / pairs).to(tl.float32))


def relation_loss(
    student: torch.Tensor,
    image: torch.Tensor,
    text: torch.Tensor,
    lam: torch.Tensor | None,
    tau: torch.Tensor | None,
    lam_number: float,
    tau_number: float,
    weights: list[float],
    kind: str,
    need: bool,
) -> tuple[torch.Tensor, ...] | NotImplementedType:
    """Return the loss, what λ and τ get of it, and in two factors what student gets: a scalar, Σ_j φ'(e_ij) h_j [N, D].

    student, image, text: [N, any] fp32, bf16 or fp16; lam, tau: fp32 scalars, or None: the numbers are
    kind: "abs" or "square"; need: whether student's is wanted, else [0]; all are fp32

    Raises TypeError for other dtypes. Declines more than `plan.SMALL` scores, and none.
    """
    operands.check_dtype("relation_loss", student, image, text)
    N, D = student.shape
    if not 0 < N * N <= plan.SMALL:
        return NotImplemented
    kind_of_product = tiles.kind(student.dtype)
    precision = "ieee" if kind_of_product == "ieee" else "tf32"
    tile, ending = tiles.RELATIONS[kind_of_product], tiles.gradients_tile(student.dtype)
    blocks = triton.cdiv(N, tile.BN)
    count = blocks * (blocks + 1) // 2
    sides = [operands.rows(x) for x in (student, image, text)]
    parts = student.new_empty(3, count, dtype=torch.float32)
    ds = room(student, N) if need else None
    dh = parts.new_empty(N, D) if need else None
    numbers = tuple(parts.new_empty(()) for _ in range(4))
    stride = ds.stride(0) if ds is not None else 0
    with torch.cuda.device_of(student):
        relation_tile_kernel[(count,)](
            *sides, lam, lam_number, parts, ds, tuple(x.stride(0) for x in sides), tuple(x.shape[1] for x in sides),
            stride, N, blocks, KIND=kind, PRECISION=precision, B=tile.BN, BK=tile.BK,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        programs = triton.cdiv(N, ending.BR) * triton.cdiv(D, ending.BC) if need else 0
        relation_loss_kernel[(programs + 1,)](
            ds, sides[0], dh, parts, lam, tau, lam_number, tau_number, *weights, *numbers,
            stride, sides[0].stride(0), N, D, count, KIND=kind, BR=ending.BR, BC=ending.BC, BK=ending.BK,
            PRECISION=precision, BT=tiles.TERMS,
            num_warps=ending.num_warps, num_stages=ending.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return *numbers, dh if dh is not None else parts.new_empty(0)
