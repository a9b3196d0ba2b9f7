"""The definitions: plain PyTorch that stores the whole similarity matrix.

Every public function has a definition here, with the same name and arguments. PyTorch differentiates it, and it runs on
any device and dtype. Tests compare with it. Read it as the formula, and use it only for small problems: it stores
several N x M matrices.
"""

from gssf_kernels.reference.attention import structured_attention
from gssf_kernels.reference.dense import (
    info_nce_loss,
    logsumexp_scores,
    nt_xent_loss,
    relational_distillation_loss,
    sigmoid_loss,
    sum_scores,
)
from gssf_kernels.reference.fragments import attention_pooling, late_interaction, late_interaction_triplet_loss
from gssf_kernels.reference.goal import (
    AnchorStatistics,
    RelativeTerms,
    anchor_statistics,
    goal_loss,
    goal_weights,
    gradient_space_loss,
)
from gssf_kernels.reference.graph_pattern import graph_pattern_loss
from gssf_kernels.reference.labels import circle_loss, multi_similarity_loss
from gssf_kernels.reference.retrieval import (
    PositiveRanks,
    Ranks,
    RankSegments,
    TopScores,
    TwoSidedTopScores,
    ranks,
    top_scores,
)
from gssf_kernels.reference.statistics import (
    EPS,
    HardestNegatives,
    accumulate,
    hardest_negatives,
    maxima,
    mean_distance,
    pair_scores,
    paired,
    positives,
    project,
    relative_negatives,
    scores,
    similarity,
    weighted_sums,
)
from gssf_kernels.reference.triplet import (
    Diagnostics,
    batch_hard_loss,
    hinge,
    reduce,
    triplet_from_scores,
    triplet_loss,
)

__all__ = [
    "EPS",
    "AnchorStatistics",
    "Diagnostics",
    "HardestNegatives",
    "PositiveRanks",
    "RankSegments",
    "Ranks",
    "RelativeTerms",
    "TopScores",
    "TwoSidedTopScores",
    "accumulate",
    "anchor_statistics",
    "attention_pooling",
    "batch_hard_loss",
    "circle_loss",
    "goal_loss",
    "goal_weights",
    "gradient_space_loss",
    "graph_pattern_loss",
    "hardest_negatives",
    "hinge",
    "info_nce_loss",
    "late_interaction",
    "late_interaction_triplet_loss",
    "logsumexp_scores",
    "maxima",
    "mean_distance",
    "multi_similarity_loss",
    "nt_xent_loss",
    "pair_scores",
    "paired",
    "positives",
    "project",
    "ranks",
    "reduce",
    "relational_distillation_loss",
    "relative_negatives",
    "scores",
    "sigmoid_loss",
    "similarity",
    "structured_attention",
    "sum_scores",
    "top_scores",
    "triplet_from_scores",
    "triplet_loss",
    "weighted_sums",
]
