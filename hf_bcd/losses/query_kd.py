"""Distillation of object queries, after DETRDistill (Chang et al., ICCV 2023, https://arxiv.org/abs/2211.10156)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..outputs import DenseOutput, Queries, Targets
from .base import DistillationLoss, Pair, check_positive
from .ops.boxes import mean_over_ranks, overlaps, xyxy
from .ops.functional import at_least_float32, divergence


class Answers(NamedTuple):
    """The best answers of a teacher's last layer, without a graph; `weights` `[B, K]` are their scores, 0 of those too low."""

    weights: Tensor
    classes: Tensor
    boxes: Tensor
    index: Tensor


def teacher_answers(teacher: Queries, least: float, limit: int) -> Answers:
    """The teacher's answers with a score of at least `least`, best first, at most `limit` (or 100)."""
    logits = at_least_float32(teacher.class_logits[-1])
    scores = logits.softmax(-1)[..., :-1].amax(-1) if teacher.softmax else logits.sigmoid().amax(-1)
    best, index = scores.topk(min(100, limit, scores.shape[1]), dim=1)
    classes, boxes = (taken(at_least_float32(x[-1]).detach(), index) for x in (teacher.class_logits, teacher.boxes))
    return Answers(best.detach().masked_fill(best < least, 0), classes, boxes, index)


def class_distance(student: Tensor, teacher: Tensor, softmax: bool) -> Tensor:
    """Cross-entropy of the student's classes `[..., C]` with the teacher's, summed over classes; KL where they exclude."""
    if softmax:
        return divergence(student, teacher, dim=-1)
    return F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none").sum(-1)


def match_queries(student: Queries, layer: int, answers: Answers) -> Tensor:
    """The student's query for each answer of the teacher: `[B, K]`, one to one; waits for the device.

    The cost is that of DETRDistill's assigner: cross-entropy 1, L1 5, generalised IoU 2.
    """
    from scipy.optimize import linear_sum_assignment  # `import hf_bcd.losses` needs only torch

    weights, classes, boxes, _ = answers
    with torch.no_grad():
        logits, own = at_least_float32(student.class_logits[layer]), at_least_float32(student.boxes[layer])
        if student.softmax:
            scored = -torch.einsum("bqc,bkc->bqk", logits.log_softmax(-1), classes.softmax(-1))
        else:
            # BCE of every pair: softplus(z) summed, minus z times the target
            scored = F.softplus(logits).sum(-1, keepdim=True) - torch.einsum("bqc,bkc->bqk", logits, classes.sigmoid())
        giou = overlaps(xyxy(own)[:, :, None], xyxy(boxes)[:, None])[1]
        cost = (scored + 5 * torch.cdist(own, boxes, p=1) - 2 * giou) * (weights > 0)[:, None]
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
    answers = teacher_answers(teacher, least_score, student.class_logits.shape[2])
    weights, classes, boxes, _ = answers
    total, sums = mean_over_ranks(weights.sum()), {"classes": [], "boxes": [], "giou": []}
    for layer in range(len(student.class_logits)):
        match = match_queries(student, layer, answers)
        logits, own = (taken(at_least_float32(x[layer]), match) for x in (student.class_logits, student.boxes))
        distances = {
            "classes": class_distance(logits, classes, student.softmax),
            "boxes": (own - boxes).abs().sum(-1),
            "giou": 1 - overlaps(xyxy(own), xyxy(boxes))[1],
        }
        for term, distance in distances.items():
            sums[term].append((weights * distance).sum() / total)
    return {term: torch.stack(values).sum() for term, values in sums.items()}


class QueryKDLoss(DistillationLoss):
    """`query_kd_losses`, between any two models of the DETR kind whose classes exclude each other alike.

    Args:
        least_score: score below which the teacher's answers do not count.
    """

    weights = {"classes": 1.0, "boxes": 5.0, "giou": 2.0}
    needs = frozenset({"queries", "classes"})
    transfers = "answers of the teacher's object queries"
    checked = "DETRDistill's matching cost and weights (official code); every layer against the teacher's last is ours"
    reference = "chang2023detrdistill"

    def __init__(self, pair: Pair, *, least_score: float = 0.05) -> None:
        super().__init__(pair)
        check_positive(least_score=least_score)
        self.least_score = least_score

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        assert student.queries is not None and teacher.queries is not None  # `needs` saw to it
        return query_kd_losses(student.queries, teacher.queries, least_score=self.least_score)
