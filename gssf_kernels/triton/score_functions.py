"""Value and slope of each loss as a function of scores. In PyTorch: `ops/score_functions.py`, `ops/goal.py`.

pointwise   f(t) and f'(t), for losses that sum over scores
logit       t(s) and dt/ds, for losses over log-sums

Functions of an anchor's positive score p and hardest negative n, for the merge that ends in a loss:

    function(p, n, constants, TRIPLET, PAIR)                → the term of one direction
    gradients(p, n, g, constants, TRIPLET, PAIR)            → (g times p's weight, g times n's weight)

hinge       [m + n − p]₊                                    constants (m)
goal        gssf_kernels/losses/goal.py                     constants (τ, α, β, λ)

Functions of statistics, for `terms.py`; g is dL with respect to the terms:

    terms(statistics, constants, i, N, TRIPLET, PAIR)       → [BT] at i
    gradients(statistics, constants, g, i, N, TRIPLET, PAIR) → one for each of three statistics
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_scalar(tensor, constant):
    """A number or a tensor's value: constant if tensor is None, exp(tensor) if constant is None, else tensor."""
    if tensor is None:
        return constant
    elif constant is None:
        return tl.exp(tl.load(tensor))
    else:
        return tl.load(tensor)


@triton.jit
def log1p_of(e):
    """log(1 + e) for e in [0, 1]: 2 artanh(e / (2 + e)) by its series, accurate for small e."""
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
    """(f, f') of every score that counts, 0 elsewhere."""
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
def valid_and_positive(i, j, diagonal, a_ids, b_ids, N, M):
    """(which scores exist, which are positives: column i + diagonal of row i, and those of equal ids)."""
    inside = (i < N)[:, None] & (j < M)[None, :]
    positive = (i + diagonal)[:, None] == j[None, :]
    if a_ids is not None:
        x, y = tl.load(a_ids + i, mask=i < N, other=0), tl.load(b_ids + j, mask=j < M, other=0)
        positive = positive | (x[:, None] == y[None, :])
    return inside, positive


@triton.jit
def circle(s, positive, margin, scale):
    """(t, dt/ds) of circle loss; the weight is scale times the distance from the optimum, constant to autograd."""
    weight = scale * tl.maximum(tl.where(positive, 1.0 + margin - s, s + margin), 0.0, tl.PropagateNan.ALL)
    slope = tl.where(positive, -weight, weight)
    return slope * (s - tl.where(positive, 1.0 - margin, margin)), slope


@triton.jit
def multi_similarity(s, positive, alpha, beta, base):
    """(t, dt/ds) of multi-similarity loss."""
    slope = tl.where(positive, -alpha, beta)
    return slope * (s - base), slope


@triton.jit
def logit(s, positive, constants, SCORE: tl.constexpr):
    """(t, dt/ds) of scores by label; weights that depend on s are constant to autograd."""
    if SCORE == "circle":
        return circle(s, positive, constants[0], constants[1])
    elif SCORE == "multi_similarity":
        return multi_similarity(s, positive, constants[0], constants[1], constants[2])
    else:
        tl.static_assert(False, "no such score function")


@triton.jit
def counted(s, positive, inside, bounds, stride, at, mask, AXIS: tl.constexpr):
    """Which scores count for the anchors at ``at``: positives below bounds[0], negatives above bounds[1], and NaN."""
    positive_below = tl.expand_dims(tl.load(bounds + at, mask=mask, other=0.0), AXIS)
    negative_above = tl.expand_dims(tl.load(bounds + stride + at, mask=mask, other=0.0), AXIS)
    return inside & (tl.where(positive, s >= positive_below, s <= negative_above) == 0)


