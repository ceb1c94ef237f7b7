"""DIST: correlation with a stronger teacher (Huang et al., NeurIPS 2022, https://arxiv.org/abs/2205.10536)."""

import torch
from torch import Tensor

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss
from .ops.functional import full_precision, image_means, on_teacher_grid, spatial_size


def pearson(x: Tensor, y: Tensor, dim: int, mask: Tensor | None = None) -> Tensor:
    """Pearson correlation of two tensors of one shape along `dim`: the shape without it, in [-1, 1], 0 for a constant.

    `mask` is broadcastable and True where an entry counts.
    """
    weight = torch.ones_like(x) if mask is None else mask.to(x.dtype).expand_as(x)
    count = weight.sum(dim, keepdim=True).clamp_min(1)
    x, y = (weight * (z - (weight * z).sum(dim, keepdim=True) / count) for z in (x, y))
    return (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim) + 1e-8)  # as officially


@full_precision
def dist_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Distances of correlation `d(u, v) = 1 - pearson(u, v)` between the class probabilities p of two models.

    - `inter`: mean over images and valid pixels i of `d(p_student[:, i], p_teacher[:, i])`, over classes.
    - `intra`: mean over images and classes c of `d(p_student[c, :], p_teacher[c, :])`, over an image's valid pixels; an
      image with fewer than two counts 0.

    Args:
        student: class scores `[B, K, h, w]`; `teacher` and `mask` are as in `on_teacher_grid`.

    Returns:
        The two terms, scalars in [0, 2], float32 or float64. Equal scores give 0 but for the 1e-8 in the official
        denominator, which counts once the probability of a class hardly varies.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    student, teacher = student.softmax(dim=1), teacher.softmax(dim=1)
    inter = image_means(1 - pearson(student, teacher, dim=1), mask)
    mask = mask.flatten(1)
    intra = (1 - pearson(student.flatten(2), teacher.flatten(2), dim=2, mask=mask[:, None])).mean(dim=1)
    return {"inter": inter.mean(), "intra": intra.masked_fill(mask.sum(dim=1) < 2, 0).mean()}


class DISTLoss(DistillationLoss):
    """`dist_loss` between the logits of two models.

    The official code correlates a class over the pixels of all images on a device; here over the pixels of one image, so
    that neither the number of devices nor that of accumulated batches changes the loss. It has no temperature.
    """

    weights = {"inter": 1.0, "intra": 1.0}
    needs = frozenset({"logits"})
    transfers = "ranking of the classes in each pixel, and of the pixels in each class"
    checked = (
        "official segmentation code (DIST_KD): same formula and weights; intra-class within an image instead of a "
        "device's batch, void pixels left out, no term on auxiliary heads"
    )
    reference = "huang2022knowledge"

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        return dist_loss(student.logits, teacher.logits, mask=targets.valid(spatial_size(teacher.logits)))
