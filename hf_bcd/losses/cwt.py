"""Feature distillation via channel-wise transformation (Liu et al., ICCVW 2023, https://arxiv.org/abs/2303.13212)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec
from .base import DistillationLoss
from .modules.connectors import shared_level
from .ops.functional import at_least_float32, mean_squared_error, on_teacher_grid, spatial_size, valid_positions


def cwt_loss(
    student: Tensor, teacher: Tensor, transform: Callable[[Tensor], Tensor], *, mask: Tensor | None = None
) -> Tensor:
    """A transformation of the student's channels follows the teacher's features.

    `mean over images and valid positions of ‖MLP(s) - t‖²`, the norm over channels.

    Args:
        student: features `[B, C, h, w]`.
        teacher: features `[B, C', h', w']`, to whose grid the transformed ones are resized; they receive no gradient.
        transform: the MLP, from `[B, C, h, w]` to `[B, C', h, w]`; it mixes channels, not positions.
        mask: `[B, h', w']`, True where valid.

    Returns:
        Scalar >= 0; float32 or float64.

    Raises:
        ValueError: if batch, the teacher's and the transformed channels, or the mask's size differ.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = transform(at_least_float32(student))
        return teacher.shape[1] * mean_squared_error(*on_teacher_grid(student, teacher, mask))


class CWTLoss(DistillationLoss):
    """`cwt_loss` on one feature level.

    Defined here from the paper's text, because its code is not public: one hidden layer as wide as the teacher's
    features, and a weight with which the gradient of MobileNetV2 on CamVid is some five times that of the task at the
    start, as that of pixel-wise distillation is at SKD's weight.

    Args:
        student_specs: feature levels of the student.
        teacher_specs: feature levels of the teacher.
        level: level name; the coarsest that both models have by default.
        ignore_index: void label.
    """

    weights = {"cwt": 0.01}
    needs = frozenset({"features"})
    transfers = "features of each position"
    source = "https://arxiv.org/abs/2303.13212"
    checked = "the paper's formula, as no code is public; width of the hidden layer and the weight are our reading"
    citation = (
        "@inproceedings{liu2023simple,\n"
        "  title={A Simple and Generic Framework for Feature Distillation via Channel-wise Transformation},\n"
        "  author={Liu, Ziwei and Wang, Yongtao and Chu, Xiaojie},\n"
        "  booktitle={ICCV Workshops},\n"
        "  year={2023}\n"
        "}"
    )

    def __init__(
        self,
        student_specs: Mapping[str, FeatureSpec],
        teacher_specs: Mapping[str, FeatureSpec],
        *,
        level: str | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.level = shared_level(student_specs, teacher_specs, level)
        self.ignore_index = ignore_index
        channels = teacher_specs[self.level].channels
        self.transform = nn.Sequential(
            nn.Conv2d(student_specs[self.level].channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 1)
        )

    def forward(self, student: DenseOutput, teacher: DenseOutput, labels: Tensor) -> dict[str, Tensor]:
        ours, theirs = student.features[self.level], teacher.features[self.level]
        mask = valid_positions(labels, spatial_size(theirs), self.ignore_index)
        return {"cwt": cwt_loss(ours, theirs, self.transform, mask=mask)}
