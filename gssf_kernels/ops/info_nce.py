"""InfoNCE of ``t = κ a bᵀ`` against soft targets, in one op.

    rows' direction:    terms_i = lse_j(t_ij) − Σ_j Y_ij t_ij,      i < N
    both directions:    terms_i = ½ [lse_j(t_ij) − Σ_j Y_ij t_ij + lse_k(t_ki) − Σ_k Y'_ki t_ki]
    dL/dt_ij = g_i [e^{t_ij − row_lse_i} − Y_ij] + g_j [e^{t_ij − col_lse_j} − Y'_ij],    g halved in both directions

Y_ij = (1 − ε) 1[positive] / (positives of row i) + ε/M. Y' is the same by columns, with N in place of M. Positives are
pairs (i, i) and equal ids. Source: arXiv 1807.03748; :mod:`gssf_kernels.losses.info_nce`.

Since t is linear in b, Σ_j Y_ij t_ij is κ a_i times a mean of rows of b. It costs O((N + M) D), whatever the segments.
On a GPU, a small problem takes two launches in each pass. Elsewhere the op is a formula over log-sums
(:mod:`gssf_kernels.ops.logsumexp`) and those means. The target is subtracted from the maximum before the logarithm is
added, because that difference is exact where the loss is small.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.dense import kept_shape
from gssf_kernels.ops.logsumexp import kappa_of, kept_for, scale_of
from gssf_kernels.ops.segments import Segments, segment_sums, segments_of
from gssf_kernels.plan import accumulation_dtype


class Options(NamedTuple):
    """The settings of the loss."""

    epsilon: float  # of label smoothing
    symmetric: bool  # both directions; False: only the rows' direction
    reduction: str


class Call(NamedTuple):
    """The loss, and what its backward needs."""

    a: Tensor  # [N, D]
    b: Tensor | None  # [M, D], M >= N; None: b is a
    scale: Tensor | None  # κ, a scalar; None: κ is constant
    constant: float | None  # None: scale stores log κ
    a_ids: Tensor | None  # [N] int64
    b_ids: Tensor | None  # [M] int64
    epsilon: float
    symmetric: bool
    reduction: str
    keep: str = ""  # what to keep for the backward; see `kept_for`


class BackwardCall(NamedTuple):
    """The gradients with respect to a, b and scale."""

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
    col_max: Tensor  # [M]; empty if the loss has only the rows' direction
    col_log: Tensor
    row_count: Tensor  # [N], positives of each row; empty without ids
    col_count: Tensor  # [N], positives of each of the first N columns; empty without ids
    needs: list[bool]  # whether a, b and scale need a gradient
    kept: Tensor | None = None
    keep: str = ""


def info_nce_of_factors(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float | _checks.Logarithm,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms [N] of a [N, D] and b [M, D], M >= N, or their sum or mean. Differentiable once in a, b and scale.

    Behind it positive_logit [N], row_max [N] and, with the columns' direction, col_max [M]; no gradient.
    """
    tensor, constant = scale_of(scale)
    keep = kept_for(a, b, tensor, options.symmetric)
    a_ids, b_ids = distinct(a_ids, b_ids)
    call = Call(a, None if b is a else b, tensor, constant, a_ids, b_ids, *options, keep)
    loss, row_max, _, col_max, *_, positive_logit = _InfoNCE.apply(*call)
    return loss, positive_logit, row_max, col_max


class _InfoNCE(Function):
    call = Call

    @staticmethod
    def forward(*arguments):
        return torch.ops.gssf.info_nce(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        call = Call(*inputs)
        ctx.constant, ctx.options = call.constant, (call.epsilon, call.symmetric, call.reduction)
        ctx.keep = call.keep
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(call.a, call.b, call.scale, call.a_ids, call.b_ids, *output[1:-1])

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * len(Call._fields)
        (a, b, scale, a_ids, b_ids, *statistics, kept), needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        inputs = (a, b, scale, ctx.constant, a_ids, b_ids)
        call = BackwardCall._make((grad_out, *inputs, *ctx.options, *statistics, needs, kept, ctx.keep))
        grads = last_derivative(torch.ops.gssf.info_nce_backward, *call)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * (len(Call._fields) - 3))


