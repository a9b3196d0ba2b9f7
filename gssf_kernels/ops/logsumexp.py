"""Log-sum-exp of the rows and columns of ``t = κ a bᵀ``, in one product that stores no matrix.

    row_lse_i = log Σ_j e^{t_ij},   col_lse_j = log Σ_i e^{t_ij}
    dL/dt_ij = row_grad_i e^{t_ij − row_lse_i} + col_grad_j e^{t_ij − col_lse_j}

One sweep computes both directions. A row is complete within its chunk; the columns' statistics are merged across chunks
with a running maximum. The backward computes every chunk again (:mod:`gssf_kernels.dense`). That makes 4 products in
all, or 3 on the CPU if s is at most 1 MiB, because it is then kept. With the rows' log-sums alone and a b without
gradient, as in a queue of negatives, the forward computes ``Σ_j softmax_ij b_j``, from which the gradient follows: 2
products in all. If b is a, t is symmetric and only the upper triangle is computed. On a GPU (``triton/logsumexp.py``),
a small problem takes two launches in each pass, and its backward stores all dscores. A large bf16 problem does the same
in row panels.

A log-sum-exp is stored as two numbers: the maximum, and the log of Σ e^{t − maximum}. A loss is the difference of two
large numbers, from which the maximum cancels exactly.

Source: the running maximum, arXiv 1805.02867.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import Function, distinct, last_derivative, may_keep, register
from gssf_kernels.dense import kept_shape
from gssf_kernels.ops.logsumexp_chunks import by_chunks, gradients_by_chunks
from gssf_kernels.ops.masks import UNPAIRED, Selection
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


def kept_for(a: Tensor, b: Tensor, scale: Any, columns: bool) -> str:
    """What the forward keeps for the backward.

    "": nothing. "scores": s, if it is small. "means": ``Σ_j softmax_ij(t) b_j`` [N, D], from which the gradients of a
    and κ follow without another product, where b needs none and columns have no statistics.
    """
    if not may_keep(a, b, scale):
        return ""
    return "scores" if columns or b.requires_grad else "means"


def paired_logsumexp(
    a: Tensor, b: Tensor | None, scale: Tensor | float, selection: Selection | None = None, other: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(row_max, row_log [N], col_max, col_log [M], positive_logit [min(N, M)])``, where positive_logit_i is t_ii.

    The maxima are constants to autograd: the whole gradient of a log-sum-exp goes through row_log and col_log.
    b, other: as in `Call`; b may also be a itself.
    """
    selection = Selection() if selection is None else selection
    tensor, constant = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    keep = kept_for(a, a if b is None else b, scale, selection.columns)
    symmetric = b is None or (b is a and selection._replace(exclude_self=False).plain)
    a_ids, b_ids = distinct(selection.a_ids, selection.b_ids)
    selection = selection._replace(a_ids=a_ids, b_ids=b_ids)
    a, b = distinct(a, None if symmetric else b)
    labels: tuple = ("scaled", [], None, None, None, False)
    return LogSumExp.apply(*Call._make((a, b, tensor, constant, keep, *labels, other, *selection)))[:5]


class LabelledFactors(NamedTuple):
    """The factors of s = a bᵀ and their labels, checked."""

    a: Tensor  # [N, D]
    b: Tensor  # [M, D], or a itself
    a_labels: Tensor  # [N] int64
    b_labels: Tensor  # [M] int64
    leave_out: bool  # row i and column i are the same sample: s_ii is neither a positive nor a negative
    folded: Tensor | None = None  # a, if s is symmetric though b is not a; see `similarity.folded_factor`

    @property
    def symmetric(self) -> bool:
        return self.folded is not None

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(a, b, other) as in `Call`."""
        if self.folded is not None:
            return self.folded, None, self.b.detach()
        return self.a, None if self.b is self.a else self.b, None


def logsumexp_by_label(
    factors: LabelledFactors, score: str, constants: list[float], bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(row_max, row_log)`` [2, N]: of the logits of each row's positives, and of its negatives.

    score: the name of t(s) in `score_functions.LOGITS`, with its constants.
    bounds: [2, N]. A positive of row i counts only if it scores less than bounds[0, i], a negative only if it scores
    greater than bounds[1, i]. Where none counts, both numbers are -inf. The maxima are constants to autograd.
    """
    a, b, other = factors.operands()
    keep = "scores" if may_keep(factors.a, factors.b) else ""
    logit = None, 1.0, keep, score, constants
    labels = distinct(factors.a_labels, factors.b_labels)
    call = Call._make((a, b, *logit, *labels, bounds, factors.leave_out, other, *Selection()))
    return LogSumExp.apply(*call)[:2]


