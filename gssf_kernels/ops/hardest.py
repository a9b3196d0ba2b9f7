"""Hardest negatives of every row and column of ``s = a bᵀ``, in one sweep that stores no score.

    row_score_i = max_{j ∉ pos(i)} s_ij,   col_score_j = max_{i ∉ pos(j)} s_ij,   positive_score_i = s_ii

pos(i) holds j = i and every j of equal id. The sweep computes the diagonal anyway, so the positives'
scores cost nothing. Only 2N + M scores carry gradient; the backward gathers exactly those
(:mod:`gssf_kernels.ops.pairs`). Source of the statistic: VSE++, arXiv 1707.05612.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan, reference
from gssf_kernels._library import Function, backends, distinct, last_derivative, register
from gssf_kernels.ops.relative import relative_sweep
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.project import pairs_project_backward
from gssf_kernels.reference import HardestNegatives, RelativeTerms


class HardestNegativesCall(NamedTuple):
    a: Tensor
    b: Tensor
    a_ids: Tensor | None
    b_ids: Tensor | None
    route: str = ""  # "sweep" or "certified"; "" is what pays


class HardestNegativesBackwardCall(NamedTuple):
    """Gradients of the scores x̂ W ŷᵀ at (i, i) [N], (i, row_index[i]) [N] and (col_index[j], j) [M].

    Without weights and normalize they are those of x yᵀ. needs: for x, y, diag, blocks.
    """

    dpositive: Tensor
    drow: Tensor
    dcol: Tensor
    row_index: Tensor
    col_index: Tensor
    x: Tensor
    y: Tensor
    diag: Tensor | None
    blocks: Tensor | None
    permutation: Tensor | None
    normalize: bool
    needs: list[bool]


def hardest_negatives(
    a: Tensor, b: Tensor, *, a_ids: Tensor | None = None, b_ids: Tensor | None = None
) -> HardestNegatives:
    """Row and column maximum of ``s = a bᵀ`` over negatives, with their places, without storing s.

    Pairs (i, i) and pairs of equal id are positives, never negatives. Ties go to the lowest index. Where b is a, only
    the upper triangle is computed.
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
    (``triton/certified.py``). PyTorch's setting for fp32 products governs both, whether it was made by
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
    """``(positive_score [N], hardest negatives)`` of ``x yᵀ`` or of ``metric``."""
    positive_score, *hardest = _paired(x, y, x_ids, y_ids, names, metric, None)
    return positive_score, HardestNegatives(*hardest)


def paired_relative_negatives(
    x, y, x_ids, y_ids, relative: RelativeTerms, *, names, metric=None
) -> tuple[Tensor, HardestNegatives, tuple[Tensor, Tensor]]:
    """The same and, from the same sweep, GOAL's r⁻ of the rows [N] and of the columns [M], which carry no gradient."""
    positive_score, *hardest, row_relative, col_relative = _paired(x, y, x_ids, y_ids, names, metric, relative)
    return positive_score, HardestNegatives(*hardest), (row_relative, col_relative)


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
        if backends()["hardest_negatives"]["cuda"] != "triton":
            return None
    elif backends()["hardest_negatives"]["certified"] == "no":
        return None
    return int(torch.ops.gssf.hardest_negatives(a.detach(), b.detach(), a_ids, b_ids, "certified")[-1])


def _paired(x, y, x_ids, y_ids, names, metric, relative):
    (x, y, *ids), weights = checked_sides(x, y, x_ids, y_ids, names, metric)
    return _PairedHardestNegatives.apply(x, y, *weights, *ids, relative)


def checked_sides(x, y, x_ids, y_ids, names, metric):
    """((x, y, x_ids, y_ids), (diag, blocks, permutation, normalize)), checked; all none without a metric."""
    x, y = _checks.autocast(x, y)
    _checks.sides(x, y, *names[:2])
    x_ids, y_ids = _checks.ids(x_ids, y_ids, x, y, *names[2:])
    x, y = distinct(x, y)
    x_ids, y_ids = distinct(x_ids, y_ids)
    if metric is None:
        return (x, y, x_ids, y_ids), (None, None, None, False)
    diag, blocks = _checks.autocast(metric.diag, metric.blocks)
    _checks.metric_weights(x, diag, blocks, metric.permutation, names[0])
    return (x, y, x_ids, y_ids), (diag, blocks, metric.permutation, metric.normalize)


def projected_sides(x, y, diag, blocks, permutation, normalize):
    """(x̂ W, ŷ); x and y themselves without weights and normalize."""
    if diag is None and blocks is None and not normalize:
        return x, y
    p, unit, *_ = torch.ops.gssf.project(x, y if normalize else None, diag, blocks, permutation, normalize)
    return p, unit if normalize else y


