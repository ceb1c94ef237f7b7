"""Feature distillation via channel-wise transformation (Liu et al., ICCVW 2023, https://arxiv.org/abs/2303.13212)."""

from collections.abc import Callable

from torch import Tensor, nn

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair
from .ops.functional import at_least_float32, full_precision, mean_squared_error, on_teacher_grid, spatial_size


@full_precision
def cwt_loss(
    student: Tensor, teacher: Tensor, transform: Callable[[Tensor], Tensor], *, mask: Tensor | None = None
) -> Tensor:
    """A transformation of the student's channels follows the teacher's features.

    `mean over images and valid positions of ‖MLP(s) - t‖²`, the norm over channels.

    Args:
        student: features `[B, C, h, w]`.
        teacher: features `[B, C', h', w']`, to whose grid the transformed ones are resized; they receive no gradient.
        transform: the MLP, from `[B, C, h, w]` to `[B, C', h, w]`; it mixes channels, not positions.
        mask: `[B, h', w']`, True where valid.

    Returns:
        Scalar >= 0; float32 or float64.
    """
    student = transform(at_least_float32(student))
    return teacher.shape[1] * mean_squared_error(*on_teacher_grid(student, teacher, mask))


class CWTLoss(DistillationLoss):
    """`cwt_loss` on one feature level.

    Defined here from the paper's text, because its code is not public: one hidden layer as wide as the teacher's
    features, and a weight with which the gradient of MobileNetV2 on CamVid is some five times that of the task at the
    start, as that of pixel-wise distillation is at SKD's weight.

    Args:
        level: level name; the coarsest that both models have by default.
    """

    weights = {"cwt": 0.01}
    needs = frozenset({"features"})
    transfers = "features of each position"
    checked = "the paper's formula, as no code is public; width of the hidden layer and the weight are our reading"
    reference = "liu2023simple"

    def __init__(self, pair: Pair, *, level: str | None = None) -> None:
        super().__init__(pair)
        self.level = pair.level(level)
        ours, theirs = pair.channels(self.level)
        self.transform = nn.Sequential(nn.Conv2d(ours, theirs, 1), nn.ReLU(), nn.Conv2d(theirs, theirs, 1))

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = student.features[self.level], teacher.features[self.level]
        return {"cwt": cwt_loss(ours, theirs, self.transform, mask=targets.valid(spatial_size(theirs)))}
