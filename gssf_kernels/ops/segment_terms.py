"""The terms of a loss over all pairs of equal id, without a list of them.

    row_terms_i = Σ_{j: id_j = id_i} f(s_ij, n_i),   col_terms_j = Σ_{i: id_i = id_j} f(s_ij, n'_j),      s = a bᵀ

n_i and n'_j are the scores of the hardest negatives, and f is the term of one direction, as in ``terms.py``: "hinge" or
"goal <triplet> <pair>". An anchor without a negative (-inf) has no terms. Diagnostics have three more: "active",
whether m + n_i > s_ij, "score", s_ij itself, and "first", whether s_ij > n_i. With "lowest" the results are the lowest
score of each anchor's pairs instead, +inf where it has none.

Rows and columns are sorted by id. Then the pairs of a tile of rows lie in one range of columns, and only those scores
are computed. Where ids cannot be read without synchronising, on CUDA, all scores are computed, one chunk at a time. A
tile determines its part of the gradients, so the forward computes them. Memory: O(N + M), the gradients and a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan, reference
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.ops.segments import segment_tiles
from gssf_kernels.ops.terms import direction_gradients, direction_value
from gssf_kernels.plan import accumulation_dtype


class Call(NamedTuple):
    """The terms, and the gradients of their weighted sum."""

    a: Tensor  # [N, D]
    b: Tensor  # [M, D]
    a_ids: Tensor  # [N] int64
    b_ids: Tensor  # [M] int64
    row_score: Tensor | None  # n [N]; None with "lowest"
    col_score: Tensor | None  # n' [M]; None: columns have no terms
    formula: str
    constants: list[float]
    row_weight: Tensor | None  # [N], of each row's terms in the sum whose gradients are computed; None: 1
    gradients: bool  # whether they are computed


def segment_terms(
    a: Tensor,
    b: Tensor,
    a_ids: Tensor,
    b_ids: Tensor,
    row_score: Tensor,
    col_score: Tensor | None,
    formula: str,
    constants: list[float],
    each: bool,
) -> Tensor:
    """The sum of all terms; or, with ``each``, row_terms [N], for which col_score is None. Differentiable once."""
    tensors = a, b, row_score, col_score
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    gradients = differentiable and not each  # with `each` the weights of the terms are known in the backward only
    a, b = distinct(a, b)
    a_ids, b_ids = distinct(a_ids, b_ids)
    return _SegmentTerms.apply(a, b, a_ids, b_ids, row_score, col_score, formula, constants, each, gradients)[0]


def lowest_of_pairs(a: Tensor, b: Tensor, a_ids: Tensor, b_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest score of each row's pairs [N], and of each column's [M]; +inf for none. No gradient."""
    call = Call(a.detach(), b.detach(), a_ids, b_ids, None, None, "lowest", [], None, False)
    rows, cols, *_ = torch.ops.gssf.segment_terms(*call)
    return rows, cols


class _SegmentTerms(Function):
    @staticmethod
    def forward(a, b, a_ids, b_ids, row_score, col_score, formula, constants, each, gradients):
        call = Call(a, b, a_ids, b_ids, row_score, col_score, formula, constants, None, gradients)
        rows, cols, *results = torch.ops.gssf.segment_terms(*call)
        return rows if each else rows.sum() + cols.sum(), *results

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, a_ids, b_ids, row_score, col_score, ctx.formula, ctx.constants, ctx.each, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*((a, b, a_ids, b_ids, row_score, col_score) if ctx.each else (a, b, *output[1:])))

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 10
        grads = last_derivative(_gradients, grad_out, ctx.formula, ctx.constants, ctx.each, *ctx.saved_tensors)
        da, db, drow, dcol = (g if need else None for g, need in zip(grads, _needed(ctx), strict=True))
        return da, db, None, None, drow, dcol, *[None] * 4


def _needed(ctx):
    return [ctx.needs_input_grad[k] for k in (0, 1, 4, 5)]


def _gradients(grad_out, formula, constants, each, a, b, *saved):
    if each:
        a_ids, b_ids, row_score, _ = saved
        call = Call(a, b, a_ids, b_ids, row_score, None, formula, constants, grad_out.contiguous(), True)
        _, _, da, db, drow, dcol = torch.ops.gssf.segment_terms(*call)
        return da.to(a.dtype), db.to(b.dtype), drow, dcol
    da, db, drow, dcol = saved
    return (grad_out * da).to(a.dtype), (grad_out * db).to(b.dtype), grad_out * drow, grad_out * dcol


class _Tile(NamedTuple):
    rows: slice  # of the sorted rows
    cols: slice  # of the sorted columns
    s: Tensor  # [R, C]
    same: Tensor  # [R, C] bool: of equal id


