"""Losses and mining on the similarity matrix that is never stored.

    import gssf_kernels as gk

    metric = gk.StructuredSimilarity(dim=1024)
    a, b = metric.factors(images, captions)
    loss = gk.triplet_loss(a, b, margin=0.2, x_ids=picture, y_ids=picture)

Every public function has a function of the same name in ``gk.reference``: its definition in plain PyTorch.
``gk.backends()`` or ``python -m gssf_kernels`` say what runs on this machine, ``gk.explain`` what a call would run and
why.
"""

from gssf_kernels import reference
from gssf_kernels._library import backends
from gssf_kernels.attention import StructuredMultiheadAttention, structured_attention
from gssf_kernels.diversified import DiversifiedAttention, DiversifiedRepresentations, ModalityClassifier
from gssf_kernels.explain import explain
from gssf_kernels.fragments import attention_pooling, late_interaction
from gssf_kernels.losses import (
    BatchHardLoss,
    CircleLoss,
    DistillationTerms,
    GoalLoss,
    GraphPatternLoss,
    InfoNCELoss,
    LateInteractionTripletLoss,
    MultiSimilarityLoss,
    NTXentLoss,
    RelationalDistillationLoss,
    SigmoidLoss,
    TripletLoss,
    batch_hard_loss,
    circle_loss,
    goal_loss,
    goal_weights,
    gradient_space_loss,
    graph_pattern_loss,
    info_nce_loss,
    late_interaction_triplet_loss,
    multi_similarity_loss,
    nt_xent_loss,
    relational_distillation_loss,
    sigmoid_loss,
    triplet_from_scores,
    triplet_loss,
)
from gssf_kernels.ops import hardest_negatives, logsumexp_scores, pair_scores, rescored_candidates, sum_scores
from gssf_kernels.project import project
from gssf_kernels.reference import AnchorStatistics, Diagnostics, HardestNegatives, RelativeTerms
from gssf_kernels.retrieval import (
    HardNegatives,
    MiningReport,
    PositiveRanks,
    Ranks,
    RankSegments,
    RetrievalMetric,
    RetrievalResult,
    TopScores,
    TwoSidedTopScores,
    evaluate,
    mine_hard_negatives,
    ranks,
    recall_at_k,
    top_scores,
)
from gssf_kernels.similarity import StructuredSimilarity, similarity

__version__ = "0.1.0"

__all__ = [
    "AnchorStatistics",
    "BatchHardLoss",
    "CircleLoss",
    "Diagnostics",
    "DistillationTerms",
    "DiversifiedAttention",
    "DiversifiedRepresentations",
    "GoalLoss",
    "GraphPatternLoss",
    "HardNegatives",
    "HardestNegatives",
    "InfoNCELoss",
    "LateInteractionTripletLoss",
    "MiningReport",
    "ModalityClassifier",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "PositiveRanks",
    "RankSegments",
    "Ranks",
    "RelationalDistillationLoss",
    "RelativeTerms",
    "RetrievalMetric",
    "RetrievalResult",
    "SigmoidLoss",
    "StructuredMultiheadAttention",
    "StructuredSimilarity",
    "TopScores",
    "TripletLoss",
    "TwoSidedTopScores",
    "attention_pooling",
    "backends",
    "batch_hard_loss",
    "circle_loss",
    "evaluate",
    "explain",
    "goal_loss",
    "goal_weights",
    "gradient_space_loss",
    "graph_pattern_loss",
    "hardest_negatives",
    "info_nce_loss",
    "late_interaction",
    "late_interaction_triplet_loss",
    "logsumexp_scores",
    "mine_hard_negatives",
    "multi_similarity_loss",
    "nt_xent_loss",
    "pair_scores",
    "project",
    "ranks",
    "recall_at_k",
    "reference",
    "relational_distillation_loss",
    "rescored_candidates",
    "sigmoid_loss",
    "similarity",
    "structured_attention",
    "sum_scores",
    "top_scores",
    "triplet_from_scores",
    "triplet_loss",
]
