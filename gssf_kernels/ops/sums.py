"""Sums of a function of every score, ``Σ_ij f(κ s_ij + β)``, in one sweep that stores no score.

    rows_i = Σ_j f(κ s_ij + β),   relative to the pairs  Σ_j f(s_ij + β − s_ii) + Σ_k f(s_ki + β − s_ii)

f: hinge, softplus, abs or square. The whole gradient of one sum is known as soon as a chunk of scores is, so it is
taken in the forward pass where one is wanted: 3 products in all, 1 without. Only rows' sums, whose gradients have
weights of their own ("none"), make the chunks again. Where b is a, and rows and columns are alike, only the upper
triangle is computed: 1.5 products in all. Small problems on a GPU take a sweep and one kernel forward, and one back
("none": two; ``triton/sums.py``); many bf16 scores, but for "none", store dscores of one panel of rows at a time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.dense import chunks, triangle, unit_of
from gssf_kernels.ops.logsumexp import kappa_of, scale_of
from gssf_kernels.ops.score_functions import KINDS, pointwise
from gssf_kernels.plan import accumulation_dtype

POSITIVES = ("include", "exclude", "negate")


def sum_scores(
    a: Tensor,
    b: Tensor,
    kind: str,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    positives: str = "include",
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """``Σ_ij f(κ s_ij + β)`` with ``s = a bᵀ``, without storing s.

    Args:
        a: [N, D] float.
        b: [M, D] of a's dtype and device; any M.
        kind: f. "hinge" [t]₊, "softplus" log(1 + eᵗ), "abs" |t| (of derivative 0 at 0) or "square" t².
        scale, bias: κ and β, numbers (κ > 0) or scalar tensors on a's device; never synchronises.
        positives: pairs (i, i) and those of equal id are like all others ("include"), left out ("exclude"), or give
            f(−κ s_ij − β) ("negate").
        a_ids: [N] int64. Ids of one side alone serve both when N = M.
        b_ids: [M] int64.
        reduction: "sum", or "none" for the sums of rows [N].

    Returns:
        fp32 (fp64 for fp64), differentiable once in a, b, scale and bias.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product; with a gradient two more ("none": three more, in the backward); where b is a and ``reduction``
    "sum", half of each. Extra memory: one chunk of scores besides the gradients, and on the CPU an fp32 copy of b (of
    bf16 where there is a unit for it), two with a gradient.
    """
    _checks.choice(kind, "kind", KINDS)
    _checks.choice(positives, "positives", POSITIVES)
    _checks.choice(reduction, "reduction", ("sum", "none"))
    a, b = _checks.autocast(a, b)
    _checks.sides(a, b, "a", "b", paired=False)
    a_ids, b_ids = _checks.ids(a_ids, b_ids, a, b, "a_ids", "b_ids")
    scale = _checks.scalar_or_number(scale, "scale", a, positive=True)
    bias = _checks.scalar_or_number(bias, "bias", a)
    return score_sums(a, b, Term(kind, positives, scale, bias), a_ids, b_ids, reduction)


class Term(NamedTuple):
    """``f(κ s + β)`` of a score."""

    kind: str  # f, of KINDS
    positives: str  # of POSITIVES
    scale: Tensor | float | _checks.Logarithm
    bias: Tensor | float


def score_sums(
    a: Tensor,
    b: Tensor,
    term: Term,
    a_ids: Tensor | None,
    b_ids: Tensor | None,
    reduction: str,
    relative: bool = False,
    positive_score: Tensor | None = None,
) -> Tensor:
    """``Σ_ij f(κ s_ij + β)``, or that over N ("mean"), or the rows' sums [N] ("none"); symmetric where b is a.

    relative, M >= N and κ = 1: the sum of ``f(s_ij + β − s_ii)`` over all and of ``f(s_ij + β − s_jj)`` over j < N;
    with "none" those of pair i. positive_score: the s_ii [N], if known.
    """
    symmetric = a is b and (reduction == "none" or (a_ids is b_ids and not relative))
    share = 1 / max(a.shape[0], 1) if reduction == "mean" else 1.0
    a, b = distinct(a, None if symmetric else b)
    a_ids, b_ids = distinct(a_ids, b_ids)
    scale, constant = scale_of(term.scale)
    bias, offset = (term.bias, 0.0) if isinstance(term.bias, Tensor) else (None, term.bias)
    scale, bias = distinct(scale, bias)
    reduction = "none" if reduction == "none" else "sum"
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (a, b)]
    options = (term.kind, term.positives, relative, reduction, share, needs, positive_score)
    return _ScoreSums.apply(*Call(a, b, scale, bias, constant, offset, a_ids, b_ids, *options))[0]


class Call(NamedTuple):
    """A sum over scores, with its gradients, or the sums of its rows."""

    a: Tensor  # [N, D]
    b: Tensor | None  # [M, D], or None: a
    scale: Tensor | None  # κ, or None: constant is
    bias: Tensor | None  # β, or None: offset is
    constant: float | None  # None: scale is log κ
    offset: float
    a_ids: Tensor | None  # [N] int64
    b_ids: Tensor | None  # [M] int64
    kind: str
    positives: str
    relative: bool
    reduction: str  # "sum" or "none"
    share: float  # what the sum is multiplied by
    needs: list[bool]  # for a and b: whether "sum" makes the gradient
    positive_score: Tensor | None = None  # [N], for relative

    @property
    def other(self) -> Tensor:
        """b, or a in its place."""
        return self.a if self.b is None else self.b

    def numbers(self) -> tuple[Tensor, Tensor]:
        """κ and β as scalar tensors."""
        dtype, bias = accumulation_dtype(self.a.dtype), self.offset if self.bias is None else self.bias
        values = (kappa_of(self.scale, self.constant), bias)
        return tuple(t if isinstance(t, Tensor) else self.a.new_full((), t, dtype=dtype) for t in values)  # type: ignore


class BackwardCall(NamedTuple):
    """The gradients of a, b, κ and β: of a sum what its forward left times grad_out, of rows' sums from scores anew."""

    grad_out: Tensor  # [] or [N]
    dscale: Tensor
    dbias: Tensor
    da: Tensor
    db: Tensor
    a: Tensor
    b: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    constant: float | None
    offset: float
    a_ids: Tensor | None
    b_ids: Tensor | None
    kind: str
    positives: str
    relative: bool
    reduction: str
    share: float
    needs: list[bool]  # for a and b
    positive_score: Tensor | None = None

    @property
    def forward(self) -> Call:
        """What the gradients are of."""
        return Call(*self[5:])


