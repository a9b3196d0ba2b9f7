"""Hardest negatives of every row and column of ``s = a bᵀ``, in one sweep that stores no score.

    row_score_i = max_{j ∉ pos(i)} s_ij,   col_score_j = max_{i ∉ pos(j)} s_ij,   pair_score_i = s_ii

pos(i) holds j = i and every j of equal id. The sweep passes the diagonal anyway, so the positives'
scores come free. Only 2N + M scores carry gradient; the backward gathers exactly those
(:mod:`gssf_kernels.statistics.pairs`). Source of the statistic: VSE++, arXiv 1707.05612.
"""

import importlib

import torch
from torch import Tensor

from gssf_kernels import _checks, reference
from gssf_kernels._library import Function, backends, define, distinct, last_derivative
from gssf_kernels.precision import accumulation_dtype
from gssf_kernels.reference import HardestNegatives, RelativeTerms
from gssf_kernels.statistics.relative import relative_sweep


def hardest_negatives(
    a: Tensor, b: Tensor, *, a_ids: Tensor | None = None, b_ids: Tensor | None = None
) -> HardestNegatives:
    """Row and column maximum of ``s = a bᵀ`` over negatives, with their places, without storing s.

    Pairs (i, i) and pairs of equal id are positives, never negatives. Ties go to the lowest index. Where b is a, half
    of the scores do.
    NaN propagates: a NaN score wins, the first one if several. Where nothing scores above -inf (no
    valid negative, say) the score is -inf and the index -1.

    Args:
        a: [N, D] float.
        b: [M, D] of a's dtype and device, M >= N; rows past N are negatives only (a memory bank).
        a_ids: [N] int64. Ids of one side alone serve both when N = M.
        b_ids: [M] int64.

    Returns:
        named tuple ``(row_score [N], row_index [N], col_score [M], col_index [M])``; scores in fp32
        (fp64 for fp64) and differentiable once, indices int64.

    On a CPU with a unit for bf16 products (AVX-512 BF16, AMX), fp32 and fp16 inputs of so many scores that it pays (a
    million, with AMX a quarter of that) are mined exactly: the winners are those of the exact scores, which are
    returned rounded to fp32, at about the price of the bf16 product (``csrc/certified.h``; :func:`rescored_candidates`
    tells how many scores it made again). So, to the same bits, are fp32 inputs of four million scores and more on a GPU
    (``kernels/certified.py``). PyTorch's setting for fp32 products governs both, whether it was made by
    ``torch.set_float32_matmul_precision`` or by backend (``torch.backends.cuda.matmul.fp32_precision``): where it lets
    PyTorch's own products be TF32, or bf16 on the CPU, ours are.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one N x M x D product. Extra memory: O(N + M), and on the CPU b packed for the products (an fp32 copy, and of
    fp16 inputs one of a too; on a bf16 unit bf16 copies of a and, twice, of b); on a GPU a fixed number of partial
    results, and for certified mining bf16 copies of a and b.
    """
    return paired_hardest_negatives(a, b, a_ids, b_ids, names=("a", "b", "a_ids", "b_ids"))[1]


def paired_hardest_negatives(x, y, x_ids, y_ids, *, names, metric=None) -> tuple[Tensor, HardestNegatives]:
    """``(pair_score [N], hardest negatives)`` of ``x yᵀ`` or of ``metric``: what every triplet loss is a formula of."""
    pair_score, *hardest = _paired(x, y, x_ids, y_ids, names, metric, None)
    return pair_score, HardestNegatives(*hardest)


def paired_relative_negatives(
    x, y, x_ids, y_ids, relative: RelativeTerms, *, names, metric=None
) -> tuple[Tensor, HardestNegatives, tuple[Tensor, Tensor]]:
    """The same and, from the same sweep, GOAL's r⁻ of the rows [N] and of the columns [M], which carry no gradient."""
    pair_score, *hardest, row_terms, col_terms = _paired(x, y, x_ids, y_ids, names, metric, relative)
    return pair_score, HardestNegatives(*hardest), (row_terms, col_terms)


