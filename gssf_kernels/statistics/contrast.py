"""InfoNCE of ``t = κ a bᵀ`` against soft targets, in one op: two launches each way on a GPU where scores are few.

    terms_i = lse_j(t_ij) − Σ_j Y_ij t_ij,    with both directions  ½ [that + lse_k(t_ki) − Σ_k Y'_ki t_ki],    i < N
    dL/dt_ij = g_i [e^{t_ij − row_lse_i} − Y_ij] + g_j [e^{t_ij − col_lse_j} − Y'_ij],    g: halved with both

Y_ij = (1 − ε) 1[positive] / (positives of row i) + ε/M, Y' the same by columns with N in place of M; positives are
pairs (i, i) and equal ids. Since t is linear in b, Σ_j Y_ij t_ij is κ a_i times a mean of rows of b: O((N + M) D),
whatever the groups. Elsewhere than on small problems the op is a formula over log-sums
(:mod:`gssf_kernels.statistics.logsumexp`) and those means. The maximum and the target meet first: their difference is
exact where the loss is small.
"""

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels._library import Function, define, distinct, last_derivative
from gssf_kernels.dense import keeps
from gssf_kernels.precision import accumulation_dtype
from gssf_kernels.statistics.groups import Groups, group_sums, groups
from gssf_kernels.statistics.sums import scale_of


def contrast_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float | _checks.Logarithm,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    epsilon: float,
    symmetric: bool,
    reduction: str,
) -> Tensor:
    """The terms [N] of a [N, D] and b [M, D], M >= N, or their sum or mean. Differentiable once in a, b and scale."""
    given, constant = scale_of(scale)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, given))
    a_ids, b_ids = distinct(a_ids, b_ids)
    options = (constant, a_ids, b_ids, epsilon, symmetric, reduction)
    return _Contrast.apply(a, None if b is a else b, given, *options, keep)[0]


class _Contrast(Function):
    @staticmethod
    def forward(a, b, scale, constant, a_ids, b_ids, epsilon, symmetric, reduction, keep):
        op = torch.ops.gssf.contrast
        return op(a, b, scale, constant, a_ids, b_ids, epsilon, symmetric, reduction, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, scale, ctx.constant, a_ids, b_ids, *ctx.options, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, scale, a_ids, b_ids, *output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 10
        (a, b, scale, a_ids, b_ids, *lines, kept), needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        given = (a, b, scale, ctx.constant, a_ids, b_ids, *ctx.options, *lines)
        found = last_derivative(torch.ops.gssf.contrast_backward, grad, *given, needs, kept)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 7)


def _forward(a, b, scale, constant, a_ids, b_ids, epsilon, symmetric, reduction, keep=False):
    if constant is None:
        scale, constant = scale.exp(), 1.0
    *lines, pair, kept = torch.ops.gssf.logsumexp_scores(a, b, scale, constant, keep)
    rows, cols, count = lines[:2], lines[2:], a.shape[0]
    kappa, b = constant if scale is None else scale, a if b is None else b
    row_count, col_count = (pair.new_empty(0) for _ in range(2))
    row_target = col_target = pair
    if a_ids is not None and count > 0:
        (x, y), found = _wide(a, b), groups(a_ids, b_ids)
        row_count, col_count = _counts(found, a_ids, b_ids, pair.dtype)
        row_target = (pair + kappa * _scores(x, _others(found, y, x, a_ids, b_ids))) / row_count
        if symmetric:
            others = _others(found.turned(), x, y, b_ids, a_ids)
            col_target = (pair + kappa * _scores(y[:count], others)) / col_count
    elif a_ids is not None:
        row_count, col_count = (pair.new_empty(count) for _ in range(2))
    if epsilon:
        row_target = torch.lerp(row_target, kappa * _mean_scores(a, b), epsilon)
    if epsilon and symmetric:
        col_target = torch.lerp(col_target, kappa * _mean_scores(b[:count], a), epsilon)
    shared = None if col_target is row_target else col_target
    given = (*cols, shared) if symmetric else (None, None, None)
    loss = torch.ops.gssf.line_terms("contrast", [*rows, row_target, *given], [], reduction)
    return loss, *lines, row_count, col_count, kept


def _backward(
    grad, a, b, scale, constant, a_ids, b_ids, epsilon, symmetric, reduction, row_max, row_log, col_max, col_log,
    row_count, col_count, needs, kept=None,
):  # fmt: skip
    if constant is None:
        kappa, options = scale.exp(), (a_ids, b_ids, epsilon, symmetric, reduction)
        known = (row_max, row_log, col_max, col_log, row_count, col_count)
        da, db, dscale = _backward(grad, a, b, kappa, 1.0, *options, *known, needs, kept)
        return da, db, dscale * kappa if needs[2] else dscale
    plain = a_ids is None and not epsilon
    statistics = [None, row_log, None, None, col_log if symmetric else None, None if plain else row_log]
    drow, dtarget, dcol = torch.ops.gssf.line_terms_backward(grad, "contrast", statistics, [], reduction)
    dcol, dpair, more = dcol if symmetric else None, dtarget, None
    if not plain:
        kappa = constant if scale is None else scale
        counts = (row_count, col_count)
        dpair, *more = _target_gradients(dtarget, a, b, kappa, a_ids, b_ids, epsilon, symmetric, counts)
    lines = (row_max, row_log, col_max, col_log)
    op = torch.ops.gssf.logsumexp_scores_backward
    found = op(drow, dcol, dpair, a, b, scale, constant, *lines, needs, kept)
    if more is None:
        return found
    if b is None:
        more = (more[0] + more[1], more[1], more[2])
    return tuple(
        t if not t.numel() else t.add_(extra) if t.dtype == extra.dtype else (extra + t).to(t.dtype)
        for t, extra in zip(found, more, strict=True)
    )


