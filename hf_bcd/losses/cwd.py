"""Channel-wise distillation (Shu et al., ICCV 2021, https://arxiv.org/abs/2011.13256)."""

from typing import Literal, get_args

from torch import Tensor

from ..outputs import DenseOutput, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Pair, check_positive
from .modules.connectors import FeaturePair
from .ops.functional import divergence, full_precision, on_teacher_grid, spatial_size


Source = Literal["logits", "features"]


@full_precision
def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, mask: Tensor | None = None) -> Tensor:
    """Channel-wise distillation: every channel, read as a distribution over positions, follows the teacher's.

    `temperature² · mean over images and channels of KL(softmax(t_c / T) ‖ softmax(s_c / T))`, the softmax over the valid
    positions of an image.

    Args:
        student: scores or features `[B, C, h, w]`; `teacher` and `mask` are as in `on_teacher_grid`.
        temperature: T, > 0.

    Returns:
        Scalar >= 0 in nat, 0 for channels that differ by a constant; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    student, teacher, mask = student.flatten(2), teacher.flatten(2), mask.flatten(1)[:, None]
    return temperature**2 * divergence(student, teacher, dim=2, tau=temperature, mask=mask).mean()


class CWDLoss(DistillationLoss):
    """`cwd_loss` between the logits, or one feature level, of two models.

    Args:
        on: `logits`, or `features` behind a trained 1x1 convolution on the student's.
        temperature: T; 4 as in the official code, whose weight is 3 for logits and, in CIRKD's scripts, 50 for features.
        level: level of `features`; the coarsest that both models have by default.
    """

    weights = {"cwd": 3.0}
    needs = frozenset({"logits"})
    transfers = "where each channel is active"
    checked = (
        "official code (TorchDistiller): same reduction, weight (50 on features) and temperature; void pixels left out"
    )
    reference = "shu2021channel"

    def __init__(
        self, pair: Pair, *, on: Source = "logits", temperature: float = 4.0, level: str | None = None
    ) -> None:
        super().__init__(pair)
        if on not in get_args(Source):
            raise UserError(f"on is {on!r}; choose one of {', '.join(get_args(Source))}.")
        if on == "logits" and level is not None:
            raise UserError(f"level is {level!r}, but logits have none; leave it out, or give on: features.")
        check_positive(temperature=temperature)
        self.temperature, self.needs = temperature, frozenset({on})
        if on == "features":
            self.weights = {"cwd": 50.0}
        self.pair = FeaturePair(pair, level, bias=False) if on == "features" else None

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = student.logits, teacher.logits
        if self.pair is not None:
            ours, theirs = self.pair(student.features, teacher.features)
        mask = targets.valid(spatial_size(theirs))
        return {"cwd": cwd_loss(ours, theirs, temperature=self.temperature, mask=mask)}