class _PairedHardestNegatives(Function):
    """Of ``s = x̂ W ŷᵀ`` or ``x yᵀ``, keeping no factor: since s is linear in each, the gradient of a row of x is a sum
    of few rows of ŷ through Wᵀ, and that of a row of y a sum of few rows of x̂ through W. Both are gathered from the
    inputs themselves, so nothing of N x D is held between forward and backward. The factors exist while the forward
    runs; the C++ backward makes the result alone, Triton's and the composite's an fp32 [N, D] besides."""

    @staticmethod
    def forward(x, y, diag, blocks, permutation, normalize, x_ids, y_ids, relative):
        a, b = projected_sides(x, y, diag, blocks, permutation, normalize)
        if relative is not None:
            return relative_sweep(a, b, x_ids, y_ids, relative)
        return torch.ops.gssf.hardest_negatives(a, b, x_ids, y_ids)[:5]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, diag, blocks, permutation, ctx.normalize, *_ = inputs
        _, _, row_index, _, col_index, *relative = output
        ctx.mark_non_differentiable(row_index, col_index, *relative)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(row_index, col_index, x, y, diag, blocks, permutation)

    @staticmethod
    def backward(ctx, dpositive, drow, _drow_index, dcol, _dcol_index, *_):
        row_index, col_index, x, y, *weights = ctx.saved_tensors
        needs, op = list(ctx.needs_input_grad[:4]), torch.ops.gssf.hardest_negatives_backward
        dscores = _without_none((dpositive, drow, dcol), x, y)
        grads = last_derivative(op, *dscores, row_index, col_index, x, y, *weights, ctx.normalize, needs)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 5)


def _without_none(grads, x, y) -> tuple[Tensor, ...]:
    """The gradients of the positives [N], row maxima [N] and column maxima [M], zeros for what was not used."""
    sizes, dtype = (x.shape[0], x.shape[0], y.shape[0]), accumulation_dtype(x.dtype)
    return tuple(x.new_zeros(n, dtype=dtype) if g is None else g for g, n in zip(grads, sizes, strict=True))


def _hardest_negatives(call):
    """The definition; certified mining has no other implementation than C++ and Triton."""
    if call.route == "certified":
        raise ValueError(f'route: expected "" or "sweep" for {call.a.dtype} on {call.a.device}, got "certified"')
    hardest = reference.hardest_negatives(call.a, call.b, a_ids=call.a_ids, b_ids=call.b_ids)
    return (reference.pair_scores(call.a, call.b), *hardest, call.a.new_empty(0, dtype=torch.int64))


def fake_results(a, b):
    """positive_score, row_score, row_index, col_score, col_index"""
    score, index = accumulation_dtype(a.dtype), torch.int64
    n, m = a.shape[0], b.shape[0]
    return tuple(a.new_empty(size, dtype=dtype) for size, dtype in
                 ((n, score), (n, score), (n, index), (m, score), (m, index)))  # fmt: skip


def _fake_hardest_negatives(call):
    rescored = call.a.new_empty(() if call.route == "certified" else 0, dtype=torch.int64)
    return *fake_results(call.a, call.b), rescored


def _hardest_gradients(call):
    """(dx, dy, ddiag, dblocks), by the list of the 2N + M scores that carry gradient."""
    i = torch.arange(call.row_index.shape[0], device=call.row_index.device)
    j = torch.arange(call.col_index.shape[0], device=call.row_index.device)
    rows, cols = torch.cat((i, i, call.col_index)), torch.cat((i, call.row_index, j))
    return pairs_project_backward(torch.cat((call.dpositive, call.drow, call.dcol)), rows, cols, call)


def _fake_hardest_gradients(call):
    tensors = (call.x, call.y, call.diag, call.blocks)
    return tuple(
        call.x.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip(tensors, call.needs, strict=True)
    )


# positive_score [N]; row_score, row_index [N], col_score, col_index [M]; how many scores were made in fp64 where the
# route is "certified", [] int64, else empty
register(
    "hardest_negatives",
    HardestNegativesCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_hardest_negatives,
    fake=_fake_hardest_negatives,
    launcher="hardest.hardest_negatives",
    plans=plan.hardest,
)
register(
    "hardest_negatives_backward",
    HardestNegativesBackwardCall,
    "(Tensor, Tensor, Tensor, Tensor)",
    composite=_hardest_gradients,
    fake=_fake_hardest_gradients,
    launcher="project.hardest_negatives_backward",
    plans=plan.hardest_backward,
)
