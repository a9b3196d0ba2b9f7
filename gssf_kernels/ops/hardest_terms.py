"""Hardest negatives and the terms of a loss of them, in one op.

    hinge, goal      as in ``terms.py``
    goal, relative   terms_i = (row_i − p_i) + (col_i − p_i),     i < N,   each 0 where there is no negative
                     dL/dp = −(w⁺ of rows + w⁺ of columns),   dL/drow = w⁻ of rows,   dL/dcol = w⁻ of columns

GOAL's pair weights with relative terms are lin_ms and sig_ms. Their weights w are constants to autograd, so the forward
computes them. On a GPU the forward of a small problem is two launches. Source: GOAL, arXiv 2210.13188.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import plan, reference
from gssf_kernels._library import Function, last_derivative, register
from gssf_kernels.ops.goal import RELATIVE, Constants, anchor_weights
from gssf_kernels.ops.hardest import checked_inputs, projected_factors
from gssf_kernels.ops.negatives import fake_results
from gssf_kernels.ops.relative import relative_positives, relative_sweep
from gssf_kernels.ops.terms import anchor_term_gradients
from gssf_kernels.reference import AnchorStatistics, HardestNegatives, RelativeTerms


class HardestTermsCall(NamedTuple):
    a: Tensor  # [N, D]
    b: Tensor  # [M, D], M >= N
    a_ids: Tensor | None  # [N] int64
    b_ids: Tensor | None  # [M] int64
    formula: str  # "hinge" or "goal <triplet> <pair>"
    constants: list[float]  # hinge: the margin; goal: τ, α, β, λ, with relative terms also positive, negative_threshold
    reduction: str


def hardest_terms(
    x, y, x_ids, y_ids, formula: str, constants: list[float], reduction: str, *, names, metric=None
) -> tuple[Tensor, Tensor, HardestNegatives]:
    """``(loss, positive_score, hardest negatives)`` of ``s = x yᵀ``, or of the scores of ``metric``.

    loss: the terms [N], or their sum or mean. Only the loss carries gradient. Differentiable once.
    """
    (x, y, *ids), weights = checked_inputs(x, y, x_ids, y_ids, names, metric)
    outputs = _HardestTerms.apply(x, y, *weights, *ids, formula, constants, reduction)
    loss, positive_score, *hardest, _ = outputs
    return loss, positive_score, HardestNegatives(*hardest)


class _HardestTerms(Function):
    """With a metric, neither factor is kept for the backward, as in ``hardest.py``."""

    @staticmethod
    def forward(x, y, diag, blocks, permutation, normalize, x_ids, y_ids, formula, constants, reduction):
        a, b = projected_factors(x, y, diag, blocks, permutation, normalize)
        return torch.ops.gssf.hardest_terms(a, b, x_ids, y_ids, formula, constants, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, diag, blocks, permutation, ctx.normalize, _, _, formula, ctx.constants, ctx.reduction = inputs
        _, positive_score, row_score, row_index, col_score, col_index, weights = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        statistics = (weights, col_score) if _relative(formula) else (positive_score, row_score, col_score)
        ctx.formula = "weights" if _relative(formula) else formula
        ctx.save_for_backward(row_index, col_index, x, y, diag, blocks, permutation, *statistics)

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 11
        needs = list(ctx.needs_input_grad[:4])
        options = (ctx.formula, ctx.constants, ctx.reduction, ctx.normalize, needs)
        grads = last_derivative(_gradients, grad_out, options, *ctx.saved_tensors)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 7)


def _gradients(grad_out, options, row_index, col_index, x, y, diag, blocks, permutation, *statistics):
    formula, constants, reduction, normalize, needs = options
    dstatistics = anchor_term_gradients(grad_out, formula, constants, reduction, *statistics)
    inputs = (x, y, diag, blocks, permutation, normalize)
    return torch.ops.gssf.hardest_negatives_backward(*dstatistics, row_index, col_index, *inputs, needs)


def _relative(formula: str) -> bool:
    """Whether the pair weight has relative terms: lin_ms, sig_ms."""
    return formula.endswith("_ms")


def _hardest_terms(call):
    if _relative(call.formula):
        return _relative_goal(call)
    *results, _ = torch.ops.gssf.hardest_negatives(*call[:4])
    statistics = [results[0], results[1], results[3]]
    loss = torch.ops.gssf.anchor_terms(call.formula, statistics, call.constants, call.reduction)
    return loss, *results, loss.new_empty(0)


def _relative_goal(call):
    triplet, pair = call.formula.split()[1:]
    tau, alpha, beta, lam, positive_threshold, negative_threshold = call.constants
    constants = Constants(tau, alpha, beta, lam)
    relative = RelativeTerms(RELATIVE[pair], alpha, beta, positive_threshold, negative_threshold)
    *results, row_relative, col_relative = relative_sweep(call.a, call.b, call.a_ids, call.b_ids, relative)
    positive_score, row_score, _, col_score, _ = results
    count = positive_score.shape[0]
    terms, weights = [], []
    for negative, relative_negative in ((row_score, row_relative), (col_score[:count], col_relative[:count])):
        valid = negative != -torch.inf
        relative_positive = relative_positives(positive_score, negative, relative)
        anchor = AnchorStatistics(positive_score, negative, relative_positive, relative_negative)
        weights += [torch.where(valid, weight, 0) for weight in anchor_weights(anchor, triplet, pair, constants)]
        terms.append(torch.where(valid, negative - positive_score, 0))
    return reference.reduce(terms[0] + terms[1], call.reduction), *results, torch.stack(weights)


def _fake_hardest_terms(call):
    results = fake_results(call.a, call.b)
    n = results[0].shape[0]
    loss = results[0].new_empty(n if call.reduction == "none" else ())
    return loss, *results, results[0].new_empty((4, n) if _relative(call.formula) else 0)


# Results: loss; positive_score, row_score, row_index [N]; col_score, col_index [M]; weights [4, N], which are w⁺ and w⁻
# of the rows, then of the columns (empty without relative terms).
register(
    "hardest_terms",
    HardestTermsCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_hardest_terms,
    fake=_fake_hardest_terms,
    launcher="hardest_terms.hardest_terms",
    plans=plan.hardest_terms,
    through="hardest_negatives",
)
