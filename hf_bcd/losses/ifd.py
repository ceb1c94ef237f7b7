"""Distillation through an ensemble of projectors (Chen et al., NeurIPS 2022, https://arxiv.org/abs/2210.15274)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec
from .base import DistillationLoss, check_positive
from .modules.connectors import shared_level
from .ops.functional import at_least_float32, image_means, on_teacher_grid, spatial_size, valid_positions


def ifd_loss(projections: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The mean of several projections of the student's features points where the teacher's features do.

    `mean over images and valid positions of 1 - cos(1/P · Σ_p ReLU(s_p), t)`, the cosine over channels.

    Args:
        projections: P projections of the student's features to the teacher's channels, `[B, P, C, h, w]`.
        teacher: features `[B, C, h', w']`, to whose grid the student's are resized; they receive no gradient.
        mask: `[B, h', w']`, True where valid.

    Returns:
        Scalar in [0, 2]; float32 or float64.

    Raises:
        ValueError: if batch, channels or the mask's size differ.
    """
    with torch.autocast(projections.device.type, enabled=False):
        ensemble = at_least_float32(projections).relu().mean(dim=1)
        student, teacher, mask = on_teacher_grid(ensemble, teacher, mask)
        return image_means(1 - F.cosine_similarity(student, teacher, dim=1), mask).mean()


class IFDLoss(DistillationLoss):
    """`ifd_loss` on one feature level.

    Defined here at every position of a level, because the paper has it for the one pooled feature of a classifier: its
    linear projectors become 1x1 convolutions. They start at random, since equal ones would remain equal. After the ReLU
    no component is negative, which suits teachers whose features end in a ReLU as the paper's do; others leave a floor,
    under which the official weight 25 outweighs the task 18 times (MobileNetV2 on CamVid), hence 5.

    Args:
        student_specs: feature levels of the student.
        teacher_specs: feature levels of the teacher.
        projectors: size P of the ensemble; 3 as in the official code.
        level: level name; the coarsest that both models have by default.
        ignore_index: void label.
    """

    weights = {"ifd": 5.0}
    needs = frozenset({"features"})
    transfers = "direction of each position's features"
    source = "https://arxiv.org/abs/2210.15274"
    checked = (
        "official code (classification): same ensemble and cosine; our reading for maps is 1x1 projectors, a mean over valid "
        "positions and weight 5 for the official 25"
    )
    citation = (
        "@inproceedings{chen2022improved,\n"
        "  title={Improved Feature Distillation via Projector Ensemble},\n"
        "  author={Chen, Yudong and Wang, Sen and Liu, Jiajun and Xu, Xuwei and de Hoog, Frank and Huang, Zi},\n"
        "  booktitle={NeurIPS},\n"
        "  year={2022}\n"
        "}"
    )

    def __init__(
        self,
        student_specs: Mapping[str, FeatureSpec],
        teacher_specs: Mapping[str, FeatureSpec],
        *,
        projectors: int = 3,
        level: str | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_positive(projectors=projectors)
        self.level = shared_level(student_specs, teacher_specs, level)
        self.projectors, self.ignore_index = projectors, ignore_index
        # all projectors in one convolution; each has the initialisation that it would have on its own
        channels = projectors * teacher_specs[self.level].channels
        self.projection = nn.Conv2d(student_specs[self.level].channels, channels, 1)

    def forward(self, student: DenseOutput, teacher: DenseOutput, labels: Tensor) -> dict[str, Tensor]:
        with torch.autocast(labels.device.type, enabled=False):
            projections = self.projection(at_least_float32(student.features[self.level]))
            projections = projections.unflatten(1, (self.projectors, -1))
            target = teacher.features[self.level]
            mask = valid_positions(labels, spatial_size(target), self.ignore_index)
            return {"ifd": ifd_loss(projections, target, mask=mask)}
