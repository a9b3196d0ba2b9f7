"""Sums of a function of every score, ``Σ_ij f(κ s_ij + β)``, in one sweep that stores no score.

    row sums:                   rows_i = Σ_j f(κ s_ij + β)
    relative to the positive:   rows_i = Σ_j f(s_ij + β − s_ii) + Σ_k f(s_ki + β − s_ii)

f: hinge, softplus, abs or square. Sources: SigLIP, arXiv 2303.15343 (softplus); VSE++, arXiv 1707.05612 (hinge).

A chunk of scores determines its part of the gradient of one sum. So the forward computes the gradient, if one is
needed: 3 products in all, 1 without. Row sums ("none") have a gradient weight for each row, so their backward computes
the chunks again. If b is a, and rows and columns have the same ids, only the upper triangle is computed: 1.5 products
in all.

On a GPU (``triton/sums.py``), the forward of a small problem is a sweep and one kernel, and its backward one kernel
("none": two). A large bf16 problem, except with "none", stores dscores of one row panel at a time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.dense import chunks, triangle, unit_of
from gssf_kernels.ops.logsumexp import kappa_of, scale_of
from gssf_kernels.ops.masks import UNPAIRED, Mask, least, left_out, lower_listed
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
        positives: what pairs (i, i) and pairs of equal id contribute: f(κ s_ij + β) like all others ("include"),
            nothing ("exclude") or f(−κ s_ij − β) ("negate").
        a_ids: [N] integers. If N = M, the ids of one input serve both.
        b_ids: [M] integers.
        reduction: "sum", or "none" for the row sums [N].

    Returns:
        fp32 (fp64 for fp64), differentiable once in a, b, scale and bias.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one product, and two further ones with a gradient ("none": three, in the backward). With "sum" half of each if
    b is a. Extra memory: one chunk of scores besides the gradients. On the CPU also an fp32 copy of b (bf16 on a CPU
    with a unit for it), two with a gradient.
    """
    _checks.choice(kind, "kind", KINDS)
    _checks.choice(positives, "positives", POSITIVES)
    _checks.choice(reduction, "reduction", ("sum", "none"))
    a, b = _checks.autocast(a, b)
    _checks.embeddings(a, b, "a", "b", paired=False)
    a_ids, b_ids = _checks.ids(a_ids, b_ids, a, b, "a_ids", "b_ids")
    scale = _checks.scalar_or_number(scale, "scale", a, positive=True)
    bias = _checks.scalar_or_number(bias, "bias", a)
    return score_sums(a, b, Term(kind, positives, scale, bias), a_ids, b_ids, reduction)


class Term(NamedTuple):
    """The term ``f(κ s + β)`` of a score."""

    kind: str  # f, one of KINDS
    positives: str  # one of POSITIVES
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
    columns: bool = True,
    mask: Mask | None = None,
) -> Tensor:
    """``Σ_ij f(κ s_ij + β)`` ("sum"), the same divided by N ("mean"), or the row sums [N] ("none").

    relative: terms are relative to the positives: ``Σ_ij f(s_ij + β − s_ii) + Σ_{i, j < N} f(s_ij + β − s_jj)``, with
    M >= N and κ = 1. With "none" entry i has the terms of row i and of column i.
    positive_score: s_ii [N], for relative; None: computed here.
    columns: with relative, whether columns have terms too. Without them positive_score is any score for each row, with
        a gradient, or K of them [K, N], and reduction is "none": [N] or [K, N].
    mask: which scores take part. With its limits a term of two scores' directions is left out where either limit says.
    """
    mask = Mask() if mask is None else mask
    symmetric = a is b and mask.plain and (reduction == "none" or (a_ids is b_ids and not relative))
    share = None if reduction == "mean" else 1.0
    a, b = distinct(a, None if symmetric else b)
    a_ids, b_ids = distinct(a_ids, b_ids)
    scale, constant = scale_of(term.scale)
    bias, offset = (term.bias, 0.0) if isinstance(term.bias, Tensor) else (None, term.bias)
    scale, bias = distinct(scale, bias)
    reduction = "none" if reduction == "none" else "sum"
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (a, b)]
    options = (term.kind, term.positives, relative, reduction, share, needs, positive_score, columns, *mask)
    return _ScoreSums.apply(*Call(a, b, scale, bias, constant, offset, a_ids, b_ids, *options))[0]


