"""The passes over a chunk of scores for :mod:`gssf_kernels.ops.logsumexp`: its statistics, and its dscores.

logsumexp_pass   (max, Σ e^{t − max}) of the rows, by label of positives and negatives; of the columns, merged
softmax_pass     s becomes dL/dt, by label dL/ds
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_kernels import plan
from gssf_kernels._library import register
from gssf_kernels.ops.score_functions import ByLabel, logit, members


class PassCall(NamedTuple):
    """Row statistics of a chunk, and its column statistics, merged into those of earlier chunks."""

    s: Tensor  # [R, M] with adjacent columns
    scale: Tensor
    score: str
    constants: list[float]
    row_labels: Tensor | None
    col_labels: Tensor | None
    row_bounds: Tensor | None
    col_bounds: Tensor | None
    first: int
    leave_out: bool
    row_max: Tensor  # [R], by label [2, R]: written
    row_sum: Tensor  # Σ_j e^{t − row_max}: written
    col_max: Tensor | None  # [M], by label [2, M]: merged; None: columns have no statistics
    col_sum: Tensor | None  # Σ_i e^{t − col_max}: merged

    @property
    def by_label(self) -> ByLabel:
        return ByLabel(*self[2:10])


class SoftmaxPassCall(NamedTuple):
    """Replaces a chunk of scores by dL/dt, by label by dL/ds."""

    s: Tensor  # [R, M] with adjacent columns: written
    scale: Tensor
    score: str
    constants: list[float]
    row_labels: Tensor | None
    col_labels: Tensor | None
    row_bounds: Tensor | None
    col_bounds: Tensor | None
    first: int
    leave_out: bool
    row_max: Tensor
    row_log: Tensor
    row_grad: Tensor | None  # dL/d row_log; None: the direction has no gradient
    col_max: Tensor | None
    col_log: Tensor | None
    col_grad: Tensor | None
    dscores_dot_s: Tensor  # [R]: written

    @property
    def by_label(self) -> ByLabel:
        return ByLabel(*self[2:10])


def _logsumexp_pass(call: PassCall) -> None:
    positive, row, col = members(call.s, call.by_label)
    t, _ = logit(call.s, call.scale, positive, call.by_label)
    call.row_max.fill_(-torch.inf)
    call.row_sum.zero_()
    for k, member in enumerate([None] if positive is None else [positive, ~positive]):

        def counted(t, counts, member=member):
            return torch.where(counts if member is None else counts & member, t, -torch.inf)

        classes = (..., slice(None)) if member is None else (k,)
        _merge(call.row_max[classes], call.row_sum[classes], counted(t, row), 1)
        if call.col_max is not None and call.col_sum is not None:
            _merge(call.col_max[classes], call.col_sum[classes], counted(t, col), 0)


def _merge(maximum, total, t, dim):
    """Merge t, reduced over dim, into (maximum, total), where total is Σ e^{t − maximum}. In place.

    A maximum that is NaN is stored as +inf, and its total is NaN.
    """
    if t.shape[dim] == 0:
        return
    larger = torch.maximum(maximum, t.amax(dim))
    shift = torch.where(larger.isfinite(), larger, 0)
    sums = torch.exp(t - shift.unsqueeze(dim)).sum(dim)
    # If the maximum stays, so does the total, also that of +inf, which stands for NaN too.
    earlier = torch.where(maximum == larger, total, total * torch.exp(maximum - shift))
    total.copy_(earlier + sums)
    maximum.copy_(torch.where(larger.isnan(), torch.inf, larger))


def _softmax_pass(call: SoftmaxPassCall) -> None:
    positive, row, col = members(call.s, call.by_label)
    t, slope = logit(call.s, call.scale, positive, call.by_label)
    ds = torch.zeros_like(call.s)
    directions: Any = ((call[10:13], row, 1), (call[13:16], col, 0))
    for statistics, counts, dim in directions:
        if statistics[2] is None:
            continue

        def softmax_grad(*statistics):  # grad · softmax(t) of the row, or of the column
            maximum, log, grad = (x.unsqueeze(dim) for x in statistics)  # noqa: B023
            return grad * torch.exp((t - maximum) - log)

        if positive is None:
            ds += torch.where(counts, softmax_grad(*statistics), 0)
        else:
            positive_grad, negative_grad = (softmax_grad(*(x[k] for x in statistics)) for k in (0, 1))
            ds += torch.where(counts, torch.where(positive, positive_grad, negative_grad), 0)
    if positive is not None:
        ds *= slope
    call.dscores_dot_s.copy_((ds * call.s).sum(1))
    call.s.copy_(ds)


register(
    "logsumexp_pass",
    PassCall,
    "()",
    composite=_logsumexp_pass,
    fake=lambda call: None,
    launcher="logsumexp.logsumexp_pass",
    plans=plan.chunk_pass,
    mutates=("row_max", "row_sum", "col_max", "col_sum"),
)
register(
    "softmax_pass",
    SoftmaxPassCall,
    "()",
    composite=_softmax_pass,
    fake=lambda call: None,
    launcher="logsumexp.softmax_pass",
    plans=plan.chunk_pass,
    mutates=("s", "dscores_dot_s"),
)
