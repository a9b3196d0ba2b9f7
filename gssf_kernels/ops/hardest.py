"""Hardest negatives of every row and column of ``s = a bᵀ``, in one sweep that stores no score.

    row_score_i = max_{j ∉ pos(i)} s_ij,   col_score_j = max_{i ∉ pos(j)} s_ij,   positive_score_i = s_ii

pos(i) holds j = i and every j of equal id. The sweep computes the diagonal anyway, so positive_score costs nothing.
Only 2N + M scores carry gradient, and the backward reads only their rows of a and b (:mod:`gssf_kernels.ops.pairs`).
Source: VSE++, arXiv 1707.05612.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan, reference
from gssf_kernels._library import Function, backends, distinct, last_derivative, register
from gssf_kernels.ops.mining import PairedInputs, mine
from gssf_kernels.ops.negatives import Negatives, fake_results, statistics
from gssf_kernels.ops.pairing import in_order, pairing_of
from gssf_kernels.ops.relative import relative_sweep
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.project import pairs_project_backward
from gssf_kernels.reference import HardestNegatives, RelativeTerms


class HardestNegativesCall(NamedTuple):
    a: Tensor  # [N, D], or with edges [L, N, D]
    b: Tensor  # [M, D], M >= N if paired; or with edges [R, M, D]
    a_ids: Tensor | None  # [N] int64
    b_ids: Tensor | None  # [M] int64
    route: str = ""  # "sweep" or "certified"; "" lets the plan choose
    # The rest is `Negatives`.
    paired: bool = True
    columns: bool = True
    pair_starts: Tensor | None = None
    pair_cols: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None
    # [E, 2] int64, of a graph's edges: each compares a[left] with b[right]. Results and limits are [E, …]. Only with
    # pairs (i, i), columns, and the route "sweep" or any.
    edges: Tensor | None = None
    # Whether a bᵀ is symmetric though b is not a, as with a symmetric metric: then a score and its mirror, which differ
    # by rounding, are one, of which the upper triangle is computed. The definition computes both.
    symmetric: bool = False

    @property
    def negatives(self) -> Negatives:
        return Negatives._make(self[5:11])

    def of_edge(self, edge: int) -> "HardestNegativesCall":
        """The call for one edge alone; reads no value of the edges."""
        assert self.edges is not None
        left, right = (t.index_select(0, self.edges[edge, k : k + 1])[0] for k, t in enumerate((self.a, self.b)))
        row_limit, col_limit = (None if limit is None else limit[edge] for limit in (self.row_limit, self.col_limit))
        call = self._replace(a=left, b=right, edges=None)
        return call._replace(row_limit=row_limit, col_limit=col_limit)


class HardestNegativesBackwardCall(NamedTuple):
    """The gradients of 2N + M scores of ``s = x̂ W ŷᵀ``; without weights and normalize of ``s = x yᵀ``."""

    dpositive: Tensor  # [N], with respect to s[i, i]
    drow: Tensor  # [N], with respect to s[i, row_index[i]]
    dcol: Tensor  # [M], with respect to s[col_index[j], j]
    row_index: Tensor  # [N] int64
    col_index: Tensor  # [M] int64
    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    diag: Tensor | None  # [D]
    blocks: Tensor | None  # [G, b, b]
    permutation: Tensor | None  # [D] int64
    normalize: bool
    needs: list[bool]  # whether x, y, diag and blocks need a gradient


def hardest_negatives(
    a: Tensor,
    b: Tensor,
    *,
    pairs: str | Tensor | None = None,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
) -> HardestNegatives:
    """Row and column maxima of ``s = a bᵀ`` over negatives, with their indices, without storing s.

    Pairs and scores of equal id are never negatives. Ties go to the lowest index. If b is a, only the
    upper triangle is computed. NaN propagates: a NaN score wins, and the first of several. Where every negative scores
    -inf, or there is no negative, the score is -inf and the index -1.

    Args:
        a: [N, D] float.
        b: [M, D] of a's dtype and device. Without ``pairs`` M >= N, and rows past N are only negatives (a memory bank).
        pairs: None: the pairs are (i, i). "ids": every (i, j) of equal id. Or [P, 2] integers, (row of a, row of b).
        a_ids: [N] integers. If N = M, the ids of one input serve both.
        b_ids: [M] integers.

    Returns:
        named tuple ``(row_score [N], row_index [N], col_score [M], col_index [M], pair_score)``. Scores are fp32 (fp64
        for fp64) and differentiable once; indices are int64. pair_score has the scores of the pairs with the sweep's
        own bits, so that a comparison with row_score is exact: [N], of listed pairs [P], or None for pairs="ids".

    Certified mining: large problems in fp32 are mined exactly, at about the cost of a bf16 product. The winners are
    those of the exact scores, which are returned rounded to fp32. On a CPU with a unit for bf16 products this holds for
    fp32 and fp16 from 2²⁰ scores on (AVX-512 BF16) or 2¹⁸ (AMX) (``csrc/certified.h``). On a GPU it holds for fp32 from
    2²² scores on (``triton/certified.py``). Both give the same bits. :func:`rescored_candidates` tells how many scores
    were computed again.

    PyTorch's setting for fp32 products applies here too, whether it was made by
    ``torch.set_float32_matmul_precision`` or for a backend (``torch.backends.cuda.matmul.fp32_precision``). If it lets
    PyTorch's products be TF32, or bf16 on the CPU, these products are as well.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one N x M x D product. Extra memory: O(N + M). On the CPU also b packed for the products: an fp32 copy, for
    fp16 inputs one of a too; on a bf16 unit bf16 copies of a and, twice, of b. On a GPU also a fixed number of
    partials, and for certified mining bf16 copies of a and b.
    """
    names = ("a", "b", "a_ids", "b_ids")
    if pairs is None:
        positive_score, hardest = paired_hardest_negatives(a, b, a_ids, b_ids, names=names)
        return hardest._replace(pair_score=positive_score)
    a, b = _checks.autocast(a, b)
    pairing = pairing_of(pairs, a_ids, b_ids, a, b, names)
    mined = mine(PairedInputs(a, b, pairing, True, (None, None)))
    pair_score = None if pairing.listed is None else in_order(mined.positive_score, pairing.listed)
    return HardestNegatives(mined.row_score, mined.row_index, mined.col_score, mined.col_index, pair_score)


def paired_hardest_negatives(x, y, x_ids, y_ids, *, names, metric=None) -> tuple[Tensor, HardestNegatives]:
    """``(positive_score [N], hardest negatives)`` of ``s = x yᵀ``, or of the scores of ``metric``.

    names: those of the four arguments, for errors.
    """
    positive_score, *hardest = _paired(x, y, x_ids, y_ids, names, metric, None)
    return positive_score, HardestNegatives(*hardest)


def paired_relative_negatives(
    x, y, x_ids, y_ids, relative: RelativeTerms, *, names, metric=None
) -> tuple[Tensor, HardestNegatives, tuple[Tensor, Tensor]]:
    """The same, and from the same sweep GOAL's r⁻ of the rows [N] and of the columns [M], without gradient."""
    positive_score, *hardest, row_relative, col_relative = _paired(x, y, x_ids, y_ids, names, metric, relative)
    return positive_score, HardestNegatives(*hardest), (row_relative, col_relative)


