"""The k best scores of every row: exact nearest neighbours by inner product, without the matrix."""

import torch
from torch import Tensor

from gssf_kernels import _checks
from gssf_kernels.ops.top_scores import MOST, TopScoresCall, top_of_factors
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.reference import TopScores, TwoSidedTopScores
from gssf_kernels.similarity import StructuredSimilarity, metric_of


def top_scores(
    a: Tensor,
    b: Tensor,
    k: int,
    *,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    exclude_same_id: bool = False,
    exclude_self: bool = False,
    max_score: float | Tensor | None = None,
    columns: bool = False,
    metric: StructuredSimilarity | None = None,
    normalize: bool = False,
) -> TopScores | TwoSidedTopScores:
    """The k largest scores of every row of ``s = a bᵀ`` with their columns, best first, without storing s.

    Ties go to the lowest index. A NaN score comes before all others.

    Args:
        a: [N, D] float, the queries.
        b: [M, D] of a's dtype and device, the candidates.
        k: how many, 1 to 1024.
        a_ids, b_ids: [N], [M] integers, for ``exclude_same_id``. If N = M, the ids of one input serve both.
        exclude_same_id: leave out scores of equal ids.
        exclude_self: leave out the scores (i, i), as where b is a.
        max_score: leave out greater scores; a number, or [N], one for each row of a.
        columns: give the k best of every column too, with the same scores left out.
        metric: a :class:`~gssf_kernels.StructuredSimilarity`, whose scores are taken instead.
        normalize: scores are cosines.

    Returns:
        named tuple ``(values [N, k], indices [N, k])``, with ``columns`` also ``(col_values [M, k], col_indices
        [M, k])``. Values are fp32 (fp64 for fp64) and differentiable once; indices are int64. Where a row has fewer
        than k candidates, the last values are -inf and their indices -1.

    Certified search: for fp32 and fp16 on a CPU with a unit for bf16 products, large problems give the k best of the
    exact scores, rounded to fp32, at about the cost of a bf16 product (:func:`~gssf_kernels.hardest_negatives`).

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.

    Time: one N x M x D product; on a GPU one for each direction. Extra memory: 16 to 32 MiB of b, packed, and of a
    copies as in :func:`~gssf_kernels.hardest_negatives`; k scores and places of each row, twice; no N x M.
    """
    _checks.whole(k, "k", 1)
    if k > MOST:
        raise ValueError(f"k: expected at most {MOST}, got {k}")
    for value, name in ((exclude_same_id, "exclude_same_id"), (exclude_self, "exclude_self"), (columns, "columns")):
        _checks.flag(value, name)
    a, b = _checks.autocast(a, b)
    _checks.embeddings(a, b, "a", "b", paired=False)
    a_ids, b_ids = _checks.ids(a_ids, b_ids, a, b, "a_ids", "b_ids")
    if exclude_same_id != (a_ids is not None):
        got = "none" if exclude_same_id else "ids"
        raise ValueError(f"a_ids, b_ids: expected ids with exclude_same_id=True and none without, got {got}")
    limit = _limit(max_score, a)
    of = metric_of(metric, normalize, "top_scores", a, b)
    if of is not None:
        _checks.metric_weights(a, *of.weights, of.permutation, "a")
        a, b = _checks.autocast(*of.factors(a, b))
    results = top_of_factors(TopScoresCall(a, b, int(k), a_ids, b_ids, exclude_self, limit, columns))
    return TwoSidedTopScores(*results) if columns else TopScores(*results)


def _limit(max_score, a: Tensor) -> Tensor | None:
    """max_score as [N] in the dtype of scores, constant to autograd."""
    if max_score is None:
        return None
    dtype = accumulation_dtype(a.dtype)
    if not isinstance(max_score, Tensor):
        return torch.full(a.shape[:1], _checks.number(max_score, "max_score"), dtype=dtype, device=a.device)
    _checks.floating(max_score, "max_score", "[N]")
    if max_score.shape != a.shape[:1]:
        raise ValueError(f"max_score: expected a number or shape [{a.shape[0]}], got {list(max_score.shape)}")
    if max_score.device != a.device:
        raise ValueError(f"max_score: expected device {a.device}, got {max_score.device}")
    return max_score.detach().to(dtype)
