"""Knowledge distillation of the class scores of every pixel (Hinton et al., https://arxiv.org/abs/1503.02531)."""

from torch import Tensor

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair, check_positive
from .ops.functional import divergence, full_precision, on_teacher_grid, spatial_size, weighted_means


@full_precision
def kd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Pixel-wise knowledge distillation.

    `temperature² · mean over images and, weighted by `mask`, over pixels of KL(softmax(z_teacher / T) ‖ softmax(z_student / T))` over
    classes.

    Args:
        student: class scores `[B, K, h, w]`; `teacher` is as in `on_teacher_grid`.
        mask: weights `[B, h', w']` >= 0 of the teacher's grid, or booleans; None for all alike.
        temperature: T, > 0.

    Returns:
        Scalar >= 0 in nat, 0 for equal scores; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    pixels = divergence(student, teacher, dim=1, tau=temperature)
    return temperature**2 * weighted_means(pixels, mask.to(pixels.dtype)).mean()


class KDLoss(DistillationLoss):
    """`kd_loss` between the logits of two models; pixels weigh as in the task loss (`class_weights`).

    Args:
        temperature: T; 1 as in CIRKD's comparison, whose reduction and weight are these as well.
    """

    weights = {"kd": 1.0}
    needs = frozenset({"logits"})
    transfers = "class scores of each pixel"
    checked = "the pixel-wise term of CIRKD's official code, same reduction, void pixels left out"
    reference = "hinton2015distilling"

    def __init__(self, pair: Pair, *, temperature: float = 1.0) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        mask = targets.weights(spatial_size(teacher.logits))
        return {"kd": kd_loss(student.logits, teacher.logits, temperature=self.temperature, mask=mask)}
