"""BGLSSeg: a boundary head beside the student (Zhou et al., TMM 2024, https://doi.org/10.1109/TMM.2024.3372835)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec
from .base import DistillationLoss, check_positive
from .kd import kd_loss
from .ops.borders import check_width, class_borders
from .ops.functional import at_least_float32, image_means, resize, spatial_size, valid_positions


def bglsseg_loss(scores: Tensor, labels: Tensor, *, width: int = 7, ignore_index: int = 255) -> Tensor:
    """Boundary supervision: mean over images and valid pixels of the binary cross-entropy with ground-truth borders.

    Args:
        scores: boundary logits `[B, 1, h, w]` at any stride; up-sampled to the labels.
        labels: class ids `[B, H, W]`, `ignore_index` where void.
        width: side in pixels of the window that must hold two classes for its centre to be a border, odd.
        ignore_index: void label.

    Returns:
        Scalar >= 0 in nat, float32 or float64.
    """
    with torch.autocast(scores.device.type, enabled=False):
        scores = resize(at_least_float32(scores), spatial_size(labels))[:, 0]
        borders = class_borders(labels, width=width, ignore_index=ignore_index).to(scores.dtype)
        entropies = F.binary_cross_entropy_with_logits(scores, borders, reduction="none")
        return image_means(entropies, labels != ignore_index).mean()


class BGLSSegLoss(DistillationLoss):
    """Pixel-wise distillation and a boundary head on the student.

    Defined here as `kd_loss` and `bglsseg_loss` of a small head (3x3 convolution to 64 channels, ReLU, 1x1 convolution)
    on one of the student's levels, because the paper proposes an architecture (BSCNet), in which a predicted boundary
    guides low-level features, and no distillation; this much of it fits any student, and costs nothing after training.
    No official code exists: weights, width and head are our choice (the width is BPKD's).

    Args:
        student_specs: feature levels of the student.
        temperature: T of the distillation.
        width: side in pixels of the window around a border.
        level: level that the head reads; the deepest of stride 8 or finer by default, or else the finest.
        ignore_index: void label.
    """

    weights = {"kd": 1.0, "boundary": 1.0}
    borrowed = frozenset({"kd"})
    needs = frozenset({"logits", "features", "labels"})
    transfers = "class scores of each pixel; borders of the ground truth through an auxiliary head"
    source = "https://doi.org/10.1109/TMM.2024.3372835"
    checked = "no official code; our reading as a teacher-student method, weights, width and head are ours"
    citation = (
        "@article{zhou2024boundary,\n"
        "  title={Boundary-Guided Lightweight Semantic Segmentation With Multi-Scale Semantic Context},\n"
        "  author={Zhou, Quan and Wang, Linjie and Gao, Guangwei and Kang, Bin and Ou, Weihua and Lu, Huimin},\n"
        "  journal={IEEE Transactions on Multimedia},\n"
        "  year={2024},\n"
        "  doi={10.1109/TMM.2024.3372835}\n"
        "}"
    )

    def __init__(
        self,
        student_specs: Mapping[str, FeatureSpec],
        *,
        temperature: float = 1.0,
        width: int = 7,
        level: str | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_width(width)
        if level is None:
            fine = [name for name, spec in student_specs.items() if spec.stride <= 8]
            level = fine[-1] if fine else next(iter(student_specs))
        if level not in student_specs:
            raise ValueError(f"level is {level!r}; the student has {', '.join(student_specs)}.")
        self.temperature, self.width, self.level, self.ignore_index = temperature, width, level, ignore_index
        channels = student_specs[level].channels
        self.head = nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 1))

    def forward(self, student: DenseOutput, teacher: DenseOutput, labels: Tensor) -> dict[str, Tensor]:
        with torch.autocast(labels.device.type, enabled=False):
            features = at_least_float32(student.features[self.level])
            void = ~valid_positions(labels, spatial_size(features), self.ignore_index)
            scores = self.head(features.masked_fill(void[:, None], 0))  # the 3x3 convolution must not see void
            mask = valid_positions(labels, spatial_size(teacher.logits), self.ignore_index)
            return {
                "kd": kd_loss(student.logits, teacher.logits, temperature=self.temperature, mask=mask),
                "boundary": bglsseg_loss(scores, labels, width=self.width, ignore_index=self.ignore_index),
            }
