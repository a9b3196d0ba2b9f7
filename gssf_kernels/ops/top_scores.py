"""The k best scores of every row of ``s = a bᵀ``, and of every column, without s.

    values[i] = the k largest s_ij, best first; ties by lowest j; NaN before all others

The state of a row is its k best so far, and a score enters it that beats the last of them. Few do, so that a sweep
costs little more than the product. Only the k scores of a row carry gradient (:mod:`gssf_kernels.ops.pairs`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan, reference
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.reference import accumulate

MOST = 1024  # the largest k


class TopScoresCall(NamedTuple):
    """(values [N, k], indices [N, k], col_values [M, k], col_indices [M, k], rescored); those of columns may be empty.

    rescored: [] int64, how many scores were computed in fp64 with the route "certified", else empty.
    """

    a: Tensor  # [N, D]
    b: Tensor  # [M, D]
    k: int
    a_ids: Tensor | None = None  # [N] int64: scores of equal id are left out
    b_ids: Tensor | None = None  # [M] int64
    exclude_self: bool = False  # scores (i, i) are left out
    row_limit: Tensor | None = None  # [N], of the scores' dtype: scores of row i above it are left out
    columns: bool = False  # columns have their best scores too
    route: str = ""  # "sweep" or "certified" (CPU); "" takes the faster


def top_of_factors(call: TopScoresCall) -> tuple[Tensor, ...]:
    """(values, indices), and with ``columns`` (col_values, col_indices); values are differentiable once."""
    a, b = distinct(call.a, call.b)
    ids = distinct(call.a_ids, call.b_ids)
    call = call._replace(a=a, b=b, a_ids=ids[0], b_ids=ids[1])
    return _TopScores.apply(*call)[: 4 if call.columns else 2]


class _TopScores(Function):
    call = TopScoresCall

    @staticmethod
    def forward(*arguments):
        return torch.ops.gssf.top_scores(*arguments)[:4]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.columns = TopScoresCall._make(inputs).columns
        ctx.mark_non_differentiable(output[1], output[3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1], output[3])

    @staticmethod
    def backward(ctx, dvalues, _, dcol_values, __):
        a, b, index, col_index = ctx.saved_tensors
        none = (None,) * (len(TopScoresCall._fields) - 2)
        if dvalues is None and dcol_values is None:
            return None, None, *none
        rows, cols, grads = [], [], []
        for grad, candidates, transposed in ((dvalues, index, False), (dcol_values, col_index, True)):
            if grad is None or (transposed and not ctx.columns):
                continue
            anchors = torch.arange(candidates.shape[0], device=candidates.device)[:, None].expand_as(candidates)
            pair = (candidates, anchors) if transposed else (anchors, candidates)
            rows.append(pair[0].flatten())  # a candidate -1, of a row without k candidates, has no gradient
            cols.append(pair[1].flatten())
            grads.append(grad.flatten())
        needs = list(ctx.needs_input_grad[:2])
        pairs = torch.cat(grads), torch.cat(rows), torch.cat(cols)
        gradients = last_derivative(torch.ops.gssf.pair_scores_backward, *pairs, a, b, needs)
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *none


def merged(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of candidates [N, C] with their indices, ties by lowest index; -inf and -1 for none."""
    missing = max(k - values.shape[1], 0)
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
    by_index = indices.argsort(dim=1, stable=True)
    order = values.gather(1, by_index).sort(dim=1, descending=True, stable=True).indices[:, :k]
    order = by_index.gather(1, order)
    values = values.gather(1, order)
    return values, torch.where(values == -torch.inf, -1, indices.gather(1, order))


def _top_scores(call):
    """In chunks of rows; of columns the best of each chunk are merged."""
    a, b, k, a_ids, b_ids, exclude_self, row_limit, columns, route = call
    if route == "certified":
        raise ValueError(f'route: expected "" or "sweep" for {a.dtype} on {a.device}, got "certified"')
    (N, _), M = a.shape, b.shape[0]
    dtype = accumulation_dtype(a.dtype)
    values, indices = a.new_full((N, k), -torch.inf, dtype=dtype), a.new_full((N, k), -1, dtype=torch.int64)
    shape = (M if columns else 0, k)
    col_values, col_indices = a.new_full(shape, -torch.inf, dtype=dtype), a.new_full(shape, -1, dtype=torch.int64)
    step = max(plan.chunk_scores(_checks.device_type(a)) // max(M, 1), 1)
    y = accumulate(b).mT
    for first in plan.starts(N if M else 0, step):
        rows = slice(first, first + step)
        s = accumulate(a[rows]) @ y
        if a_ids is not None:
            s = torch.where(a_ids[rows, None] == b_ids, -torch.inf, s)
        if exclude_self:
            s.diagonal(first).fill_(-torch.inf)
        if row_limit is not None:
            s = torch.where(s > row_limit[rows, None], -torch.inf, s)
        values[rows], indices[rows] = reference.retrieval.best(s, k)
        if columns:
            new, place = reference.retrieval.best(s.mT, min(k, s.shape[0]))
            place = torch.where(place < 0, -1, place + first)
            col_values, col_indices = merged(torch.cat((col_values, new), 1), torch.cat((col_indices, place), 1), k)
    return values, indices, col_values, col_indices, indices.new_empty(0)


def _fake_top_scores(call):
    dtype = accumulation_dtype(call.a.dtype)
    shapes = (call.a.shape[0], call.k), (call.b.shape[0] if call.columns else 0, call.k)
    results = [call.a.new_empty(shape, dtype=kind) for shape in shapes for kind in (dtype, torch.int64)]
    return *results, call.a.new_empty(() if call.route == "certified" else 0, dtype=torch.int64)


register(
    "top_scores",
    TopScoresCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_top_scores,
    fake=_fake_top_scores,
    launcher="top_scores.top_scores",
    plans=plan.top_scores,
)