@triton.jit
def logits(s, i, j, N, M, kappa, OPTIONS, by_label):
    """(t, dt/ds, positive, row, col); row, col: which scores count for their row, and for their column.

    OPTIONS: (SCORE, LEAVE_OUT, …); a string in a tuple that is unpacked or compared with None would not compile
    by_label: None for "scaled", t = κ s of all scores; else (constants, row_labels, col_labels, row_bounds, row_stride,
    col_bounds, col_stride, first), the fields of `ByLabel` in the PyTorch module
    """
    inside = (i < N)[:, None] & (j < M)[None, :]
    SCORE: tl.constexpr = OPTIONS[0]
    if SCORE == "scaled":
        return s * kappa, kappa, inside, inside, inside
    elif SCORE == "limited":
        _, row_labels, col_labels, row_limit, _, col_limit, _, first = by_label
        _, positive = valid_and_positive(i, j, first, row_labels, col_labels, N, M)
        row, col = inside, inside
        if row_limit is not None:  # NaN counts
            row = inside & (positive | ((s > tl.load(row_limit + i, mask=i < N, other=0.0)[:, None]) == 0))
        if col_limit is not None:
            col = inside & (positive | ((s > tl.load(col_limit + j, mask=j < M, other=0.0)[None, :]) == 0))
        return s * kappa, kappa, positive, row, col
    else:
        LEAVE_OUT: tl.constexpr = OPTIONS[1]
        constants, row_labels, col_labels, row_bounds, row_stride, col_bounds, col_stride, first = by_label
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
    """e^(t - top - log), the slope of the log-sum top + log; 0 if every t of the log-sum is -inf."""
    least: tl.constexpr = -3.4028234663852886e38
    x = tl.load(top + at, mask=mask, other=0.0)
    y = tl.load(log + at, mask=mask, other=0.0)
    x, y = tl.where(x < least, least, x), tl.where(y < least, least, y)  # written like this NaN stays
    return tl.exp((t - tl.expand_dims(x, AXIS)) - tl.expand_dims(y, AXIS))


@triton.jit
def logsumexp_slope(t, positive, counts, classes, at, mask, AXIS: tl.constexpr, ALL: tl.constexpr):
    """dL/dt of one direction, grad · softmax of the score's class; classes: (top, log, grad = dL/d log-sum) of each.

    ALL: every score counts
    """
    top, log, grad = classes[0]
    g = tl.expand_dims(tl.load(grad + at, mask=mask, other=0.0), AXIS) * softmax(t, top, log, at, mask, AXIS)
    if len(classes) == 2:
        top, log, grad = classes[1]
        other = tl.expand_dims(tl.load(grad + at, mask=mask, other=0.0), AXIS) * softmax(t, top, log, at, mask, AXIS)
        g = tl.where(positive, g, other)
    return g if ALL else tl.where(counts, g, 0.0)


