"""Sums of a function of every score, ``Σ_ij f(κ s_ij + β)``, in one sweep that stores no score.

    rows_i = Σ_j f(κ s_ij + β_i),   cols_j = Σ_i f(κ s_ij + γ_j),     f: hinge, softplus, abs or square

The whole gradient of one sum is known as soon as a chunk of scores is, so it is taken in the forward pass where one is
wanted: 3 products in all, 1 without. Only rows' sums that get weights of their own ("none") make the chunks again.
Where b is a, and rows and columns are alike, half of it does: 1.5 products in all. Small problems on a GPU take a sweep
and one kernel more forward, and one back (``kernels/sums.py``).
"""

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels._library import Function, accumulation_dtype, define, distinct, last_derivative
from gssf_kernels.dense import chunks, triangle, unit_of

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
    return total_score(*arguments) if reduction == "sum" else row_sums(*arguments)


def total_score(a, b, kind, scale, bias, positives, a_ids, b_ids, share=1.0, relative=False) -> Tensor:
    """``share Σ_ij f(κ s_ij + β)``, κ and β scalar tensors or numbers; symmetric where b is a.

    ``relative``, M >= N and κ = 1: the sum of ``f(s_ij + β − s_ii)`` over all and ``f(s_ij + β − s_jj)`` over j < N.
    """
    symmetric = a is b and a_ids is b_ids and not relative
    a, b = distinct(a, None if symmetric else b)
    a_ids, b_ids = distinct(a_ids, b_ids)
    scale, constant = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    bias, offset = (bias, 0.0) if isinstance(bias, Tensor) else (None, bias)
    scale, bias = distinct(scale, bias)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (a, b)]
    options = (constant, offset, a_ids, b_ids, kind, positives, relative, share, needs)
    return _Total.apply(a, b, scale, bias, *options)[0]


def row_sums(a, b, kind, scale, bias, positives, a_ids, b_ids) -> Tensor:
    """``Σ_j f(κ s_ij + β)`` [N], κ and β scalar tensors or numbers."""
    dtype = accumulation_dtype(a.dtype)
    scale, bias = (t if isinstance(t, Tensor) else a.new_full((), t, dtype=dtype) for t in (scale, bias))
    return line_sums(a, b, kind, scale, bias.expand(a.shape[0]), None, positives, a_ids, b_ids)[0]


def line_sums(a, b, kind, scale, row_bias, col_bias, positives, a_ids, b_ids) -> tuple[Tensor, Tensor]:
    """``(rows [N], cols [K])``."""
    a, b = distinct(a, b)
    a_ids, b_ids = distinct(a_ids, b_ids)
    row_bias, col_bias = distinct(row_bias, col_bias)
    return _Lines.apply(a, b, scale, row_bias, col_bias, a_ids, b_ids, kind, positives)


class _Total(Function):
    @staticmethod
    def forward(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, share, needs):
        options = (constant, offset, a_ids, b_ids, kind, positives, relative, share, needs)
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
            return (None,) * 13
        op = torch.ops.gssf.score_total_backward
        found = last_derivative(op, grad, *ctx.saved_tensors, ctx.constant, ctx.share)
        return (*(g if need else None for g, need in zip(found, ctx.needs_input_grad[:4], strict=True)), *[None] * 9)


class _Lines(Function):
    @staticmethod
    def forward(a, b, scale, row_bias, col_bias, a_ids, b_ids, kind, positives):
        op, biases = torch.ops.gssf.score_sums, (row_bias, None, col_bias, None)
        rows, _, cols, *_ = op(a, b, scale, *biases, a_ids, b_ids, kind, positives, [False, False])
        return rows, cols

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.kind, ctx.positives = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, drows, dcols):
        needs = ctx.needs_input_grad[:5]
        options = (ctx.kind, ctx.positives, list(needs[:2]))
        found = last_derivative(_again, drows, dcols, *ctx.saved_tensors, *options)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 4)