def _tiles(a: Tensor, b: Tensor, a_ids: Tensor, b_ids: Tensor):
    """The tiles that hold all pairs; a, b and the ids are sorted by id."""
    readable = _checks.readable(a_ids) and _checks.readable(b_ids)
    scores = plan.SEGMENT_SCORES if readable else plan.CHUNK_SCORES.get(a.device.type, plan.SEGMENT_SCORES)
    rows = plan.SEGMENT_ROWS if readable else max(scores // max(b.shape[0], 1), 1)
    for i0, i1, j0, j1 in segment_tiles(a_ids, b_ids, rows):
        step = max(scores // (i1 - i0), 1)
        for j in range(j0, j1, step):
            cols = slice(j, min(j + step, j1))
            s = reference.accumulate(a[i0:i1]) @ reference.accumulate(b[cols]).mT
            yield _Tile(slice(i0, i1), cols, s, a_ids[i0:i1, None] == b_ids[cols])


def _values(call: Call, s: Tensor, n: Tensor) -> Tensor:
    """f(s, n) of scores s and hardest negatives n; 0 where there is no negative."""
    if call.formula == "active":
        return torch.where(n != -torch.inf, (call.constants[0] + n - s > 0).to(s.dtype), 0)
    if call.formula == "first":
        return (s > n).to(s.dtype)
    if call.formula == "score":
        return torch.where(n != -torch.inf, s, 0)
    return direction_value(call.formula, call.constants, s, n)


def _segment_terms(call: Call) -> tuple[Tensor, ...]:
    a, b, dtype = call.a, call.b, accumulation_dtype(call.a.dtype)
    (a_ids, a_order), (b_ids, b_order) = call.a_ids.sort(stable=True), call.b_ids.sort(stable=True)
    sorted_a, sorted_b = a[a_order], b[b_order]
    lowest = call.formula == "lowest"
    has_columns = lowest or call.col_score is not None
    rows = a.new_full(a.shape[:1], torch.inf if lowest else 0, dtype=dtype)
    cols = a.new_full(b.shape[:1] if has_columns else (0,), torch.inf if lowest else 0, dtype=dtype)
    da, db = (t.new_zeros(t.shape if call.gradients else 0, dtype=dtype) for t in (a, b))
    drow, dcol = (t.new_zeros(t.shape if call.gradients else 0) for t in (rows, cols))
    row_n = None if call.row_score is None else call.row_score[a_order]
    col_n = None if call.col_score is None else call.col_score[b_order]
    row_weight, col_weight = torch.ones_like(rows), torch.ones_like(cols)
    if call.row_weight is not None:
        row_weight = call.row_weight[a_order]
    for tile in _tiles(sorted_a, sorted_b, a_ids, b_ids):
        if lowest:
            s = torch.where(tile.same, tile.s, torch.inf)
            rows[tile.rows] = torch.minimum(rows[tile.rows], s.amin(1))
            cols[tile.cols] = torch.minimum(cols[tile.cols], s.amin(0))
            continue
        ds = torch.zeros_like(tile.s)
        sides = (
            (row_n, row_weight, rows, drow, tile.rows, 1),
            (col_n, col_weight, cols, dcol, tile.cols, 0),
        )
        for n, weight, totals, dn, part, dim in sides:
            if n is None:
                continue
            n_of_tile = n[part].unsqueeze(dim)
            totals[part] += torch.where(tile.same, _values(call, tile.s, n_of_tile), 0).sum(dim)
            if call.gradients:
                dterms = weight[part].unsqueeze(dim)
                dpositive, dnegative = direction_gradients(dterms, call.formula, call.constants, tile.s, n_of_tile)
                ds -= torch.where(tile.same, dpositive, 0)
                dn[part] += torch.where(tile.same, dnegative, 0).sum(dim)
        if call.gradients:
            da[tile.rows] += ds @ reference.accumulate(sorted_b[tile.cols])
            db[tile.cols] += ds.mT @ reference.accumulate(sorted_a[tile.rows])
    unsorted = ((rows, a_order), (cols, b_order), (da, a_order), (db, b_order), (drow, a_order), (dcol, b_order))
    return tuple(torch.empty_like(t).index_copy_(0, order, t) if t.numel() else t for t, order in unsorted)


def _fake(call: Call) -> tuple[Tensor, ...]:
    n, m, dtype = call.a.shape[0], call.b.shape[0], accumulation_dtype(call.a.dtype)
    columns = m if call.formula == "lowest" or call.col_score is not None else 0
    shapes = ((n,), (columns,), call.a.shape, call.b.shape, (n,), (columns,))
    return tuple(call.a.new_empty(s if k < 2 or call.gradients else (0,), dtype=dtype) for k, s in enumerate(shapes))


# Results: the terms of rows [N] and of columns [M], or none; the gradients of a, b, row_score and col_score, or none.
register(
    "segment_terms",
    Call,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_segment_terms,
    fake=_fake,
)