class Call(NamedTuple):
    """The sum over all scores with its gradients, or the row sums."""

    a: Tensor  # [N, D]
    b: Tensor | None  # [M, D]; None: b is a
    scale: Tensor | None  # κ, a scalar; None: κ is constant
    bias: Tensor | None  # β, a scalar; None: β is offset
    constant: float | None  # None: scale stores log κ
    offset: float
    a_ids: Tensor | None  # [N] int64
    b_ids: Tensor | None  # [M] int64
    kind: str
    positives: str
    relative: bool
    reduction: str  # "sum" or "none"
    share: float | None  # the sum is multiplied by it; None: 1/N, a float that a traced graph would be bound to
    needs: list[bool]  # whether the forward of "sum" computes the gradients of a and b
    positive_score: Tensor | None = None  # [N], without columns also [K, N], for relative; None: computed here
    columns: bool = True  # relative: also the terms of columns
    # The rest is `Mask`. Listed pairs take part only where positives are "exclude" or "negate".
    paired: bool = True
    ignore: bool = False
    pair_rows: Tensor | None = None
    pair_cols: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None

    @property
    def mask(self) -> Mask:
        return Mask._make(self[16:])

    @property
    def general(self) -> bool:
        """Whether only the loop over chunks computes it."""
        return not self.columns or not self.mask.plain

    @property
    def factor(self) -> float:
        """What the sum is multiplied by."""
        return 1 / max(self.a.shape[0], 1) if self.share is None else self.share

    @property
    def other(self) -> Tensor:
        """b, also if b is a."""
        return self.a if self.b is None else self.b

    def scalars(self) -> tuple[Tensor, Tensor]:
        """κ and β as scalar tensors."""
        dtype, bias = accumulation_dtype(self.a.dtype), self.offset if self.bias is None else self.bias
        values = (kappa_of(self.scale, self.constant), bias)
        return tuple(t if isinstance(t, Tensor) else self.a.new_full((), t, dtype=dtype) for t in values)  # type: ignore


class BackwardCall(NamedTuple):
    """The gradients with respect to a, b, scale and bias.

    "sum" multiplies the gradients that the forward computed by grad_out; "none" computes the scores again.
    """

    grad_out: Tensor  # [], [N] or [K, N]
    dscale: Tensor  # this and the next three: computed by the forward of "sum", without grad_out
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
    share: float | None
    needs: list[bool]  # whether a and b need a gradient
    positive_score: Tensor | None = None
    columns: bool = True
    paired: bool = True
    ignore: bool = False
    pair_rows: Tensor | None = None
    pair_cols: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None

    @property
    def general(self) -> bool:
        return self.forward.general

    @property
    def factor(self) -> float:
        return self.forward.factor

    @property
    def forward(self) -> Call:
        """The arguments of the forward."""
        return Call(*self[5:])


