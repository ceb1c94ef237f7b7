"""Cross-head distillation (Wang et al., CVPR 2024, https://arxiv.org/abs/2306.11369)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseHead, DenseOutput, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Pair
from .ld import heads_of
from .modules.connectors import FeaturePair
from .ops.boxes import mean_over_ranks, overlaps
from .ops.functional import (
    at_least_float32,
    divergence,
    full_precision,
    image_means,
    match_moments,
    on_teacher_grid,
    spatial_size,
)


@full_precision
def crosskd_loss(cross: Tensor, teacher: Tensor, *, beta: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Distance of a cross-head prediction to the teacher's own.

    `mean over images and valid pixels of d^beta · KL(t ‖ p)` with the softmaxes over classes `p` of `cross` and `t` of
    `teacher`, and `d = ½ Σ_k |p_k − t_k|` in [0, 1].

    Args:
        cross: class scores `[B, K, h, w]` of the teacher's head on the student's features.
        teacher: class scores `[B, K, h', w']`, to whose grid `cross` is resized; they receive no gradient.
        beta: 0, or >= 1.
        mask: `[B, h', w']`, True where valid.

    Returns:
        Scalar >= 0 in nat, 0 for equal scores; float32 or float64.
    """
    cross, teacher, mask = on_teacher_grid(cross, teacher, mask)
    disagreement = (cross.softmax(1) - teacher.softmax(1)).abs().sum(1) / 2
    return image_means(disagreement.pow(beta) * divergence(cross, teacher, dim=1), mask).mean()


def cross_head_losses(student: DenseHead, teacher: DenseHead, targets: Targets) -> dict[str, Tensor]:
    """Distances of a detector's head on the student's maps to its own answers, as the official code has them.

    `classes`: `|σ(p) − σ(t)| · BCE(p, σ(t))` summed over classes and all priors but ignored ones, over the positives. `boxes`:
    of distributions KL, of deltas 1 − generalised IoU, weighted by the teacher's confidence; the former summed over sides and
    divided by the sum of the weights, the latter by the positives.

    Args:
        student: its raw output, with what it was assigned.
        teacher: likewise; its head is frozen and gets no gradient.
        targets: which positions of the maps count for their moments.
    """
    assert student.assigned is not None and teacher.cross is not None
    tower = {}
    for side, maps in student.tower.items():
        pairs = zip(maps, teacher.tower[side], strict=True)
        tower[side] = [
            match_moments(at_least_float32(x), at_least_float32(t).detach(), targets.valid(spatial_size(t))[:, None])
            for x, t in pairs
        ]
    crossed = teacher.cross(tower)
    counted, number = student.assigned >= -1, mean_over_ranks((student.assigned >= 0).sum().float())
    logits, target = at_least_float32(crossed.class_logits), at_least_float32(teacher.class_logits).detach().sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    classes = ((logits.sigmoid() - target).abs() * bce).sum(-1).masked_fill(~counted, 0).sum() / number

    weight = target.amax(-1).masked_fill(~counted, 0)
    if teacher.box_outputs.shape[-1] > 4:
        sides = [
            at_least_float32(x).unflatten(-1, (4, -1)) for x in (crossed.box_outputs, teacher.box_outputs.detach())
        ]
        boxes = (weight * divergence(*sides, dim=-1).sum(-1)).sum() / mean_over_ranks(weight.sum())
    else:
        giou = overlaps(crossed.boxes().float(), teacher.boxes().detach().float())[1]
        boxes = (weight * (1 - giou)).sum() / number
    return {"classes": classes, "boxes": boxes}


class CrossKDLoss(DistillationLoss):
    """`crosskd_loss` of the teacher's frozen head on the student's features.

    Defined here with all levels that the head reads, each behind a trained 1x1 convolution, because the paper's is for
    detectors, whose student and teacher heads agree layer by layer: it crosses over before their last convolution.
    Every level comes from the student, as in the paper; beside the teacher's own fine levels, the prediction would
    hardly depend on the student. Where a pixel is void, the head sees the teacher's own features.

    Of the paper's quality focal loss `|σ(p) − σ(t)|^beta · BCE(p, σ(t))` over classes that exclude nothing, the weight
    stays, as the distance of two distributions over classes, and BCE becomes KL, so that agreement is 0 for any beta.

    Officially weight 1 multiplies a sum over all anchors with a label, positive and negative, divided by the number of the
    positive ones: `(positives + negatives) / positives` times a mean. Every valid pixel has a class here, none is negative,
    so the factor is 1 and the mean over valid pixels keeps the weight.

    Of detectors with towers alike, `on: tower` crosses over before the last convolution, as officially, see
    `cross_head_losses`.

    Args:
        beta: exponent of the weight; 1 as in the official code, 0 for KL only.
        on: `head` of a segmenter, or `tower` of a detector.
    """

    weights = {"crosskd": 1.0}
    needs = frozenset({"features", "head"})
    transfers = "what the teacher's head makes of the features"
    checked = (
        "official code (detectors): same rescaling of each channel and beta, weight 1 as no pixel is a negative; softmax and KL for sigmoid and BCE, "
        "and the place where the student's features enter, are ours; that "
        "rescaling takes its statistics from a forward pass, so accumulated batches do not add up to one"
    )
    reference = "wang2024crosskd"

    def __init__(self, pair: Pair, *, beta: float = 1.0, on: Literal["head", "tower"] = "head") -> None:
        super().__init__(pair)
        if on not in ("head", "tower"):
            raise UserError(f"on is {on!r}; choose head or tower.")
        if on == "tower":
            self.weights, self.needs = {"classes": 1.0, "boxes": 1.0}, frozenset({"tower", "classes", "labels"})
        if not (beta == 0 or beta >= 1):
            raise UserError(f"beta is {beta!r}; it must be 0 or >= 1, or the gradient is infinite at agreement.")
        self.beta, self.on = beta, on
        levels = pair.head_levels if on == "head" else ()
        self.pairs = nn.ModuleList(FeaturePair(pair, level, bias=False) for level in levels)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        if self.on == "tower":
            return cross_head_losses(*heads_of(student, teacher), targets)
        if teacher.head is None:
            raise ValueError("crosskd needs teacher.head, the teacher's head as a function of its levels.")
        crossed = {}
        for pair in self.pairs:
            ours, theirs = pair(student.features, teacher.features)
            valid = targets.valid(spatial_size(theirs))[:, None]
            crossed[pair.level] = torch.where(valid, match_moments(ours, theirs, valid), theirs)
        mask = targets.valid(spatial_size(teacher.logits))
        return {"crosskd": crosskd_loss(teacher.head(crossed), teacher.logits, beta=self.beta, mask=mask)}