@triton.jit
def hinge(p, n, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    t = (n + constants[0]) - p
    return tl.where((t < 0) == 0, t, 0.0)  # NaN stays


@triton.jit
def hinge_weighted(p, n, g, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    g = tl.where((((n + constants[0]) - p) < 0) == 0, g, 0.0)
    return g, g


@triton.jit
def goal_weights(p, n, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """(w⁺, w⁻), without relative terms; a sigmoid is the slope of softplus."""
    tau, alpha, beta, lam = constants[0], constants[1], constants[2], constants[3]
    one = tl.zeros_like(p) + 1
    weight, positive_part, negative_part = one, one, one
    if TRIPLET == "nca":
        _, weight = pointwise(-tau * (p - n), "softplus")
    elif TRIPLET == "cir":
        _, weight = pointwise(-tau * (p * (2 - p) - n * n - 0.5), "softplus")
    if PAIR == "lin":
        positive_part, negative_part = 1 - p, n
    elif PAIR == "sig":
        _, positive_part = pointwise(-alpha * (p - lam), "softplus")
        _, negative_part = pointwise(beta * (n - lam), "softplus")
    return weight * positive_part, weight * negative_part


@triton.jit
def goal(p, n, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """The loss with these weights where it has a closed form, else n - p; 0 where there is no negative."""
    tau, alpha, beta, lam = constants[0], constants[1], constants[2], constants[3]
    MODE: tl.constexpr = TRIPLET + " " + PAIR
    if MODE == "con lin":
        term = ((1 - p) * (1 - p) + n * n) * 0.5
    elif MODE == "con sig":
        positive_part, _ = pointwise(-alpha * (p - lam), "softplus")
        negative_part, _ = pointwise(beta * (n - lam), "softplus")
        term = positive_part / alpha + negative_part / beta
    elif MODE == "nca con":
        term, _ = pointwise(-tau * (p - n), "softplus")
        term = term / tau
    elif MODE == "cir lin":
        term, _ = pointwise(tau * ((1 - p) * (1 - p) + n * n - 0.5), "softplus")
        term = term / (2 * tau)
    else:
        term = n - p
    return tl.where(n != float("-inf"), term, 0.0)


@triton.jit
def goal_weighted(p, n, g, constants, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    positive_part, negative_part = goal_weights(p, n, constants, TRIPLET, PAIR)
    valid = n != float("-inf")
    return g * tl.where(valid, positive_part, 0.0), g * tl.where(valid, negative_part, 0.0)


@triton.jit
def directions(statistics, i, N):
    """(positive_score, row_score, col_score) at i; past N as of an anchor without a negative. No columns: row_score."""
    positive_score, row_score, col_score = statistics
    p = tl.load(positive_score + i, mask=i < N, other=0.0)
    row = tl.load(row_score + i, mask=i < N, other=float("-inf"))
    if col_score is not None:  # noqa: SIM108
        col = tl.load(col_score + i, mask=i < N, other=float("-inf"))
    else:
        col = row
    return p, row, col


@triton.jit
def both_directions(
    statistics, constants, i, N, FUNCTION: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    p, row, col = directions(statistics, i, N)
    terms = FUNCTION(p, row, constants, TRIPLET, PAIR)
    if statistics[2] is not None:
        terms += FUNCTION(p, col, constants, TRIPLET, PAIR)
    return terms


@triton.jit
def both_gradients(
    statistics, constants, g, i, N, WEIGHTED: tl.constexpr, TRIPLET: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    p, row, col = directions(statistics, i, N)
    row_positive, row_negative = WEIGHTED(p, row, g, constants, TRIPLET, PAIR)
    col_positive, col_negative = WEIGHTED(p, col, g, constants, TRIPLET, PAIR)
    if statistics[2] is None:
        col_positive = tl.zeros_like(row_positive)
    return -(row_positive + col_positive), row_negative, col_negative


@triton.jit
def hinge_terms(statistics, constants, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    return both_directions(statistics, constants, i, N, hinge, TRIPLET, PAIR)


@triton.jit
def hinge_gradients(statistics, constants, g, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    return both_gradients(statistics, constants, g, i, N, hinge_weighted, TRIPLET, PAIR)


@triton.jit
def goal_terms(statistics, constants, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    return both_directions(statistics, constants, i, N, goal, TRIPLET, PAIR)


@triton.jit
def goal_gradients(statistics, constants, g, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    return both_gradients(statistics, constants, g, i, N, goal_weighted, TRIPLET, PAIR)


@triton.jit
def log_ratio(top, log, target, i, inside):
    """log Σ e^t - target, as (max - target) + log: the difference is exact where the loss is small."""
    t = tl.load(top + i, mask=inside, other=0.0) - tl.load(target + i, mask=inside, other=0.0)
    return t + tl.load(log + i, mask=inside, other=0.0)


@triton.jit
def info_nce_terms(statistics, constants, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    row_max, row_log, row_target, col_max, col_log, col_target = statistics
    terms = log_ratio(row_max, row_log, row_target, i, i < N)
    if col_log is not None:
        if col_target is not None:
            terms += log_ratio(col_max, col_log, col_target, i, i < N)
        else:
            terms += log_ratio(col_max, col_log, row_target, i, i < N)
        terms *= 0.5
    return terms


@triton.jit
def info_nce_gradients(statistics, constants, g, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """Gradients of row_log, of either target, and of col_log."""
    _, _, _, _, col_log, col_target = statistics
    g = tl.where(i < N, g, 0.0)
    dtarget = -g
    if col_log is not None:
        g = g * 0.5
        dtarget = -g
        if col_target is None:  # one target stands for both directions
            dtarget = -2.0 * g
    return g, dtarget, g


@triton.jit
def weights_gradients(statistics, constants, g, i, N, TRIPLET: tl.constexpr, PAIR: tl.constexpr):
    """Gradients by weights [4, N] from the forward: of the rows' positives and negatives, then of the columns'."""
    at, stride = statistics[0] + i, N.to(tl.int64)
    row_positive = tl.load(at, mask=i < N, other=0.0)
    row_negative = tl.load(at + stride, mask=i < N, other=0.0)
    col_positive = tl.load(at + 2 * stride, mask=i < N, other=0.0)
    col_negative = tl.load(at + 3 * stride, mask=i < N, other=0.0)
    return -(g * row_positive + g * col_positive), g * row_negative, g * col_negative
