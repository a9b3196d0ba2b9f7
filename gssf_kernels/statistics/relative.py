"""GOAL's relative negatives, in the sweep that finds the hardest ones.

    r⁻_i  = mean over {j ∉ pos(i), j ≠ a_i, s_ij >= threshold} of e^{−β (n_i − s_ij)},      n_i = s[i, a_i]
    r⁻'_j = the same over {i ∉ pos(j), i ≠ c_j, s_ij >= threshold} with n'_j = s[c_j, j]

(a_i, c_j: the hardest negatives of row i and column j.) With ``beta=None`` the term is the distance
``n_i − s_ij`` itself, and exact ties with n_i, whose term is 0, are left out of the mean's divisor, as the
authors' code does. The mean of an empty set is 0. Both are weights: nothing is differentiated through them.

Source: GOAL, arXiv 2210.13188, and its authors' public code (microsoft/VSE_Gradient).
"""

import torch

from gssf_kernels import reference
from gssf_kernels._library import accumulation_dtype, define


def _reference(a, b, a_ids, b_ids, threshold, beta):
    found = reference.hardest_negatives(a, b, a_ids=a_ids, b_ids=b_ids)
    terms = reference.relative_negatives(a, b, threshold, beta=beta, a_ids=a_ids, b_ids=b_ids)
    return (reference.pair_scores(a, b), *found, *terms)


def _fake(a, b, a_ids, b_ids, threshold, beta):
    score, index = accumulation_dtype(a.dtype), torch.int64
    n, m = a.shape[0], b.shape[0]
    return tuple(a.new_empty(size, dtype=dtype) for size, dtype in
                 ((n, score), (n, score), (n, index), (m, score), (m, index), (n, score), (m, score)))  # fmt: skip


# pair_score [N], then what hardest_negatives gives, then r⁻ of the rows [N] and of the columns [M].
# threshold: a 0-d tensor of the scores' dtype on a's device, so that nothing waits for its value.
define(
    "relative_negatives(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids, Tensor threshold, float? beta)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
