"""Sums of a function of every score, ``Σ_ij f(κ s_ij + β)``, in one sweep that stores no score.

    rows_i = Σ_j f(κ s_ij + β_i),   cols_j = Σ_i f(κ s_ij + γ_j),     f: hinge, softplus, abs or square

The whole gradient of one sum is known as soon as a chunk of scores is, so it is taken in the forward pass where one is
wanted: 3 products in all, 1 without. Only rows' sums that get weights of their own ("none") make the chunks again.
Where b is a, and rows and columns are alike, half of it does: 1.5 products in all. Small problems on a GPU take a sweep
and one kernel more forward, and one back ("none": two; ``kernels/sums.py``); many of bf16, but for "none", store the
gradient of a slab of rows at a time there, and no score.
"""

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels._library import Function, define, distinct, last_derivative
from gssf_kernels.dense import chunks, triangle, unit_of
from gssf_kernels.precision import accumulation_dtype

KINDS = ("hinge", "softplus", "abs", "square")
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
        scale, bias: κ and β, numbers (κ > 0) or scalar tensors on a's device, whose values are not looked at.
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
    arguments = (a, b, kind, scale, bias, positives, a_ids, b_ids)
    return total_score(*arguments) if reduction == "sum" else row_terms(*arguments)


def total_score(a, b, kind, scale, bias, positives, a_ids, b_ids, share=1.0, relative=False, pair=None) -> Tensor:
    """``share Σ_ij f(κ s_ij + β)``, κ and β scalar tensors or numbers, or κ a `Logarithm`; symmetric where b is a.

    ``relative``, M >= N and κ = 1: the sum of ``f(s_ij + β − s_ii)`` over all and ``f(s_ij + β − s_jj)`` over j < N;
    pair: the s_ii [N], if known.
    """
    symmetric = a is b and a_ids is b_ids and not relative
    a, b = distinct(a, None if symmetric else b)
    a_ids, b_ids = distinct(a_ids, b_ids)
    scale, constant = scale_of(scale)
    bias, offset = (bias, 0.0) if isinstance(bias, Tensor) else (None, bias)
    scale, bias = distinct(scale, bias)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (a, b)]
    options = (constant, offset, a_ids, b_ids, kind, positives, relative, share, needs, pair)
    return _Total.apply(a, b, scale, bias, *options)[0]


def scale_of(scale: Tensor | float | _checks.Logarithm) -> tuple[Tensor | None, float | None]:
    """(scale, constant) as the ops take κ: a tensor and 1, or None and a number; a tensor and None is its logarithm."""
    if isinstance(scale, _checks.Logarithm):
        return scale.tensor, None
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)


def kappa_of(scale, constant):
    """The κ that those stand for."""
    if scale is None:
        return constant
    return scale.exp() if constant is None else scale


def row_terms(a, b, kind, scale, bias, positives, a_ids, b_ids, relative=False, pair=None) -> Tensor:
    """``Σ_j f(κ s_ij + β)`` [N], κ and β scalar tensors or numbers, or κ a `Logarithm`.

    ``relative``, M >= N and κ = 1: ``Σ_j f(s_ij + β − s_ii) + Σ_k f(s_ki + β − s_ii)``; pair: the s_ii [N], if known.
    """
    a, b = distinct(a, None if a is b else b)
    a_ids, b_ids = distinct(a_ids, b_ids)
    scale, constant = scale_of(scale)
    bias, offset = (bias, 0.0) if isinstance(bias, Tensor) else (None, bias)
    scale, bias = distinct(scale, bias)
    return _Rows.apply(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, pair)[0]


class _Total(Function):
    @staticmethod
    def forward(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, share, needs, pair):
        options = (constant, offset, a_ids, b_ids, kind, positives, relative, share, needs, pair)
        return torch.ops.gssf.score_total(a, b, scale, bias, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *found = output
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*found, *inputs[:4])
        ctx.constant, ctx.share = inputs[4], inputs[11]

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 14
        op = torch.ops.gssf.score_total_backward
        found = last_derivative(op, grad, *ctx.saved_tensors, ctx.constant, ctx.share)
        return (*(g if need else None for g, need in zip(found, ctx.needs_input_grad[:4], strict=True)), *[None] * 10)


