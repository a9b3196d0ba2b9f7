"""How many scores of ``s = a bᵀ`` reach levels of their row, and of their column: what ranks are made of.

    row_greater[l] = |{j: s_ij > level_l}|,  row_reaching[l] = |{j: s_ij >= level_l}|,  of each level l of row i

Left out are scores of equal ids, of listed pairs and, with exclude_self, (i, i). A NaN score is greater than every
level. One sweep counts for both directions and sorts nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import register
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.reference import accumulate


class ScoreCountsCall(NamedTuple):
    """(row_greater [P], row_reaching [P], col_greater [Q], col_reaching [Q]), int64; those of columns may be empty."""

    a: Tensor  # [N, D]
    b: Tensor  # [M, D]
    row_levels: Tensor  # [P] of the scores' dtype, no NaN, ascending within a row
    row_starts: Tensor | None = None  # [N + 1] int64: row i has the levels from row_starts[i] on; None: one each
    col_levels: Tensor | None = None  # [Q]; None: columns are not counted
    col_starts: Tensor | None = None  # [M + 1] int64
    a_ids: Tensor | None = None  # [N] int64
    b_ids: Tensor | None = None  # [M] int64
    exclude_self: bool = False
    pair_starts: Tensor | None = None  # [N + 1] int64: row i has the pairs (i, pair_cols[e]) from pair_starts[i] on
    pair_cols: Tensor | None = None  # [E] int64, ascending within a row


def swept_scores(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The scores of listed pairs [E], sorted by row, with the bits that the op compares with levels.

    Without kernels they may differ in the last bit: matrix products of a library round by position.
    """
    if rows.shape[0] == 0:
        return a.new_empty(0, dtype=accumulation_dtype(a.dtype))
    device = _checks.device_type(a)
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    has_kernels = device in keys and torch._C._dispatch_has_kernel_for_dispatch_key("gssf::score_counts", keys[device])
    if device == "cpu" and has_kernels:
        return torch.ops.gssf.pair_scores(a, b, rows, cols)
    starts = torch.searchsorted(rows, torch.arange(a.shape[0] + 1, device=rows.device))
    if device == "cuda" and has_kernels and a.dtype != torch.float64:
        call = (a, b, None, None, "sweep", False, False, starts, cols)
        return torch.ops.gssf.hardest_negatives(*call)[0]
    out = a.new_empty(rows.shape, dtype=accumulation_dtype(a.dtype))
    y = accumulate(b).mT
    step = max(plan.chunk_scores(device) // b.shape[0], 1)
    for first in plan.starts(a.shape[0], step):
        last = min(first + step, a.shape[0])
        pairs = slice(int(starts[first]), int(starts[last]))
        out[pairs] = (accumulate(a[first:last]) @ y)[rows[pairs] - first, cols[pairs]]
    return out


def _score_counts(call):
    """In chunks of rows."""
    a, b, *_ = call
    N, M = a.shape[0], b.shape[0]
    row_greater, row_reaching = (torch.zeros(call.row_levels.shape, dtype=torch.int64, device=a.device) for _ in "ab")
    columns = call.col_levels is not None
    col_levels = call.col_levels if columns else row_greater.new_empty(0, dtype=accumulation_dtype(a.dtype))
    col_greater, col_reaching = (torch.zeros(col_levels.shape, dtype=torch.int64, device=a.device) for _ in "ab")
    row_of = _anchor_of(call.row_starts, call.row_levels)
    col_of = _anchor_of(call.col_starts, col_levels) if columns else None
    width = max(M + call.row_levels.shape[0] * M // max(N, 1) + col_levels.shape[0], 1)
    step = max(plan.chunk_scores(_checks.device_type(a)) // width, 1)
    y = accumulate(b).mT
    for first in plan.starts(N if M else 0, step):
        rows = slice(first, first + step)
        s = accumulate(a[rows]) @ y
        s = torch.where(s.isnan(), torch.inf, s)
        out = torch.zeros(s.shape, dtype=torch.bool, device=s.device)
        if call.a_ids is not None:
            out = call.a_ids[rows, None] == call.b_ids
        if call.exclude_self:
            out.diagonal(first).fill_(True)
        if call.pair_starts is not None:
            last = min(first + step, N)
            begin, end = int(call.pair_starts[first]), int(call.pair_starts[last])
            places = torch.arange(begin, end, device=s.device)
            out[torch.searchsorted(call.pair_starts, places, right=True) - 1 - first, call.pair_cols[begin:end]] = True
        s = torch.where(out, torch.nan, s)
        if call.row_starts is None:
            levels = slice(first, first + s.shape[0])
        else:
            levels = slice(int(call.row_starts[first]), int(call.row_starts[min(first + step, N)]))
        of = s[row_of[levels] - first]
        level = call.row_levels[levels, None]
        row_greater[levels], row_reaching[levels] = (of > level).sum(1), (of >= level).sum(1)
        if columns:
            of = s[:, col_of]
            col_greater += (of > col_levels).sum(0)
            col_reaching += (of >= col_levels).sum(0)
    return row_greater, row_reaching, col_greater, col_reaching


def _anchor_of(starts: Tensor | None, levels: Tensor) -> Tensor:
    """The anchor of each level."""
    places = torch.arange(levels.shape[0], device=levels.device)
    return places if starts is None else torch.searchsorted(starts, places, right=True) - 1


def _fake_score_counts(call):
    rows = call.row_levels
    cols = call.row_levels.new_empty(0) if call.col_levels is None else call.col_levels
    return tuple(t.new_empty(t.shape, dtype=torch.int64) for t in (rows, rows, cols, cols))


register(
    "score_counts",
    ScoreCountsCall,
    "(Tensor, Tensor, Tensor, Tensor)",
    composite=_score_counts,
    fake=_fake_score_counts,
    launcher="score_counts.score_counts",
    plans=plan.score_counts,
)