def _again(drows, dcols, a, b, scale, row_bias, col_bias, a_ids, b_ids, kind, positives, needs):
    """The gradients of rows and cols weighted by drows and dcols, from the scores made once more."""
    unit = unit_of(a.dtype, drows, dcols)
    if unit is not None:
        drows, dcols = drows / unit, dcols / unit
    weights = (row_bias, drows.contiguous(), col_bias, dcols.contiguous() if col_bias is not None else None)
    op = torch.ops.gssf.score_sums
    _, row_slope, _, col_slope, along, da, db = op(a, b, scale, *weights, a_ids, b_ids, kind, positives, needs)
    one = unit if unit is not None else scale.new_ones(())
    return (
        (one * scale * da).to(a.dtype),
        (one * scale * db).to(b.dtype),
        one * along.sum(dtype=torch.float64).to(along.dtype),
        one * drows * row_slope,
        one * dcols * col_slope,
    )


def _total(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, share, needs):
    """``share Σ f`` and the slopes that κ and β get of it; da and db times κ, ``share`` and the upstream gradient."""
    dtype, n = accumulation_dtype(a.dtype), a.shape[0]
    scale, bias = (
        a.new_full((), number, dtype=dtype) if t is None else t for t, number in ((scale, constant), (bias, offset))
    )
    biases, i = bias.expand(n), torch.arange(n, device=a.device)
    if relative:
        biases = bias - torch.ops.gssf.pair_scores(a, b, i, i)
    lines = (biases, None, biases if relative else None, None)
    op = torch.ops.gssf.score_sums
    rows, row_slope, cols, col_slope, along, da, db = op(a, b, scale, *lines, a_ids, b_ids, kind, positives, needs)
    if relative and any(needs):  # what the pairs' own scores get
        wide, slopes = (a.to(dtype), b.to(dtype)), -(row_slope + col_slope)
        for whole, part in zip((da, db), torch.ops.gssf.pair_scores_backward(slopes, i, i, *wide, needs), strict=True):
            whole += part
    sums = (t.sum(dtype=torch.float64) for t in (torch.cat((rows, cols)), along, torch.cat((row_slope, col_slope))))
    total, dscale, dbias = ((share * t).to(dtype) for t in sums)
    return total, dscale, dbias, da, db


def _total_backward(grad, dscale, dbias, da, db, a, b, scale, bias, constant, share):
    """a, b and the rest come along for their dtypes and for their history."""
    factor = grad * share * (constant if scale is None else scale)
    return (factor * da).to(a.dtype), (factor * db).to(a.dtype), grad * dscale, grad * dbias


def _fake_total(a, b, scale, bias, constant, offset, a_ids, b_ids, kind, positives, relative, share, needs):
    shapes = ((), (), (), *(t.shape if need and t is not None else 0 for t, need in zip((a, b), needs, strict=True)))
    return tuple(a.new_empty(shape, dtype=accumulation_dtype(a.dtype)) for shape in shapes)


def _fake_total_backward(grad, dscale, dbias, da, db, a, b, scale, bias, constant, share):
    return a.new_empty(da.shape), a.new_empty(db.shape), torch.empty_like(dscale), torch.empty_like(dbias)


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
    "score_total(Tensor a, Tensor? b, Tensor? scale, Tensor? bias, float constant, float offset, Tensor? a_ids, "
    "Tensor? b_ids, str kind, str positives, bool relative, float share, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_total,
    fake=_fake_total,
    through="score_sums_pass",
    triton="sums.score_total",
)
define(
    "score_total_backward(Tensor grad, Tensor dscale, Tensor dbias, Tensor da, Tensor db, Tensor a, Tensor? b, "
    "Tensor? scale, Tensor? bias, float constant, float share) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_total_backward,
    fake=_fake_total_backward,
    through="score_sums_pass",
    triton="sums.score_total_backward",
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
