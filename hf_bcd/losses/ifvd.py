"""Intra-class feature variation distillation (Wang et al., ECCV 2020, https://arxiv.org/abs/2001.03349)."""

from torch import Tensor

from ..outputs import DenseOutput, Targets
from .base import Pair
from .kd import kd_loss
from .modules.adversarial import AdversarialLoss
from .ops.functional import class_similarity, full_precision, on_teacher_grid, spatial_size, weighted_means


@full_precision
def ifvd_loss(student: Tensor, teacher: Tensor, classes: Tensor) -> Tensor:
    """Intra-class feature variation distillation: positions resemble their class as they do in the teacher.

    `mean over images and labelled positions of (M_s - M_t)²`, `M(p) = cos(f(p), mean of f over the class of p)`; a
    position of several classes counts for each.

    Args:
        student: features `[B, C, h, w]`, resized to the teacher's grid.
        teacher: features `[B, C', h', w']`; they receive no gradient.
        classes: where each class is, `[B, K, h', w']`, boolean or in 0..1, 0 where void.

    Returns:
        Scalar in [0, 4], 0 for features that differ by a rotation; float32 or float64.

    Raises:
        ValueError: if batch or grid of the classes differ from the teacher's.
    """
    if classes.shape[0] != teacher.shape[0] or spatial_size(classes) != spatial_size(teacher):
        raise ValueError(f"classes are {tuple(classes.shape)} for a teacher of {tuple(teacher.shape)}.")
    student, teacher, _ = on_teacher_grid(student, teacher, None, same_channels=False)
    error = (class_similarity(student, classes) - class_similarity(teacher, classes)).square()
    return weighted_means(error, classes.to(error.dtype)).mean()


class IFVDLoss(AdversarialLoss):
    """The three terms of the official code: `ifvd_loss` (variation), `kd_loss` and an `Adversary`.

    Weights: 10 and 0.001 as there, and for the variation 50, which the paper is quoted with; the code has 200, on the
    features behind the pyramid pooling, which models of other families lack. On a backbone's level 200 outweighs the
    task some 40 times (MobileNetV2 on CamVid). The official KL divergence is a mean over classes too, so `kd` is
    `kd_loss` over their number.

    Args:
        level: level of the features; the coarsest that both models have by default.
        discriminator_channels: width of the discriminator; 64 in the official code, 0 leaves the adversarial term out.
    """

    weights = {"variation": 50.0, "kd": 10.0, "adversarial": 0.001}
    borrowed = frozenset({"kd", "adversarial"})
    needs = frozenset({"logits", "features", "labels"})
    transfers = "how features vary within each class, class scores, and the look of a whole score map"
    checked = (
        "official code: same terms, reductions and discriminator layers, weights but for the variation, 50 for its 200; a "
        "position has the class of the pixel at its centre (there: at its upper left), lengths below 1e-4 count as 1e-4; void "
        "pixels left out"
    )
    reference = "wang2020intra"

    def __init__(self, pair: Pair, *, level: str | None = None, discriminator_channels: int = 64) -> None:
        super().__init__(pair, discriminator_channels)
        self.level, self.num_labels = pair.level(level), pair.num_labels

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = student.features[self.level], teacher.features[self.level]
        mask = targets.valid(spatial_size(teacher.logits))
        return {
            "variation": ifvd_loss(ours, theirs, targets.class_masks(spatial_size(theirs))),
            "kd": kd_loss(student.logits, teacher.logits, mask=mask) / self.num_labels,
        } | self.adversarial_term(student.logits, teacher.logits, mask)