class _Rows(Function):
    @staticmethod
    def forward(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, pair):
        options = (constant, offset, a_ids, b_ids, kind, positives, relative, pair)
        return torch.ops.gssf.score_rows(a, b, scale, bias, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.constant, ctx.offset, a_ids, b_ids, ctx.kind, ctx.positives, ctx.relative, pair = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, a_ids, b_ids, output[1] if pair is None else pair)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 12
        (*tensors, a_ids, b_ids, pair), needs = ctx.saved_tensors, ctx.needs_input_grad[:4]
        given = (*tensors, ctx.constant, ctx.offset, a_ids, b_ids, ctx.kind, ctx.positives, ctx.relative, pair)
        found = last_derivative(torch.ops.gssf.score_rows_backward, grad, *given, list(needs[:2]))
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 8)


def _rows(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, pair=None):
    scale, bias = _numbers(a, scale, bias, constant, offset)
    own, y = a.new_empty(0, dtype=scale.dtype), a if b is None else b
    if relative and pair is None:
        own = pair = _pairs(a, y)
    row_bias, col_bias = _biases(a, bias, pair if relative else None)
    op = torch.ops.gssf.score_sums
    rows, _, cols, *_ = op(a, y, scale, row_bias, None, col_bias, None, a_ids, b_ids, kind, positives, [False, False])
    return rows + cols if relative else rows, own


def _rows_backward(grad, a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, pair, needs):
    """From the scores made once more."""
    dtype, y, both = accumulation_dtype(a.dtype), a if b is None else b, [needs[0], needs[0] if b is None else needs[1]]
    scale, bias = _numbers(a, scale, bias, constant, offset)
    unit = unit_of(a.dtype, grad)
    one = unit if unit is not None else scale.new_ones(())
    weight = (grad if unit is None else grad / unit).contiguous()
    row_bias, col_bias = _biases(a, bias, pair if relative else None)
    lines = (row_bias, weight, col_bias, weight if relative else None)
    op = torch.ops.gssf.score_sums
    _, row_slope, _, col_slope, along, da, db = op(a, y, scale, *lines, a_ids, b_ids, kind, positives, both)
    slopes = weight * (row_slope + col_slope if relative else row_slope)
    if relative and any(both):
        _add_pairs(da, db, -slopes, a, y, both)
    da, db = one * scale * da, one * scale * db
    if b is None and needs[0]:
        da, db = da + db, db.new_empty(0)
    ends = [one * t.sum(dtype=torch.float64).to(dtype) for t in (along, slopes)]
    if constant is None:
        ends[0] = ends[0] * scale
    return da.to(a.dtype), db.to(a.dtype), *ends


def _numbers(a, scale, bias, constant, offset):
    """κ and β as scalar tensors."""
    given, dtype = (kappa_of(scale, constant), offset if bias is None else bias), accumulation_dtype(a.dtype)
    return tuple(t if isinstance(t, Tensor) else a.new_full((), t, dtype=dtype) for t in given)


def _pairs(a, b):
    i = torch.arange(a.shape[0], device=a.device)
    return torch.ops.gssf.pair_scores(a, b, i, i)


def _biases(a, bias, pair):
    """(of rows [N], of columns [N] or None): β, or β − s_ii of both."""
    if pair is None:
        return bias.expand(a.shape[0]), None
    return (bias - pair,) * 2


def _add_pairs(da, db, slopes, a, b, needs):
    """Add what the pairs' own scores get, slopes [N], to da and db."""
    i, dtype = torch.arange(a.shape[0], device=a.device), accumulation_dtype(a.dtype)
    wide = (a.to(dtype), b.to(dtype))
    for whole, part in zip((da, db), torch.ops.gssf.pair_scores_backward(slopes, i, i, *wide, needs), strict=True):
        whole += part


def _total(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, share, needs, pair=None):
    """``share Σ f`` and the slopes that κ and β get of it; da and db times κ, ``share`` and the upstream gradient."""
    dtype = accumulation_dtype(a.dtype)
    scale, bias = _numbers(a, scale, bias, constant, offset)
    if relative and pair is None:
        pair = _pairs(a, b)
    row_bias, col_bias = _biases(a, bias, pair if relative else None)
    op, lines = torch.ops.gssf.score_sums, (row_bias, None, col_bias, None)
    rows, row_slope, cols, col_slope, along, da, db = op(a, b, scale, *lines, a_ids, b_ids, kind, positives, needs)
    if relative and any(needs):
        _add_pairs(da, db, -(row_slope + col_slope), a, b, needs)
    sums = (t.sum(dtype=torch.float64) for t in (torch.cat((rows, cols)), along, torch.cat((row_slope, col_slope))))
    total, dscale, dbias = ((share * t).to(dtype) for t in sums)
    return total, dscale, dbias, da, db


