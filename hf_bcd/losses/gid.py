"""General instance distillation (Dai et al., CVPR 2021, https://arxiv.org/abs/2103.02340)."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..outputs import DenseHead, DenseOutput, FeatureSpec, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Pair, check_positive
from .ld import heads_of
from .modules.connectors import FeaturePair
from .ops.boxes import mean_over_ranks, overlaps
from .ops.functional import at_least_float32


POOLED = 7  # cells a side


def general_instances(
    student: DenseHead, teacher: DenseHead, count: int = 10, threshold: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes at which two detectors disagree most.

    A prior's score is the largest difference of the two models' probabilities of a class; its box is that of the model that
    is surer of that class. Boxes that overlap a better one by more than `threshold` are left out, in each image.

    Returns:
        Boxes `[B, count, 4]`, their scores `[B, count]` (0 where there are no more), and the box of each prior `[B, A, 4]`.
    """
    ours, theirs = (at_least_float32(head.class_logits).detach().sigmoid() for head in (student, teacher))
    score, index = (theirs - ours).abs().max(dim=-1)
    surer = theirs.gather(-1, index[..., None]) > ours.gather(-1, index[..., None])
    boxes = at_least_float32(torch.where(surer, teacher.boxes().detach(), student.boxes().detach()))
    return *best_apart(score, boxes, count, threshold), boxes


def disputed_answers(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], count: int = 10, threshold: float = 0.3
) -> tuple[Tensor, Tensor]:
    """The same of two models' final boxes, each with class logits `[B, K, C]` and boxes `[B, K, 4]`, without graphs.

    What a model says of a box, its own or the other's, is the best score that its boxes with an IoU of at least a half give
    a class; nothing is 0.

    Returns:
        Boxes `[B, count, 4]` and their scores `[B, count]`.
    """
    (_, ours), (_, theirs) = student, teacher
    boxes, said = at_least_float32(torch.cat([ours, theirs], dim=1)), []
    for logits, own in (student, teacher):
        near = overlaps(boxes[:, :, None], at_least_float32(own)[:, None])[0] >= 0.5
        said.append((near[..., None] * at_least_float32(logits).sigmoid()[:, None]).amax(2))
    score = (said[0] - said[1]).abs().amax(-1)
    return best_apart(score, boxes, min(count, boxes.shape[1]), threshold)


def best_apart(score: Tensor, boxes: Tensor, count: int, threshold: float) -> tuple[Tensor, Tensor]:
    """The `count` boxes with the highest scores of each image, none of which overlaps a better one by more than `threshold`."""
    chosen, scores, left = [], [], score
    for _ in range(count):  # a fixed number, so that nothing waits for the device
        best, where = left.max(dim=1)
        box = boxes.gather(1, where[:, None, None].expand(-1, 1, 4))
        chosen.append(box[:, 0])
        scores.append(best)
        left = left.masked_fill(overlaps(box, boxes)[0] > threshold, 0).scatter(1, where[:, None], 0)
    return torch.stack(chosen, dim=1), torch.stack(scores, dim=1)


def pooled(features: Mapping[str, Tensor], specs: Mapping[str, FeatureSpec], boxes: Tensor) -> Tensor:
    """Features `[B, N, C, 7, 7]` of boxes `[B, N, 4]`: each from the level that suits its size, bilinear at cell centres."""
    strides = [spec.stride for spec in specs.values()]
    boxes = boxes.to(at_least_float32(features[next(iter(specs))]).dtype)
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp_min(1).prod(-1).sqrt()
    # a box of 56 pixels belongs to stride 4, as in feature pyramid networks
    level = (sides / 14 / strides[0] + 1e-6).log2().floor().clamp(0, len(strides) - 1)
    steps = (torch.arange(POOLED, device=boxes.device) + 0.5) / POOLED
    total = torch.zeros((), device=boxes.device)
    for number, (name, stride) in enumerate(zip(specs, strides, strict=True)):
        x = at_least_float32(features[name])
        size = boxes.new_tensor([x.shape[-1] * stride, x.shape[-2] * stride])
        corner, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
        places = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
        points = corner[:, :, None, None] + places * extent[:, :, None, None]  # [B, N, 7, 7, 2]
        sampled = F.grid_sample(x, (2 * points / size - 1).flatten(1, 2), align_corners=False)
        sampled = sampled.unflatten(2, (boxes.shape[1], POOLED)).transpose(1, 2)
        total = total + sampled * (level == number)[:, :, None, None, None]
    return total


