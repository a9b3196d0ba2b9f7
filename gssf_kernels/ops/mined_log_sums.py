"""Log-sums by label over the scores that are worth training on, with one product fewer where positives are few.

    a positive of row i counts if s_ij < u_i,   u_i = max over its negatives + ε
    a negative of row i counts if s_ij > l_i,   l_i = min over its positives − ε           (multi-similarity's mining)

l needs the scores of the positives alone. With it one pass over all scores has the negatives' log-sum and its largest
logit, from which u follows but for rounding. Rows of which a positive is so close to u that rounding could decide are
mined again, exactly. If no negative of a row counts, no positive does either: n <= min p − ε says n + ε <= p, though
not always of rounded sums. The positives' log-sum is then one over their scores, which have the bits of the pass.
"""

from typing import Any

import torch
from torch import Tensor

from gssf_kernels._library import distinct, may_keep
from gssf_kernels.ops.labels import hardest_scores, log_sums
from gssf_kernels.ops.logsumexp import Call, LabelledFactors, LogSumExp
from gssf_kernels.ops.masks import Selection
from gssf_kernels.ops.pairing import Pairing, few_as_list
from gssf_kernels.ops.score_functions import LOGITS

SCORE = "multi_similarity"


def mined_log_sums(factors: LabelledFactors, constants: list[float], epsilon: float) -> tuple[Tensor, Tensor]:
    """``(log Σ e^t over positives, log Σ e^t over negatives)`` that count, [N] each. Differentiable once.

    constants: α, β and the base of multi-similarity's logits. Time: one product forward on the CPU if few pairs have
    equal labels (`plan.lists_pairs`), else two; three backward; half of each if b is a.
    """
    # Of a symmetric s of two factors, a score and its mirror differ by rounding, and one of them is computed.
    listed = None if factors.symmetric else few_as_list(Pairing("ids", factors.a_labels, factors.b_labels))
    if listed is None:
        least_positive, largest_negative = hardest_scores(factors)
        bounds = torch.stack((largest_negative + epsilon, least_positive - epsilon))
        return log_sums(factors, SCORE, constants, bounds)
    rows, cols = listed.rows, listed.cols
    if factors.leave_out:
        rows, cols = rows[rows != cols], cols[rows != cols]
    with torch.no_grad():
        call, results = _forward(factors, constants, epsilon, rows, cols)
    row_max, row_log, *_ = _Computed.apply(*call, results)
    positive, negative = (row_max + row_log).unbind()
    return positive, negative


class _Computed(LogSumExp):
    """Log-sums that are computed already, the last argument: what is left is their backward."""

    call: Any = None

    @staticmethod
    def forward(*arguments):
        return arguments[-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        LogSumExp.setup_context(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx, *grads):
        return *LogSumExp.backward(ctx, *grads), None


def _forward(factors: LabelledFactors, constants: list[float], epsilon: float, rows: Tensor, cols: Tensor):
    """The op's arguments with the bounds of the mining, and its results; rows, cols: the positives [P]."""
    a, b = factors.a.detach(), factors.b.detach()
    p = torch.ops.gssf.pair_scores(a, b, rows, cols)
    infinite = p.new_full(a.shape[:1], torch.inf)
    lower = infinite.scatter_reduce(0, rows, p, "amin") - epsilon
    logit = None, 1.0, "scores" if may_keep(factors.a, factors.b) else "", SCORE, constants
    labels = distinct(factors.a_labels, factors.b_labels)
    bounds = torch.stack((infinite, lower))
    sides = factors.a, None if factors.b is factors.a else factors.b
    call = Call._make((*sides, *logit, *labels, bounds, factors.leave_out, None, *Selection()))
    row_max, row_log, *unchanged = torch.ops.gssf.logsumexp_scores(*call)
    bounds[0] = _largest_negatives(factors, constants, epsilon, row_max[1], rows, p) + epsilon
    row_max[0], row_log[0] = _log_sums_of(p, rows, bounds[0], constants)
    return call, (row_max, row_log, *unchanged)


def _largest_negatives(
    factors: LabelledFactors, constants: list[float], epsilon: float, top: Tensor, rows: Tensor, p: Tensor
) -> Tensor:
    """The largest negative score of each row [N] from its logit, to rounding; exact where that could decide.

    top: the largest logit of the negatives that count [N]; -inf for none, and then no positive counts either.
    """
    _, beta, base = constants
    largest = torch.where(top == -torch.inf, -torch.inf, top / beta + base)
    rounding = 8 * torch.finfo(p.dtype).eps
    error = torch.where(top == -torch.inf, 0, rounding * (top.abs() / beta + abs(base) + epsilon))
    sure = (p - largest[rows] - epsilon).abs() > error[rows] + rounding * p.abs()  # a NaN is not
    unsure = rows[~sure].unique()
    if unsure.shape[0]:
        labels = factors.a_labels[unsure], factors.b_labels
        sides = factors.a.detach()[unsure], factors.b.detach()
        largest[unsure] = torch.ops.gssf.hardest_negatives(*sides, *labels, "sweep", False, False)[1]
    return largest


def _log_sums_of(p: Tensor, rows: Tensor, upper: Tensor, constants: list[float]) -> tuple[Tensor, Tensor]:
    """(max, log Σ e^{t − max}) [N] over the positives p [P] of each row that score less than upper [N]."""
    t, _ = LOGITS[SCORE](p, torch.ones_like(p, dtype=torch.bool), *constants)
    t = torch.where(p >= upper[rows], -torch.inf, t)  # a NaN counts
    none = upper.new_full(upper.shape, -torch.inf)
    top = none.scatter_reduce(0, rows, t, "amax")
    top = torch.where(top.isnan(), torch.inf, top)  # as the passes store it
    shift = torch.where(top.isfinite(), top, 0)
    return top, torch.zeros_like(top).index_add(0, rows, torch.exp(t - shift[rows])).log()
