"""Distillation by Pearson correlation (Cao et al., NeurIPS 2022, https://arxiv.org/abs/2207.02039)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair
from .modules.connectors import FeaturePair
from .ops.functional import full_precision, mean_squared_error, on_teacher_grid, spatial_size, standardize


@full_precision
def pkd_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The student's channels follow the teacher's, whatever their magnitude.

    `½ · mean over images, valid positions and channels of (ŝ - t̂)²`; a hat standardises a channel over the valid
    positions of the whole batch, on all ranks together. With images of equal weight this is the mean over channels of
    `1 - r`, r being Pearson's correlation.

    Args:
        student: features `[B, C, h, w]`, projected to the teacher's channels; the rest is as in `on_teacher_grid`.

    Returns:
        Scalar >= 0, 0 for channels that differ by a positive factor and a constant; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    student, teacher = (standardize(x, (0, 2, 3), mask[:, None], eps=1e-6) for x in (student, teacher))
    return 0.5 * mean_squared_error(student, teacher, mask)


class PKDLoss(DistillationLoss):
    """`pkd_loss` summed over feature levels, each behind a trained 1x1 convolution on the student's.

    Defined for the pyramids of detectors, whose channels agree; here on the stages of a backbone, so a convolution brings
    the student's channels to the teacher's.

    Args:
        levels: level names; the coarsest that both models have by default. Detectors take all four of their pyramid.
    """

    weights = {"pkd": 6.0}
    needs = frozenset({"features"})
    transfers = "the pattern of each channel over the batch"
    checked = (
        "official code (MMRazor): same formula, weight of its two-stage detectors for each level; deviations are biased "
        "and statistics run over all ranks of a forward pass, so accumulated batches do not add up to one; void pixels left out"
    )
    reference = "cao2022pkd"

    def __init__(self, pair: Pair, *, levels: Sequence[str] | None = None) -> None:
        super().__init__(pair)
        self.pairs = nn.ModuleList(FeaturePair(pair, level, bias=False) for level in levels or [None])

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        losses = []
        for pair in self.pairs:
            ours, theirs = pair(student.features, teacher.features)
            losses.append(pkd_loss(ours, theirs, mask=targets.valid(spatial_size(theirs))))
        return {"pkd": torch.stack(losses).sum()}