def structured_terms(
    x, y, x_ids, y_ids, kind: str, options: tuple, *, names, metric
) -> tuple[Tensor, Tensor, HardestNegatives]:
    """``(terms [N], or their sum or mean; pair_score, hardest negatives)`` of ``metric``.

    kind: "hinge", of :func:`~gssf_kernels.statistics.hinge_terms`, with options margin and reduction; or "goal", of
    :func:`~gssf_kernels.statistics.goal.goal_terms`, with triplet, pair, its four constants and reduction. The terms
    alone carry gradient. One op for all of it, so that a GPU merges what its sweep of few scores leaves and makes the
    terms in one launch.
    """
    sides, weights = _given(x, y, x_ids, y_ids, names, metric)
    loss, pair_score, *hardest = _StructuredTerms.apply(*sides[:2], *weights, *sides[2:], kind, options)
    return loss, pair_score, HardestNegatives(*hardest)


def rescored_candidates(
    a: Tensor, b: Tensor, *, a_ids: Tensor | None = None, b_ids: Tensor | None = None
) -> int | None:
    """How many scores certified mining makes again in fp64 for these inputs: a diagnosis, not differentiable.

    One or two for every row and column is what embeddings in training give. ``N * M`` and more says that the bound told
    too few scores apart (copies of one row, lengths over many decades) and that all were made in fp64, on the CPU at
    some five times the time. None where this processor has no bf16 unit. On a GPU a tile's scores of a row, or of a
    column, are all made where two of them are too near each other, and the caller waits for the number. Arguments and
    errors as in :func:`hardest_negatives`; fp32, on the CPU also fp16.
    """
    _checks.sides(a, b, "a", "b")
    a_ids, b_ids = _checks.ids(a_ids, b_ids, a, b, "a_ids", "b_ids")
    served = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float32,)}
    if a.device.type not in served:
        raise ValueError(f"a: expected device cpu or cuda, got {a.device}")
    if a.dtype not in served[a.device.type]:
        names = " or ".join(str(dtype)[6:] for dtype in served[a.device.type])
        raise TypeError(f"a: expected dtype {names}, got {a.dtype}")
    if a.device.type == "cuda":
        return _rescored_on_cuda(a.detach(), b.detach(), a_ids, b_ids)
    if backends()["hardest_negatives"]["certified"] == "no":
        return None
    return torch.ops.gssf.hardest_negatives_by(a.detach(), b.detach(), a_ids, b_ids, True)[-1]


def _rescored_on_cuda(a, b, a_ids, b_ids) -> int | None:
    if backends()["hardest_negatives"]["cuda"] != "triton":
        return None
    certified = importlib.import_module("gssf_kernels.kernels.certified")
    return int(certified.hardest_negatives(a, b, a_ids, b_ids, True)[-1]) if len(a) else 0


def _paired(x, y, x_ids, y_ids, names, metric, relative):
    (x, y, *ids), weights = _given(x, y, x_ids, y_ids, names, metric)
    if weights is None:
        return _PairedHardestNegatives.apply(x, y, *ids, relative)
    return _StructuredHardestNegatives.apply(x, y, *weights, *ids, relative)


def _given(x, y, x_ids, y_ids, names, metric):
    """((x, y, x_ids, y_ids), (diag, blocks, permutation, normalize) or None without a metric), checked."""
    x, y = _checks.autocast(x, y)
    _checks.sides(x, y, *names[:2])
    x_ids, y_ids = _checks.ids(x_ids, y_ids, x, y, *names[2:])
    x, y = distinct(x, y)
    x_ids, y_ids = distinct(x_ids, y_ids)
    if metric is None:
        return (x, y, x_ids, y_ids), None
    diag, blocks = _checks.autocast(metric.diag, metric.blocks)
    _checks.metric_weights(x, diag, blocks, metric.permutation, names[0])
    return (x, y, x_ids, y_ids), (diag, blocks, metric.permutation, metric.normalize)


def _factors(x, y, diag, blocks, permutation, normalize):
    """(x̂ W, ŷ)"""
    if normalize:
        return torch.ops.gssf.project_sides(x, y, diag, blocks, permutation)[:2]
    return torch.ops.gssf.project(x, diag, blocks, permutation, False), y


def _sweep(a, b, a_ids, b_ids, relative):
    """What `hardest_negatives` gives, then the relative negatives if asked for."""
    if relative is None:
        return torch.ops.gssf.hardest_negatives(a, b, a_ids, b_ids)
    return relative_sweep(a, b, a_ids, b_ids, relative)


