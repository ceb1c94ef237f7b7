"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017, https://arxiv.org/abs/1612.03928)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair
from .ops.functional import attention_map, full_precision, on_teacher_grid, spatial_size, unit_maps


@full_precision
def at_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Activation-based attention transfer: the student is active where the teacher is.

    `mean over images of ‖a_s / ‖a_s‖ - a_t / ‖a_t‖‖²`, where `a` is the mean over channels of `f²` at the valid positions.

    Args:
        student: features `[B, C, h, w]`; its attention map is resized to the teacher's grid.
        teacher: features `[B, C', h', w']` of any number of channels; they receive no gradient.
        mask: `[B, h', w']`, True where valid.

    Returns:
        Scalar in [0, 2], 0 for maps that differ by a factor; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(attention_map(student), attention_map(teacher), mask)
    return (unit_maps(student, mask) - unit_maps(teacher, mask)).square().sum(dim=2).mean()


class ATLoss(DistillationLoss):
    """`at_loss` summed over feature levels; it needs no connector.

    The official code takes the mean over the n positions of a map, so its weight belongs to one size of a map: 1e3 on
    CIFAR, 1e4 in CIRKD's comparison for segmentation. This sum over positions has that weight / n, here of CIRKD's
    64 x 128 positions (512 x 1024 pixels at stride 8).

    Args:
        levels: level names; the coarsest that both models have by default, as in CIRKD.
    """

    weights = {"at": 1e4 / (64 * 128)}
    needs = frozenset({"features"})
    transfers = "where a feature level is active"
    checked = "official code and CIRKD's: same maps; sum over positions with CIRKD's weight / n; void pixels left out"
    reference = "zagoruyko2017paying"

    def __init__(self, pair: Pair, *, levels: Sequence[str] | None = None) -> None:
        super().__init__(pair)
        self.levels = [pair.level(level) for level in levels or [None]]

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        losses = []
        for level in self.levels:
            ours, theirs = student.features[level], teacher.features[level]
            losses.append(at_loss(ours, theirs, mask=targets.valid(spatial_size(theirs))))
        return {"at": torch.stack(losses).sum()}
