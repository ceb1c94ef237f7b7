"""Intra-class feature variation distillation (Wang et al., ECCV 2020, https://arxiv.org/abs/2001.03349)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..outputs import DenseOutput, FeatureSpec
from .kd import kd_loss
from .modules.adversarial import AdversarialLoss
from .modules.connectors import shared_level
from .ops.functional import (
    at_least_float32,
    class_masks,
    class_similarity,
    image_means,
    resize,
    spatial_size,
    valid_positions,
)


def ifvd_loss(student: Tensor, teacher: Tensor, classes: Tensor) -> Tensor:
    """Intra-class feature variation distillation: positions resemble their class as they do in the teacher.

    `mean over images and labelled positions of (M_s - M_t)²`, `M(p) = cos(f(p), mean of f over the class of p)`.

    Args:
        student: features `[B, C, h, w]`, resized to the teacher's grid.
        teacher: features `[B, C', h', w']`; they receive no gradient.
        classes: one-hot label maps `[B, K, h', w']`, False everywhere where void.

    Returns:
        Scalar in [0, 4], 0 for features that differ by a rotation; float32 or float64.

    Raises:
        ValueError: if batch or grid of the classes differ from the teacher's.
    """
    if classes.shape[0] != teacher.shape[0] or spatial_size(classes) != spatial_size(teacher):
        raise ValueError(f"classes are {tuple(classes.shape)} for a teacher of {tuple(teacher.shape)}.")
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = resize(at_least_float32(student), spatial_size(teacher)), at_least_float32(teacher).detach()
        error = (class_similarity(student, classes) - class_similarity(teacher, classes)).square()
        return image_means(error, classes.any(dim=1)).mean()


class IFVDLoss(AdversarialLoss):
    """The three terms of the official code: `ifvd_loss` (variation), `kd_loss` and an `Adversary`.

    Weights: 10 and 0.001 as there, and for the variation 50, which the paper is quoted with; the code has 200, on the
    features behind the pyramid pooling, which models of other families lack. On a backbone's level 200 outweighs the
    task some 40 times (MobileNetV2 on CamVid). The official KL divergence is a mean over classes too, so `kd` is
    `kd_loss` over their number.

    Args:
        student_specs: feature levels of the student.
        teacher_specs: feature levels of the teacher.
        num_labels: number of classes.
        level: level of the features; the coarsest that both models have by default.
        discriminator_channels: width of the discriminator; 64 in the official code, 0 leaves the adversarial term out.
        ignore_index: void label.
        seed: seed of the discriminator's training.
    """

    weights = {"variation": 50.0, "kd": 10.0, "adversarial": 0.001}
    borrowed = frozenset({"kd", "adversarial"})
    needs = frozenset({"logits", "features", "labels"})
    transfers = "how features vary within each class, class scores, and the look of a whole score map"
    source = "https://arxiv.org/abs/2001.03349"
    checked = (
        "official code: same terms, reductions and discriminator layers, weights but for the variation, 50 for its 200; void "
        "pixels left out"
    )
    citation = (
        "@inproceedings{wang2020intra,\n"
        "  title={Intra-class Feature Variation Distillation for Semantic Segmentation},\n"
        "  author={Wang, Yukang and Zhou, Wei and Jiang, Tao and Bai, Xiang and Xu, Yongchao},\n"
        "  booktitle={ECCV},\n"
        "  year={2020}\n"
        "}"
    )

    def __init__(
        self,
        student_specs: Mapping[str, FeatureSpec],
        teacher_specs: Mapping[str, FeatureSpec],
        num_labels: int,
        *,
        level: str | None = None,
        discriminator_channels: int = 64,
        ignore_index: int = 255,
        seed: int = 0,
    ) -> None:
        super().__init__(num_labels, discriminator_channels, seed)
        self.level = shared_level(student_specs, teacher_specs, level)
        self.num_labels, self.ignore_index = num_labels, ignore_index

    def forward(self, student: DenseOutput, teacher: DenseOutput, labels: Tensor) -> dict[str, Tensor]:
        ours, theirs = student.features[self.level], teacher.features[self.level]
        mask = valid_positions(labels, spatial_size(teacher.logits), self.ignore_index)
        classes = class_masks(labels, self.num_labels, spatial_size(theirs))
        return {
            "variation": ifvd_loss(ours, theirs, classes),
            "kd": kd_loss(student.logits, teacher.logits, mask=mask) / self.num_labels,
        } | self.adversarial_term(student.logits, teacher.logits, mask)