def _total_backward(grad, dscale, dbias, da, db, a, b, scale, bias, constant, share):
    """a, b and the rest come along for their dtypes and for their history."""
    kappa = kappa_of(scale, constant)
    factor, of_scale = grad * share * kappa, grad * dscale
    of_scale = of_scale * kappa if constant is None else of_scale
    return (factor * da).to(a.dtype), (factor * db).to(a.dtype), of_scale, grad * dbias


def _fake_total(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, share, needs, pair=None):
    shapes = ((), (), (), *(t.shape if need and t is not None else 0 for t, need in zip((a, b), needs, strict=True)))
    return tuple(a.new_empty(shape, dtype=accumulation_dtype(a.dtype)) for shape in shapes)


def _fake_total_backward(grad, dscale, dbias, da, db, a, b, scale, bias, constant, share):
    return a.new_empty(da.shape), a.new_empty(db.shape), torch.empty_like(dscale), torch.empty_like(dbias)


def _fake_rows(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, pair=None):
    n, dtype = a.shape[0], accumulation_dtype(a.dtype)
    return a.new_empty(n, dtype=dtype), a.new_empty(n if relative and pair is None else 0, dtype=dtype)


def _fake_rows_backward(
    grad, a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, pair, needs
):  # fmt: skip
    shapes = (t.shape if need and t is not None else 0 for t, need in zip((a, b), needs, strict=True))
    return *(a.new_empty(shape) for shape in shapes), *(grad.new_empty(()) for _ in range(2))


def _forward(
    a, b, scale, row_bias, row_weight, col_bias, col_weight, a_ids, b_ids, kind, positives, needs
):  # fmt: skip
    dtype, n = accumulation_dtype(a.dtype), a.shape[0]
    if b is None:
        return _symmetric(a, scale, row_bias, a_ids, kind, positives, needs[0])
    rows = a.new_zeros(3, n, dtype=dtype)
    cols = a.new_zeros(2, col_bias.shape[0] if col_bias is not None else 0, dtype=dtype)
    col_bias, col_weight, b_ids = (t.contiguous() if t is not None else None for t in (col_bias, col_weight, b_ids))

    def visit(s, first):
        part = slice(first, first + s.shape[0])
        bias, weight, ids = (t[part].contiguous() if t is not None else None for t in (row_bias, row_weight, a_ids))
        torch.ops.gssf.score_sums_pass(
            s, scale, bias, weight, col_bias, col_weight, ids, b_ids, first, kind, positives, any(needs),
            rows[:, part], cols,
        )  # fmt: skip

    da, db = chunks(a, b, visit, tuple(needs))
    empty = a.new_empty(0, dtype=dtype)
    lines = (rows[0].clone(), rows[1].clone(), cols[0].clone(), cols[1].clone(), rows[2].clone())
    return (*lines, da if da is not None else empty, db if db is not None else empty.clone())


def _symmetric(a, scale, bias, ids, kind, positives, need):
    """The same for b = a. The slopes are right in their sum alone, and da is the whole gradient, of both sides."""
    n = a.shape[0]
    total, none = a.new_zeros(3, n, dtype=scale.dtype), a.new_empty(2, 0, dtype=scale.dtype)
    ids = ids.contiguous() if ids is not None else None

    def visit(scores, first):
        count, (s,) = scores[0].shape[0], scores
        part = slice(first, first + count)
        row_ids = ids[part] if ids is not None else None
        for start, stop, times in ((0, count, 1), (count, n - first, 2)):  # the square, and what stands for both halves
            if start == stop:
                continue
            col_ids = ids[first + start : first + stop] if ids is not None else None
            rows = total.new_zeros(3, count)
            torch.ops.gssf.score_sums_pass(
                s[:, start:stop], scale, bias[part].contiguous(), None, None, None, row_ids, col_ids, -start, kind,
                positives, need, rows, none,
            )  # fmt: skip
            total[:, part] += times * rows

    da = triangle((a,), visit, need)
    empty = none.new_empty(0)
    da = da.mul_(2) if da is not None else empty.clone()
    return total[0].clone(), total[1].clone(), empty, empty.clone(), total[2].clone(), da, empty.clone()


