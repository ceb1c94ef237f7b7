"""Cross-head distillation (Wang et al., CVPR 2024, https://arxiv.org/abs/2306.11369)."""

import torch
from torch import Tensor, nn

from ..outputs import DenseOutput, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Pair
from .modules.connectors import FeaturePair
from .ops.functional import divergence, full_precision, image_means, match_moments, on_teacher_grid, spatial_size


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

    Args:
        beta: exponent of the weight; 1 as in the official code, 0 for KL only.
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

    def __init__(self, pair: Pair, *, beta: float = 1.0) -> None:
        super().__init__(pair)
        if not (beta == 0 or beta >= 1):
            raise UserError(f"beta is {beta!r}; it must be 0 or >= 1, or the gradient is infinite at agreement.")
        self.beta = beta
        self.pairs = nn.ModuleList(FeaturePair(pair, level, bias=False) for level in pair.head_levels)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        if teacher.head is None:
            raise ValueError("crosskd needs teacher.head, the teacher's head as a function of its levels.")
        crossed = {}
        for pair in self.pairs:
            ours, theirs = pair(student.features, teacher.features)
            valid = targets.valid(spatial_size(theirs))[:, None]
            crossed[pair.level] = torch.where(valid, match_moments(ours, theirs, valid), theirs)
        mask = targets.valid(spatial_size(teacher.logits))
        return {"crosskd": crosskd_loss(teacher.head(crossed), teacher.logits, beta=self.beta, mask=mask)}
