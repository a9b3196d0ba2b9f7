"""Per-row and per-column statistics of ``s = a bᵀ``, one file each: op, reference, autograd."""

from gssf_kernels.statistics import relative  # registers its op
from gssf_kernels.statistics.hardest import hardest_negatives, paired_hardest_negatives
from gssf_kernels.statistics.pairs import pair_scores

__all__ = ["hardest_negatives", "pair_scores", "paired_hardest_negatives", "relative"]