def _fake(
    a, b, scale, row_bias, row_weight, col_bias, col_weight, a_ids, b_ids, kind, positives, needs
):  # fmt: skip
    n, k = a.shape[0], col_bias.shape[0] if col_bias is not None else 0
    lines = (scale.new_empty(size) for size in (n, n, k, k, n))
    return (*lines, *(scale.new_empty(t.shape if need else 0) for t, need in zip((a, b), needs, strict=True)))


def pointwise(t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``(f(t), f'(t))``."""
    if kind == "hinge":
        return torch.where(t < 0, 0, t), torch.where(t < 0, 0, torch.ones_like(t))
    if kind == "softplus":
        return torch.logaddexp(t, t.new_zeros(())), torch.sigmoid(t)
    if kind == "abs":
        return t.abs(), torch.where(t > 0, 1, torch.where(t < 0, -1, t))
    return t * t, 2 * t


def _score_sums_pass(
    s, scale, row_bias, row_weight, col_bias, col_weight, row_ids, col_ids, first, kind, positives, gradient, rows, cols
):
    same = torch.zeros_like(s, dtype=torch.bool)
    if positives != "include":
        same.diagonal(first).fill_(True)
        if row_ids is not None:
            same |= row_ids[:, None] == col_ids

    def term(s, same, bias):  # f and its slope, by scores
        t = s * scale if bias is None else s * scale + bias
        f, slope = pointwise(torch.where(same, -t, t) if positives == "negate" else t, kind)
        if positives == "negate":
            return f, torch.where(same, -slope, slope)
        return (f.masked_fill(same, 0), slope.masked_fill(same, 0)) if positives == "exclude" else (f, slope)

    f, slope = term(s, same, None if row_bias is None else row_bias[:, None])
    rows[0], rows[1] = f.sum(1), slope.sum(1)
    ds = slope if row_weight is None else slope * row_weight[:, None]
    k = cols.shape[1]
    if k:
        f, slope = term(s[:, :k], same[:, :k], col_bias)
        cols[0] += f.sum(0)
        cols[1] += slope.sum(0)
        ds[:, :k] += slope if col_weight is None else slope * col_weight
    rows[2] = (ds * s).sum(1)
    if gradient:
        s.copy_(ds)


define(
    "score_total(Tensor a, Tensor? b, Tensor? scale, Tensor? bias, float? constant, float offset, Tensor? a_ids, "
    "Tensor? b_ids, str kind, str positives, bool relative, float share, bool[] needs, Tensor? pair=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_total,
    fake=_fake_total,
    through="score_sums_pass",
    triton="sums.score_total",
)
define(
    "score_total_backward(Tensor grad, Tensor dscale, Tensor dbias, Tensor da, Tensor db, Tensor a, Tensor? b, "
    "Tensor? scale, Tensor? bias, float? constant, float share) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_total_backward,
    fake=_fake_total_backward,
    through="score_sums_pass",
    triton="sums.score_total_backward",
)
_ROWS = (
    "Tensor a, Tensor? b, Tensor? scale, Tensor? bias, float? constant, float offset, Tensor? a_ids, Tensor? b_ids, "
    "str kind, str positives, bool relative"
)
define(
    f"score_rows({_ROWS}, Tensor? pair=None) -> (Tensor, Tensor)",
    reference=_rows,
    fake=_fake_rows,
    through="score_sums_pass",
    triton="sums.score_rows",
)
define(
    f"score_rows_backward(Tensor grad, {_ROWS}, Tensor? pair, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_rows_backward,
    fake=_fake_rows_backward,
    through="score_sums_pass",
    triton="sums.score_rows_backward",
)
define(
    "score_sums(Tensor a, Tensor? b, Tensor scale, Tensor? row_bias, Tensor? row_weight, Tensor? col_bias, "
    "Tensor? col_weight, Tensor? a_ids, Tensor? b_ids, str kind, str positives, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_forward,
    fake=_fake,
    through="score_sums_pass",
)
define(
    "score_sums_pass(Tensor(a!) s, Tensor scale, Tensor? row_bias, Tensor? row_weight, Tensor? col_bias, "
    "Tensor? col_weight, Tensor? row_ids, Tensor? col_ids, int first, str kind, str positives, bool gradient, "
    "Tensor(b!) rows, Tensor(c!) cols) -> ()",
    reference=_score_sums_pass,
    fake=lambda *_: None,
    triton="dense.score_sums_pass",
)
