"""Log-sum-exp of the rows and columns of ``t = κ a bᵀ``, in one product that stores no matrix.

    row_lse_i = log Σ_j e^{t_ij},   col_lse_j = log Σ_i e^{t_ij}
    dL/dt_ij = row_grad_i e^{t_ij − row_lse_i} + col_grad_j e^{t_ij − col_lse_j}

One sweep computes both directions. A row is complete within its chunk; the columns' statistics are merged across chunks
with a running maximum. The backward computes every chunk again (:mod:`gssf_kernels.dense`). That makes 4 products in
all, or 3 on the CPU if s is at most 1 MiB, because it is then kept. If b is a, t is symmetric and only the upper
triangle is computed. On a GPU (``triton/logsumexp.py``), a small problem takes two launches in each pass, and its
backward stores all dscores. A large bf16 problem does the same in row panels.

A log-sum-exp is stored as two numbers: the maximum, and the log of Σ e^{t − maximum}. A loss is the difference of two
large numbers, from which the maximum cancels exactly.

Source: the running maximum, arXiv 1805.02867.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import Function, distinct, last_derivative, may_keep, register
from gssf_kernels.dense import chunks, kept_shape, triangle, unit_of
from gssf_kernels.ops.masks import Selection, least
from gssf_kernels.ops.score_functions import ByLabel
from gssf_kernels.plan import accumulation_dtype


def logsumexp_scores(
    a: Tensor,
    b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    exclude_self: bool = False,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    same_id: str = "positive",
) -> tuple[Tensor, Tensor]:
    """``(log Σ_j e^{κ s_ij} [N], log Σ_i e^{κ s_ij} [M])`` with ``s = a bᵀ``, without storing s.

    Args:
        a: [N, D] float.
        b: [M, D] of a's dtype and device; any M.
        scale: κ, a number > 0 or a scalar tensor on a's device; never synchronises.
        exclude_self: leave the scores (i, i) out, as for one set of rows compared with itself.
        a_ids: [N] integers. If N = M, the ids of one input serve both.
        b_ids: [M] integers.
        same_id: "positive": ids change nothing. "ignore": scores of equal id are left out, but for (i, i).

    Returns:
        row_lse [N] and col_lse [M], fp32 (fp64 for fp64), differentiable once in a, b and scale. An empty sum gives
        -inf. NaN and infinities propagate as in ``torch.logsumexp``.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product forward, three backward; half of each if b is a. On the CPU two backward if s takes at most 1 MiB,
    which is then kept. Extra memory: one chunk of scores (16 MiB on the CPU) besides the gradients. On the CPU also an
    fp32 copy of b (bf16 on a CPU with a unit for it), two in the backward.
    """
    a, b = _checks.autocast(a, b)
    _checks.embeddings(a, b, "a", "b", paired=False)
    scale = _checks.scalar_or_number(scale, "scale", a, positive=True)
    _checks.flag(exclude_self, "exclude_self")
    _checks.choice(same_id, "same_id", SAME_ID)
    a_ids, b_ids = _checks.ids(a_ids, b_ids, a, b, "a_ids", "b_ids")
    ignore = same_id == "ignore" and a_ids is not None
    a_ids, b_ids = (a_ids, b_ids) if ignore else (None, None)
    selection = Selection(exclude_self=exclude_self, a_ids=a_ids, b_ids=b_ids, ignore=ignore)
    row_max, row_log, col_max, col_log, _ = paired_logsumexp(a, b, scale, selection)
    return row_max + row_log, col_max + col_log


def scale_of(scale: Tensor | float | _checks.Logarithm) -> tuple[Tensor | None, float | None]:
    """κ as the two arguments (scale, constant) of an op.

    κ a tensor: (κ, 1.0). κ a number: (None, κ). A tensor that stores log κ: (log κ, None).
    """
    if isinstance(scale, _checks.Logarithm):
        return scale.tensor, None
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)


def kappa_of(scale: Tensor | None, constant: float | None) -> Any:
    """κ from the arguments that :func:`scale_of` makes."""
    if scale is None:
        return constant
    return scale.exp() if constant is None else scale


SAME_ID = ("positive", "ignore")


def paired_logsumexp(
    a: Tensor, b: Tensor, scale: Tensor | float, selection: Selection | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(row_max, row_log [N], col_max, col_log [M], positive_logit [min(N, M)])``, where positive_logit_i is t_ii.

    The maxima are constants to autograd: the whole gradient of a log-sum-exp goes through row_log and col_log.
    """
    selection = Selection() if selection is None else selection
    tensor, constant = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    keep = may_keep(a, b, scale)
    symmetric = b is a and selection._replace(exclude_self=False).plain
    a_ids, b_ids = distinct(selection.a_ids, selection.b_ids)
    selection = selection._replace(a_ids=a_ids, b_ids=b_ids)
    a, b = distinct(a, None if symmetric else b)
    labels: tuple = ("scaled", [], None, None, None, False)
    return _LogSumExp.apply(*Call._make((a, b, tensor, constant, keep, *labels, *selection)))[:5]