class _ScoreSums(Function):
    call = Call

    @staticmethod
    def forward(*arguments):
        return torch.ops.gssf.score_sums(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        call = Call(*inputs)
        _, dscale, dbias, da, db, positive_score = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        positive_score = positive_score if call.positive_score is None else call.positive_score
        tensors = (call.a, call.b, call.scale, call.bias, call.a_ids, call.b_ids, positive_score)
        ctx.save_for_backward(dscale, dbias, da, db, *tensors)
        ctx.numbers, ctx.options = (call.constant, call.offset), call[8:13]

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * len(Call._fields)
        *gradients, a, b, scale, bias, a_ids, b_ids, positive_score = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        sides = (a, b, scale, bias, *ctx.numbers, a_ids, b_ids)
        call = BackwardCall._make((grad_out, *gradients, *sides, *ctx.options, list(needs[:2]), positive_score))
        grads = last_derivative(torch.ops.gssf.score_sums_backward, *call)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * (len(Call._fields) - 4))


class _Sums(NamedTuple):
    """Of all chunks: sums and slopes of the rows' terms [N] and of the columns' [K], Σ_j ds_ij s_ij [N], gradients."""

    rows: Tensor
    row_slope: Tensor
    dscores_dot_s: Tensor
    cols: Tensor
    col_slope: Tensor
    da: Tensor
    db: Tensor

    @property
    def slope(self) -> Tensor:
        """Of the pairs' own scores minus that, where terms are relative to them [N]."""
        return self.row_slope + self.col_slope


def _by_chunks(call: Call) -> tuple[Tensor, ...]:
    a, empty = call.a, call.a.new_empty(0, dtype=accumulation_dtype(call.a.dtype))
    positive_score = call.positive_score
    if call.relative and positive_score is None:
        positive_score = _pair_scores(a, call.other)
    new_positive = positive_score if call.positive_score is None and positive_score is not None else empty
    if call.reduction == "none":
        sums = _sweep(call, positive_score, [False, False])
        rows = sums.rows + sums.cols if call.relative else sums.rows
        return rows, empty.clone(), empty.clone(), empty.clone(), empty.clone(), new_positive
    sums = _sweep(call, positive_score, call.needs)
    if call.relative and any(call.needs):
        _add_pairs(sums, -sums.slope, call, call.needs)
    slopes = torch.cat((sums.row_slope, sums.col_slope))
    totals = (t.sum(dtype=torch.float64) for t in (torch.cat((sums.rows, sums.cols)), sums.dscores_dot_s, slopes))
    value, dscale, dbias = ((call.share * t).to(empty.dtype) for t in totals)
    return value, dscale, dbias, sums.da, sums.db, empty.clone()


