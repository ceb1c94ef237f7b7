"""SlimSeg: distillation with supervision near borders (Xue et al., ACM MM 2022, https://arxiv.org/abs/2207.06242)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..outputs import DenseOutput
from .base import DistillationLoss, check_positive
from .kd import kd_loss
from .ops.borders import check_width, class_borders
from .ops.functional import at_least_float32, image_means, resize, spatial_size, valid_positions


def slimseg_loss(logits: Tensor, labels: Tensor, *, width: int = 7, ignore_index: int = 255) -> Tensor:
    """Boundary-guided supervision: mean over images and border pixels of the cross-entropy with the ground truth.

    Args:
        logits: class scores `[B, K, h, w]` at any stride; up-sampled to the labels.
        labels: class ids `[B, H, W]`, `ignore_index` where void.
        width: side in pixels of the window that must hold two classes for its centre to count, odd.
        ignore_index: void label.

    Returns:
        Scalar >= 0 in nat, float32 or float64; an image without a border counts 0.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = resize(at_least_float32(logits), spatial_size(labels))
        entropies = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
        return image_means(entropies, class_borders(labels, width=width, ignore_index=ignore_index)).mean()


class SlimSegLoss(DistillationLoss):
    """Pixel-wise distillation and a second, border-only task loss.

    Defined here as `kd_loss` and `slimseg_loss`, because the paper trains the widths of one slimmable network, each with
    the next wider one as its teacher, and a boundary-guided loss on the ground truth; with a teacher and a student of
    their own this is what remains. No official code exists: weights and width are our choice (the width is BPKD's).

    Args:
        temperature: T of the distillation.
        width: side in pixels of the window around a border.
        ignore_index: void label.
    """

    weights = {"kd": 1.0, "boundary": 1.0}
    borrowed = frozenset({"kd"})
    needs = frozenset({"logits", "labels"})
    transfers = "class scores of each pixel; the ground truth once more near borders"
    source = "https://arxiv.org/abs/2207.06242"
    checked = "no official code; our reading as a teacher-student method, weights and width are ours"
    citation = (
        "@inproceedings{xue2022slimseg,\n"
        "  title={SlimSeg: Slimmable Semantic Segmentation with Boundary Supervision},\n"
        "  author={Xue, Danna and Yang, Fei and Wang, Pei and Herranz, Luis and Sun, Jinqiu and Zhu, Yu and Zhang, "
        "Yanning},\n"
        "  booktitle={ACM International Conference on Multimedia},\n"
        "  pages={6539--6548},\n"
        "  year={2022}\n"
        "}"
    )

    def __init__(self, *, temperature: float = 1.0, width: int = 7, ignore_index: int = 255) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_width(width)
        self.temperature, self.width, self.ignore_index = temperature, width, ignore_index

    def forward(self, student: DenseOutput, teacher: DenseOutput, labels: Tensor) -> dict[str, Tensor]:
        mask = valid_positions(labels, spatial_size(teacher.logits), self.ignore_index)
        return {
            "kd": kd_loss(student.logits, teacher.logits, temperature=self.temperature, mask=mask),
            "boundary": slimseg_loss(student.logits, labels, width=self.width, ignore_index=self.ignore_index),
        }
