"""Distillation losses: tensor mathematics that needs nothing but torch."""

from .at import ATLoss, at_loss
from .base import DistillationLoss, Pair
from .bcd import BCDLoss
from .bglsseg import BGLSSegLoss, bglsseg_loss
from .boundary import boundary_distillation_loss, boundary_strength
from .bpkd import BPKDLoss, bpkd_loss
from .c2vkd import C2VKDLoss, c2vkd_feature_loss, dkd_loss
from .cirkd import CIRKDLoss, cirkd_loss, cirkd_memory_loss
from .context import context_distillation_loss
from .criterion import DistillationCriterion
from .crosskd import CrossKDLoss, cross_head_losses, crosskd_loss
from .cwd import CWDLoss, cwd_loss
from .cwt import CWTLoss, cwt_loss
from .ddf import DDFLoss, ddf_loss
from .dist import DISTLoss, dist_loss
from .dsd import DSDLoss, category_similarity_loss, pixel_similarity_loss
from .fam import FAMLoss, fam_loss
from .fgd import FGDLoss, fgd_loss
from .fitnet import FitNetLoss, fitnet_loss
from .gid import GIDLoss, general_instances
from .ifd import IFDLoss, ifd_loss
from .ifvd import IFVDLoss, ifvd_loss
from .kd import KDLoss, kd_loss
from .ld import LDLoss, box_response_loss, distribution_divergence
from .mgd import MGDLoss, mgd_loss
from .modules.adversarial import Adversary
from .modules.schedules import Temperature, decay
from .ops.path import path_offsets, path_range
from .ops.relation import relation_divergence
from .ops.segmentation import segmentation_loss
from .pkd import PKDLoss, pkd_loss
from .query_kd import QueryKDLoss, query_kd_losses
from .recipe import LOSSES, build_criterion
from .sckd import SCKDLoss, sckd_gate
from .skd import SKDLoss, skd_loss
from .slimseg import SlimSegLoss, slimseg_loss
from .sstkd import SSTKDLoss, sstkd_loss
from .tat import TATLoss, tat_loss


__all__ = [
    "LOSSES", "ATLoss", "Adversary", "BCDLoss", "BGLSSegLoss", "BPKDLoss", "C2VKDLoss", "CIRKDLoss", "CWDLoss",
    "CWTLoss", "CrossKDLoss", "DDFLoss", "DISTLoss", "DSDLoss", "DistillationCriterion", "DistillationLoss", "FAMLoss",
    "FGDLoss", "FitNetLoss", "GIDLoss", "IFDLoss", "IFVDLoss", "KDLoss", "LDLoss", "MGDLoss", "PKDLoss", "Pair", "QueryKDLoss", "SCKDLoss", "SKDLoss",
    "SSTKDLoss", "SlimSegLoss", "TATLoss", "Temperature", "at_loss", "bglsseg_loss", "boundary_distillation_loss",
    "boundary_strength", "box_response_loss", "bpkd_loss", "build_criterion", "c2vkd_feature_loss", "category_similarity_loss",
    "cirkd_loss", "cirkd_memory_loss", "context_distillation_loss", "cross_head_losses", "crosskd_loss", "cwd_loss", "cwt_loss", "ddf_loss", "decay",
    "dist_loss", "distribution_divergence", "dkd_loss", "fam_loss", "fgd_loss", "fitnet_loss", "general_instances", "ifd_loss", "ifvd_loss", "kd_loss", "mgd_loss",
    "path_offsets", "path_range", "pixel_similarity_loss", "pkd_loss", "query_kd_losses", "relation_divergence", "sckd_gate",
    "segmentation_loss", "skd_loss", "slimseg_loss", "sstkd_loss", "tat_loss",
]  # fmt: skip
