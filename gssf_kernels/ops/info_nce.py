"""InfoNCE of ``t = κ a bᵀ`` against soft targets, in one op: two launches each way on a GPU where scores are few.

    terms_i = lse_j(t_ij) − Σ_j Y_ij t_ij,    with both directions  ½ [that + lse_k(t_ki) − Σ_k Y'_ki t_ki],    i < N
    dL/dt_ij = g_i [e^{t_ij − row_lse_i} − Y_ij] + g_j [e^{t_ij − col_lse_j} − Y'_ij],    g: halved with both

Y_ij = (1 − ε) 1[positive] / (positives of row i) + ε/M, Y' the same by columns with N in place of M; positives are
pairs (i, i) and equal ids. Since t is linear in b, Σ_j Y_ij t_ij is κ a_i times a mean of rows of b: O((N + M) D),
whatever the groups. Elsewhere than on small problems the op is a formula over log-sums
(:mod:`gssf_kernels.ops.logsumexp`) and those means. The maximum and the target meet first: their difference is
exact where the loss is small.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.dense import keeps
from gssf_kernels.ops.groups import Groups, group_sums, groups
from gssf_kernels.ops.logsumexp import kappa_of, scale_of
from gssf_kernels.plan import accumulation_dtype


class Options(NamedTuple):
    """The settings of the loss."""

    epsilon: float  # of label smoothing
    symmetric: bool  # both directions, or the rows' alone
    reduction: str


class Call(NamedTuple):
    """The loss, and what its gradient takes."""

    a: Tensor  # [N, D]
    b: Tensor | None  # [M, D], M >= N, or None: a
    scale: Tensor | None  # κ, or None: constant is
    constant: float | None  # None: scale is log κ
    a_ids: Tensor | None  # [N] int64
    b_ids: Tensor | None  # [M] int64
    epsilon: float
    symmetric: bool
    reduction: str
    keep: bool = False  # hold s for a backward, if it is small


class BackwardCall(NamedTuple):
    """The gradients of a, b and κ."""

    grad_out: Tensor  # [] or [N]
    a: Tensor
    b: Tensor | None
    scale: Tensor | None
    constant: float | None
    a_ids: Tensor | None
    b_ids: Tensor | None
    epsilon: float
    symmetric: bool
    reduction: str
    row_max: Tensor
    row_log: Tensor
    col_max: Tensor
    col_log: Tensor
    row_count: Tensor  # [N] positives of each row, empty without ids
    col_count: Tensor  # [N] of each of the first N columns
    needs: list[bool]  # for a, b and scale
    kept: Tensor | None = None


def contrast_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float | _checks.Logarithm,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    options: Options,
) -> Tensor:
    """The terms [N] of a [N, D] and b [M, D], M >= N, or their sum or mean. Differentiable once in a, b and scale."""
    tensor, constant = scale_of(scale)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, tensor))
    a_ids, b_ids = distinct(a_ids, b_ids)
    return _InfoNCE.apply(*Call(a, None if b is a else b, tensor, constant, a_ids, b_ids, *options, keep))[0]


class _InfoNCE(Function):
    call = Call

    @staticmethod
    def forward(*arguments):
        return torch.ops.gssf.info_nce(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        call = Call(*inputs)
        ctx.constant, ctx.options = call.constant, (call.epsilon, call.symmetric, call.reduction)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(call.a, call.b, call.scale, call.a_ids, call.b_ids, *output[1:])

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * len(Call._fields)
        (a, b, scale, a_ids, b_ids, *statistics, kept), needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        sides = (grad_out, a, b, scale, ctx.constant, a_ids, b_ids)
        call = BackwardCall._make((*sides, *ctx.options, *statistics, needs, kept))
        grads = last_derivative(torch.ops.gssf.info_nce_backward, *call)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * (len(Call._fields) - 3))


def _by_log_sums(call: Call) -> tuple[Tensor, ...]:
    a, b, a_ids, b_ids, count = call.a, call.b, call.a_ids, call.b_ids, call.a.shape[0]
    kappa = kappa_of(call.scale, call.constant)
    scale, constant = scale_of(kappa)
    *statistics, positive_logit, kept = torch.ops.gssf.logsumexp_scores(a, b, scale, constant, call.keep)
    rows, cols, b = statistics[:2], statistics[2:], a if b is None else b
    row_count, col_count = (positive_logit.new_empty(0) for _ in range(2))
    row_target = col_target = positive_logit
    if a_ids is not None and b_ids is not None and count > 0:
        (x, y), slots = _wide(a, b), groups(a_ids, b_ids)
        row_count, col_count = _counts(slots, a_ids, b_ids, positive_logit.dtype)
        row_target = (positive_logit + kappa * _scores(x, _others(slots, y, x, a_ids, b_ids))) / row_count
        if call.symmetric:
            others = _others(slots.turned(), x, y, b_ids, a_ids)
            col_target = (positive_logit + kappa * _scores(y[:count], others)) / col_count
    elif a_ids is not None:
        row_count, col_count = (positive_logit.new_empty(count) for _ in range(2))
    if call.epsilon:
        row_target = torch.lerp(row_target, kappa * _mean_scores(a, b), call.epsilon)
    if call.epsilon and call.symmetric:
        col_target = torch.lerp(col_target, kappa * _mean_scores(b[:count], a), call.epsilon)
    shared = None if col_target is row_target else col_target
    of_columns = (*cols, shared) if call.symmetric else (None, None, None)
    loss = torch.ops.gssf.line_terms("contrast", [*rows, row_target, *of_columns], [], call.reduction)
    return loss, *statistics, row_count, col_count, kept


def _backward(call: BackwardCall) -> tuple[Tensor, ...]:
    if call.constant is None and call.scale is not None:
        kappa = call.scale.exp()
        da, db, dscale = _backward(call._replace(scale=kappa, constant=1.0))
        return da, db, dscale * kappa if call.needs[2] else dscale
    plain = call.a_ids is None and not call.epsilon
    of_columns = (None, call.col_log if call.symmetric else None, None if plain else call.row_log)
    log_sums = [None, call.row_log, None, *of_columns]
    drow, dtarget, dcol = torch.ops.gssf.line_terms_backward(call.grad_out, "contrast", log_sums, [], call.reduction)
    dcol, dpositive, extra = dcol if call.symmetric else None, dtarget, None
    if not plain:
        dpositive, *extra = _target_gradients(call, dtarget)
    statistics = (call.row_max, call.row_log, call.col_max, call.col_log)
    sides = (call.a, call.b, call.scale, call.constant)
    op = torch.ops.gssf.logsumexp_scores_backward
    grads = op(drow, dcol, dpositive, *sides, *statistics, call.needs, call.kept)
    if extra is None:
        return grads
    if call.b is None:
        extra = (extra[0] + extra[1], extra[1], extra[2])
    return tuple(
        t if not t.numel() else t.add_(more) if t.dtype == more.dtype else (more + t).to(t.dtype)
        for t, more in zip(grads, extra, strict=True)
    )


def _target_gradients(call: BackwardCall, dtarget):
    """Gradients of the pairs' t [N], of a, b and κ, by each direction's target, whose gradient is dtarget [N]."""
    a, b, a_ids, b_ids, epsilon = call.a, call.b, call.a_ids, call.b_ids, call.epsilon
    kappa, counts = kappa_of(call.scale, call.constant), (call.row_count, call.col_count)
    sides = _wide(a, a if b is None else b)
    grads: list = [None, None]  # of a and of b
    dpositive, dscale, count = torch.zeros_like(dtarget), dtarget.new_zeros(()), a.shape[0]
    all_slots, ids = (
        groups(a_ids, b_ids) if a_ids is not None and b_ids is not None and count > 0 else None,
        (a_ids, b_ids),
    )
    if all_slots is None:
        grads = [torch.zeros_like(t) for t in sides]
    for k in (0, 1) if call.symmetric else (0,):
        of, other, weight = sides[k], sides[1 - k], (1 - epsilon) * dtarget
        anchors = of[:count]
        if all_slots is not None:
            slots, of_ids, other_ids = all_slots.turned() if k else all_slots, ids[k], ids[1 - k]
            weight = weight / counts[k]
            others = _others(slots, other, of, of_ids, other_ids)
            dscale = dscale + weight @ _scores(anchors, others)
            dothers = (kappa * weight)[:, None] * anchors
            back = group_sums(dothers, slots.rows[:count], slots.cols, slots.slots)
            back[:count] -= torch.where(_in_own_group(of_ids, other_ids, count)[:, None], dothers, 0)
            grads[1 - k] = back if grads[1 - k] is None else grads[1 - k].add_(back)
            drawn = others.mul_((kappa * weight)[:, None])
            if grads[k] is None:  # of the rows, which all are anchors
                grads[k] = drawn
            else:
                grads[k][:count] += drawn
        dpositive += weight
        if epsilon:
            mean, weight = other.mean(0), epsilon * dtarget
            grads[k][:count] += kappa * torch.outer(weight, mean)
            drawn = weight @ anchors
            grads[1 - k] += kappa / max(other.shape[0], 1) * drawn
            dscale = dscale + drawn @ mean
    return dpositive, *grads, dscale


def _wide(a, b):
    dtype = accumulation_dtype(a.dtype)
    return a.to(dtype), b.to(dtype)


def _in_own_group(of_ids, other_ids, count):
    """Whether pair i is in its own group; it is a positive in any case."""
    return of_ids[:count] == other_ids[:count]


def _counts(slots: Groups, a_ids, b_ids, dtype):
    """How many positives the rows have, and the first N columns: [N] each."""
    count = a_ids.shape[0]
    missing = ~_in_own_group(a_ids, b_ids, count)
    rows, cols = slots.row_counts() + missing, slots.col_counts()[:count] + missing
    return rows.to(dtype), cols.to(dtype)


def _others(slots: Groups, other, of, of_ids, other_ids):
    """Σ of the positives of each of the first N rows of one side, in the other, without its pair: [N, D]."""
    count = min(of.shape[0], other.shape[0])
    sums = group_sums(other, slots.cols, slots.rows[:count], slots.slots)
    return sums - torch.where(_in_own_group(of_ids, other_ids, count)[:, None], other[:count], 0)


def _scores(a, b):
    """``a_i · b_i`` [N]."""
    i = torch.arange(a.shape[0], device=a.device)
    return torch.ops.gssf.pair_scores(a, b, i, i)


def _mean_scores(a, b):
    """``mean_j a_i · b_j`` [N]."""
    dtype = accumulation_dtype(a.dtype)
    return a.to(dtype) @ b.mean(0, dtype=dtype)


def _fake(call: Call) -> tuple[Tensor, ...]:
    n, dtype = call.a.shape[0], accumulation_dtype(call.a.dtype)
    m, counts = n if call.b is None else call.b.shape[0], n if call.a_ids is not None else 0
    loss = call.a.new_empty((n,) if call.reduction == "none" else (), dtype=dtype)
    kept = (n, m) if call.keep and keeps(call.a, call.b) else 0
    return loss, *(call.a.new_empty(size, dtype=dtype) for size in (n, n, m, m, counts, counts, kept))


def _fake_backward(call: BackwardCall) -> tuple[Tensor, ...]:
    return tuple(
        (call.row_max if k == 2 else call.a).new_empty(t.shape if need and t is not None else 0)
        for k, (t, need) in enumerate(zip((call.a, call.b, call.scale), call.needs, strict=True))
    )


register(
    "info_nce",
    Call,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_by_log_sums,
    fake=_fake,
    launcher="info_nce.info_nce",
    plans=plan.info_nce,
    through="logsumexp_pass",
)
register(
    "info_nce_backward",
    BackwardCall,
    "(Tensor, Tensor, Tensor)",
    composite=_backward,
    fake=_fake_backward,
    launcher="info_nce.info_nce_backward",
    plans=plan.info_nce,
    through="softmax_pass",
)
