"""SlimSeg: distillation with supervision near borders (Xue et al., ACM MM 2022, https://arxiv.org/abs/2207.06242)."""

from torch import Tensor

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair, check_positive
from .kd import kd_loss
from .ops.borders import check_width, class_borders
from .ops.functional import at_least_float32, full_precision, resize, spatial_size, weighted_means


@full_precision
def slimseg_loss(logits: Tensor, classes: Tensor, *, mask: Tensor, width: int = 7) -> Tensor:
    """Boundary-guided supervision: mean over images and border pixels of the cross-entropy with the ground truth.

    Args:
        logits: class scores `[B, K, h, w]` at any stride; up-sampled to the classes.
        classes: where each class is, `[B, K, H, W]`, boolean or in 0..1; a pixel counts by its classes together.
        mask: `[B, H, W]`, True where valid.
        width: side in pixels of the window that must hold two classes for its centre to count, odd.

    Returns:
        Scalar >= 0 in nat, float32 or float64; an image without a border counts 0.
    """
    log_p = resize(at_least_float32(logits), spatial_size(mask)).log_softmax(dim=1)
    weight = class_borders(classes, mask, width=width).to(log_p.dtype)[:, None] * classes
    return weighted_means(-log_p, weight).mean()


class SlimSegLoss(DistillationLoss):
    """Pixel-wise distillation and a second, border-only task loss.

    Defined here as `kd_loss` and `slimseg_loss`, because the paper trains the widths of one slimmable network, each with
    the next wider one as its teacher, and a boundary-guided loss on the ground truth; with a teacher and a student of
    their own this is what remains. No official code exists: weights and width are our choice (the width is BPKD's).

    Args:
        temperature: T of the distillation.
        width: side in pixels of the window around a border.
    """

    weights = {"kd": 1.0, "boundary": 1.0}
    borrowed = frozenset({"kd"})
    needs = frozenset({"logits", "labels"})
    transfers = "class scores of each pixel; the ground truth once more near borders"
    checked = "no official code; our reading as a teacher-student method, weights and width are ours"
    reference = "xue2022slimseg"

    def __init__(self, pair: Pair, *, temperature: float = 1.0, width: int = 7) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature)
        check_width(width)
        self.temperature, self.width = temperature, width

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        valid = targets.valid(spatial_size(teacher.logits))
        classes, mask = targets.class_masks(targets.size), targets.valid(targets.size)
        return {
            "kd": kd_loss(student.logits, teacher.logits, temperature=self.temperature, mask=valid),
            "boundary": slimseg_loss(student.logits, classes, mask=mask, width=self.width),
        }
