"""Distillation of object queries, after DETRDistill (https://arxiv.org/abs/2211.10156) and KD-DETR; and D-FINE's corners."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..outputs import DenseOutput, Queries, Targets
from .base import DistillationLoss, Pair, check_positive
from .ops.boxes import mean_over_ranks, overlaps, xyxy
from .ops.functional import at_least_float32, divergence


def teacher_answers(teacher: Queries, least: float, limit: int = 100) -> tuple[Tensor, Tensor]:
    """The teacher's last answers, best first: weights `[B, K]`, 0 below `least`, and indices of their queries `[B, K]`."""
    logits = at_least_float32(teacher.class_logits[-1])
    scores = logits.softmax(-1)[..., :-1].amax(-1) if teacher.softmax else logits.sigmoid().amax(-1)
    best, index = scores.topk(min(limit, scores.shape[1]), dim=1)
    return best.masked_fill(best < least, 0), index


def class_distance(student: Tensor, teacher: Tensor, softmax: bool) -> Tensor:
    """Cross-entropy of the student's classes `[..., C]` with the teacher's, summed over classes; KL where they exclude."""
    if softmax:
        return divergence(student, teacher, dim=-1)
    return F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none").sum(-1)


def match_queries(student: Queries, layer: int, classes: Tensor, boxes: Tensor, weights: Tensor) -> Tensor:
    """The student's query for each answer of the teacher: `[B, K]`, one to one; waits for the device.

    The cost is that of DETRDistill's assigner: cross-entropy 1, L1 5, generalised IoU 2.
    """
    from scipy.optimize import linear_sum_assignment  # as these models' own losses do; not everybody needs it

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
            queries, answers = linear_sum_assignment(one)
            matches[image, torch.from_numpy(answers)] = torch.from_numpy(queries)
    return matches.to(weights.device)


def taken(values: Tensor, index: Tensor) -> Tensor:
    """Rows `[B, K, ...]` of `[B, Q, ...]`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class QueryKDLoss(DistillationLoss):
    """Each decoder layer of the student answers as the teacher's last one does.

    The teacher's answers with a score of at least `least_score`, at most 100, are matched one to one to the student's
    queries; class, L1 and generalised IoU of a pair are weighted by the teacher's score, as a mean over all of them.

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
        ours, theirs = student.queries, teacher.queries
        assert ours is not None and theirs is not None  # `needs` saw to it
        limit = ours.class_logits.shape[2]
        weights, index = teacher_answers(theirs, self.least_score, min(100, limit))
        classes = taken(at_least_float32(theirs.class_logits[-1]).detach(), index)
        boxes = taken(at_least_float32(theirs.boxes[-1]).detach(), index)
        total = mean_over_ranks(weights.sum())
        sums = {"classes": [], "boxes": [], "giou": []}
        for layer in range(len(ours.class_logits)):
            match = match_queries(ours, layer, classes, boxes, weights)
            logits, own = (taken(at_least_float32(x[layer]), match) for x in (ours.class_logits, ours.boxes))
            distances = {
                "classes": class_distance(logits, classes, ours.softmax),
                "boxes": (own - boxes).abs().sum(-1),
                "giou": 1 - overlaps(xyxy(own), xyxy(boxes))[1],
            }
            for term, distance in distances.items():
                sums[term].append((weights * distance).sum() / total)
        return {term: torch.stack(values).sum() for term, values in sums.items()}


class DDFLoss(DistillationLoss):
    """D-FINE's decoupled distillation focal loss between two models: distributions over the distances to a box's sides.

    Pairs are those of `query_kd`. `tau² · KL` of a side's bins is weighted by the overlap of the student's box with the
    teacher's; bins must mean the same in both, so D-FINE-X teaches D-FINE-X only.

    Args:
        temperature: of the bins.
        least_score: as in `query_kd`.
    """

    weights = {"ddf": 1.5}
    needs = frozenset({"corners", "queries", "classes"})
    transfers = "distributions over the distances to a box's sides"
    checked = (
        "official code's formula (D-FINE distils its own last layer so); the teacher's queries in its place are ours"
    )
    reference = "peng2025dfine"

    def __init__(self, pair: Pair, *, temperature: float = 5.0, least_score: float = 0.05) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature, least_score=least_score)
        self.temperature, self.least_score = temperature, least_score

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = student.queries, teacher.queries
        assert ours is not None and theirs is not None and ours.corners is not None and theirs.corners is not None
        weights, index = teacher_answers(theirs, self.least_score, min(100, ours.class_logits.shape[2]))
        classes = taken(at_least_float32(theirs.class_logits[-1]).detach(), index)
        boxes = taken(at_least_float32(theirs.boxes[-1]).detach(), index)
        bins = taken(at_least_float32(theirs.corners[-1]).detach(), index).unflatten(-1, (4, -1))
        sums = []
        for layer in range(len(ours.corners)):
            match = match_queries(ours, layer, classes, boxes, weights)
            own, corners = (taken(at_least_float32(x[layer]), match) for x in (ours.boxes, ours.corners))
            kl = self.temperature**2 * divergence(corners.unflatten(-1, (4, -1)), bins, dim=-1, tau=self.temperature)
            near = overlaps(xyxy(own.detach()), xyxy(boxes))[0].clamp_min(0) * (weights > 0)
            sums.append((near * kl.mean(-1)).sum() / mean_over_ranks((weights > 0).sum().float()))
        return {"ddf": torch.stack(sums).sum()}