def rescored_candidates(
    a: Tensor, b: Tensor, *, a_ids: Tensor | None = None, b_ids: Tensor | None = None
) -> int | None:
    """How many scores certified mining computes again in fp64 for these inputs; for diagnosis, not differentiable.

    Embeddings in training give one or two for each row and column. ``N * M`` or a larger number says that the bound
    could not tell the scores apart (copies of one row, norms over many decades), so that all were computed in fp64. On
    the CPU this takes about five times as long.

    On a GPU, if two scores of a row in a tile are too close to each other, all scores of that row in the tile are
    computed again; the same holds for columns. On a GPU this function synchronises.

    Arguments and errors are as in :func:`hardest_negatives`; a and b are fp32, on the CPU also fp16.

    Returns:
        the number of scores, or None if this CPU has no bf16 unit or the GPU no Triton.
    """
    _checks.embeddings(a, b, "a", "b")
    a_ids, b_ids = _checks.ids(a_ids, b_ids, a, b, "a_ids", "b_ids")
    dtypes = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float32,)}
    if a.device.type not in dtypes:
        raise ValueError(f"a: expected device cpu or cuda, got {a.device}")
    if a.dtype not in dtypes[a.device.type]:
        names = " or ".join(str(dtype)[6:] for dtype in dtypes[a.device.type])
        raise TypeError(f"a: expected dtype {names}, got {a.dtype}")
    if a.device.type == "cuda":
        if backends()["hardest_negatives"]["cuda"] != "triton":
            return None
    elif backends()["hardest_negatives"]["certified"] == "no":
        return None
    return int(torch.ops.gssf.hardest_negatives(a.detach(), b.detach(), a_ids, b_ids, "certified")[-1])


