"""Feature hints (Romero et al., ICLR 2015, https://arxiv.org/abs/1412.6550)."""

from torch import Tensor

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair
from .modules.connectors import FeaturePair
from .ops.functional import full_precision, mean_squared_error, on_teacher_grid, spatial_size


@full_precision
def fitnet_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The student's features follow the teacher's.

    `mean over images, valid positions and channels of (s - t)²`.

    Args:
        student: features `[B, C, h, w]`, projected to the teacher's channels; the rest is as in `on_teacher_grid`.

    Returns:
        Scalar >= 0, 0 for equal features; float32 or float64.
    """
    return mean_squared_error(*on_teacher_grid(student, teacher, mask))


class FitNetLoss(DistillationLoss):
    """`fitnet_loss` on one feature level, behind a trained 1x1 convolution on the student's.

    The mean over channels is that of CIRKD's comparison for segmentation, whose weight is 10, on the features of a head.
    Those of a backbone are larger, and the gradient grows with their square: here 1. The paper itself has half the sum
    over channels, without a weight: it first trains only on the hint.

    Args:
        level: level name; the coarsest that both models have by default.
    """

    weights = {"fitnet": 1.0}
    needs = frozenset({"features"})
    transfers = "features of each position"
    checked = "CIRKD's official code: same reduction, weight 1 for its 10; official FitNets sum over channels; void pixels left out"
    reference = "romero2015fitnets"

    def __init__(self, pair: Pair, *, level: str | None = None) -> None:
        super().__init__(pair)
        self.pair = FeaturePair(pair, level)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = self.pair(student.features, teacher.features)
        return {"fitnet": fitnet_loss(ours, theirs, mask=targets.valid(spatial_size(theirs)))}
