"""D-FINE's decoupled distillation focal loss (Peng et al., ICLR 2025, https://arxiv.org/abs/2410.13842), between models."""

import torch
from torch import Tensor

from ..outputs import DenseOutput, Queries, Targets
from .base import DistillationLoss, Pair, check_positive
from .ops.boxes import mean_over_ranks, overlaps, xyxy
from .ops.functional import at_least_float32, divergence
from .query_kd import box_costs, match_queries, taken, teacher_answers


def ddf_loss(student: Queries, teacher: Queries, *, tau: float = 5.0, least_score: float = 0.05) -> Tensor:
    """Distributions over the distances to a box's sides, of the pairs that `match_queries` makes in each layer.

    `mean over pairs of IoU · mean over sides of tau² · KL(softmax(t / tau) ‖ softmax(s / tau))`, summed over layers, with the
    overlap of the student's box and the teacher's.

    Args:
        student: its queries with `corners`.
        teacher: likewise, of which the last layer counts; it receives no gradient.
        tau: temperature.
        least_score: score below which the teacher's answers do not count.

    Returns:
        Scalar >= 0, float32.
    """
    assert student.corners is not None and teacher.corners is not None
    assert student.boxes is not None and teacher.boxes is not None
    answers = teacher_answers(teacher, least_score, student.class_logits.shape[2])
    bins, boxes = answers.of(teacher.corners).unflatten(-1, (4, -1)), answers.of(teacher.boxes)
    real, losses = (answers.weights > 0).float(), []
    count = mean_over_ranks(real.sum())
    for layer in range(len(student.corners)):
        match = match_queries(
            student, layer, answers, box_costs(at_least_float32(student.boxes[layer]).detach(), boxes)
        )
        own, corners = (taken(at_least_float32(x[layer]), match) for x in (student.boxes, student.corners))
        kl = tau**2 * divergence(corners.unflatten(-1, (4, -1)), bins, dim=-1, tau=tau).mean(-1)
        near = overlaps(xyxy(own.detach()), xyxy(boxes))[0] * real
        losses.append((near * kl).sum() / count)
    return torch.stack(losses).sum()


class DDFLoss(DistillationLoss):
    """`ddf_loss` between two D-FINE or DEIMv2 models whose bins mean the same: D-FINE-X teaches D-FINE-X only.

    Args:
        temperature: of the bins.
        least_score: as in `query_kd`.
    """

    weights = {"ddf": 1.5}
    needs = frozenset({"corners", "queries", "classes"})
    transfers = "distributions over the distances to a box's sides"
    checked = (
        "official code: temperature, weight and the overlap as weight (a D-FINE distils its own last layer so); matched pairs of "
        "two models only, and a mean over them instead of square roots of counts, are ours"
    )
    reference = "peng2025dfine"

    def __init__(self, pair: Pair, *, temperature: float = 5.0, least_score: float = 0.05) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature, least_score=least_score)
        self.temperature, self.least_score = temperature, least_score

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        assert student.queries is not None and teacher.queries is not None  # `needs` saw to it
        options = {"tau": self.temperature, "least_score": self.least_score}
        return {"ddf": ddf_loss(student.queries, teacher.queries, **options)}