def _numbered(a_labels: Tensor | None, b_labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Labels as their index among all labels."""
    if a_labels is None or b_labels is None:
        return None, None
    labels = torch.cat((a_labels, b_labels)).sort().values
    return torch.searchsorted(labels, a_labels.contiguous()), torch.searchsorted(labels, b_labels.contiguous())


class Call(NamedTuple):
    """Log-sum-exps of the rows and columns of t(s), s = a bᵀ: over all scores, or over positives and over negatives."""

    a: Tensor  # [N, D]
    b: Tensor | None  # [M, D]; None: b is a
    scale: Tensor | None  # κ, a scalar; None: κ is constant
    constant: float
    keep: str = ""  # what to keep for the backward; see `kept_for`
    score: str = "scaled"  # as in `ByLabel`
    constants: list[float] = []  # noqa: RUF012
    a_labels: Tensor | None = None  # [N] int64
    b_labels: Tensor | None = None  # [M] int64
    bounds: Tensor | None = None  # [2, N]
    leave_out: bool = False
    # [N, D], for a symmetric s = a otherᵀ, whose gradient da is then all of it, (ds + dsᵀ) other; only without b.
    other: Tensor | None = None
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
        """Whether only the loop over chunks computes it: kernels know no left-out scores, biases and other factors."""
        selective = self.exclude_self or self.ignore or self.other is not None
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
        if self.selection.limited:
            same = (None, None) if self.ignore else (self.a_ids, self.b_ids)
            first = 0 if self.paired else UNPAIRED
            return ByLabel("limited", [], *_numbered(*same), self.row_limit, self.col_limit, first)
        if self.score == "scaled":
            return ByLabel()
        bounds = (self.bounds, self.bounds if self.b is None else None)
        labels = _numbered(self.a_labels, self.b_labels)
        return ByLabel(self.score, self.constants, *labels, *bounds, 0, self.leave_out)

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
    kept: Tensor | None = None  # what the forward kept; None or empty: nothing
    keep: str = ""
    score: str = "scaled"
    constants: list[float] = []  # noqa: RUF012
    a_labels: Tensor | None = None
    b_labels: Tensor | None = None
    bounds: Tensor | None = None
    leave_out: bool = False
    # [N, D], for a symmetric s = a otherᵀ, whose gradient da is then all of it, (ds + dsᵀ) other; only without b.
    other: Tensor | None = None
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
        inputs = self.a, self.b, self.scale, self.constant, ""
        labels = self.score, self.constants, self.a_labels, self.b_labels, self.bounds, self.leave_out, self.other
        return Call._make((*inputs, *labels, *self.selection))


class LogSumExp(Function):
    call: Any = Call

    @staticmethod
    def forward(*arguments):
        return torch.ops.gssf.logsumexp_scores(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        call = Call(*inputs)
        row_max, row_log, col_max, col_log, _, kept = output
        ctx.mark_non_differentiable(row_max, col_max, kept)
        ctx.set_materialize_grads(False)
        ctx.constant, ctx.keep, ctx.by_label = call.constant, call.keep, (call.score, call.constants, call.leave_out)
        labels, selection = (call.a_labels, call.b_labels, call.bounds), call.selection
        ctx.flags = selection.columns, selection.exclude_self, selection.paired, selection.ignore
        tensors = (*selection[2:5], *selection[7:], call.other)
        ctx.save_for_backward(call.a, call.b, call.scale, row_max, row_log, col_max, col_log, kept, *labels, *tensors)

    @staticmethod
    def backward(ctx, _row_max, drow, _col_max, dcol, dpositive, _kept):
        saved = ctx.saved_tensors  # read once: checkpointing without re-entrance forbids a second time
        a, b, scale, *statistics, kept, a_labels, b_labels, bounds = saved[:11]
        columns, exclude_self, paired, ignore = ctx.flags
        a_ids, b_ids, col_bias, *mask, other = saved[11:]
        selection = columns, exclude_self, a_ids, b_ids, col_bias, paired, ignore, *mask
        needs = list(ctx.needs_input_grad[:3])
        score, constants, leave_out = ctx.by_label
        labels = score, constants, a_labels, b_labels, bounds, leave_out, other
        inputs = drow, dcol, dpositive, a, b, scale, ctx.constant
        call = BackwardCall._make((*inputs, *statistics, needs, kept, ctx.keep, *labels, *selection))
        grads = last_derivative(torch.ops.gssf.logsumexp_scores_backward, *call)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * (len(Call._fields) - 3))


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
    composite=by_chunks,
    fake=_fake,
    launcher="logsumexp.logsumexp_scores",
    plans=plan.logsumexp,
    through="logsumexp_pass",
)
register(
    "logsumexp_scores_backward",
    BackwardCall,
    "(Tensor, Tensor, Tensor)",
    composite=gradients_by_chunks,
    fake=_fake_backward,
    launcher="logsumexp.logsumexp_scores_backward",
    plans=plan.logsumexp,
    through="softmax_pass",
)