def _by_log_sums(call: Call) -> tuple[Tensor, ...]:
    a, b, a_ids, b_ids, count = call.a, call.b, call.a_ids, call.b_ids, call.a.shape[0]
    kappa = kappa_of(call.scale, call.constant)
    scale, constant = scale_of(kappa)
    *statistics, positive_logit, kept = torch.ops.gssf.logsumexp_scores(
        a, b, scale, constant, call.keep, columns=call.symmetric
    )
    rows, cols, b = statistics[:2], statistics[2:], a if b is None else b
    row_count, col_count = (positive_logit.new_empty(0) for _ in range(2))
    row_target = col_target = positive_logit
    if a_ids is not None and b_ids is not None and count > 0:
        (x, y), segments = _accumulated(a, b), segments_of(a_ids, b_ids)
        row_count, col_count = _counts(segments, a_ids, b_ids, positive_logit.dtype)
        further = _sum_of_further_positives(segments, x, y, a_ids, b_ids)
        row_target = (positive_logit + kappa * _scores(x, further)) / row_count
        if call.symmetric:
            further = _sum_of_further_positives(segments.transposed(), y, x, b_ids, a_ids)
            col_target = (positive_logit + kappa * _scores(y[:count], further)) / col_count
    elif a_ids is not None:
        row_count, col_count = (positive_logit.new_empty(count) for _ in range(2))
    if call.epsilon:
        row_target = torch.lerp(row_target, kappa * mean_scores(a, b), call.epsilon)
    if call.epsilon and call.symmetric:
        col_target = torch.lerp(col_target, kappa * mean_scores(b[:count], a), call.epsilon)
    col_statistics = (*cols, None if col_target is row_target else col_target) if call.symmetric else (None, None, None)
    loss = torch.ops.gssf.anchor_terms("info_nce", [*rows, row_target, *col_statistics], [], call.reduction)
    return loss, *statistics, row_count, col_count, kept, positive_logit


def _backward(call: BackwardCall) -> tuple[Tensor, ...]:
    if call.constant is None and call.scale is not None:
        kappa = call.scale.exp()
        da, db, dscale = _backward(call._replace(scale=kappa, constant=1.0))
        return da, db, dscale * kappa if call.needs[2] else dscale
    one_hot = call.a_ids is None and not call.epsilon  # the target is the positive alone
    col_statistics = (None, call.col_log if call.symmetric else None, None if one_hot else call.row_log)
    statistics = [None, call.row_log, None, *col_statistics]
    drow, dtarget, dcol = torch.ops.gssf.anchor_terms_backward(
        call.grad_out, "info_nce", statistics, [], call.reduction
    )
    dcol, dpositive, target_grads = dcol if call.symmetric else None, dtarget, None
    if not one_hot:
        dpositive, *target_grads = _target_gradients(call, dtarget)
    log_sums = (call.row_max, call.row_log, call.col_max, call.col_log)
    inputs = (call.a, call.b, call.scale, call.constant)
    op = torch.ops.gssf.logsumexp_scores_backward
    from_forward = call.kept, call.keep
    grads = op(drow, dcol, dpositive, *inputs, *log_sums, call.needs, *from_forward, columns=call.symmetric)
    if target_grads is None:
        return grads
    if call.b is None:
        da, db, dscale = target_grads
        target_grads = (None if da is None else da + db, db, dscale)
    return tuple(
        t if not t.numel() else t.add_(by_target) if t.dtype == by_target.dtype else (by_target + t).to(t.dtype)
        for t, by_target in zip(grads, target_grads, strict=True)
    )


