"""Losses, one file each: a formula over row and column statistics."""

from gssf_kernels.losses.batch_hard import BatchHardLoss, batch_hard_loss
from gssf_kernels.losses.circle import CircleLoss, circle_loss
from gssf_kernels.losses.distillation import DistillationTerms, RelationalDistillationLoss, relational_distillation_loss
from gssf_kernels.losses.from_scores import triplet_from_scores
from gssf_kernels.losses.goal import GoalLoss, goal_loss, goal_weights
from gssf_kernels.losses.gradient_space import gradient_space_loss
from gssf_kernels.losses.graph_pattern import GraphPatternLoss, graph_pattern_loss
from gssf_kernels.losses.info_nce import InfoNCELoss, info_nce_loss
from gssf_kernels.losses.late_interaction import LateInteractionTripletLoss, late_interaction_triplet_loss
from gssf_kernels.losses.multi_similarity import MultiSimilarityLoss, multi_similarity_loss
from gssf_kernels.losses.nt_xent import NTXentLoss, nt_xent_loss
from gssf_kernels.losses.sigmoid import SigmoidLoss, sigmoid_loss
from gssf_kernels.losses.triplet import TripletLoss, triplet_loss

__all__ = [
    "BatchHardLoss",
    "CircleLoss",
    "DistillationTerms",
    "GoalLoss",
    "GraphPatternLoss",
    "InfoNCELoss",
    "LateInteractionTripletLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "RelationalDistillationLoss",
    "SigmoidLoss",
    "TripletLoss",
    "batch_hard_loss",
    "circle_loss",
    "goal_loss",
    "goal_weights",
    "gradient_space_loss",
    "graph_pattern_loss",
    "info_nce_loss",
    "late_interaction_triplet_loss",
    "multi_similarity_loss",
    "nt_xent_loss",
    "relational_distillation_loss",
    "sigmoid_loss",
    "triplet_from_scores",
    "triplet_loss",
]