class LabelledFactors(NamedTuple):
    """The factors of s = a bᵀ and their labels, checked."""

    a: Tensor  # [N, D]
    b: Tensor  # [M, D], or a itself
    a_labels: Tensor  # [N] int64
    b_labels: Tensor  # [M] int64
    leave_out: bool  # row i and column i are the same sample: s_ii is neither a positive nor a negative


def logsumexp_by_label(
    factors: LabelledFactors, score: str, constants: list[float], bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(row_max, row_log)`` [2, N]: of the logits of each row's positives, and of its negatives.

    score: the name of t(s) in `score_functions.LOGITS`, with its constants.
    bounds: [2, N]. A positive of row i counts only if it scores less than bounds[0, i], a negative only if it scores
    greater than bounds[1, i]. Where none counts, both numbers are -inf. The maxima are constants to autograd.
    """
    a, b = factors.a, factors.b
    keep = may_keep(a, b)
    logit = None, 1.0, keep, score, constants
    labels = distinct(factors.a_labels, factors.b_labels)
    call = Call._make((a, None if b is a else b, *logit, *labels, bounds, factors.leave_out, *Selection()))
    return _LogSumExp.apply(*call)[:2]


class Call(NamedTuple):
    """Log-sum-exps of the rows and columns of t(s), s = a bᵀ: over all scores, or over positives and over negatives."""

    a: Tensor  # [N, D]
    b: Tensor | None  # [M, D]; None: b is a
    scale: Tensor | None  # κ, a scalar; None: κ is constant
    constant: float
    keep: bool = False  # keep s for the backward, if it is small
    score: str = "scaled"  # as in `ByLabel`
    constants: list[float] = []  # noqa: RUF012
    a_labels: Tensor | None = None  # [N] int64
    b_labels: Tensor | None = None  # [M] int64
    bounds: Tensor | None = None  # [2, N]
    leave_out: bool = False
    # Which scores take part, and what is added to the logits; see `Selection`.
    columns: bool = True
    exclude_self: bool = False
    a_ids: Tensor | None = None
    b_ids: Tensor | None = None
    col_bias: Tensor | None = None
    paired: bool = True
    ignore: bool = False
    pair_rows: Tensor | None = None
    pair_cols: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None

    @property
    def selection(self) -> Selection:
        return Selection._make(self[-11:])

    @property
    def general(self) -> bool:
        """Whether only the loop over chunks computes it: `Selection.plain` denied, written out, for plans ask often."""
        selective = self.exclude_self or self.ignore or not self.columns
        return selective or any(t is not None for t in (self.col_bias, self.row_limit, self.col_limit))

    @property
    def kappa(self) -> Tensor:
        """κ as a scalar tensor."""
        if self.scale is not None:
            return self.scale
        return self.a.new_full((), self.constant, dtype=accumulation_dtype(self.a.dtype))

    @property
    def by_label(self) -> ByLabel:
        """How scores become logits, for all rows and columns.

        Labels are replaced by their index among all labels, which fits vector lanes of any width.
        """
        if self.a_labels is None or self.b_labels is None:
            return ByLabel()
        labels = torch.cat((self.a_labels, self.b_labels)).sort().values
        row_labels, col_labels = (torch.searchsorted(labels, t.contiguous()) for t in (self.a_labels, self.b_labels))
        bounds = (self.bounds, self.bounds if self.b is None else None)
        return ByLabel(self.score, self.constants, row_labels, col_labels, *bounds, 0, self.leave_out)

    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """The shape of a row statistic, that of a column statistic, and how many pairs (i, i) there are."""
        n = self.a.shape[0]
        m = n if self.b is None else self.b.shape[0]
        if self.score != "scaled":
            return (2, n), (0,), 0
        return (n,), (m if self.columns else 0,), torch.sym_min(n, m)


class BackwardCall(NamedTuple):
    """The gradients with respect to a, b and scale."""

    drow: Tensor | None  # dL/d row_log
    dcol: Tensor | None  # dL/d col_log
    dpositive: Tensor | None  # dL/d positive_logit
    a: Tensor
    b: Tensor | None
    scale: Tensor | None
    constant: float
    row_max: Tensor
    row_log: Tensor
    col_max: Tensor
    col_log: Tensor
    needs: list[bool]  # whether a, b and scale need a gradient
    kept: Tensor | None = None  # s [N, M], if the forward kept it; else None or empty
    score: str = "scaled"
    constants: list[float] = []  # noqa: RUF012
    a_labels: Tensor | None = None
    b_labels: Tensor | None = None
    bounds: Tensor | None = None
    leave_out: bool = False
    # Which scores take part, and what is added to the logits; see `Selection`.
    columns: bool = True
    exclude_self: bool = False
    a_ids: Tensor | None = None
    b_ids: Tensor | None = None
    col_bias: Tensor | None = None
    paired: bool = True
    ignore: bool = False
    pair_rows: Tensor | None = None
    pair_cols: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None

    @property
    def selection(self) -> Selection:
        return Selection._make(self[-11:])

    @property
    def general(self) -> bool:
        return self.forward.general

    @property
    def forward(self) -> Call:
        """The arguments of the forward."""
        inputs = self.a, self.b, self.scale, self.constant, False
        labels = self.score, self.constants, self.a_labels, self.b_labels, self.bounds, self.leave_out
        return Call._make((*inputs, *labels, *self.selection))


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
        labels, selection = (call.a_labels, call.b_labels, call.bounds), call.selection
        ctx.flags = selection.columns, selection.exclude_self, selection.paired, selection.ignore
        tensors = (*selection[2:5], *selection[7:])
        ctx.save_for_backward(call.a, call.b, call.scale, row_max, row_log, col_max, col_log, kept, *labels, *tensors)

    @staticmethod
    def backward(ctx, _row_max, drow, _col_max, dcol, dpositive, _kept):
        a, b, scale, *statistics, kept, a_labels, b_labels, bounds = ctx.saved_tensors[:11]
        columns, exclude_self, paired, ignore = ctx.flags
        a_ids, b_ids, col_bias, *mask = ctx.saved_tensors[11:]
        selection = columns, exclude_self, a_ids, b_ids, col_bias, paired, ignore, *mask
        needs = list(ctx.needs_input_grad[:3])
        score, constants, leave_out = ctx.by_label
        labels = score, constants, a_labels, b_labels, bounds, leave_out
        inputs = drow, dcol, dpositive, a, b, scale, ctx.constant
        call = BackwardCall._make((*inputs, *statistics, needs, kept, *labels, *selection))
        grads = last_derivative(torch.ops.gssf.logsumexp_scores_backward, *call)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * (len(Call._fields) - 3))


def _by_chunks(call: Call) -> tuple[Tensor, ...]:
    a, dtype, scale, by_label = call.a, accumulation_dtype(call.a.dtype), call.kappa, call.by_label
    row_shape, _, pairs = call.sizes()
    n, m = a.shape[0], a.shape[0] if call.b is None else call.b.shape[0]
    row_max, row_sum = (a.new_empty(row_shape, dtype=dtype) for _ in range(2))
    positive_logit = a.new_empty(pairs, dtype=dtype)
    columns = (*row_shape[:-1], m)  # by label they are used only if b is a, where columns and rows are the same anchors
    needs_columns = call.b is None or (by_label.classes == 1 and call.columns)
    selection = call.selection
    col_max, col_sum = a.new_full(columns, -torch.inf, dtype=dtype), a.new_zeros(columns, dtype=dtype)
    kept = a.new_empty(kept_shape(a, call.b, call.keep), dtype=dtype)

    def statistics(s, rows, columns, first, out, col_out):
        torch.ops.gssf.logsumexp_pass(s, scale, *by_label.part(rows, columns, first), *out, *col_out)

    def visit(s, first):
        rows, columns = slice(first, first + s.shape[0]), slice(0, m)
        if kept.numel():
            kept[rows] = s
        if pairs:
            torch.mul(s.diagonal(first), scale, out=positive_logit[rows])
        col_out, row_out = (col_max, col_sum) if needs_columns else (None, None), _parts((row_max, row_sum), rows)
        if selection.apart:  # the columns' pass overwrites statistics of rows that nobody reads
            statistics(selection.logits(s, first, "cols", scale), rows, columns, first, row_out, col_out)
            col_out = (None, None)
        s = s if selection.plain else selection.logits(s, first, "rows", scale)
        statistics(s, rows, columns, first, row_out, col_out)

    def visit_half(scores, first):
        (s,) = scores
        count = s.shape[0]
        rows, beyond = slice(first, first + count), slice(first + count, n)
        if pairs:
            torch.mul(s.diagonal(), scale, out=positive_logit[rows])
        if selection.exclude_self:
            s.diagonal().fill_(least(s.dtype))
        # The scores of a row come in three parts: right of the square on the diagonal, the square, and left of it. The
        # last were columns of earlier chunks.
        square, right = (row_max.new_empty(2, *row_shape[:-1], count) for _ in range(2))
        statistics(s[:, :count], rows, rows, 0, square, (None, None))
        statistics(s[:, count:], rows, beyond, -count, right, (col_max[..., beyond], col_sum[..., beyond]))
        left = col_max[..., rows], col_sum[..., rows]
        row_max[..., rows], row_sum[..., rows] = _merged(
            *(torch.stack(t) for t in zip(right, square, left, strict=True))
        )

    if call.b is None:
        triangle((a,), visit_half, False)
        col_max, col_sum = row_max.clone(), row_sum.clone()
    else:
        chunks(a, call.b, visit)
    if by_label.classes > 1 or not call.columns:
        col_max, col_sum = col_max.new_empty(0), col_sum.new_empty(0)
    return row_max, row_sum.log(), col_max, col_sum.log(), positive_logit, kept


def _parts(statistics, part: slice):
    """``t[..., part]`` of each, or t itself if that is all of it: a small batch is one chunk, where slicing shows."""
    count = part.stop - part.start
    return [t if t is None or t.shape[-1] == count else t.narrow(-1, part.start, count) for t in statistics]


def _merged(maxima, sums):
    """Merge (maximum, Σ e^{t − maximum}) of P parts, [P, …] each. A maximum of +inf stands for NaN too."""
    maximum = maxima.amax(0)
    shift = torch.where(maximum.isfinite(), maximum, 0)
    return maximum, torch.where(maxima == maximum, sums, sums * torch.exp(maxima - shift)).sum(0)


def _backward_by_chunks(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    a, b, needs, forward = call.a, call.b, call.needs, call.forward
    scale, by_label = forward.kappa, forward.by_label
    # If all logits of a row are -inf, its maximum and log-sum are -inf too. Clamped to the lowest finite number l, they
    # give e^{t − l − l} = 0 for its scores.
    lowest = torch.finfo(call.row_max.dtype).min
    row_max, row_log, col_max, col_log = (t.clamp_min(lowest) for t in call[7:11])
    drow, dcol, dpositive = call.drow, call.dcol, call.dpositive
    selection = forward.selection
    if by_label.classes > 1:
        dcol = dpositive = None  # by label there are only row statistics
    if not selection.columns:
        dcol = None
    unit = unit_of(a.dtype, drow, dcol, dpositive)
    if unit is not None:
        drow, dcol, dpositive = (g / unit if g is not None else None for g in (drow, dcol, dpositive))
    if b is None and (drow is not None or dcol is not None):  # rows and columns are the same anchors
        directions = [g for g in (drow, dcol) if g is not None]
        drow = dcol = directions[0] if len(directions) == 1 else directions[0] + directions[1]
        col_max, col_log = row_max, row_log
    drow, dcol = (g.contiguous() if g is not None else None for g in (drow, dcol))

    dscores_dot_s = a.new_zeros(a.shape[0], dtype=scale.dtype)  # Σ_j ds_ij s_ij [N]; their sum is dL/dκ

    row_statistics = row_max, row_log, drow
    col_statistics = (col_max, col_log, dcol) if dcol is not None else (None, None, None)

    def visit(s, rows, columns, first, dot):
        """Replace s by dscores; write Σ_j ds_ij s_ij of its rows to dot."""
        row_part, col_part = _parts(row_statistics, rows), _parts(col_statistics, columns)
        torch.ops.gssf.softmax_pass(s, scale, *by_label.part(rows, columns, first), *row_part, *col_part, dot)
        return dot

    def visit_apart(s, rows, first, dot):
        """The same where the logits of the two directions differ: a pass for each."""
        columns, ds = slice(0, s.shape[1]), torch.zeros_like(s)
        for direction, statistics in (("rows", row_statistics), ("cols", col_statistics)):
            if statistics[2] is None:
                continue
            t, of_direction = selection.logits(s, first, direction, scale), torch.zeros_like(dot)
            by_direction = (statistics, None) if direction == "rows" else (None, statistics)
            row_part, col_part = (
                (None, None, None) if x is None else _parts(x, part)
                for x, part in zip(by_direction, (rows, columns), strict=True)
            )
            row_part = (*_parts(row_statistics[:2], rows), None) if row_part[2] is None else row_part
            torch.ops.gssf.softmax_pass(t, scale, *by_label, *row_part, *col_part, of_direction)
            dot += of_direction
            if selection.col_bias is not None and direction == "rows":
                dot -= t @ (selection.col_bias / scale)
            ds += t
        s.copy_(ds)

    def visit_chunk(s, first):
        rows = slice(first, first + s.shape[0])
        diagonal = s.diagonal(first)
        pairs = slice(first, first + diagonal.shape[0])
        pairs_dot = diagonal * dpositive[pairs] if dpositive is not None else None
        if selection.apart or selection.col_bias is not None:
            dot = torch.zeros_like(dscores_dot_s[rows])
            visit_apart(s, rows, first, dot)
            dscores_dot_s[rows] = dot
        else:
            s = s if selection.plain else selection.logits(s, first, "rows", scale)
            visit(s, rows, slice(0, s.shape[1]), first, dscores_dot_s[rows])
        if pairs_dot is not None and dpositive is not None:
            diagonal.add_(dpositive[pairs])
            dscores_dot_s[pairs] += pairs_dot

    def visit_half(scores, first):  # leaves dscores + dscoresᵀ
        (s,) = scores
        count = s.shape[0]
        rows, beyond = slice(first, first + count), slice(first + count, first + s.shape[1])
        pairs_dot = s.diagonal() * dpositive[rows] if dpositive is not None else None
        if selection.exclude_self:
            s.diagonal().fill_(least(s.dtype))
        dot, dot_beyond = dscores_dot_s.new_empty(2, count)
        dscores_dot_s[rows] = visit(s[:, :count], rows, rows, 0, dot) / 2
        if count < s.shape[1]:
            dscores_dot_s[rows] += visit(s[:, count:], rows, beyond, -count, dot_beyond)
        if pairs_dot is not None and dpositive is not None:
            s.diagonal().add_(dpositive[rows], alpha=2)
            dscores_dot_s[rows] += pairs_dot

    if b is None:
        da, db = triangle((a,), visit_half, needs[0]), None
    else:
        kept = call.kept if call.kept is not None and call.kept.numel() else None
        da, db = chunks(a, b, visit_chunk, needs[:2], kept)  # from dL/dt; multiplied by κ below
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
    kept = kept_shape(call.a, call.b, call.keep)
    return tuple(call.a.new_empty(size, dtype=dtype) for size in (rows, rows, columns, columns, pairs, kept))


def _fake_backward(call: BackwardCall) -> tuple[Tensor, ...]:
    return tuple(
        (call.row_max if k == 2 else call.a).new_empty(t.shape if need and t is not None else 0)
        for k, (t, need) in enumerate(zip((call.a, call.b, call.scale), call.needs, strict=True))
    )


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
