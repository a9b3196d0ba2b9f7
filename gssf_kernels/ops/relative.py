"""GOAL's relative terms: negatives in the sweep that finds the hardest ones, positives by sorting.

    r⁻_i  = mean over {j ∉ pos(i), j ≠ a_i, s_ij >= threshold} of e^{−β (n_i − s_ij)},      n_i = s[i, a_i]
    r⁻'_j = the same over {i ∉ pos(j), i ≠ c_j, s_ij >= threshold} with n'_j = s[c_j, j]

(a_i, c_j: the hardest negatives of row i and column j.) With ``beta=None`` the term is the distance
``n_i − s_ij`` itself, and exact ties with n_i, whose term is 0, are left out of the mean's divisor, as the
authors' code does. The mean of an empty set is 0. These are weights: nothing is differentiated through them.

    r⁺_i  = mean over {k ≠ i : p_k <= n_i + t} of e^{α (p_i − p_k)},   or of p_i − p_k where that is not 0

needs no scores but the positives p [N]: sorted once, each set is a prefix, each sum a prefix sum.

Source: GOAL, arXiv 2210.13188, and its authors' public code (microsoft/VSE_Gradient).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_kernels import plan, reference
from gssf_kernels._library import register
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.reference import RelativeTerms


class RelativeNegativesCall(NamedTuple):
    a: Tensor
    b: Tensor
    a_ids: Tensor | None
    b_ids: Tensor | None
    threshold: Tensor  # [] of the scores' dtype on a's device, so that its value never synchronises
    beta: float | None


def relative_sweep(a, b, a_ids, b_ids, relative: RelativeTerms) -> tuple[Tensor, ...]:
    """What ``relative_negatives`` gives, with the threshold that the positives set. Not differentiable."""
    i = torch.arange(a.shape[0], device=a.device)
    positive_score = torch.ops.gssf.pair_scores(a, b, i, i)
    # +inf behind them, so that there is a minimum of no positives too; a tensor, which never synchronises
    lowest = torch.cat((positive_score, positive_score.new_full((1,), torch.inf))).min()
    threshold = lowest - relative.negative_threshold
    beta = None if relative.kind == "linear" else relative.beta
    return torch.ops.gssf.relative_negatives(a, b, a_ids, b_ids, threshold, beta)


def relative_positives(positive: Tensor, negative: Tensor, relative: RelativeTerms) -> Tensor:
    """r⁺ of N anchors with scores ``positive [N]`` and hardest negatives ``negative [N]`` -> [N] of their dtype.

    O(N log N), in fp64. A NaN positive is close to every anchor.
    """
    count = positive.shape[0]
    if count < 2:
        return torch.zeros_like(positive)
    p = positive.double()
    bound = (negative + relative.positive_threshold).double()
    ordered = p.sort().values
    prefix = torch.searchsorted(ordered, bound, right=True)  # [N], size of the prefix that is close to anchor i
    inside = ~(p > bound)  # whether i itself is in it
    least, second = ordered[0], ordered[1]
    if relative.kind == "linear":
        span = (ordered[-1] - least).clamp_min(torch.finfo(p.dtype).tiny)
        total = prefix * (p - least) - span * _prefix_sums((ordered - least) / span)[prefix]
        ties = torch.searchsorted(ordered, p, right=True) - torch.searchsorted(ordered, p)  # i and its equals
        size = prefix - inside * ties
    else:
        # The term of i itself is subtracted from the sum. Where p_i is the least, it may dwarf the others, so that this
        # would leave their rounding: those anchors sum without it.
        decay = -relative.alpha
        every = _prefix_sums(torch.exp(decay * (ordered - least)))[prefix] - inside * torch.exp(decay * (p - least))
        others = _prefix_sums(torch.exp(decay * (ordered[1:] - second)))[(prefix - 1).clamp_min(0)]
        from_least, from_second = torch.exp(-decay * (p - least)), torch.exp(-decay * (p - second))
        total = torch.where(p == least, from_second * others, from_least * every)
        size = prefix - inside.long()
    mean = torch.where(size > 0, total / size.clamp_min(1), 0)
    return torch.where(p.isnan().any(), torch.nan, mean).to(positive.dtype)


def _prefix_sums(terms: Tensor) -> Tensor:
    """``terms [K]`` in [0, 1], fp64 -> [K + 1], the sum of the first k of them.

    Added as whole multiples of K / 2^62: exact in any order, where a GPU's floating-point scan differs run by run.
    """
    unit = terms.shape[0] / 2.0**62
    sums = F.pad(torch.cumsum((terms / unit).round().long(), 0), (1, 0))
    return sums.double() * unit


def _relative_negatives(call):
    a, b, a_ids, b_ids, threshold, beta = call
    hardest = reference.hardest_negatives(a, b, a_ids=a_ids, b_ids=b_ids)
    relative = reference.relative_negatives(a, b, threshold, beta=beta, a_ids=a_ids, b_ids=b_ids)
    return (reference.pair_scores(a, b), *hardest, *relative)


def _fake_relative_negatives(call):
    score, index = accumulation_dtype(call.a.dtype), torch.int64
    n, m = call.a.shape[0], call.b.shape[0]
    return tuple(call.a.new_empty(size, dtype=dtype) for size, dtype in
                 ((n, score), (n, score), (n, index), (m, score), (m, index), (n, score), (m, score)))  # fmt: skip


# positive_score [N]; row_score, row_index [N], col_score, col_index [M]; r⁻ of the rows [N] and of the columns [M]
register(
    "relative_negatives",
    RelativeNegativesCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composite=_relative_negatives,
    fake=_fake_relative_negatives,
    launcher="relative.relative_negatives",
    plans=plan.relative_terms,
)
