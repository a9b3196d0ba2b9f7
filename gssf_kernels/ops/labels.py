"""Log-sum-exps by label: the positives of an anchor have its label, its negatives another.

    log Σ_{j: label_j = label_i} e^{t(s_ij)},   log Σ_{j: label_j ≠ label_i} e^{t(s_ij)},      s = x yᵀ

Anchors are the rows of x. Without y, ``s = x xᵀ``, and a row is never compared with itself. Circle loss and
multi-similarity loss are formulas over these two; their sources stand in ``losses/``.
"""

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels.ops.logsumexp import LabelledFactors, logsumexp_by_label
from gssf_kernels.ops.positives import hardest_positives
from gssf_kernels.ops.segment_terms import lowest_of_pairs
from gssf_kernels.similarity import StructuredSimilarity, check_metric, factors_with_itself, folded_factor


def labelled_factors(
    x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, metric: StructuredSimilarity | None
) -> LabelledFactors:
    """The factors and their labels, from the user's arguments, which are checked.

    x: [N, D]; labels: [N]; y: [M, D] with y_labels [M], or None for both: the rows of x are compared with one another.
    """
    check_metric(metric)
    if (y is None) != (y_labels is None):
        missing, present = ("y", "y_labels") if y is None else ("y_labels", "y")
        raise ValueError(f"{missing}: expected it too, because {present} is given, got None")
    symmetric = y is None
    x, y = _checks.autocast(x, x if y is None else y)
    _checks.embeddings(x, y, "x", "x" if symmetric else "y", paired=False)
    labels = _checks.labels(labels, "labels", x.shape[0], x.device)
    if y_labels is not None:
        y_labels = _checks.labels(y_labels, "y_labels", y.shape[0], x.device)
    of_x = labels, labels if y_labels is None else y_labels, symmetric
    if metric is None or not symmetric:
        a, b = (x, y) if metric is None else _checks.autocast(*metric.factors(x, y))
        return LabelledFactors(a, b, *of_x)
    a, b = factors_with_itself(metric, x)
    return LabelledFactors(a, b, *of_x, folded_factor(metric, a, b))


def log_sums(
    factors: LabelledFactors, score: str, constants: list[float], bounds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(log Σ e^t over positives, log Σ e^t over negatives)``, [N] each; -inf for an empty sum. Differentiable once.

    score: the name of t(s) in `score_functions.LOGITS`, with its constants.
    bounds: [2, N]. A positive of row i counts only if it scores less than bounds[0, i], a negative only if it scores
    greater than bounds[1, i].
    Time: one product forward, three backward; half of each if b is a.
    """
    row_max, row_log = logsumexp_by_label(factors, score, constants, bounds)
    positive, negative = (row_max + row_log).unbind()
    return positive, negative


def hardest_scores(factors: LabelledFactors) -> tuple[Tensor, Tensor]:
    """Each anchor's least positive score [N], +inf for none, and its largest negative score [N], -inf for none.

    Both are constants to autograd. Time: one product, half of it if b is a, and the scores of the positives.
    """
    a_labels, b_labels, leave_out, _ = factors[2:]
    a = factors.a.detach()
    b = a if factors.b is factors.a else factors.b.detach()
    negatives = False, False, None, None, None, None, None, factors.symmetric
    negative = torch.ops.gssf.hardest_negatives(a, b, a_labels, b_labels, "", *negatives)[1]
    if not leave_out:
        return lowest_of_pairs(a, b, a_labels, b_labels)[0], negative
    index = hardest_positives(a, a_labels, None if b is a else b)
    positive = torch.ops.gssf.pair_scores(a, b, torch.arange(a.shape[0], device=a.device), index)
    return torch.where(index < 0, torch.inf, positive), negative