class GIDLoss(DistillationLoss):
    """Features, relations and answers at the boxes where student and teacher disagree most.

    Args:
        num_boxes: boxes of an image.
        on: `priors` of dense detectors, or the final `boxes` of models in two stages, which have no answers at priors to
            compare, see `disputed_answers`; finding them waits for the device.
    """

    weights = {"features": 5e-4 * 256 * POOLED**2, "relations": 40.0, "responses": 1.0}
    needs = frozenset({"dense", "classes"})
    features = "pyramid"
    transfers = "features, relations and answers where student and teacher disagree"
    checked = (
        "the paper (no official code); which priors answer for a box (an overlap of a half), means for sums, the factor 256 · 49 "
        "that belongs to them, and the form for two stages are ours"
    )
    reference = "dai2021gid"

    def __init__(self, pair: Pair, *, num_boxes: int = 10, on: Literal["priors", "boxes"] = "priors") -> None:
        super().__init__(pair)
        check_positive(num_boxes=num_boxes)
        if on not in ("priors", "boxes"):
            raise UserError(f"on is {on!r}; choose priors or boxes.")
        self.num_boxes, self.on = num_boxes, on
        if on == "boxes":
            self.weights = {term: weight for term, weight in self.weights.items() if term != "responses"}
            self.needs = frozenset({"final_boxes", "classes"})
        names = [name for name in pair.levels if pair.student[name].stride <= 32]
        self.specs = {name: pair.student[name] for name in names}
        self.pairs = torch.nn.ModuleList(FeaturePair(pair, name) for name in names)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        if self.on == "boxes":
            assert student.final_boxes is not None and teacher.final_boxes is not None  # `needs` saw to it
            with torch.no_grad():
                boxes, scores = disputed_answers(student.final_boxes(), teacher.final_boxes(), self.num_boxes)
            return self.at_boxes(student, teacher, boxes, (scores > 0).float())
        ours, theirs = heads_of(student, teacher)
        boxes, scores, at_priors = general_instances(ours, theirs, self.num_boxes)
        real = (scores > 0).float()
        terms = self.at_boxes(student, teacher, boxes, real)
        belongs = ((overlaps(at_priors[:, :, None], boxes[:, None])[0] >= 0.5) * real[:, None]).amax(2)
        target = at_least_float32(theirs.class_logits).detach().sigmoid()
        classes = F.binary_cross_entropy_with_logits(at_least_float32(ours.class_logits), target, reduction="none")
        giou = overlaps(at_least_float32(ours.boxes()), at_least_float32(theirs.boxes().detach()))[1]
        answers = (belongs * (classes.sum(-1) + 1 - giou)).sum() / mean_over_ranks(belongs.sum())
        return terms | {"responses": answers}

    def at_boxes(self, student: DenseOutput, teacher: DenseOutput, boxes: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Features of boxes `[B, N, 4]` and the relations between them; of `real` `[B, N]`, 0 is a box that is none."""
        count = mean_over_ranks(real.sum())
        maps = [pair(student.features, teacher.features) for pair in self.pairs]
        levels = [dict(zip(self.specs, side, strict=True)) for side in zip(*maps, strict=True)]
        mine, its = (pooled(side, self.specs, boxes) for side in levels)
        features = ((mine - its).square().mean((2, 3, 4)) * real).sum() / count

        ours_apart, theirs_apart = (normalised_distances(side.flatten(2), real) for side in (mine, its))
        pairs = real[:, :, None] * real[:, None]
        relation = F.smooth_l1_loss(ours_apart, theirs_apart, reduction="none") * pairs
        relations = relation.sum() / mean_over_ranks(pairs.sum())
        return {"features": features, "relations": relations}


def normalised_distances(vectors: Tensor, real: Tensor) -> Tensor:
    """Euclidean distances `[B, N, N]` between vectors `[B, N, C]`, divided by their mean over the pairs of real ones."""
    squared = (vectors[:, :, None] - vectors[:, None]).square().mean(-1)
    distance = squared.clamp_min(1e-12).sqrt()
    pairs = real[:, :, None] * real[:, None] * (1 - torch.eye(real.shape[1], device=real.device))
    mean = (distance * pairs).sum((1, 2), keepdim=True) / pairs.sum((1, 2), keepdim=True).clamp_min(1)
    return distance / mean.clamp_min(1e-6)
