"""Losses, one file each: a formula over statistics."""

from gssf_kernels.losses.batch_hard import BatchHardLoss, batch_hard_loss
from gssf_kernels.losses.goal import GoalLoss, goal_loss, goal_weights
from gssf_kernels.losses.gradient_space import gradient_space_loss
from gssf_kernels.losses.triplet import TripletLoss, triplet_loss

__all__ = [
    "BatchHardLoss",
    "GoalLoss",
    "TripletLoss",
    "batch_hard_loss",
    "goal_loss",
    "goal_weights",
    "gradient_space_loss",
    "triplet_loss",
]
