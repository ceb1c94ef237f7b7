"""Distillation losses: tensor mathematics that needs torch alone."""

from .base import DistillationLoss
from .bcd import BCDLoss
from .boundary import boundary_distillation_loss, boundary_strength
from .context import context_distillation_loss
from .criterion import LOSSES, DistillationCriterion, build_criterion
from .cwd import CWDLoss, cwd_loss
from .kd import KDLoss, kd_loss
from .path import path_offsets, path_range
from .relation import relation_divergence
from .schedules import Temperature, decay
from .task import segmentation_loss


__all__ = [
    "LOSSES",
    "BCDLoss",
    "CWDLoss",
    "DistillationCriterion",
    "DistillationLoss",
    "KDLoss",
    "Temperature",
    "boundary_distillation_loss",
    "boundary_strength",
    "build_criterion",
    "context_distillation_loss",
    "cwd_loss",
    "decay",
    "kd_loss",
    "path_offsets",
    "path_range",
    "relation_divergence",
    "segmentation_loss",
]