def _target_gradients(call: BackwardCall, dtarget):
    """The gradients through the targets of both directions; dtarget [N] is that with respect to each target.

    Returns the gradients with respect to the positives' logits [N], a, b and scale; None for an input that needs none.
    """
    a, b, a_ids, b_ids, epsilon = call.a, call.b, call.a_ids, call.b_ids, call.epsilon
    kappa, counts = kappa_of(call.scale, call.constant), (call.row_count, call.col_count)
    factors, ids = _accumulated(a, a if b is None else b), (a_ids, b_ids)
    needed = [call.needs[0], call.needs[0] if b is None else call.needs[1]]
    grads: list = [None, None]  # da and db
    dpositive, dscale, count = torch.zeros_like(dtarget), dtarget.new_zeros(()), a.shape[0]
    row_segments = segments_of(a_ids, b_ids) if a_ids is not None and b_ids is not None and count > 0 else None
    if row_segments is None:
        grads = [torch.zeros_like(t) if need else None for t, need in zip(factors, needed, strict=True)]
    for k in (0, 1) if call.symmetric else (0,):  # the rows' direction, the columns'
        x, y, weight = factors[k], factors[1 - k], (1 - epsilon) * dtarget
        anchors = x[:count]
        if row_segments is not None:
            segments, x_ids, y_ids = row_segments.transposed() if k else row_segments, ids[k], ids[1 - k]
            weight = weight / counts[k]
            further = _sum_of_further_positives(segments, x, y, x_ids, y_ids)
            dscale = dscale + weight @ _scores(anchors, further)
            if needed[1 - k]:
                dfurther = (kappa * weight)[:, None] * anchors
                dy = segment_sums(dfurther, segments.rows[:count], segments.cols, segments.total)
                dy[:count] -= torch.where(_pair_in_segment(x_ids, y_ids, count)[:, None], dfurther, 0)
                grads[1 - k] = dy if grads[1 - k] is None else grads[1 - k].add_(dy)
            danchors = further.mul_((kappa * weight)[:, None])
            if needed[k] and grads[k] is None:  # of a, whose rows all are anchors
                grads[k] = danchors
            elif needed[k]:
                grads[k][:count] += danchors
        dpositive += weight
        if epsilon:
            mean, weight = y.mean(0), epsilon * dtarget
            weighted_sum = weight @ anchors
            if needed[k]:
                grads[k][:count] += kappa * torch.outer(weight, mean)
            if needed[1 - k]:
                grads[1 - k] += kappa / max(y.shape[0], 1) * weighted_sum
            dscale = dscale + weighted_sum @ mean
    return dpositive, *grads, dscale


def _accumulated(a, b):
    dtype = accumulation_dtype(a.dtype)
    return a.to(dtype), b.to(dtype)


def _pair_in_segment(x_ids, y_ids, count):
    """Whether x_i and y_i are of one segment [count]. They are a pair, and so a positive, in any case."""
    return x_ids[:count] == y_ids[:count]


def _counts(segments: Segments, a_ids, b_ids, dtype):
    """How many positives the rows have, and the first N columns: [N] each."""
    count = a_ids.shape[0]
    missing = ~_pair_in_segment(a_ids, b_ids, count)
    rows, cols = segments.row_counts() + missing, segments.col_counts()[:count] + missing
    return rows.to(dtype), cols.to(dtype)


def _sum_of_further_positives(segments: Segments, x, y, x_ids, y_ids):
    """For each of the first N rows of x, the sum of its positives among the rows of y, but for its pair: [N, D]."""
    count = min(x.shape[0], y.shape[0])
    sums = segment_sums(y, segments.cols, segments.rows[:count], segments.total)
    return sums - torch.where(_pair_in_segment(x_ids, y_ids, count)[:, None], y[:count], 0)


def _scores(a, b):
    """``a_i · b_i`` [N]."""
    i = torch.arange(a.shape[0], device=a.device)
    return torch.ops.gssf.pair_scores(a, b, i, i)


def mean_scores(a, b):
    """``mean_j a_i · b_j`` [N]."""
    dtype = accumulation_dtype(a.dtype)
    return a.to(dtype) @ b.mean(0, dtype=dtype)


def _fake(call: Call) -> tuple[Tensor, ...]:
    n, dtype = call.a.shape[0], accumulation_dtype(call.a.dtype)
    m, counts = n if call.b is None else call.b.shape[0], n if call.a_ids is not None else 0
    m = m if call.symmetric else 0
    loss = call.a.new_empty((n,) if call.reduction == "none" else (), dtype=dtype)
    kept = kept_shape(call.a, call.b, call.keep)
    return loss, *(call.a.new_empty(size, dtype=dtype) for size in (n, n, m, m, counts, counts, kept, n))


def _fake_backward(call: BackwardCall) -> tuple[Tensor, ...]:
    return tuple(
        (call.row_max if k == 2 else call.a).new_empty(t.shape if need and t is not None else 0)
        for k, (t, need) in enumerate(zip((call.a, call.b, call.scale), call.needs, strict=True))
    )


register(
    "info_nce",
    Call,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