def _paired(x, y, x_ids, y_ids, names, metric, relative):
    (x, y, *ids), weights = checked_inputs(x, y, x_ids, y_ids, names, metric)
    return _PairedHardestNegatives.apply(x, y, *weights, *ids, relative)


def checked_inputs(x, y, x_ids, y_ids, names, metric):
    """``((x, y, x_ids, y_ids), (diag, blocks, permutation, normalize))``, checked.

    Without a metric the second is ``(None, None, None, False)``.
    """
    x, y = _checks.autocast(x, y)
    _checks.embeddings(x, y, *names[:2])
    x_ids, y_ids = _checks.ids_of_pairs(x_ids, y_ids, x, y, *names[2:])
    x, y = distinct(x, y)
    x_ids, y_ids = distinct(x_ids, y_ids)
    if metric is None:
        return (x, y, x_ids, y_ids), (None, None, None, False)
    diag, blocks = metric.weights
    _checks.metric_weights(x, diag, blocks, metric.permutation, names[0])
    return (x, y, x_ids, y_ids), (diag, blocks, metric.permutation, metric.normalize)


def projected_factors(x, y, diag, blocks, permutation, normalize):
    """``(x̂ W, ŷ)``; x and y themselves without weights and normalize."""
    if diag is None and blocks is None and not normalize:
        return x, y
    p, unit, *_ = torch.ops.gssf.project(x, y if normalize else None, diag, blocks, permutation, normalize)
    return p, unit if normalize else y


class _PairedHardestNegatives(Function):
    """Hardest negatives of ``s = x̂ W ŷᵀ`` or ``s = x yᵀ``, keeping neither factor for the backward.

    s is linear in each factor. The gradient with respect to a row of x is a sum of few rows of ŷ times Wᵀ, and that
    with respect to a row of y a sum of few rows of x̂ times W. Both are computed from x and y, so nothing of N x D is
    kept between forward and backward: the factors live only while the forward runs. The C++ backward allocates only its
    result; those of Triton and of the composite also an fp32 [N, D].
    """

    @staticmethod
    def forward(x, y, diag, blocks, permutation, normalize, x_ids, y_ids, relative):
        a, b = projected_factors(x, y, diag, blocks, permutation, normalize)
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
        dscores = _zeros_for_none((dpositive, drow, dcol), x, y)
        grads = last_derivative(op, *dscores, row_index, col_index, x, y, *weights, ctx.normalize, needs)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 5)


def _zeros_for_none(grads, x, y) -> tuple[Tensor, ...]:
    """The gradients of positive_score [N], row_score [N] and col_score [M], zeros for a result that was not used."""
    sizes, dtype = (x.shape[0], x.shape[0], y.shape[0]), accumulation_dtype(x.dtype)
    return tuple(x.new_zeros(n, dtype=dtype) if g is None else g for g, n in zip(grads, sizes, strict=True))


def _hardest_negatives(call):
    """The definition. Certified mining is implemented only in C++ and Triton."""
    if call.edges is not None:
        each = [_hardest_negatives(call.of_edge(e)) for e in range(call.edges.shape[0])]
        return *(torch.stack(t) for t in list(zip(*each, strict=True))[:5]), each[0][5]
    if call.route == "certified":
        raise ValueError(f'route: expected "" or "sweep" for {call.a.dtype} on {call.a.device}, got "certified"')
    positive_score, rows, cols = statistics(call.a, call.b, call.a_ids, call.b_ids, call.negatives)
    none = rows.new_empty(0), call.a.new_empty(0, dtype=torch.int64)
    hardest = (*reference.maxima(rows, -1), *(none if cols is None else reference.maxima(cols, -1)))
    return positive_score, *(t.clone() for t in hardest), call.a.new_empty(0, dtype=torch.int64)


def _fake_hardest_negatives(call):
    rescored = call.a.new_empty(() if call.route == "certified" else 0, dtype=torch.int64)
    if call.edges is not None:
        results = fake_results(call.a[0], call.b[0])
        return *(t.new_empty((call.edges.shape[0], *t.shape)) for t in results), rescored
    return *fake_results(call.a, call.b, call.negatives), rescored


def _hardest_gradients(call):
    """(dx, dy, ddiag, dblocks), from the list of the 2N + M scores that carry gradient."""
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


# Results: positive_score [N], or [P] of listed pairs (of one listed twice the second may be -inf); row_score, row_index
# [N]; col_score, col_index [M]; with K limits [K, N] and [K, M], with edges [E, …]; how many scores were computed again
# in fp64, [] int64, with the route "certified", else empty.
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