def _backward(call: BackwardCall) -> tuple[Tensor, ...]:
    a, forward = call.a, call.forward
    if call.reduction == "sum":
        kappa = kappa_of(call.scale, call.constant)
        factor, dscale = call.grad_out * call.share * kappa, call.grad_out * call.dscale
        dscale = dscale * kappa if call.constant is None else dscale
        return (factor * call.da).to(a.dtype), (factor * call.db).to(a.dtype), dscale, call.grad_out * call.dbias
    scale, _ = forward.numbers()
    needs = [call.needs[0], call.needs[0] if call.b is None else call.needs[1]]
    unit = unit_of(a.dtype, call.grad_out)
    one = unit if unit is not None else scale.new_ones(())
    weight = (call.grad_out if unit is None else call.grad_out / unit).contiguous()
    # Rows have weights of their own: b being a helps nothing.
    sums = _sweep(forward._replace(b=call.a) if call.b is None else forward, call.positive_score, needs, weight)
    slopes = weight * (sums.slope if call.relative else sums.row_slope)
    if call.relative and any(needs):
        _add_pairs(sums, -slopes, forward, needs)
    da, db = one * scale * sums.da, one * scale * sums.db
    if call.b is None and needs[0]:
        da, db = da + db, db.new_empty(0)
    dscale, dbias = (one * t.sum(dtype=torch.float64).to(scale.dtype) for t in (sums.dscores_dot_s, slopes))
    return da.to(a.dtype), db.to(a.dtype), dscale * scale if call.constant is None else dscale, dbias


def _pair_scores(a, b):
    i = torch.arange(a.shape[0], device=a.device)
    return torch.ops.gssf.pair_scores(a, b, i, i)


def _add_pairs(sums: _Sums, slopes: Tensor, call: Call, needs) -> None:
    """Add the gradients by way of the pairs' own scores, whose slopes [N] are given."""
    a, b = call.a, call.other
    i, dtype = torch.arange(a.shape[0], device=a.device), accumulation_dtype(a.dtype)
    of_pairs = torch.ops.gssf.pair_scores_backward(slopes, i, i, a.to(dtype), b.to(dtype), needs)
    for total, of_pair in zip((sums.da, sums.db), of_pairs, strict=True):
        total += of_pair


def _sweep(call: Call, positive_score: Tensor | None, needs, weight: Tensor | None = None) -> _Sums:
    """Of all chunks. weight: [N], of the rows' slopes in dscores, and of the columns' with relative; None: 1."""
    scale, bias = call.numbers()
    if call.b is None and call.reduction == "sum":
        return _symmetric(call, scale, bias, needs[0])
    a, b, n = call.a, call.other, call.a.shape[0]
    columns = positive_score if call.relative else None
    rows = scale.new_zeros(3, n)
    cols = scale.new_zeros(2, n if columns is not None else 0)
    a_ids, b_ids = (t.contiguous() if t is not None else None for t in (call.a_ids, call.b_ids))
    col_weight = weight if columns is not None else None

    def visit(s, first):
        part = slice(first, first + s.shape[0])
        of_rows = (t[part] if t is not None else None for t in (columns, weight, a_ids))
        positive, row_weight, row_ids = of_rows
        terms = (scale, bias, positive, row_weight, columns, col_weight, row_ids, b_ids)
        options = (first, call.kind, call.positives, any(needs))
        torch.ops.gssf.score_sums_pass(s, *terms, *options, rows[:, part], cols)

    da, db = chunks(a, b, visit, tuple(needs))
    empty = rows.new_empty(0)
    statistics = (t.clone() for t in (*rows, *cols))
    return _Sums._make((*statistics, da if da is not None else empty, db if db is not None else empty.clone()))


def _symmetric(call: Call, scale: Tensor, bias: Tensor, need: bool) -> _Sums:
    """The same for b = a. The slopes are right in their sum alone, and da is the whole gradient, of both sides."""
    n = call.a.shape[0]
    total, no_columns = scale.new_zeros(3, n), scale.new_empty(2, 0)
    ids = call.a_ids.contiguous() if call.a_ids is not None else None

    def visit(scores, first):
        count, (s,) = scores[0].shape[0], scores
        part = slice(first, first + count)
        row_ids = ids[part] if ids is not None else None
        for start, stop, times in ((0, count, 1), (count, n - first, 2)):  # the square, and what stands for both halves
            if start == stop:
                continue
            col_ids = ids[first + start : first + stop] if ids is not None else None
            rows = total.new_zeros(3, count)
            terms = (scale, bias, None, None, None, None, row_ids, col_ids)
            options = (-start, call.kind, call.positives, need)
            torch.ops.gssf.score_sums_pass(s[:, start:stop], *terms, *options, rows, no_columns)
            total[:, part] += times * rows

    da = triangle((call.a,), visit, need)
    empty = no_columns.new_empty(0)
    da = da.mul_(2) if da is not None else empty.clone()
    return _Sums._make((*(t.clone() for t in total), empty, empty.clone(), da, empty.clone()))


