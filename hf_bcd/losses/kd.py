"""Knowledge distillation of the class scores of every pixel (Hinton et al., https://arxiv.org/abs/1503.02531)."""

from torch import Tensor

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair, check_positive
from .ops.functional import divergence, full_precision, image_means, on_teacher_grid, spatial_size


@full_precision
def kd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Pixel-wise knowledge distillation.

    `temperature² · mean over images and valid pixels of KL(softmax(z_teacher / T) ‖ softmax(z_student / T))` over
    classes.

    Args:
        student: class scores `[B, K, h, w]`; `teacher` and `mask` are as in `on_teacher_grid`.
        temperature: T, > 0.

    Returns:
        Scalar >= 0 in nat, 0 for equal scores; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    return temperature**2 * image_means(divergence(student, teacher, dim=1, tau=temperature), mask).mean()


class KDLoss(DistillationLoss):
    """`kd_loss` between the logits of two models.

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
        mask = targets.valid(spatial_size(teacher.logits))
        return {"kd": kd_loss(student.logits, teacher.logits, temperature=self.temperature, mask=mask)}
