"""Localization distillation (Zheng et al., CVPR 2022, https://arxiv.org/abs/2102.12252)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..outputs import DenseHead, DenseOutput, Objects, Targets
from .base import DistillationLoss, Pair, check_positive
from .ops.boxes import mean_over_ranks, valuable_region
from .ops.functional import at_least_float32, divergence, full_precision


@full_precision
def distribution_divergence(student: Tensor, teacher: Tensor, *, tau: float = 10.0) -> Tensor:
    """`tau² · mean over bins` of KL between distributions of the distances to a box's sides, in nat.

    Args:
        student: logits `[..., 4 * bins]`.
        teacher: likewise; they receive no gradient.
        tau: temperature.

    Returns:
        `[..., 4]`, one number a side.
    """
    sides = [at_least_float32(x).unflatten(-1, (4, -1)) for x in (student, teacher.detach())]
    return tau**2 * divergence(*sides, dim=-1, tau=tau) / sides[0].shape[-1]


@full_precision
def box_response_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Class scores of a dense detector: `mean over priors and classes of max_c σ(t) · KL(σ(t) ‖ σ(s))`, in nat.

    Our form of a pixel term where each prior stands for a position and classes exclude nothing; the weight keeps the many
    priors of the background from deciding.

    Args:
        student: logits `[B, A, C]`.
        teacher: likewise; they receive no gradient.

    Returns:
        Scalar >= 0, 0 for equal scores; float32 or float64.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    target = teacher.sigmoid()
    distance = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher, target, reduction="none")
    return ((distance - entropy) * target.amax(-1, keepdim=True)).mean()


class LDLoss(DistillationLoss):
    """Distributions over the distances to a box's sides, and classes, of GFL detectors.

    Three terms, with the weights of the official GFL configuration, in which all three are on: `main`, sides at the
    student's positive priors, weighted by its confidence; `vlr`, sides in the valuable region around them, weighted by
    overlap; `classes`, the softmax over classes at the positives, a mean for each level.

    Args:
        temperature: of the sides.
        class_temperature: of the classes.
    """

    weights = {"main": 0.25, "vlr": 0.25, "classes": 10.0}
    needs = frozenset({"distributions", "classes", "labels"})
    transfers = "distributions over the distances to a box's sides"
    checked = (
        "official code (LD's GFL heads): regions, temperatures and weights; its `vlr` term is a sum over the two images of a "
        "device, so here it is twice a mean over images"
    )
    reference = "zheng2022ld"

    def __init__(self, pair: Pair, *, temperature: float = 10.0, class_temperature: float = 2.0) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature, class_temperature=class_temperature)
        self.temperature, self.class_temperature = temperature, class_temperature

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = heads_of(student, teacher)
        assert isinstance(targets, Objects) and ours.assigned is not None
        logits = at_least_float32(ours.class_logits)
        positive = ours.assigned >= 0
        sides = distribution_divergence(ours.box_outputs, theirs.box_outputs, tau=self.temperature).mean(-1)

        confidence = logits.detach().amax(-1).sigmoid().masked_fill(~positive, 0)
        main = (confidence * sides).sum() / mean_over_ranks(confidence.sum())
        region = torch.stack([valuable_region(ours.priors, ours.level_sizes, boxes) for boxes in targets.boxes])
        vlr = 2 * (4 * region * sides).sum(1).mean() / 16

        kl = divergence(logits, at_least_float32(theirs.class_logits).detach(), dim=-1, tau=self.class_temperature)
        kl = self.class_temperature**2 * kl / logits.shape[-1]
        means = [
            (part * chosen).sum() / mean_over_ranks(chosen.sum())
            for part, chosen in zip(
                kl.split(ours.level_sizes, dim=1), positive.float().split(ours.level_sizes, dim=1), strict=True
            )
        ]
        return {"main": main, "vlr": vlr, "classes": torch.stack(means).sum()}


def heads_of(student: DenseOutput, teacher: DenseOutput) -> tuple[DenseHead, DenseHead]:
    """Both models' raw outputs at the same priors.

    Raises:
        ValueError: if a teacher that resizes its images has others.
    """
    ours, theirs = student.dense, teacher.dense
    assert ours is not None and theirs is not None  # `needs` saw to it
    if ours.level_sizes != theirs.level_sizes:
        raise ValueError(
            f"student and teacher have {ours.level_sizes} and {theirs.level_sizes} priors a level; they must see images of one "
            "size, so train at multiples of 32."
        )
    return ours, theirs