_POSITIVE = Call._fields.index("positive_score")


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
        masks = call.pair_rows, call.pair_cols, call.row_limit, call.col_limit
        ctx.save_for_backward(dscale, dbias, da, db, *tensors, *masks)
        ctx.numbers, ctx.options = (call.constant, call.offset), call[8:13]
        ctx.flags = call.columns, call.paired, call.ignore

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * len(Call._fields)
        saved = ctx.saved_tensors  # read once: checkpointing without re-entrance forbids a second time
        *gradients, a, b, scale, bias, a_ids, b_ids, positive_score = saved[:11]
        needs = ctx.needs_input_grad[:4]
        inputs = (a, b, scale, bias, *ctx.numbers, a_ids, b_ids)
        mask = (*ctx.flags, *saved[11:])
        call = BackwardCall._make((grad_out, *gradients, *inputs, *ctx.options, list(needs[:2]), positive_score, *mask))
        grads = last_derivative(torch.ops.gssf.score_sums_backward, *call)
        *grads, dpositive = grads
        empty = [None] * len(Call._fields)
        empty[:4] = (g if need else None for g, need in zip(grads, needs, strict=True))
        if not call.columns and ctx.needs_input_grad[_POSITIVE]:
            empty[_POSITIVE] = dpositive
        return tuple(empty)


class _Sums(NamedTuple):
    """The results of a loop over chunks. K is N where terms are relative to the positives, else 0."""

    rows: Tensor  # [N], sums of f over each row; [K, N] for K scores that terms of a row are relative to
    row_slope: Tensor  # [N] or [K, N], sums of f′
    dscores_dot_s: Tensor  # [N], Σ_j ds_ij s_ij
    cols: Tensor  # [K], sums of f over each column
    col_slope: Tensor  # [K], sums of f′
    da: Tensor
    db: Tensor

    @property
    def slope(self) -> Tensor:
        """Minus the gradient with respect to positive_score [N], where terms are relative to the positives."""
        return self.row_slope + self.col_slope if self.col_slope.numel() else self.row_slope


def _by_chunks(call: Call) -> tuple[Tensor, ...]:
    a, empty = call.a, call.a.new_empty(0, dtype=accumulation_dtype(call.a.dtype))
    positive_score = call.positive_score
    if call.relative and positive_score is None:
        positive_score = _pair_scores(a, call.other)
    new_positive = positive_score if call.positive_score is None and positive_score is not None else empty
    if call.reduction == "none":
        sums = _sweep(call, positive_score, [False, False])
        rows = sums.rows + sums.cols if call.relative and call.columns else sums.rows
        return rows, empty.clone(), empty.clone(), empty.clone(), empty.clone(), new_positive
    sums = _sweep(call, positive_score, call.needs)
    if call.relative and any(call.needs):
        _add_pairs(sums, -sums.slope, call, call.needs)
    slopes = torch.cat((sums.row_slope, sums.col_slope))
    totals = (t.sum(dtype=torch.float64) for t in (torch.cat((sums.rows, sums.cols)), sums.dscores_dot_s, slopes))
    value, dscale, dbias = ((call.factor * t).to(empty.dtype) for t in totals)
    return value, dscale, dbias, sums.da, sums.db, empty.clone()


def _backward(call: BackwardCall) -> tuple[Tensor, ...]:
    a, forward = call.a, call.forward
    if call.reduction == "sum":
        kappa = kappa_of(call.scale, call.constant)
        factor, dscale = call.grad_out * call.factor * kappa, call.grad_out * call.dscale
        dscale = dscale * kappa if call.constant is None else dscale
        da, db = (factor * call.da).to(a.dtype), (factor * call.db).to(a.dtype)
        return da, db, dscale, call.grad_out * call.dbias, dscale.new_empty(0)
    scale, _ = forward.scalars()
    needs = [call.needs[0], call.needs[0] if call.b is None else call.needs[1]]
    unit = unit_of(a.dtype, call.grad_out)
    one = unit if unit is not None else scale.new_ones(())
    weight = (call.grad_out if unit is None else call.grad_out / unit).contiguous()
    # Every row has its weight, so dscores are not symmetric even if b is a: all of them are computed.
    sums = _sweep(forward._replace(b=call.a) if call.b is None else forward, call.positive_score, needs, weight)
    slopes = weight * (sums.slope if call.relative else sums.row_slope)
    if call.relative and call.columns and any(needs):
        _add_pairs(sums, -slopes, forward, needs)
    da, db = one * scale * sums.da, one * scale * sums.db
    if call.b is None and needs[0]:
        da, db = da + db, db.new_empty(0)
    dscale, dbias = (one * t.sum(dtype=torch.float64).to(scale.dtype) for t in (sums.dscores_dot_s, slopes))
    dpositive = -one * slopes if call.relative and not call.columns else slopes.new_empty(0)  # as positive_score
    return da.to(a.dtype), db.to(a.dtype), dscale * scale if call.constant is None else dscale, dbias, dpositive


