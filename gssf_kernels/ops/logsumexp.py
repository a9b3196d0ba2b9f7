"""Log-sum-exp of the rows and columns of ``t = κ a bᵀ``, in one product that stores no matrix.

    row_lse_i = log Σ_j e^{t_ij},   col_lse_j = log Σ_i e^{t_ij}
    dL/dt_ij = row_grad_i e^{t_ij − row_lse_i} + col_grad_j e^{t_ij − col_lse_j}

Both directions come from one sweep: a row is complete within its chunk, a column is merged across chunks with a running
maximum. The backward makes every chunk again (:mod:`gssf_kernels.dense`): 4 products in all, 3 on the CPU where s is so
small that it is kept (1 MiB). Where b is a, t is symmetric and half of them do. Small problems on a GPU, where launches
are what a step costs, take two each way: a sweep that stores no score, and in the backward one that stores ds whole;
many of bf16 do the same by slabs of rows (``triton/logsumexp.py``). Inside, a log-sum is kept as (maximum, log of the
sum over it), because a loss is the difference of two large numbers and the maximum falls out of it exactly.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.dense import chunks, keeps, triangle, unit_of
from gssf_kernels.ops.score_functions import ByLabel, logit, members
from gssf_kernels.plan import accumulation_dtype


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


def scale_of(scale: Tensor | float | _checks.Logarithm) -> tuple[Tensor | None, float | None]:
    """(scale, constant) as the ops take κ: a tensor and 1, or None and a number; a tensor and None is its logarithm."""
    if isinstance(scale, _checks.Logarithm):
        return scale.tensor, None
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)


def kappa_of(scale: Tensor | None, constant: float | None) -> Any:
    """The κ that those stand for."""
    if scale is None:
        return constant
    return scale.exp() if constant is None else scale


def paired_logsumexp(a: Tensor, b: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(row_max, row_log [N], col_max, col_log [M], positive_logit [min(N, M)])``, the last t_ii.

    The maxima are constants to autograd: the whole gradient of a log-sum goes through its logarithm.
    """
    tensor, constant = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    keep = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (a, b, scale))
    return _LogSumExp.apply(*Call(a, None if b is a else b, tensor, constant, keep))[:5]


class LabelledSides(NamedTuple):
    """The factors of s = a bᵀ and their labels, checked."""

    a: Tensor  # [N, D]
    b: Tensor  # [M, D], or a itself
    a_labels: Tensor  # [N] int64
    b_labels: Tensor  # [M] int64
    leave_out: bool  # whether row i and column i are one thing, which is neither a positive nor a negative