def _target_gradients(dtarget, a, b, kappa, a_ids, b_ids, epsilon, symmetric, counts):
    """What the pairs' t [N], a, b and κ get where each direction's target gets dtarget [N]."""
    sides = _wide(a, a if b is None else b)
    grads: list = [None, None]  # of a and of b
    dpair, dscale, count = torch.zeros_like(dtarget), dtarget.new_zeros(()), a.shape[0]
    found, ids = groups(a_ids, b_ids) if a_ids is not None and count > 0 else None, (a_ids, b_ids)
    if found is None:
        grads = [torch.zeros_like(t) for t in sides]
    for k in (0, 1) if symmetric else (0,):
        of, other, weight = sides[k], sides[1 - k], (1 - epsilon) * dtarget
        anchors = of[:count]
        if found is not None:
            slots, of_ids, other_ids = found.turned() if k else found, ids[k], ids[1 - k]
            weight = weight / counts[k]
            others = _others(slots, other, of, of_ids, other_ids)
            dscale = dscale + weight @ _scores(anchors, others)
            dothers = (kappa * weight)[:, None] * anchors
            back = group_sums(dothers, slots.rows[:count], slots.cols, slots.slots)
            back[:count] -= torch.where(_own(of_ids, other_ids, count)[:, None], dothers, 0)
            grads[1 - k] = back if grads[1 - k] is None else grads[1 - k].add_(back)
            drawn = others.mul_((kappa * weight)[:, None])
            if grads[k] is None:  # of the rows, which all are anchors
                grads[k] = drawn
            else:
                grads[k][:count] += drawn
        dpair += weight
        if epsilon:
            mean, weight = other.mean(0), epsilon * dtarget
            grads[k][:count] += kappa * torch.outer(weight, mean)
            drawn = weight @ anchors
            grads[1 - k] += kappa / max(other.shape[0], 1) * drawn
            dscale = dscale + drawn @ mean
    return dpair, *grads, dscale


def _wide(a, b):
    dtype = accumulation_dtype(a.dtype)
    return a.to(dtype), b.to(dtype)


def _own(of_ids, other_ids, count):
    """Whether pair i is in its own group; it is a positive in any case."""
    return of_ids[:count] == other_ids[:count]


def _counts(found: Groups, a_ids, b_ids, dtype):
    """How many positives the rows have, and the first N columns: [N] each."""
    count = a_ids.shape[0]
    missing = ~_own(a_ids, b_ids, count)
    rows, cols = found.row_counts() + missing, found.col_counts()[:count] + missing
    return rows.to(dtype), cols.to(dtype)


def _others(found: Groups, other, of, of_ids, other_ids):
    """Σ of the positives of each of the first N rows of one side, in the other, without its pair: [N, D]."""
    count = min(of.shape[0], other.shape[0])
    sums = group_sums(other, found.cols, found.rows[:count], found.slots)
    return sums - torch.where(_own(of_ids, other_ids, count)[:, None], other[:count], 0)


def _scores(a, b):
    """``a_i · b_i`` [N]."""
    i = torch.arange(a.shape[0], device=a.device)
    return torch.ops.gssf.pair_scores(a, b, i, i)


def _mean_scores(a, b):
    """``mean_j a_i · b_j`` [N]."""
    dtype = accumulation_dtype(a.dtype)
    return a.to(dtype) @ b.mean(0, dtype=dtype)


def _fake(a, b, scale, constant, a_ids, b_ids, epsilon, symmetric, reduction, keep=False):
    n, dtype = a.shape[0], accumulation_dtype(a.dtype)
    m, counts = n if b is None else b.shape[0], n if a_ids is not None else 0
    loss = a.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    kept = (n, m) if keep and keeps(a, b) else 0
    return loss, *(a.new_empty(size, dtype=dtype) for size in (n, n, m, m, counts, counts, kept))


def _fake_backward(
    grad, a, b, scale, constant, a_ids, b_ids, epsilon, symmetric, reduction, row_max, row_log, col_max, col_log,
    row_count, col_count, needs, kept=None,
):  # fmt: skip
    return tuple(
        (row_max if k == 2 else a).new_empty(t.shape if need and t is not None else 0)
        for k, (t, need) in enumerate(zip((a, b, scale), needs, strict=True))
    )


_GIVEN = (
    "Tensor a, Tensor? b, Tensor? scale, float? constant, Tensor? a_ids, Tensor? b_ids, float epsilon, bool symmetric, "
    "str reduction"
)
define(
    f"contrast({_GIVEN}, bool keep=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
    triton="contrast.contrast",
    through="logsumexp_pass",
)
define(
    f"contrast_backward(Tensor grad, {_GIVEN}, Tensor row_max, Tensor row_log, Tensor col_max, Tensor col_log, "
    "Tensor row_count, Tensor col_count, bool[] needs, Tensor? kept=None) -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_fake_backward,
    triton="contrast.contrast_backward",
    through="softmax_pass",
)
