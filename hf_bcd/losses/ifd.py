"""Distillation through an ensemble of projectors (Chen et al., NeurIPS 2022, https://arxiv.org/abs/2210.15274)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair, check_positive
from .ops.functional import at_least_float32, full_precision, image_means, on_teacher_grid, spatial_size


@full_precision
def ifd_loss(projections: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The mean of several projections of the student's features points where the teacher's features do.

    `mean over images and valid positions of 1 - cos(1/P · Σ_p ReLU(s_p), t)`, the cosine over channels.

    Args:
        projections: P projections of the student's features to the teacher's channels, `[B, P, C, h, w]`.
        teacher: features `[B, C, h', w']`, to whose grid the student's are resized; they receive no gradient.
        mask: `[B, h', w']`, True where valid.

    Returns:
        Scalar in [0, 2]; float32 or float64.
    """
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
        projectors: size P of the ensemble; 3 as in the official code.
        level: level name; the coarsest that both models have by default.
    """

    weights = {"ifd": 5.0}
    needs = frozenset({"features"})
    transfers = "direction of each position's features"
    checked = (
        "official code (classification): same ensemble and cosine; our reading for maps is 1x1 projectors, a mean over valid "
        "positions and weight 5 for the official 25"
    )
    reference = "chen2022improved"

    def __init__(self, pair: Pair, *, projectors: int = 3, level: str | None = None) -> None:
        super().__init__(pair)
        check_positive(projectors=projectors)
        self.level, self.projectors = pair.level(level), projectors
        ours, theirs = pair.channels(self.level)
        # all projectors in one convolution; each has the initialisation that it would have on its own
        self.projection = nn.Conv2d(ours, projectors * theirs, 1)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        projections = self.projection(at_least_float32(student.features[self.level]))
        projections = projections.unflatten(1, (self.projectors, -1))
        target = teacher.features[self.level]
        return {"ifd": ifd_loss(projections, target, mask=targets.valid(spatial_size(target)))}
