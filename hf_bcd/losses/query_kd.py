"""Distillation of object queries, after DETRDistill (Chang et al., ICCV 2023, https://arxiv.org/abs/2211.10156)."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..outputs import DenseOutput, Queries, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Pair, check_positive
from .ops.boxes import mean_over_ranks, overlaps, xyxy
from .ops.functional import at_least_float32, divergence, resize


class Answers(NamedTuple):
    """The best answers of a teacher's last layer, without a graph; `weights` `[B, K]` are their scores, 0 of those too low."""

    weights: Tensor
    classes: Tensor
    index: Tensor

    def of(self, values: Tensor) -> Tensor:
        """What the last of several layers `[L, B, Q, ...]` says for these answers, `[B, K, ...]`."""
        return taken(at_least_float32(values[-1]).detach(), self.index)


def teacher_answers(teacher: Queries, least: float, limit: int) -> Answers:
    """The teacher's answers with a score of at least `least`, best first, at most `limit` (or 100)."""
    logits = at_least_float32(teacher.class_logits[-1]).detach()
    scores = logits.softmax(-1)[..., :-1].amax(-1) if teacher.softmax else logits.sigmoid().amax(-1)
    best, index = scores.topk(min(100, limit, scores.shape[1]), dim=1)
    return Answers(best.masked_fill(best < least, 0), taken(logits, index), index)


def class_distance(student: Tensor, teacher: Tensor, softmax: bool) -> Tensor:
    """Cross-entropy of the student's classes `[..., C]` with the teacher's, summed over classes; KL where they exclude."""
    if softmax:
        return divergence(student, teacher, dim=-1)
    return F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none").sum(-1)


def box_costs(student: Tensor, teacher: Tensor) -> Tensor:
    """What pairs of boxes `[B, Q, 4]` and `[B, K, 4]` cost in DETRDistill's assigner: L1 5, generalised IoU 2; `[B, Q, K]`."""
    giou = overlaps(xyxy(student)[:, :, None], xyxy(teacher)[:, None])[1]
    return 5 * torch.cdist(student, teacher, p=1) - 2 * giou


