"""Losses, one file each: a formula over statistics."""

from gssf_kernels.losses.triplet import TripletLoss, triplet_loss

__all__ = ["TripletLoss", "triplet_loss"]
