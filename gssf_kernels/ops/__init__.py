"""Row and column statistics of ``s = a bᵀ``. One file per statistic has its op, composite and ``autograd.Function``."""

from gssf_kernels.ops import hopper as _hopper  # noqa: F401 (these modules register their ops)
from gssf_kernels.ops import logsumexp_pass as _logsumexp_pass  # noqa: F401
from gssf_kernels.ops import sums_pass as _sums_pass  # noqa: F401
from gssf_kernels.ops.batch_hard import batch_hard_of_factors, batch_hard_terms
from gssf_kernels.ops.hardest import (
    hardest_negatives,
    paired_hardest_negatives,
    paired_relative_negatives,
    rescored_candidates,
)
from gssf_kernels.ops.hardest_terms import hardest_terms
from gssf_kernels.ops.info_nce import info_nce_of_factors
from gssf_kernels.ops.logsumexp import logsumexp_scores
from gssf_kernels.ops.pairs import pair_scores
from gssf_kernels.ops.positives import hardest_positives
from gssf_kernels.ops.relative import relative_positives
from gssf_kernels.ops.sums import sum_scores
from gssf_kernels.ops.terms import anchor_terms, hinge_terms

__all__ = [
    "anchor_terms",
    "batch_hard_of_factors",
    "batch_hard_terms",
    "hardest_negatives",
    "hardest_positives",
    "hardest_terms",
    "hinge_terms",
    "info_nce_of_factors",
    "logsumexp_scores",
    "pair_scores",
    "paired_hardest_negatives",
    "paired_relative_negatives",
    "relative_positives",
    "rescored_candidates",
    "sum_scores",
]
