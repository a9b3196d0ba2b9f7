"""The passes over a chunk of scores s [R, M]: statistics of rows and columns, and s turned into ds in place.

A program reduces one tile [BR, BM] to partial results of its rows and its columns, each in a place of its own; a second
kernel, or for sums PyTorch's, folds them in the tiles' order. No atomics: the same inputs give the same bits. The
formulas stand in `gssf_kernels/statistics/logsumexp.py` and `sums.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gssf_kernels.kernels import operands, tiles


@triton.jit
def tile_places(R, M, BR: tl.constexpr, BM: tl.constexpr):
    """(row block, column block, i [BR], j [BM], inside [BR, BM]) of this program's tile; programs go down, then right.

    The grid has one dimension: a second may have 65,535 programs at most, too few for four million columns.
    """
    down = tl.cdiv(R, BR)
    tile_i, tile_j = tl.program_id(0) % down, tl.program_id(0) // down
    i = tile_i * BR + tl.arange(0, BR)
    j = tile_j * BM + tl.arange(0, BM)
    return tile_i, tile_j, i, j, (i < R)[:, None] & (j < M)[None, :]


@triton.jit
def log_sums(t, axis: tl.constexpr):
    """Along axis the largest of t and Σ e^(t - largest); an infinite one is not taken off, NaN alone leaves +inf."""
    top = tl.max(t, axis)  # NaN is passed over
    shift = tl.where((top == float("inf")) | (top == float("-inf")), 0.0, top)
    total = tl.sum(tl.exp(t - tl.expand_dims(shift, axis)), axis)
    return tl.where((total != total) & (top == float("-inf")), float("inf"), top), total


@triton.jit(do_not_specialize=["R", "M"])
def logsumexp_kernel(
    s, scale, row_max, row_sum, col_max, col_sum, stride, R, M, BR: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    tile_i, tile_j, i, j, inside = tile_places(R, M, BR, BM)
    t = tl.load(s + i.to(tl.int64)[:, None] * stride + j[None, :], mask=inside, other=0.0) * tl.load(scale)
    t = tl.where(inside, t, float("-inf"))
    top, total = log_sums(t, 1)  # [BR]
    at = tile_j.to(tl.int64) * R + i
    tl.store(row_max + at, top, mask=i < R)
    tl.store(row_sum + at, total, mask=i < R)
    top, total = log_sums(t, 0)  # [BM]
    at = tile_i.to(tl.int64) * M + j
    tl.store(col_max + at, top, mask=j < M)
    tl.store(col_sum + at, total, mask=j < M)


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
        found = tl.sum(tl.where(t == float("-inf"), 0.0, sums * factor), 0)
        before = tl.where(top == float("-inf"), 0.0, total * tl.where(top == new, 1.0, tl.exp(top - new)))
        top, total = new, before + found
    return top, total


@triton.jit(do_not_specialize=["R", "M", "down", "across"])
def merge_logs_kernel(
    rows, cols, row_max, row_sum, col_max, col_sum, R, M, down, across, BP: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """Finish the chunk's rows, BL to a program, and merge its columns into those of the chunks before."""
    row_programs = tl.cdiv(R, BL)
    if tl.program_id(0) < row_programs:
        i = tl.program_id(0) * BL + tl.arange(0, BL)
        top, total = tl.full([BL], float("-inf"), tl.float32), tl.zeros([BL], tl.float32)
        half = across.to(tl.int64) * R
        top, total = merge_logs(top, total, rows, rows + half, i, R, across, BP)
        tl.store(row_max + i, top, mask=i < R)
        tl.store(row_sum + i, total, mask=i < R)
    else:
        j = (tl.program_id(0) - row_programs) * BL + tl.arange(0, BL)
        top = tl.load(col_max + j, mask=j < M, other=float("-inf"))
        total = tl.load(col_sum + j, mask=j < M, other=0.0)
        half = down.to(tl.int64) * M
        top, total = merge_logs(top, total, cols, cols + half, j, M, down, BP)
        tl.store(col_max + j, top, mask=j < M)
        tl.store(col_sum + j, total, mask=j < M)


