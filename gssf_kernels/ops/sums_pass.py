"""The pass over a chunk of scores for :mod:`gssf_kernels.ops.sums`: sums of rows and columns, and dscores."""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import plan
from gssf_kernels._library import register
from gssf_kernels.ops.masks import UNPAIRED
from gssf_kernels.ops.score_functions import pointwise


class PassCall(NamedTuple):
    """Sums over the rows of a chunk, and over its first K columns; with ``gradient`` s becomes dscores."""

    s: Tensor  # [R, M] with adjacent columns: written
    scale: Tensor
    bias: Tensor
    row_positive: Tensor | None  # [R], the positive_score that the terms of the rows are relative to
    row_weight: Tensor | None  # [R], multiplies the slopes of the rows in dscores; None: 1
    col_positive: Tensor | None  # [K], the same of the columns
    col_weight: Tensor | None  # [K]
    row_ids: Tensor | None  # [R]
    col_ids: Tensor | None  # [M]
    first: int  # the column of row 0's pair
    kind: str
    positives: str
    gradient: bool
    rows: Tensor  # [3, R]: sums, slopes and Σ_j ds_ij s_ij, written
    cols: Tensor  # [2, K]: sums and slopes are added to it


def _pass(call: PassCall) -> None:
    s, positive = call.s, torch.zeros_like(call.s, dtype=torch.bool)
    if call.positives != "include":
        if call.first != UNPAIRED:
            positive.diagonal(call.first).fill_(True)
        if call.row_ids is not None:
            positive |= call.row_ids[:, None] == call.col_ids

    def term(s, positive, bias):  # f(t) and df/dt; "negate" takes f(−t) of positives
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
    "score_sums_pass",
    PassCall,
    "()",
    composite=_pass,
    fake=lambda call: None,
    launcher="sums.score_sums_pass",
    plans=plan.chunk_pass,
    mutates=("s", "rows", "cols"),
)