def _pair_scores(a, b):
    i = torch.arange(a.shape[0], device=a.device)
    return torch.ops.gssf.pair_scores(a, b, i, i)


def _add_pairs(sums: _Sums, slopes: Tensor, call: Call, needs) -> None:
    """Add the gradients through positive_score to da and db; slopes [N] is the gradient with respect to it."""
    a, b = call.a, call.other
    i, dtype = torch.arange(a.shape[0], device=a.device), accumulation_dtype(a.dtype)
    pair_grads = torch.ops.gssf.pair_scores_backward(slopes, i, i, a.to(dtype), b.to(dtype), needs)
    for total, pair_grad in zip((sums.da, sums.db), pair_grads, strict=True):
        total += pair_grad


def _sweep(call: Call, positive_score: Tensor | None, needs, weight: Tensor | None = None) -> _Sums:
    """Run the pass over all chunks; K times over each if terms of a row are relative to K scores.

    weight: [N] or [K, N], multiplies the slopes of row i in dscores, and with relative those of column i; None: 1.
    """
    scale, bias = call.scalars()
    if call.b is None and call.reduction == "sum":
        return _symmetric(call, scale, bias, needs[0])
    a, b, n = call.a, call.other, call.a.shape[0]
    columns = positive_score if call.relative and call.columns else None
    row_positive = positive_score if call.relative else None
    mask = call.mask
    many = row_positive is not None and row_positive.dim() == 2
    rows = scale.new_zeros(row_positive.shape[0] if row_positive is not None and many else 1, 3, n)
    cols = scale.new_zeros(2, n if columns is not None else 0)
    a_ids, b_ids = (t.contiguous() if t is not None else None for t in (call.a_ids, call.b_ids))
    col_weight = weight if columns is not None else None

    def visit(s, first):
        part = slice(first, first + s.shape[0])
        row_ids = None if a_ids is None else a_ids[part]
        positives, weights = (
            [None] * len(rows) if t is None else t[..., part].unbind() if many else [t[part]]
            for t in (row_positive, weight)
        )
        col_ids, listed = b_ids, None
        if not mask.plain:
            if not many:
                listed = _listed_terms(s, part, mask, call.positives, scale, bias, call.kind, weights[0])
            out = left_out(s, first, row_ids, b_ids, mask)
            if out is not None:
                s.masked_fill_(out, least(s.dtype))
            in_chunk = mask.chunk(first, s.shape[0])
            if in_chunk is not None:
                lower_listed(s, in_chunk, least(s.dtype))
            if mask.ignore:
                row_ids = col_ids = None
        options = (first if call.paired else UNPAIRED, call.kind, call.positives, any(needs))
        scores, ds = (s.clone(), torch.zeros_like(s)) if many and any(needs) else (s, s)
        for of_rows, positive, row_weight in zip(rows, positives, weights, strict=True):
            if ds is not s:
                s.copy_(scores)
            terms = (scale, bias, positive, row_weight, columns, col_weight, row_ids, col_ids)
            torch.ops.gssf.score_sums_pass(s, *terms, *options, of_rows[:, part], cols)
            if ds is not s:
                ds += s
        if ds is not s:
            s.copy_(ds)
        if listed is not None:
            listed.add_to(rows[0][:, part], s if any(needs) else None)

    da, db = chunks(a, b, visit, tuple(needs))
    empty = rows.new_empty(0)
    by_row = rows.unbind(1) if many else rows[0]
    statistics = (t.clone() for t in (by_row[0], by_row[1], rows[:, 2].sum(0), *cols))
    return _Sums._make((*statistics, da if da is not None else empty, db if db is not None else empty.clone()))