def _edges(row_index: Tensor, col_index: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, cols) of the 2N + M scores that carry gradient: pairs, hardest of each row, hardest of each column."""
    i = torch.arange(row_index.shape[0], device=row_index.device)
    j = torch.arange(col_index.shape[0], device=row_index.device)
    return torch.cat((i, i, col_index)), torch.cat((i, row_index, j))


class _PairedHardestNegatives(Function):
    @staticmethod
    def forward(a, b, a_ids, b_ids, relative):
        return _sweep(a, b, a_ids, b_ids, relative)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, *_ = inputs
        _, _, row_index, _, col_index, *terms = output
        ctx.mark_non_differentiable(row_index, col_index, *terms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, row_index, col_index)

    @staticmethod
    def backward(ctx, dpair, drow, _drow_index, dcol, _dcol_index, *_dterms):
        a, b, row_index, col_index = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        op = torch.ops.gssf.hardest_negatives_backward
        grads = _whole((dpair, drow, dcol), a, b)
        found = last_derivative(op, *grads, row_index, col_index, a, b, needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None)


class _StructuredHardestNegatives(Function):
    """The same on ``s = x̂ W ŷᵀ``, keeping neither factor: since s is linear in each, what reaches a row of x is a
    sum of few rows of ŷ through Wᵀ, and what reaches a row of y a sum of few rows of x̂ through W. Both are gathered
    from the inputs themselves, so nothing of N x D is held between forward and backward. The factors exist while the
    forward runs; the C++ backward makes the result alone, Triton's and the reference's an fp32 [N, D] besides."""

    @staticmethod
    def forward(x, y, diag, blocks, permutation, normalize, x_ids, y_ids, relative):
        a, b = _factors(x, y, diag, blocks, permutation, normalize)
        return _sweep(a, b, x_ids, y_ids, relative)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, diag, blocks, permutation, ctx.normalize, *_ = inputs
        _, _, row_index, _, col_index, *terms = output
        ctx.mark_non_differentiable(row_index, col_index, *terms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, diag, blocks, permutation, row_index, col_index)

    @staticmethod
    def backward(ctx, dpair, drow, _drow_index, dcol, _dcol_index, *_dterms):
        x, y, diag, blocks, permutation, row_index, col_index = ctx.saved_tensors
        lines, needs = _whole((dpair, drow, dcol), x, y), list(ctx.needs_input_grad[:4])
        op, places = torch.ops.gssf.hardest_project_backward, (row_index, col_index)
        found = last_derivative(op, *lines, *places, x, y, diag, blocks, permutation, ctx.normalize, needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 5)


class _StructuredTerms(Function):
    """Terms of the same, keeping as little."""

    @staticmethod
    def forward(x, y, diag, blocks, permutation, normalize, x_ids, y_ids, kind, options):
        a, b = _factors(x, y, diag, blocks, permutation, normalize)
        op = torch.ops.gssf.hardest_hinge if kind == "hinge" else torch.ops.gssf.hardest_goal
        return op(a, b, x_ids, y_ids, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, diag, blocks, permutation, ctx.normalize, _, _, ctx.kind, ctx.options = inputs
        _, pair_score, row_score, row_index, col_score, col_index = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        lines = (pair_score, row_score, col_score, row_index, col_index)
        ctx.save_for_backward(*lines, x, y, diag, blocks, permutation)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 10
        needs = list(ctx.needs_input_grad[:4])
        options = (ctx.kind, ctx.options, ctx.normalize, needs)
        found = last_derivative(_terms_project_backward, grad, *ctx.saved_tensors, *options)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 6)


def _terms_project_backward(
    grad, pair_score, row_score, col_score, row_index, col_index, x, y, diag, blocks, permutation, kind, options,
    normalize, needs,
):  # fmt: skip
    of_terms = torch.ops.gssf.hinge_terms_backward if kind == "hinge" else torch.ops.gssf.goal_terms_backward
    lines = of_terms(grad, pair_score, row_score, col_score, *options)
    op = torch.ops.gssf.hardest_project_backward
    return op(*lines, row_index, col_index, x, y, diag, blocks, permutation, normalize, needs)


def _reference_hinge(a, b, a_ids, b_ids, margin, reduction):
    pair_score, row_score, row_index, col_score, col_index = torch.ops.gssf.hardest_negatives(a, b, a_ids, b_ids)
    loss = torch.ops.gssf.hinge_terms(pair_score, row_score, col_score, margin, reduction)
    return loss, pair_score, row_score, row_index, col_score, col_index


def _fake_hinge(a, b, a_ids, b_ids, margin, reduction):
    found = _fake(a, b, a_ids, b_ids)
    return found[0].new_empty(found[0].shape if reduction == "none" else ()), *found


def _reference(a, b, a_ids, b_ids):
    found = reference.hardest_negatives(a, b, a_ids=a_ids, b_ids=b_ids)
    return (reference.pair_scores(a, b), *found)


def _fake(a, b, a_ids, b_ids):
    score, index = accumulation_dtype(a.dtype), torch.int64
    n, m = a.shape[0], b.shape[0]
    return tuple(a.new_empty(size, dtype=dtype) for size, dtype in
                 ((n, score), (n, score), (n, index), (m, score), (m, index)))  # fmt: skip


def _whole(grads, a, b) -> tuple[Tensor, ...]:
    """The gradients of the pairs [N], row maxima [N] and column maxima [M], zeros for what was not used."""
    sizes, dtype = (a.shape[0], a.shape[0], b.shape[0]), accumulation_dtype(a.dtype)
    return tuple(a.new_zeros(n, dtype=dtype) if g is None else g for g, n in zip(grads, sizes, strict=True))


def _reference_backward(dpair, drow, dcol, row_index, col_index, a, b, needs):
    grad = torch.cat((dpair, drow, dcol))
    return torch.ops.gssf.pair_scores_backward(grad, *_edges(row_index, col_index), a, b, needs)


def _fake_backward(dpair, drow, dcol, row_index, col_index, a, b, needs):
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((a, b), needs, strict=True))


def _reference_project_backward(
    dpair, drow, dcol, row_index, col_index, x, y, diag, blocks, permutation, normalize, needs
):
    grad, (rows, cols) = torch.cat((dpair, drow, dcol)), _edges(row_index, col_index)
    op = torch.ops.gssf.pairs_project_backward
    dx, dy, ddiag, dblocks = x.new_empty(0), y.new_empty(0), x.new_empty(0), x.new_empty(0)
    if needs[0] or needs[2] or needs[3]:
        wanted = [needs[0], needs[2], needs[3]]
        dx, ddiag, dblocks = op(grad, rows, cols, x, y, diag, blocks, permutation, normalize, wanted)
    if needs[1]:  # y's rows go through W where x's go through its transpose
        transposed = None if blocks is None else blocks.mT
        dy, _, _ = op(grad, cols, rows, y, x, diag, transposed, permutation, normalize, [True, False, False])
    return dx, dy, ddiag, dblocks


def _fake_project_backward(dpair, drow, dcol, row_index, col_index, x, y, diag, blocks, permutation, normalize, needs):
    given = (x, y, diag, blocks)
    return tuple(
        x.new_empty(0) if t is None or not need else t.new_empty(t.shape) for t, need in zip(given, needs, strict=True)
    )


define(
    "hardest_negatives_backward(Tensor dpair, Tensor drow, Tensor dcol, Tensor row_index, Tensor col_index, Tensor a, "
    "Tensor b, bool[] needs) -> (Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton="pairs.hardest_negatives_backward",
)
define(
    "hardest_project_backward(Tensor dpair, Tensor drow, Tensor dcol, Tensor row_index, Tensor col_index, Tensor x, "
    "Tensor y, Tensor? diag, Tensor? blocks, Tensor? permutation, bool normalize, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_project_backward,
    fake=_fake_project_backward,
    through="pairs_project_backward",
    triton="project.hardest_project_backward",
)
_SIGNATURE = "(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"

define(
    "hardest_negatives" + _SIGNATURE,
    reference=_reference,
    fake=_fake,
    triton="hardest.hardest_negatives",
)
define(
    "hardest_hinge(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids, float margin, str reduction) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_hinge,
    fake=_fake_hinge,
    through="hardest_negatives",
    triton="hardest.hardest_hinge",
)
# Hardest negatives by csrc/cuda, on CUDA where that is built. Reached through `kernels.hopper` alone: nothing
# dispatches here.
define("hardest_negatives_hopper" + _SIGNATURE, reference=_reference, fake=_fake, dispatched=False)
