"""GOAL's relative terms: r⁻ from the sweep that computes the hardest negatives, r⁺ by sorting.

    r⁻_i  = mean over {j ∉ pos(i), j ≠ a_i, s_ij >= threshold} of e^{−β (n_i − s_ij)},      n_i = s[i, a_i]
    r⁻'_j = mean over {i ∉ pos(j), i ≠ c_j, s_ij >= threshold} of e^{−β (n'_j − s_ij)},     n'_j = s[c_j, j]
    r⁺_i  = mean over {k ≠ i : p_k <= n_i + t} of e^{α (p_i − p_k)}

a_i and c_j are the hardest negatives of row i and column j. The mean of an empty set is 0. Both terms are constants to
autograd.

The linear kind (``beta=None``) takes the distances ``n_i − s_ij`` and ``p_i − p_k`` in place of the exponentials. It
leaves distances of exactly 0 out of the mean's divisor, as the authors' code does.

r⁺ needs only positive_score, p [N]. After sorting p, each set is a prefix and each sum a prefix sum.

Source: GOAL, arXiv 2210.13188, and its authors' public code (microsoft/VSE_Gradient).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels import plan, reference
from gssf_kernels._library import register
from gssf_kernels.ops.negatives import Negatives, fake_results, statistics
from gssf_kernels.reference import RelativeTerms


class RelativeNegativesCall(NamedTuple):
    a: Tensor  # [N, D]
    b: Tensor  # [M, D], M >= N
    a_ids: Tensor | None  # [N] int64
    b_ids: Tensor | None  # [M] int64
    threshold: Tensor  # [] of the scores' dtype; a tensor on a's device, so that nothing synchronises
    beta: float | None  # β; None: the linear kind
    # The rest is `Negatives`.
    paired: bool = True
    columns: bool = True
    pair_starts: Tensor | None = None
    pair_cols: Tensor | None = None
    row_limit: Tensor | None = None
    col_limit: Tensor | None = None

    @property
    def negatives(self) -> Negatives:
        return Negatives._make(self[6:])


def relative_sweep(a, b, a_ids, b_ids, relative: RelativeTerms) -> tuple[Tensor, ...]:
    """The results of the op ``relative_negatives``, with threshold min_i s_ii − t. Not differentiable."""
    i = torch.arange(a.shape[0], device=a.device)
    positive_score = torch.ops.gssf.pair_scores(a, b, i, i)
    # With +inf appended, so that there is a minimum even without positives. It stays a tensor: nothing synchronises.
    lowest = torch.cat((positive_score, positive_score.new_full((1,), torch.inf))).min()
    threshold = lowest - relative.negative_threshold
    beta = None if relative.kind == "linear" else relative.beta
    return torch.ops.gssf.relative_negatives(a, b, a_ids, b_ids, threshold, beta)


def relative_positives(
    positive_score: Tensor, negative: Tensor, relative: RelativeTerms, counted: Tensor | None = None
) -> Tensor:
    """r⁺ [N] of N anchors, from positive_score [N] and the scores of their hardest negatives [N], in their dtype.

    counted: [N] bool, which positive scores there are; None: all. The others are left out of every mean.
    O(N log N), in fp64. If a positive score is NaN, all of r⁺ is NaN.
    """
    if positive_score.shape[0] < 2:
        return torch.zeros_like(positive_score)
    p = positive_score.double()
    bound = (negative + relative.positive_threshold).double()
    if counted is None:
        count, ordered = p.new_full((), p.shape[0], dtype=torch.int64), p.sort().values
    else:  # those left out come last, as copies of the largest score; no prefix reaches them
        count = counted.sum()
        ordered = torch.where(counted, p, torch.inf).sort().values
        last = ordered.gather(0, (count - 1).clamp_min(0)[None])
        ordered = torch.where(torch.arange(p.shape[0], device=p.device) < count, ordered, last)
        bound = torch.where(counted, bound, -torch.inf)

    def at_most(score):  # how many of the scores are at most each of these
        return torch.searchsorted(ordered, score, right=True).clamp_max(count)

    prefix = at_most(bound)  # [N]
    inside = ~(p > bound)  # whether the score of anchor i is one of them
    least, second = ordered[0], ordered[1]
    if relative.kind == "linear":
        span = (ordered[-1] - least).clamp_min(torch.finfo(p.dtype).tiny)
        total = prefix * (p - least) - span * _prefix_sums((ordered - least) / span)[prefix]
        ties = at_most(p) - torch.searchsorted(ordered, p).clamp_max(count)  # i and its equals
        size = prefix - inside * ties
    else:
        # The term k = i is subtracted from the sum. If p_i is the lowest score, that term may be so large that only
        # rounding would be left. For those anchors the sum is formed without it.
        decay = -relative.alpha
        every = _prefix_sums(torch.exp(decay * (ordered - least)))[prefix] - inside * torch.exp(decay * (p - least))
        others = _prefix_sums(torch.exp(decay * (ordered[1:] - second)))[(prefix - 1).clamp_min(0)]
        from_least, from_second = torch.exp(-decay * (p - least)), torch.exp(-decay * (p - second))
        total = torch.where(p == least, from_second * others, from_least * every)
        size = prefix - inside.long()
    mean = torch.where(size > 0, total / size.clamp_min(1), 0)
    return torch.where(p.isnan().any(), torch.nan, mean).to(positive_score.dtype)


def _prefix_sums(terms: Tensor) -> Tensor:
    """The sums [K + 1] of the first k of the terms [K], which are fp64 in [0, 1].

    Terms are rounded to whole multiples of K / 2^62 and added as integers, which is exact in any order. A GPU's
    floating-point scan would differ from run to run.
    """
    unit = terms.shape[0] / 2.0**62
    sums = F.pad(torch.cumsum((terms / unit).round().long(), 0), (1, 0))
    return sums.double() * unit


def _relative_negatives(call):
    positive_score, rows, cols = statistics(call.a, call.b, call.a_ids, call.b_ids, call.negatives)
    none = rows.new_empty(0), call.a.new_empty(0, dtype=torch.int64), rows.new_empty(0)
    sides = (
        none if s is None else (*reference.maxima(s, 1), reference.mean_distance(s, call.threshold, call.beta))
        for s in (rows, cols)
    )
    (*row, row_relative), (*col, col_relative) = sides
    return positive_score, *(t.clone() for t in (*row, *col)), row_relative, col_relative


def _fake_relative_negatives(call):
    results = fake_results(call.a, call.b, call.negatives)
    return *results, *(torch.empty_like(t) for t in (results[1], results[3]))


# Results: positive_score, row_score, row_index [N]; col_score, col_index [M]; r⁻ of the rows [N], of the columns [M].
register(
    "relative_negatives",
    RelativeNegativesCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_relative_negatives,
    fake=_fake_relative_negatives,
    launcher="relative.relative_negatives",
    plans=plan.relative_terms,
)
