"""BGLSSeg: a boundary head beside the student (Zhou et al., TMM 2024, https://doi.org/10.1109/TMM.2024.3372835)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseOutput, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Pair, check_positive
from .kd import kd_loss
from .ops.borders import check_width, class_borders
from .ops.functional import at_least_float32, full_precision, image_means, resize, spatial_size


@full_precision
def bglsseg_loss(scores: Tensor, classes: Tensor, *, mask: Tensor, width: int = 7) -> Tensor:
    """Boundary supervision: mean over images and valid pixels of the binary cross-entropy with ground-truth borders.

    Args:
        scores: boundary logits `[B, 1, h, w]` at any stride; up-sampled to the classes.
        classes: where each class is, `[B, K, H, W]`, boolean or in 0..1.
        mask: `[B, H, W]`, True where valid.
        width: side in pixels of the window that must hold two classes for its centre to be a border, odd.

    Returns:
        Scalar >= 0 in nat, float32 or float64.
    """
    scores = resize(at_least_float32(scores), spatial_size(mask))[:, 0]
    borders = class_borders(classes, mask, width=width).to(scores.dtype)
    return image_means(F.binary_cross_entropy_with_logits(scores, borders, reduction="none"), mask).mean()


class BGLSSegLoss(DistillationLoss):
    """Pixel-wise distillation and a boundary head on the student.

    Defined here as `kd_loss` and `bglsseg_loss` of a small head (3x3 convolution to 64 channels, ReLU, 1x1 convolution)
    on one of the student's levels, because the paper proposes an architecture (BSCNet), in which a predicted boundary
    guides low-level features, and no distillation; this much of it fits any student, and costs nothing after training.
    No official code exists: weights, width and head are our choice (the width is BPKD's).

    Args:
        temperature: T of the distillation.
        width: side in pixels of the window around a border.
        level: level that the head reads; the deepest of stride 8 or finer by default, or else the finest.
    """

    weights = {"kd": 1.0, "boundary": 1.0}
    borrowed = frozenset({"kd"})
    needs = frozenset({"logits", "features", "labels"})
    transfers = "class scores of each pixel; borders of the ground truth through an auxiliary head"
    checked = "no official code; our reading as a teacher-student method, weights, width and head are ours"
    reference = "zhou2024boundary"

    def __init__(self, pair: Pair, *, temperature: float = 1.0, width: int = 7, level: str | None = None) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature)
        check_width(width)
        if level is None:
            fine = [name for name, spec in pair.student.items() if spec.stride <= 8]
            level = fine[-1] if fine else next(iter(pair.student))
        if level not in pair.student:
            raise UserError(f"level is {level!r}; the student has {', '.join(pair.student)}.")
        self.temperature, self.width, self.level = temperature, width, level
        channels = pair.student[level].channels
        self.head = nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 1, 1))

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        features = at_least_float32(student.features[self.level])
        void = ~targets.valid(spatial_size(features))
        scores = self.head(features.masked_fill(void[:, None], 0))  # the 3x3 convolution must not see void
        classes, mask = targets.class_masks(targets.size), targets.valid(targets.size)
        valid = targets.valid(spatial_size(teacher.logits))
        return {
            "kd": kd_loss(student.logits, teacher.logits, temperature=self.temperature, mask=valid),
            "boundary": bglsseg_loss(scores, classes, mask=mask, width=self.width),
        }