def _fake(call: Call) -> tuple[Tensor, ...]:
    n, dtype = call.a.shape[0], accumulation_dtype(call.a.dtype)
    shapes: tuple[Any, ...]
    if call.reduction == "none":
        shapes = (n, 0, 0, 0, 0, n if call.relative and call.positive_score is None else 0)
    else:
        of_sides = zip((call.a, call.b), call.needs, strict=True)
        shapes = ((), (), (), *(t.shape if need and t is not None else 0 for t, need in of_sides), 0)
    return tuple(call.a.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_backward(call: BackwardCall) -> tuple[Tensor, ...]:
    if call.reduction == "sum":
        ends = torch.empty_like(call.dscale), torch.empty_like(call.dbias)
        return call.a.new_empty(call.da.shape), call.a.new_empty(call.db.shape), *ends
    shapes = (t.shape if need and t is not None else 0 for t, need in zip((call.a, call.b), call.needs, strict=True))
    return *(call.a.new_empty(shape) for shape in shapes), *(call.grad_out.new_empty(()) for _ in range(2))


class PassCall(NamedTuple):
    """Sums over a chunk's rows, and over its first K columns; with gradient s becomes dscores."""

    s: Tensor  # [R, M] with adjacent columns: written
    scale: Tensor
    bias: Tensor
    row_positive: Tensor | None  # [R], what the rows' terms are relative to
    row_weight: Tensor | None  # [R], of their slopes in dscores; None: 1
    col_positive: Tensor | None  # [K], of the columns' terms
    col_weight: Tensor | None  # [K]
    row_ids: Tensor | None  # [R]
    col_ids: Tensor | None  # [M]
    first: int  # the column that is row 0's own
    kind: str
    positives: str
    gradient: bool
    rows: Tensor  # [3, R]: sums, slopes and Σ_j ds_ij s_ij, written
    cols: Tensor  # [2, K]: sums and slopes, added to


def _pass(call: PassCall) -> None:
    s, positive = call.s, torch.zeros_like(call.s, dtype=torch.bool)
    if call.positives != "include":
        positive.diagonal(call.first).fill_(True)
        if call.row_ids is not None:
            positive |= call.row_ids[:, None] == call.col_ids

    def term(s, positive, bias):  # f and its slope, by scores
        t = s * call.scale + bias
        f, slope = pointwise(torch.where(positive, -t, t) if call.positives == "negate" else t, call.kind)
        if call.positives == "negate":
            return f, torch.where(positive, -slope, slope)
        if call.positives == "exclude":
            return f.masked_fill(positive, 0), slope.masked_fill(positive, 0)
        return f, slope

    bias = call.bias if call.row_positive is None else (call.bias - call.row_positive)[:, None]
    f, slope = term(s, positive, bias)
    call.rows[0], call.rows[1] = f.sum(1), slope.sum(1)
    dscores = slope if call.row_weight is None else slope * call.row_weight[:, None]
    k = call.cols.shape[1]
    if k:
        bias = call.bias if call.col_positive is None else call.bias - call.col_positive
        f, slope = term(s[:, :k], positive[:, :k], bias)
        call.cols[0] += f.sum(0)
        call.cols[1] += slope.sum(0)
        dscores[:, :k] += slope if call.col_weight is None else slope * call.col_weight
    call.rows[2] = (dscores * s).sum(1)
    if call.gradient:
        s.copy_(dscores)


register(
    "score_sums",
    Call,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_by_chunks,
    fake=_fake,
    launcher="sums.score_sums",
    plans=plan.score_sums,
    through="score_sums_pass",
)
register(
    "score_sums_backward",
    BackwardCall,
    "(Tensor, Tensor, Tensor, Tensor)",
    composite=_backward,
    fake=_fake_backward,
    launcher="sums.score_sums_backward",
    plans=plan.score_sums_backward,
    through="score_sums_pass",
)
register(
    "score_sums_pass",
    PassCall,
    "()",
    composite=_pass,
    fake=lambda call: None,
    launcher="sums.score_sums_pass",
    plans=plan.chunk_pass,
    mutates=("s", "rows", "cols"),
)