def logsumexp_by_label(
    sides: LabelledSides, score: str, constants: list[float], bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(row_max, row_log) [2, N]`` of the rows' positives and of their negatives, each with the logit of ``score``.

    bounds: [2, N], a positive counts only below bounds[0, i] and a negative above bounds[1, i]. -inf and -inf where
    nothing counts. The maxima are constants to autograd.
    """
    keep = torch.is_grad_enabled() and (sides.a.requires_grad or sides.b.requires_grad)
    logit = None, 1.0, keep, score, constants
    labels = distinct(sides.a_labels, sides.b_labels)
    call = Call._make((sides.a, None if sides.b is sides.a else sides.b, *logit, *labels, bounds, sides.leave_out))
    return _LogSumExp.apply(*call)[:2]


class Call(NamedTuple):
    """Log-sums of the rows and columns of t(s), s = a bᵀ: over all scores, or by label over two classes."""

    a: Tensor  # [N, D]
    b: Tensor | None  # [M, D], or None: a
    scale: Tensor | None  # κ, a scalar, or None: constant is
    constant: float
    keep: bool = False  # hold s for a backward, if it is small
    score: str = "scaled"  # as in `ByLabel`
    constants: list[float] = []  # noqa: RUF012
    a_labels: Tensor | None = None  # [N] int64
    b_labels: Tensor | None = None  # [M] int64
    bounds: Tensor | None = None  # [2, N]
    leave_out: bool = False

    @property
    def kappa(self) -> Tensor:
        """κ as a scalar tensor."""
        if self.scale is not None:
            return self.scale
        return self.a.new_full((), self.constant, dtype=accumulation_dtype(self.a.dtype))

    @property
    def by_label(self) -> ByLabel:
        """How scores become logits, of all rows and columns; labels become numbers from 0 on, which fit every lane."""
        if self.a_labels is None or self.b_labels is None:
            return ByLabel()
        table = torch.cat((self.a_labels, self.b_labels)).sort().values
        row_labels, col_labels = (torch.searchsorted(table, t.contiguous()) for t in (self.a_labels, self.b_labels))
        bounds = (self.bounds, self.bounds if self.b is None else None)
        return ByLabel(self.score, self.constants, row_labels, col_labels, *bounds, 0, self.leave_out)

    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Shapes of the rows' statistics and of the columns', and how many pairs (i, i) there are."""
        n = self.a.shape[0]
        m = n if self.b is None else self.b.shape[0]
        if self.score != "scaled":
            return (2, n), (0,), 0
        return (n,), (m,), torch.sym_min(n, m)


class BackwardCall(NamedTuple):
    """The gradients of a, b and κ from those of the logarithms and of the pairs' logits."""

    drow: Tensor | None  # of row_log
    dcol: Tensor | None  # of col_log
    dpositive: Tensor | None  # of the pairs' logits
    a: Tensor
    b: Tensor | None
    scale: Tensor | None
    constant: float
    row_max: Tensor
    row_log: Tensor
    col_max: Tensor
    col_log: Tensor
    needs: list[bool]  # for a, b and scale
    kept: Tensor | None = None
    score: str = "scaled"
    constants: list[float] = []  # noqa: RUF012
    a_labels: Tensor | None = None
    b_labels: Tensor | None = None
    bounds: Tensor | None = None
    leave_out: bool = False

    @property
    def forward(self) -> Call:
        """What the gradients are of."""
        sides = self.a, self.b, self.scale, self.constant, False
        return Call(*sides, self.score, self.constants, self.a_labels, self.b_labels, self.bounds, self.leave_out)


class _LogSumExp(Function):
    call = Call

    @staticmethod
    def forward(*arguments):
        return torch.ops.gssf.logsumexp_scores(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        call = Call(*inputs)
        row_max, row_log, col_max, col_log, _, kept = output
        ctx.mark_non_differentiable(row_max, col_max, kept)
        ctx.set_materialize_grads(False)
        ctx.constant, ctx.by_label = call.constant, (call.score, call.constants, call.leave_out)
        labels = call.a_labels, call.b_labels, call.bounds
        ctx.save_for_backward(call.a, call.b, call.scale, row_max, row_log, col_max, col_log, kept, *labels)

    @staticmethod
    def backward(ctx, _row_max, drow, _col_max, dcol, dpositive, _kept):
        a, b, scale, *statistics, kept, a_labels, b_labels, bounds = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        score, constants, leave_out = ctx.by_label
        labels = score, constants, a_labels, b_labels, bounds, leave_out
        sides = drow, dcol, dpositive, a, b, scale, ctx.constant
        call = BackwardCall._make((*sides, *statistics, needs, kept, *labels))
        grads = last_derivative(torch.ops.gssf.logsumexp_scores_backward, *call)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * (len(Call._fields) - 3))


def _by_chunks(call: Call) -> tuple[Tensor, ...]:
    a, dtype, scale, by_label = call.a, accumulation_dtype(call.a.dtype), call.kappa, call.by_label
    row_shape, _, pairs = call.sizes()
    n, m = a.shape[0], a.shape[0] if call.b is None else call.b.shape[0]
    row_max, row_sum = (a.new_empty(row_shape, dtype=dtype) for _ in range(2))
    positive_logit = a.new_empty(pairs, dtype=dtype)
    columns = (*row_shape[:-1], m)  # by label only where b is a: the columns' anchors are the rows' then
    needs_columns = call.b is None or by_label.classes == 1
    col_max, col_sum = a.new_full(columns, -torch.inf, dtype=dtype), a.new_zeros(columns, dtype=dtype)
    kept = a.new_empty((n, m) if call.keep and keeps(a, call.b) else 0, dtype=dtype)

    def statistics(s, rows, columns, first, out, col_out):
        torch.ops.gssf.logsumexp_pass(s, scale, *by_label.of(rows, columns, first), *out, *col_out)

    def visit(s, first):
        rows, columns = slice(first, first + s.shape[0]), slice(0, m)
        if kept.numel():
            kept[rows] = s
        if pairs:
            torch.mul(s.diagonal(first), scale, out=positive_logit[rows])
        col_out = (col_max, col_sum) if needs_columns else (None, None)
        statistics(s, rows, columns, first, (row_max[..., rows], row_sum[..., rows]), col_out)

    def visit_half(scores, first):
        (s,) = scores
        count = s.shape[0]
        rows, beyond = slice(first, first + count), slice(first + count, n)
        if pairs:
            torch.mul(s.diagonal(), scale, out=positive_logit[rows])
        square, rest = (row_max.new_empty(2, *row_shape[:-1], count) for _ in range(2))
        statistics(s[:, :count], rows, rows, 0, square, (None, None))
        statistics(s[:, count:], rows, beyond, -count, rest, (col_max[..., beyond], col_sum[..., beyond]))
        # of a row: what lies beyond its square, in it, and before it, where it was a column
        before = col_max[..., rows], col_sum[..., rows]
        row_max[..., rows], row_sum[..., rows] = _merged(
            *(torch.stack(t) for t in zip(rest, square, before, strict=True))
        )

    if call.b is None:
        triangle((a,), visit_half, False)
        col_max, col_sum = row_max.clone(), row_sum.clone()
    else:
        chunks(a, call.b, visit)
    if by_label.classes > 1:
        col_max, col_sum = col_max.new_empty(0), col_sum.new_empty(0)
    return row_max, row_sum.log(), col_max, col_sum.log(), positive_logit, kept


def _merged(maxima, sums):
    """(max, Σ e^(· − max)) of those of several parts [P, …]; +inf stands for any maximum that is not finite."""
    new = maxima.amax(0)
    shift = torch.where(new.isfinite(), new, 0)
    return new, torch.where(maxima == new, sums, sums * torch.exp(maxima - shift)).sum(0)


def _backward_by_chunks(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    a, b, needs, forward = call.a, call.b, call.needs, call.forward
    scale, by_label = forward.kappa, forward.by_label
    # Where all is -inf, e^{t − l − l} with the least number l is the 0 that belongs there.
    least = torch.finfo(call.row_max.dtype).min
    row_max, row_log, col_max, col_log = (t.clamp_min(least) for t in call[7:11])
    drow, dcol, dpositive = call.drow, call.dcol, call.dpositive
    if by_label.classes > 1:
        dcol = dpositive = None  # by label there are rows' statistics alone
    unit = unit_of(a.dtype, drow, dcol, dpositive)
    if unit is not None:
        drow, dcol, dpositive = (g / unit if g is not None else None for g in (drow, dcol, dpositive))
    if b is None and (drow is not None or dcol is not None):  # rows and columns are the same anchors
        both = [g for g in (drow, dcol) if g is not None]
        drow = dcol = both[0] if len(both) == 1 else both[0] + both[1]
        col_max, col_log = row_max, row_log
    drow, dcol = (g.contiguous() if g is not None else None for g in (drow, dcol))

    dscores_dot_s = a.new_zeros(a.shape[0], dtype=scale.dtype)  # [N] of each row, the gradient of the scale

    def of_part(statistics, part):
        return (t[..., part] if t is not None else None for t in statistics)

    def visit(s, rows, columns, first):
        """s becomes dscores; Σ_j ds_ij s_ij of its rows."""
        dot = dscores_dot_s.new_empty(s.shape[0])
        of_rows = of_part((row_max, row_log, drow), rows)
        of_columns = of_part((col_max, col_log, dcol) if dcol is not None else (None, None, None), columns)
        torch.ops.gssf.softmax_pass(s, scale, *by_label.of(rows, columns, first), *of_rows, *of_columns, dot)
        return dot

    def visit_chunk(s, first):
        rows = slice(first, first + s.shape[0])
        diagonal = s.diagonal(first)
        pairs = slice(first, first + diagonal.shape[0])
        of_pairs = diagonal * dpositive[pairs] if dpositive is not None else None
        dscores_dot_s[rows] = visit(s, rows, slice(0, s.shape[1]), first)
        if of_pairs is not None and dpositive is not None:
            diagonal.add_(dpositive[pairs])
            dscores_dot_s[pairs] += of_pairs

    def visit_half(scores, first):  # of dscores + dscoresᵀ
        (s,) = scores
        count = s.shape[0]
        rows, beyond = slice(first, first + count), slice(first + count, first + s.shape[1])
        of_pairs = s.diagonal() * dpositive[rows] if dpositive is not None else None
        dscores_dot_s[rows] = visit(s[:, :count], rows, rows, 0) / 2
        if count < s.shape[1]:
            dscores_dot_s[rows] += visit(s[:, count:], rows, beyond, -count)
        if of_pairs is not None and dpositive is not None:
            s.diagonal().add_(dpositive[rows], alpha=2)
            dscores_dot_s[rows] += of_pairs

    if b is None:
        da, db = triangle((a,), visit_half, needs[0]), None
    else:
        known = call.kept if call.kept is not None and call.kept.numel() else None
        da, db = chunks(a, b, visit_chunk, needs[:2], known)  # of t: κ is still to come
    factor, total = scale, dscores_dot_s.sum(dtype=torch.float64)
    if unit is not None:
        factor, total = scale * unit, total * unit
    return (
        da.mul_(factor).to(a.dtype) if da is not None else a.new_empty(0),
        db.mul_(factor).to(a.dtype) if db is not None else a.new_empty(0),
        total.to(scale.dtype) if needs[2] else scale.new_empty(0),
    )


def _fake(call: Call) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(call.a.dtype)
    rows, columns, pairs = call.sizes()
    n = call.a.shape[0]
    kept = (n, n if call.b is None else call.b.shape[0]) if call.keep and keeps(call.a, call.b) else 0
    return tuple(call.a.new_empty(size, dtype=dtype) for size in (rows, rows, columns, columns, pairs, kept))


def _fake_backward(call: BackwardCall) -> tuple[Tensor, ...]:
    return tuple(
        (call.row_max if k == 2 else call.a).new_empty(t.shape if need and t is not None else 0)
        for k, (t, need) in enumerate(zip((call.a, call.b, call.scale), call.needs, strict=True))
    )


class PassCall(NamedTuple):
    """Statistics of a chunk's rows, and of its columns merged with those of the chunks before."""

    s: Tensor  # [R, M] with adjacent columns
    scale: Tensor
    score: str
    constants: list[float]
    row_labels: Tensor | None
    col_labels: Tensor | None
    row_bounds: Tensor | None
    col_bounds: Tensor | None
    first: int
    leave_out: bool
    row_max: Tensor  # [R], by label [2, R]: written
    row_sum: Tensor  # Σ e^(t - row_max): written
    col_max: Tensor | None  # [M], by label [2, M]: merged; None: columns have no statistics
    col_sum: Tensor | None

    @property
    def by_label(self) -> ByLabel:
        return ByLabel(*self[2:10])


class SoftmaxPassCall(NamedTuple):
    """A chunk of scores into dL/dt (by label dL/ds), in place."""

    s: Tensor  # [R, M] with adjacent columns: written
    scale: Tensor
    score: str
    constants: list[float]
    row_labels: Tensor | None
    col_labels: Tensor | None
    row_bounds: Tensor | None
    col_bounds: Tensor | None
    first: int
    leave_out: bool
    row_max: Tensor
    row_log: Tensor
    row_grad: Tensor | None  # a direction without a gradient is left out
    col_max: Tensor | None
    col_log: Tensor | None
    col_grad: Tensor | None
    dscores_dot_s: Tensor  # [R]: written

    @property
    def by_label(self) -> ByLabel:
        return ByLabel(*self[2:10])


def _logsumexp_pass(call: PassCall) -> None:
    positive, row, col = members(call.s, call.by_label)
    t, _ = logit(call.s, call.scale, positive, call.by_label)
    call.row_max.fill_(-torch.inf)
    call.row_sum.zero_()
    for k, member in enumerate([None] if positive is None else [positive, ~positive]):

        def counted(t, counts, member=member):
            return t if member is None else torch.where(counts & member, t, -torch.inf)

        classes = (..., slice(None)) if member is None else (k,)
        _merge(call.row_max[classes], call.row_sum[classes], counted(t, row), 1)
        if call.col_max is not None and call.col_sum is not None:
            _merge(call.col_max[classes], call.col_sum[classes], counted(t, col), 0)


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


def _softmax_pass(call: SoftmaxPassCall) -> None:
    positive, row, col = members(call.s, call.by_label)
    t, slope = logit(call.s, call.scale, positive, call.by_label)
    ds = torch.zeros_like(call.s)
    directions: Any = ((call[10:13], row, 1), (call[13:16], col, 0))
    for statistics, counts, dim in directions:
        if statistics[2] is None:
            continue

        def share(*statistics):  # of each score in its row's, or column's, log-sum
            top, log, grad = (x.unsqueeze(dim) for x in statistics)  # noqa: B023
            return grad * torch.exp((t - top) - log)

        if positive is None:
            ds += share(*statistics)
        else:
            of_positives, of_negatives = (share(*(x[k] for x in statistics)) for k in (0, 1))
            ds += torch.where(counts, torch.where(positive, of_positives, of_negatives), 0)
    if positive is not None:
        ds *= slope
    call.dscores_dot_s.copy_((ds * call.s).sum(1))
    call.s.copy_(ds)


register(
    "logsumexp_scores",
    Call,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_by_chunks,
    fake=_fake,
    launcher="logsumexp.logsumexp_scores",
    plans=plan.logsumexp,
    through="logsumexp_pass",
)
register(
    "logsumexp_scores_backward",
    BackwardCall,
    "(Tensor, Tensor, Tensor)",
    composite=_backward_by_chunks,
    fake=_fake_backward,
    launcher="logsumexp.logsumexp_scores_backward",
    plans=plan.logsumexp,
    through="softmax_pass",
)
register(
    "logsumexp_pass",
    PassCall,
    "()",
    composite=_logsumexp_pass,
    fake=lambda call: None,
    launcher="logsumexp.logsumexp_pass",
    plans=plan.chunk_pass,
    mutates=("row_max", "row_sum", "col_max", "col_sum"),
)
register(
    "softmax_pass",
    SoftmaxPassCall,
    "()",
    composite=_softmax_pass,
    fake=lambda call: None,
    launcher="logsumexp.softmax_pass",
    plans=plan.chunk_pass,
    mutates=("s", "dscores_dot_s"),
)