def mask_costs(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """What pairs of masks cost in Mask2Former's matching: cross-entropy 5, dice 5; `[B, Q, K]`.

    Args:
        student: logits `[B, Q, n]`.
        teacher: likewise, `[B, K, n]`.
        valid: which positions count, 0 or 1 `[B, 1, n]`.
    """
    target = teacher.sigmoid() * valid
    # BCE of every pair: softplus(z) summed, minus z times the target
    crossed = (F.softplus(student) * valid).sum(-1, keepdim=True) - student @ target.mT
    own = student.sigmoid() * valid
    dice = (2 * own @ target.mT + 1) / (own.sum(-1, keepdim=True) + target.sum(-1)[:, None] + 1)
    return 5 * crossed / valid.sum(-1, keepdim=True).clamp_min(1) - 5 * dice


def match_queries(student: Queries, layer: int, answers: Answers, places: Tensor, class_weight: float = 1.0) -> Tensor:
    """The student's query for each answer of the teacher: `[B, K]`, one to one; waits for the device.

    The cost is the cross-entropy of classes, times `class_weight`, and that of the places `[B, Q, K]`: `box_costs` or
    `mask_costs`.
    """
    from scipy.optimize import linear_sum_assignment  # `import hf_bcd.losses` needs only torch

    weights, classes, _ = answers
    with torch.no_grad():
        logits = at_least_float32(student.class_logits[layer])
        if student.softmax:
            scored = -torch.einsum("bqc,bkc->bqk", logits.log_softmax(-1), classes.softmax(-1))
        else:
            # BCE of every pair: softplus(z) summed, minus z times the target
            scored = F.softplus(logits).sum(-1, keepdim=True) - torch.einsum("bqc,bkc->bqk", logits, classes.sigmoid())
        cost = (class_weight * scored + places) * (weights > 0)[:, None]
        matches = torch.empty(weights.shape, dtype=torch.long)
        for image, one in enumerate(cost.cpu().numpy()):
            queries, columns = linear_sum_assignment(one)
            matches[image, torch.from_numpy(columns)] = torch.from_numpy(queries)
    return matches.to(weights.device)


def taken(values: Tensor, index: Tensor) -> Tensor:
    """Rows `[B, K, ...]` of `[B, Q, ...]`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def query_kd_losses(student: Queries, teacher: Queries, *, least_score: float = 0.05) -> dict[str, Tensor]:
    """Each decoder layer of a student answers as the teacher's last one does.

    The teacher's answers with a score of at least `least_score`, at most 100, are matched one to one to the student's queries
    of a layer, see `match_queries`. `classes` is `class_distance` of a pair, `boxes` the L1 distance of their relative
    coordinates, `giou` 1 minus their generalised IoU: each weighted by the teacher's score, divided by the sum of the scores
    over the batch, and summed over layers.

    Returns:
        Scalars in float32, >= 0.
    """
    assert student.boxes is not None and teacher.boxes is not None
    answers = teacher_answers(teacher, least_score, student.class_logits.shape[2])
    theirs, sums = answers.of(teacher.boxes), {"classes": [], "boxes": [], "giou": []}
    for layer in range(len(student.class_logits)):
        boxes = at_least_float32(student.boxes[layer])
        match = match_queries(student, layer, answers, box_costs(boxes.detach(), theirs))
        own = taken(boxes, match)
        distances = {
            "classes": paired_classes(student, layer, match, answers),
            "boxes": (own - theirs).abs().sum(-1),
            "giou": 1 - overlaps(xyxy(own), xyxy(theirs))[1],
        }
        for term, distance in distances.items():
            sums[term].append((answers.weights * distance).sum())
    return over_scores(sums, answers)


def mask_query_kd_losses(
    student: Queries, teacher: Queries, valid: Tensor, *, least_score: float = 0.05
) -> dict[str, Tensor]:
    """`query_kd_losses` of models that find masks: cross-entropy and dice of a pair's masks in the place of its boxes.

    Args:
        student: its queries, with `masks` `[L, B, Q, h, w]`.
        teacher: likewise, at any resolution.
        valid: which positions of the student's masks count, boolean `[B, h, w]`.
        least_score: score below which the teacher's answers do not count.

    Returns:
        `classes`; `masks`, the mean over positions of the cross-entropy with the teacher's probabilities; `dice`, 1 minus the
        dice coefficient. Scalars in float32, >= 0.
    """
    assert student.masks is not None and teacher.masks is not None
    answers = teacher_answers(teacher, least_score, student.class_logits.shape[2])
    size, counted = (student.masks.shape[-2], student.masks.shape[-1]), valid.flatten(1)[:, None].float()
    theirs = resize(answers.of(teacher.masks.flatten(3)).unflatten(2, teacher.masks.shape[-2:]), size).flatten(2)
    target, sums = theirs.sigmoid() * counted, {"classes": [], "masks": [], "dice": []}
    for layer in range(len(student.class_logits)):
        masks = at_least_float32(student.masks[layer]).flatten(2)
        with torch.no_grad():
            match = match_queries(student, layer, answers, mask_costs(masks, theirs, counted), class_weight=2.0)
        own = taken(masks, match)
        crossed = F.binary_cross_entropy_with_logits(own, target, reduction="none") * counted
        inside = own.sigmoid() * counted
        dice = (2 * (inside * target).sum(-1) + 1) / (inside.sum(-1) + target.sum(-1) + 1)
        distances = {
            "classes": paired_classes(student, layer, match, answers),
            "masks": crossed.sum(-1) / counted.sum(-1).clamp_min(1),
            "dice": 1 - dice,
        }
        for term, distance in distances.items():
            sums[term].append((answers.weights * distance).sum())
    return over_scores(sums, answers)


def paired_classes(student: Queries, layer: int, match: Tensor, answers: Answers) -> Tensor:
    """`class_distance` of the pairs of a layer, `[B, K]`."""
    logits = taken(at_least_float32(student.class_logits[layer]), match)
    return class_distance(logits, answers.classes, student.softmax)


def over_scores(sums: dict[str, list[Tensor]], answers: Answers) -> dict[str, Tensor]:
    """Terms of all layers, divided by the teacher's scores in the whole batch."""
    total = mean_over_ranks(answers.weights.sum())
    return {term: torch.stack(values).sum() / total for term, values in sums.items()}


class QueryKDLoss(DistillationLoss):
    """`query_kd_losses`, between any two models of the DETR kind whose classes exclude each other alike.

    Args:
        least_score: score below which the teacher's answers do not count.
        on: `boxes`, or `masks` of models such as Mask2Former, see `mask_query_kd_losses`, with its weights: 2, 5 and 5.
    """

    weights = {"classes": 1.0, "boxes": 5.0, "giou": 2.0}
    needs = frozenset({"queries", "classes"})
    transfers = "answers of the teacher's object queries"
    checked = (
        "DETRDistill's matching cost and weights (official code), of masks Mask2Former's; every layer against the teacher's last "
        "is ours"
    )
    reference = "chang2023detrdistill"

    def __init__(self, pair: Pair, *, least_score: float = 0.05, on: Literal["boxes", "masks"] = "boxes") -> None:
        super().__init__(pair)
        check_positive(least_score=least_score)
        if on not in ("boxes", "masks"):
            raise UserError(f"on is {on!r}; choose boxes or masks.")
        self.least_score, self.on = least_score, on
        if on == "masks":
            self.weights = {"classes": 2.0, "masks": 5.0, "dice": 5.0}
            self.needs = frozenset({"mask_queries", "classes"})

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = student.queries, teacher.queries
        assert ours is not None and theirs is not None  # `needs` saw to it
        if self.on == "boxes":
            return query_kd_losses(ours, theirs, least_score=self.least_score)
        assert ours.masks is not None
        valid = targets.valid((ours.masks.shape[-2], ours.masks.shape[-1]))
        return mask_query_kd_losses(ours, theirs, valid, least_score=self.least_score)
