"""Log-sum-exp of the rows and columns of ``t = κ a bᵀ``, in one product that stores no matrix.

    row_lse_i = log Σ_j e^{t_ij},   col_lse_j = log Σ_i e^{t_ij}
    dL/dt_ij = row_grad_i e^{t_ij − row_lse_i} + col_grad_j e^{t_ij − col_lse_j}

Both directions come from one sweep: a row is complete within its chunk, a column is merged across chunks with a running
maximum. The backward makes every chunk again (:mod:`gssf_kernels.dense`): 4 products in all, 3 on the CPU where s is so
small that it is kept (1 MiB). Where b is a, t is symmetric and half of them do. Small problems on a GPU, where launches
are what a step costs, take two each way: a sweep that stores no score, and in the backward one that stores ds whole;
many of bf16 do the same by slabs of rows (``kernels/logsumexp.py``). Inside, a log-sum is kept as (maximum, log of the
sum over it), because a loss is the difference of two large numbers and the maximum falls out of it exactly.
"""

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels._library import Function, define, last_derivative
from gssf_kernels.dense import chunks, keeps, triangle, unit_of
from gssf_kernels.precision import accumulation_dtype


def logsumexp_scores(a: Tensor, b: Tensor, *, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """``(log Σ_j e^{κ s_ij} [N], log Σ_i e^{κ s_ij} [M])`` with ``s = a bᵀ``, without storing s.

    Args:
        a: [N, D] float.
        b: [M, D] of a's dtype and device; any M.
        scale: κ, a number > 0 or a scalar tensor on a's device (its value is not looked at).

    Returns:
        row_lse [N] and col_lse [M], fp32 (fp64 for fp64), differentiable once in a, b and scale. -inf where there is
        nothing to sum; NaN and infinities propagate as in ``torch.logsumexp``.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product forward, three backward; half of each where b is a; on the CPU two backward where s takes at most
    1 MiB, which is then held. Extra memory: one chunk of scores (16 MiB on the CPU) besides the gradients, and on the
    CPU an fp32 copy of b (of bf16 where there is a unit for it), two in the backward.
    """
    a, b = _checks.autocast(a, b)
    _checks.sides(a, b, "a", "b", paired=False)
    scale = _checks.scalar_or_number(scale, "scale", a, positive=True)
    row_max, row_log, col_max, col_log, _ = paired_logsumexp(a, b, scale)
    return row_max + row_log, col_max + col_log


def paired_logsumexp(a: Tensor, b: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(row_max, row_log [N], col_max, col_log [M], pair [min(N, M)])``, ``pair_i = t_ii``.

    The maxima are constants to autograd: the whole gradient of a log-sum goes through its logarithm.
    """
    given, constant = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    keep = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (a, b, scale))
    return _LogSumExp.apply(a, None if b is a else b, given, constant, keep)[:5]


class _LogSumExp(Function):
    @staticmethod
    def forward(a, b, scale, constant, keep):
        return torch.ops.gssf.logsumexp_scores(a, b, scale, constant, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.constant, _ = inputs
        row_max, row_log, col_max, col_log, _, kept = output
        ctx.mark_non_differentiable(row_max, col_max, kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, row_max, row_log, col_max, col_log, kept)

    @staticmethod
    def backward(ctx, _row_max, drow, _col_max, dcol, dpair, _kept):
        (a, b, scale, *lines, kept), needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        op = torch.ops.gssf.logsumexp_scores_backward
        found = last_derivative(op, drow, dcol, dpair, a, b, scale, ctx.constant, *lines, needs, kept)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None)


def _forward(a, b, scale, constant, keep=False):
    dtype, n = accumulation_dtype(a.dtype), a.shape[0]
    scale = a.new_full((), constant, dtype=dtype) if scale is None else scale
    m = n if b is None else b.shape[0]
    row_max, row_sum, pair = (a.new_empty(size, dtype=dtype) for size in (n, n, min(n, m)))
    col_max, col_sum = a.new_full((m,), -torch.inf, dtype=dtype), a.new_zeros(m, dtype=dtype)
    kept = a.new_empty((n, m) if keep and keeps(a, b) else 0, dtype=dtype)

    def visit(s, first):
        rows = slice(first, first + s.shape[0])
        if kept.numel():
            kept[rows] = s
        torch.mul(s.diagonal(first), scale, out=pair[rows])
        torch.ops.gssf.logsumexp_pass(s, scale, row_max[rows], row_sum[rows], col_max, col_sum)

    def visit_half(scores, first):
        (s,) = scores
        count = s.shape[0]
        rows, beyond = slice(first, first + count), slice(first + count, n)
        torch.mul(s.diagonal(), scale, out=pair[rows])
        own, rest = row_max.new_empty(2, count), row_max.new_empty(2, count)
        nothing = (row_max.new_full((count,), -torch.inf), row_max.new_zeros(count))
        torch.ops.gssf.logsumexp_pass(s[:, :count], scale, *own, *nothing)
        torch.ops.gssf.logsumexp_pass(s[:, count:], scale, *rest, col_max[beyond], col_sum[beyond])
        # of a row: what lies beyond its square, in it, and before it, where it was a column
        merged = _together(*(torch.stack(t) for t in zip(rest, own, (col_max[rows], col_sum[rows]), strict=True)))
        row_max[rows], row_sum[rows] = merged

    if b is None:
        triangle((a,), visit_half, False)
        col_max, col_sum = row_max.clone(), row_sum.clone()
    else:
        chunks(a, b, visit)
    return row_max, row_sum.log(), col_max, col_sum.log(), pair, kept


def _together(maxima, sums):
    """(max, Σ e^(· − max)) [K] of those of several parts [P, K]; +inf stands for any maximum that is not finite."""
    new = maxima.amax(0)
    shift = torch.where(new.isfinite(), new, 0)
    return new, torch.where(maxima == new, sums, sums * torch.exp(maxima - shift)).sum(0)


def _backward(drow, dcol, dpair, a, b, scale, constant, row_max, row_log, col_max, col_log, needs, kept=None):
    scale = row_max.new_full((), constant) if scale is None else scale
    # Where all is -inf, e^{t − l − l} with the least number l is the 0 that belongs there.
    least = torch.finfo(row_max.dtype).min
    rows, cols = ([t.clamp_min(least) for t in line] for line in ((row_max, row_log), (col_max, col_log)))
    unit = unit_of(a.dtype, drow, dcol, dpair)
    if unit is not None:
        drow, dcol, dpair = (g / unit if g is not None else None for g in (drow, dcol, dpair))
    if b is None and (drow is not None or dcol is not None):  # both belong to the same lines
        drow = dcol = sum(g for g in (drow, dcol) if g is not None)
    drow, dcol = (g.contiguous() if g is not None else None for g in (drow, dcol))

    along = a.new_zeros(a.shape[0], dtype=scale.dtype)  # [N] Σ_j ds_ij s_ij, what the scale gets

    def visit(s, first, start=0):
        """s [R, :] of rows from `first` on and columns from `start` on becomes ds; Σ_j ds_ij s_ij of its rows."""
        part, columns = slice(first, first + s.shape[0]), slice(start, start + s.shape[1])
        found = along.new_empty(s.shape[0])
        row_grad = drow[part] if drow is not None else None
        col_grad = dcol[columns] if dcol is not None else None
        torch.ops.gssf.softmax_pass(
            s, scale, *(t[part] for t in rows), row_grad, *(t[columns] for t in cols), col_grad, found
        )
        return found

    def visit_chunk(s, first):
        diagonal = s.diagonal(first)
        part = slice(first, first + diagonal.shape[0])
        pair = diagonal * dpair[part] if dpair is not None else None
        along[first : first + s.shape[0]] = visit(s, first)
        if pair is not None:
            diagonal.add_(dpair[part])
            along[part] += pair

    def visit_half(scores, first):  # of E = ds + dsᵀ
        (s,) = scores
        count = s.shape[0]
        part = slice(first, first + count)
        pair = s.diagonal() * dpair[part] if dpair is not None else None
        along[part] = visit(s[:, :count], first, first) / 2
        if count < s.shape[1]:
            along[part] += visit(s[:, count:], first, first + count)
        if pair is not None:
            s.diagonal().add_(dpair[part], alpha=2)
            along[part] += pair

    if b is None:
        da, db = triangle((a,), visit_half, needs[0]), None
    else:
        known = kept if kept is not None and kept.numel() else None
        da, db = chunks(a, b, visit_chunk, needs[:2], known)  # of t: κ is still to come
    factor, total = scale, along.sum(dtype=torch.float64)
    if unit is not None:
        factor, total = scale * unit, total * unit
    return (
        da.mul_(factor).to(a.dtype) if da is not None else a.new_empty(0),
        db.mul_(factor).to(a.dtype) if db is not None else a.new_empty(0),
        total.to(scale.dtype) if needs[2] else scale.new_empty(0),
    )


def _fake(a, b, scale, constant, keep=False):
    n, dtype = a.shape[0], accumulation_dtype(a.dtype)
    m = n if b is None else b.shape[0]
    kept = (n, m) if keep and keeps(a, b) else 0
    return tuple(a.new_empty(size, dtype=dtype) for size in (n, n, m, m, torch.sym_min(n, m), kept))


def _fake_backward(drow, dcol, dpair, a, b, scale, constant, row_max, row_log, col_max, col_log, needs, kept=None):
    return tuple(
        (row_max if k == 2 else a).new_empty(t.shape if need and t is not None else 0)
        for k, (t, need) in enumerate(zip((a, b, scale), needs, strict=True))
    )


def _logsumexp_pass(s, scale, row_max, row_sum, col_max, col_sum):
    t = s * scale
    _merge(row_max.fill_(-torch.inf), row_sum.zero_(), t, 1)
    _merge(col_max, col_sum, t, 0)


def _merge(maximum, total, t, dim):
    """(maximum, total of e^{· − maximum}) with those of t along dim, in place."""
    if t.shape[dim] == 0:
        return
    new = torch.maximum(maximum, t.amax(dim))
    shift = torch.where(new.isfinite(), new, 0)
    sums = torch.exp(t - shift.unsqueeze(dim)).sum(dim)
    # all NaN, or an infinity: its sum stays above what comes later
    before = torch.where(maximum == new, total, total * torch.exp(maximum - shift))
    total.copy_(before + sums)
    maximum.copy_(torch.where(new.isnan(), torch.inf, new))


def _softmax_pass(s, scale, row_max, row_log, row_grad, col_max, col_log, col_grad, along):
    t = s * scale
    ds = torch.zeros_like(s)
    if row_grad is not None:
        ds += row_grad[:, None] * torch.exp((t - row_max[:, None]) - row_log[:, None])
    if col_grad is not None:
        ds += col_grad * torch.exp((t - col_max) - col_log)
    along.copy_((ds * s).sum(1))
    s.copy_(ds)


def _fake_pass(*_):
    return None


define(
    "logsumexp_scores(Tensor a, Tensor? b, Tensor? scale, float constant, bool keep=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
    triton="logsumexp.logsumexp_scores",
    through="logsumexp_pass",
)
define(
    "logsumexp_scores_backward(Tensor? drow, Tensor? dcol, Tensor? dpair, Tensor a, Tensor? b, Tensor? scale, "
    "float constant, Tensor row_max, Tensor row_log, Tensor col_max, Tensor col_log, bool[] needs, "
    "Tensor? kept=None) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_fake_backward,
    triton="logsumexp.logsumexp_scores_backward",
    through="softmax_pass",
)
define(
    "logsumexp_pass(Tensor s, Tensor scale, Tensor(a!) row_max, Tensor(b!) row_sum, Tensor(c!) col_max, "
    "Tensor(d!) col_sum) -> ()",
    reference=_logsumexp_pass,
    fake=_fake_pass,
    triton="dense.logsumexp_pass",
)
define(
    "softmax_pass(Tensor(a!) s, Tensor scale, Tensor row_max, Tensor row_log, Tensor? row_grad, Tensor col_max, "
    "Tensor col_log, Tensor? col_grad, Tensor(b!) along) -> ()",
    reference=_softmax_pass,
    fake=_fake_pass,
    triton="dense.softmax_pass",
)