@triton.jit(do_not_specialize=["R", "M"])
def softmax_kernel(
    s, scale, row_max, row_log, row_grad, col_max, col_log, col_grad, along, stride, R, M,
    BR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    _, tile_j, i, j, inside = tile_places(R, M, BR, BM)
    at = s + i.to(tl.int64)[:, None] * stride + j[None, :]
    score = tl.load(at, mask=inside, other=0.0)
    t = score * tl.load(scale)
    ds = tl.zeros([BR, BM], tl.float32)
    if row_grad is not None:
        top, log = tl.load(row_max + i, mask=i < R, other=0.0), tl.load(row_log + i, mask=i < R, other=0.0)
        ds += tl.load(row_grad + i, mask=i < R, other=0.0)[:, None] * tl.exp((t - top[:, None]) - log[:, None])
    if col_grad is not None:
        top, log = tl.load(col_max + j, mask=j < M, other=0.0), tl.load(col_log + j, mask=j < M, other=0.0)
        ds += tl.load(col_grad + j, mask=j < M, other=0.0)[None, :] * tl.exp((t - top[None, :]) - log[None, :])
    tl.store(at, ds, mask=inside)
    sums = tl.sum(tl.where(inside, ds * score, 0.0), 1)
    tl.store(along + tile_j.to(tl.int64) * R + i, sums, mask=i < R)


@triton.jit
def log1p_of(e):
    """log(1 + e) for e in [0, 1]: 2 artanh(e / (2 + e)) by its series, which keeps a small e."""
    z = e / (e + 2.0)
    q = z * z
    p = 1 / 17 + tl.zeros_like(q)
    p = p * q + 1 / 15
    p = p * q + 1 / 13
    p = p * q + 1 / 11
    p = p * q + 1 / 9
    p = p * q + 1 / 7
    p = p * q + 1 / 5
    p = p * q + 1 / 3
    return 2.0 * z * (p * q + 1.0)


@triton.jit
def pointwise(t, KIND: tl.constexpr):
    """(f(t), f'(t)); NaN stays NaN."""
    zero = tl.zeros_like(t)
    if KIND == "hinge":
        return tl.where(t < 0, zero, t), tl.where(t < 0, zero, zero + 1)
    elif KIND == "softplus":
        e = tl.exp(tl.where(t < 0, t, -t))
        upper = 1.0 / (1.0 + e)
        return tl.where(t < 0, zero, t) + log1p_of(e), tl.where(t < 0, e * upper, upper)
    elif KIND == "abs":
        return tl.where(t < 0, -t, t), tl.where(t > 0, zero + 1, tl.where(t < 0, zero - 1, t))
    else:
        return t * t, 2 * t


@triton.jit
def term(t, same, counted, KIND: tl.constexpr, POSITIVES: tl.constexpr):
    """f and its slope of every score that counts, 0 elsewhere."""
    if POSITIVES == "negate":
        f, slope = pointwise(tl.where(same, -t, t), KIND)
        slope = tl.where(same, -slope, slope)
    else:
        f, slope = pointwise(t, KIND)
        if POSITIVES == "exclude":
            counted = counted & ~same
    return tl.where(counted, f, 0.0), tl.where(counted, slope, 0.0)


@triton.jit(do_not_specialize=["R", "M", "K", "first"])
def score_sums_kernel(
    s, scale, row_bias, row_weight, col_bias, col_weight, row_ids, col_ids, rows, cols, stride, R, M, K, first,
    KIND: tl.constexpr, POSITIVES: tl.constexpr, COLUMNS: tl.constexpr, GRADIENT: tl.constexpr,
    BR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    tile_i, tile_j, i, j, inside = tile_places(R, M, BR, BM)
    at = s + i.to(tl.int64)[:, None] * stride + j[None, :]
    score = tl.load(at, mask=inside, other=0.0)
    t = score * tl.load(scale)
    same = (i + first)[:, None] == j[None, :]
    if row_ids is not None:
        x, y = tl.load(row_ids + i, mask=i < R, other=0), tl.load(col_ids + j, mask=j < M, other=0)
        same = same | (x[:, None] == y[None, :])
    bias = tl.load(row_bias + i, mask=i < R, other=0.0) if row_bias is not None else tl.zeros([BR], tl.float32)
    f, ds = term(t + bias[:, None], same, inside, KIND, POSITIVES)
    to = rows + tile_j.to(tl.int64) * 3 * R + i  # [column block, 3, R]
    tl.store(to, tl.sum(f, 1), mask=i < R)
    tl.store(to + R, tl.sum(ds, 1), mask=i < R)
    if row_weight is not None:
        ds *= tl.load(row_weight + i, mask=i < R, other=0.0)[:, None]
    if COLUMNS:
        bias = tl.load(col_bias + j, mask=j < K, other=0.0)
        f, slope = term(t + bias[None, :], same, inside & (j < K)[None, :], KIND, POSITIVES)
        to = cols + tile_i.to(tl.int64) * 2 * K + j  # [row block, 2, K]
        tl.store(to, tl.sum(f, 0), mask=j < K)
        tl.store(to + K, tl.sum(slope, 0), mask=j < K)
        if col_weight is not None:
            slope *= tl.load(col_weight + j, mask=j < K, other=0.0)[None, :]
        ds += slope
    sums = tl.sum(tl.where(inside, ds * score, 0.0), 1)
    tl.store(rows + tile_j.to(tl.int64) * 3 * R + 2 * R + i, sums, mask=i < R)
    if GRADIENT:
        tl.store(at, ds, mask=inside)


@triton.jit(do_not_specialize=["R", "M"])
def relation_kernel(
    f, u, w, lam, rows, stride, R, M, KIND: tl.constexpr, GRADIENT: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    _, tile_j, i, j, inside = tile_places(R, M, BR, BM)
    at = i.to(tl.int64)[:, None] * stride + j[None, :]
    image = tl.load(u + at, mask=inside, other=0.0)
    gap = tl.load(w + at, mask=inside, other=0.0) - image
    e = (tl.load(f + at, mask=inside, other=0.0) - image) - tl.load(lam) * gap
    counted = inside & (i[:, None] != j[None, :])
    times = tl.where(j < R, 1.0, 2.0)[None, :]  # what lies right of the chunk's own square stands for its mirror too
    phi, slope = pointwise(e, KIND)
    between, _ = pointwise(gap, KIND)
    to = rows + tile_j.to(tl.int64) * 3 * R + i  # [column block, 3, R]
    tl.store(to, tl.sum(tl.where(counted, times * phi, 0.0), 1), mask=i < R)
    tl.store(to + R, tl.sum(tl.where(counted, times * between, 0.0), 1), mask=i < R)
    tl.store(to + 2 * R, tl.sum(tl.where(counted, times * slope * gap, 0.0), 1), mask=i < R)
    if GRADIENT:
        tl.store(f + at, tl.where(counted, slope, 0.0), mask=inside)


def grid(s: torch.Tensor) -> tuple[int, int, dict[str, int]]:
    """(row blocks, column blocks, the launch options) for a chunk."""
    tile = tiles.PASS
    options = {"BR": tile.BR, "BM": tile.BM, "num_warps": tile.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.cdiv(s.shape[0], tile.BR), triton.cdiv(s.shape[1], tile.BM), options


def logsumexp_pass(
    s: torch.Tensor,
    scale: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    col_max: torch.Tensor,
    col_sum: torch.Tensor,
) -> None:
    """Write (max, Σ e^(t - max)) of the rows of t = scale * s, and merge those of its columns into col_max, col_sum.

    s: [R, M] fp32 with adjacent columns; row_max, row_sum: [R]; col_max, col_sum: [M]
    """
    operands.check_dtype("logsumexp_pass", s)
    (R, M), (down, across, options) = s.shape, grid(s)
    if R == 0 or M == 0:
        row_max.fill_(float("-inf"))
        row_sum.zero_()
        return
    rows, cols = s.new_empty(2, across, R), s.new_empty(2, down, M)
    BL = tiles.MERGE_LANES
    with torch.cuda.device_of(s):
        logsumexp_kernel[(down * across,)](s, scale, *rows, *cols, s.stride(0), R, M, **options)
        merge_logs_kernel[(triton.cdiv(R, BL) + triton.cdiv(M, BL),)](
            rows, cols, row_max, row_sum, col_max, col_sum, R, M, down, across,
            BP=tiles.MERGE_PARTS, BL=BL, num_warps=4, num_stages=2,
        )  # fmt: skip


def softmax_pass(
    s: torch.Tensor,
    scale: torch.Tensor,
    row_max: torch.Tensor,
    row_log: torch.Tensor,
    row_grad: torch.Tensor | None,
    col_max: torch.Tensor,
    col_log: torch.Tensor,
    col_grad: torch.Tensor | None,
    along: torch.Tensor,
) -> None:
    """Turn s [R, M] into row_grad e^(t - row_max - row_log) + col_grad e^(t - col_max - col_log), t = scale * s.

    row_*: [R], col_*: [M]; a direction without a gradient is left out; along: [R], gets Σ_j ds_ij s_ij
    """
    operands.check_dtype("softmax_pass", s)
    (R, M), (down, across, options) = s.shape, grid(s)
    if R == 0 or M == 0:
        along.zero_()
        return
    parts = s.new_empty(across, R)
    with torch.cuda.device_of(s):
        softmax_kernel[(down * across,)](
            s, scale, row_max, row_log, row_grad, col_max, col_log, col_grad, parts, s.stride(0), R, M, **options
        )  # fmt: skip
    torch.sum(parts, 0, out=along)


def score_sums_pass(
    s: torch.Tensor,
    scale: torch.Tensor,
    row_bias: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    col_bias: torch.Tensor | None,
    col_weight: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    col_ids: torch.Tensor | None,
    first: int,
    kind: str,
    positives: str,
    gradient: bool,
    rows: torch.Tensor,
    cols: torch.Tensor,
) -> None:
    """Sums of f(scale s + bias) over the rows of s [R, M], and over its first K columns with biases of their own.

    rows: [3, R], gets sums, slopes and Σ_j ds_ij s_ij; cols: [2, K], sums and slopes are added; first: the chunk's row
    gradient: s becomes ds, the slopes by row_weight [R] and col_weight [K] (1 where None)
    """
    operands.check_dtype("score_sums_pass", s)
    (R, M), K, (down, across, options) = s.shape, cols.shape[1], grid(s)
    if R == 0 or M == 0:
        rows.zero_()
        return
    row_parts, col_parts = s.new_empty(across, 3, R), s.new_empty(down, 2, K)
    if K and col_bias is None:
        col_bias = s.new_zeros(K)
    with torch.cuda.device_of(s):
        score_sums_kernel[(down * across,)](
            s, scale, row_bias, row_weight, col_bias, col_weight, row_ids, col_ids, row_parts, col_parts, s.stride(0),
            R, M, K, first, KIND=kind, POSITIVES=positives, COLUMNS=K > 0, GRADIENT=gradient, **options,
        )  # fmt: skip
    torch.sum(row_parts, 0, out=rows)
    if K:
        cols.add_(col_parts.sum(0))


def relation_pass(
    f: torch.Tensor, u: torch.Tensor, w: torch.Tensor, lam: torch.Tensor, kind: str, gradient: bool, rows: torch.Tensor
) -> None:
    """Sums of phi(e), phi(w - u) and phi'(e) (w - u) over the rows of e = (f - u) - lam (w - u), into rows [3, R].

    f, u, w: [R, M] fp32, symmetric as a whole, column 0 being the chunk's first row: columns past R count twice, the
    diagonal not at all; gradient: f becomes phi'(e)
    """
    operands.check_dtype("relation_pass", f, u, w)
    (R, M), (down, across, options) = f.shape, grid(f)
    parts = f.new_empty(across, 3, R)
    with torch.cuda.device_of(f):
        relation_kernel[(down * across,)](
            f, u, w, lam, parts, f.stride(0), R, M, KIND=kind, GRADIENT=gradient, **options
        )  # fmt: skip
    torch.sum(parts, 0, out=rows)
