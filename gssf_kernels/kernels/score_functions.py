"""What a loss makes of one score: in plain PyTorch it is `gssf_kernels/statistics/score_functions.py`.

pointwise   f(t) and f'(t) of losses that sum over scores
logit       t(s) and dt/ds of losses over log-sums
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(tensor, constant):
    """What an argument that is a tensor or a number stands for; a tensor without a number is its logarithm."""
    if tensor is None:
        return constant
    elif constant is None:
        return tl.exp(tl.load(tensor))
    else:
        return tl.load(tensor)


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
def term(t, positive, counted, KIND: tl.constexpr, POSITIVES: tl.constexpr):
    """f and its slope of every score that counts, 0 elsewhere."""
    if POSITIVES == "negate":
        f, slope = pointwise(tl.where(positive, -t, t), KIND)
        slope = tl.where(positive, -slope, slope)
    else:
        f, slope = pointwise(t, KIND)
        if POSITIVES == "exclude":
            counted = counted & ~positive
    return tl.where(counted, f, 0.0), tl.where(counted, slope, 0.0)


@triton.jit
def relation_terms(f, u, w, lam, KIND: tl.constexpr):
    """(φ(e), φ(w - u), w - u, φ'(e)) of e = (f - u) - λ (w - u)."""
    gap = w - u
    phi, slope = pointwise((f - u) - lam * gap, KIND)
    between, _ = pointwise(gap, KIND)
    return phi, between, gap, slope


@triton.jit
def pairs_and_ids(i, j, diagonal, a_ids, b_ids, N, M):
    """(which scores there are, which are of positives: column i + diagonal of row i, and equal ids)."""
    inside = (i < N)[:, None] & (j < M)[None, :]
    positive = (i + diagonal)[:, None] == j[None, :]
    if a_ids is not None:
        x, y = tl.load(a_ids + i, mask=i < N, other=0), tl.load(b_ids + j, mask=j < M, other=0)
        positive = positive | (x[:, None] == y[None, :])
    return inside, positive


@triton.jit
def circle(s, positive, margin, scale):
    """Of circle loss: the weight is the distance from the optimum."""
    weight = scale * tl.maximum(tl.where(positive, 1.0 + margin - s, s + margin), 0.0, tl.PropagateNan.ALL)
    slope = tl.where(positive, -weight, weight)
    return slope * (s - tl.where(positive, 1.0 - margin, margin)), slope


@triton.jit
def multi_similarity(s, positive, alpha, beta, base):
    """Of multi-similarity loss."""
    slope = tl.where(positive, -alpha, beta)
    return slope * (s - base), slope


@triton.jit
def logit(s, positive, constants, SCORE: tl.constexpr):
    """(t, dt/ds) of scores by label, as its loss has them; a loss's own weights are constants to autograd."""
    if SCORE == "circle":
        return circle(s, positive, constants[0], constants[1])
    elif SCORE == "multi_similarity":
        return multi_similarity(s, positive, constants[0], constants[1], constants[2])
    else:
        tl.static_assert(False, "no such score function")


@triton.jit
def counted(s, positive, inside, bounds, stride, at, mask, AXIS: tl.constexpr):
    """Which scores count for the anchors at ``at``: positives below a bound, negatives above another. A NaN does."""
    below = tl.expand_dims(tl.load(bounds + at, mask=mask, other=0.0), AXIS)
    above = tl.expand_dims(tl.load(bounds + stride + at, mask=mask, other=0.0), AXIS)
    return inside & (tl.where(positive, s >= below, s <= above) == 0)


@triton.jit
def logits(s, i, j, N, M, kappa, by_label):
    """(t, dt/ds, positive, row, col): which scores count for their row, and for their column.

    by_label: None for t = κ s; else ((SCORE, LEAVE_OUT), constants, row_labels, col_labels, row_bounds, row_stride,
    col_bounds, col_stride, first), as `ByLabel` of the PyTorch module has them
    """
    inside = (i < N)[:, None] & (j < M)[None, :]
    if by_label is None:
        return s * kappa, kappa, inside, inside, inside
    else:
        SCORE: tl.constexpr = by_label[0][0]
        LEAVE_OUT: tl.constexpr = by_label[0][1]
        _, constants, row_labels, col_labels, row_bounds, row_stride, col_bounds, col_stride, first = by_label
        x, y = tl.load(row_labels + i, mask=i < N, other=0), tl.load(col_labels + j, mask=j < M, other=0)
        positive = x[:, None] == y[None, :]
        if LEAVE_OUT:
            inside = inside & ((i + first)[:, None] != j[None, :])
        row, col = inside, inside
        if row_bounds is not None:
            row = counted(s, positive, inside, row_bounds, row_stride, i, i < N, 1)
        if col_bounds is not None:
            col = counted(s, positive, inside, col_bounds, col_stride, j, j < M, 0)
        t, slope = logit(s, positive, constants, SCORE)
        return t, slope, positive, row, col


@triton.jit
def softmax(t, top, log, at, mask, AXIS: tl.constexpr):
    """e^(t - top - log), the slope of a log-sum kept in two parts; where all that it sums is -inf, that is 0."""
    least: tl.constexpr = -3.4028234663852886e38
    x = tl.load(top + at, mask=mask, other=0.0)
    y = tl.load(log + at, mask=mask, other=0.0)
    x, y = tl.where(x < least, least, x), tl.where(y < least, least, y)  # in this form NaN stays
    return tl.exp((t - tl.expand_dims(x, AXIS)) - tl.expand_dims(y, AXIS))


@triton.jit
def logsumexp_slope(t, positive, counts, classes, at, mask, AXIS: tl.constexpr):
    """Σ grad · softmax of the log-sums of one direction: classes holds (top, log, grad) of each class."""
    top, log, grad = classes[0]
    g = tl.expand_dims(tl.load(grad + at, mask=mask, other=0.0), AXIS) * softmax(t, top, log, at, mask, AXIS)
    if len(classes) == 2:
        top, log, grad = classes[1]
        other = tl.expand_dims(tl.load(grad + at, mask=mask, other=0.0), AXIS) * softmax(t, top, log, at, mask, AXIS)
        g = tl.where(counts, tl.where(positive, g, other), 0.0)
    return g