class _Listed(NamedTuple):
    """The listed pairs of a chunk, which the pass leaves out, as terms of their own."""

    row: Tensor  # [P], in the chunk
    col: Tensor
    here: Tensor  # [P] bool: in this chunk
    statistics: Tensor  # [3, P]: f, f' and f' s
    dscores: Tensor  # [P]

    def add_to(self, rows: Tensor, s: Tensor | None) -> None:
        """Add the sums of each row to rows [3, R], and the slopes to dscores s [R, M], which are 0 there."""
        rows.index_add_(1, self.row, self.statistics)
        if s is not None:
            s.index_put_((self.row, self.col), self.dscores, accumulate=True)


def _listed_terms(s, part, mask, positives, scale, bias, kind, row_weight) -> _Listed | None:
    listed = mask.chunk(part.start, s.shape[0])
    if listed is None:
        return None
    row, col, here = listed
    score = s[row, col]
    if positives == "negate":
        f, slope = pointwise(-(score * scale + bias), kind)
        f, slope = torch.where(here, f, 0), torch.where(here, -slope, 0)
    else:
        f = slope = torch.zeros_like(score)
    dscores = slope if row_weight is None else slope * row_weight[row]
    return _Listed(row, col, here, torch.stack((f, slope, torch.where(here, dscores * score, 0))), dscores)


def _symmetric(call: Call, scale: Tensor, bias: Tensor, need: bool) -> _Sums:
    """The same for b = a, from the upper triangle.

    Only the sums over all rows are those of :func:`_sweep`; da is the gradient with respect to a as both factors.
    """
    n = call.a.shape[0]
    total, no_columns = scale.new_zeros(3, n), scale.new_empty(2, 0)
    ids = call.a_ids.contiguous() if call.a_ids is not None else None

    def visit(scores, first):
        count, (s,) = scores[0].shape[0], scores
        part = slice(first, first + count)
        row_ids = ids[part] if ids is not None else None
        for start, stop, times in ((0, count, 1), (count, n - first, 2)):  # the square on the diagonal; right of it
            if start == stop:
                continue
            col_ids = ids[first + start : first + stop] if ids is not None else None
            rows = total.new_zeros(3, count)
            terms = (scale, bias, None, None, None, None, row_ids, col_ids)
            options = (-start if call.paired else UNPAIRED, call.kind, call.positives, need)
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
        rows = n if call.positive_score is None else call.positive_score.shape
        shapes = (rows, 0, 0, 0, 0, n if call.relative and call.positive_score is None else 0)
    else:
        factors = zip((call.a, call.b), call.needs, strict=True)
        shapes = ((), (), (), *(t.shape if need and t is not None else 0 for t, need in factors), 0)
    return tuple(call.a.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_backward(call: BackwardCall) -> tuple[Tensor, ...]:
    if call.reduction == "sum":
        scalars = torch.empty_like(call.dscale), torch.empty_like(call.dbias)
        return call.a.new_empty(call.da.shape), call.a.new_empty(call.db.shape), *scalars, call.dscale.new_empty(0)
    shapes = (t.shape if need and t is not None else 0 for t, need in zip((call.a, call.b), call.needs, strict=True))
    positives = call.grad_out.shape if call.relative and not call.columns else 0
    sizes = ((), (), positives)
    return *(call.a.new_empty(shape) for shape in shapes), *(call.grad_out.new_empty(size) for size in sizes)


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
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_backward,
    fake=_fake_backward,
    launcher="sums.score_sums_backward",
    plans=plan.score_sums_backward,
    through="score_sums_pass",
)
