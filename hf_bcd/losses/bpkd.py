"""BPKD: body and edges distilled apart (Liu et al., WACV 2024, https://arxiv.org/abs/2306.08075)."""

from torch import Tensor

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair, check_positive
from .cwd import cwd_loss
from .ops.borders import check_width, class_border_shares
from .ops.functional import divergence, full_precision, on_teacher_grid, spatial_size


@full_precision
def bpkd_loss(
    student: Tensor, teacher: Tensor, edges: Tensor, *, temperature: float = 4.0, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Boundary privileged knowledge distillation.

    `M[c, i]` is the fraction of position i that lies on the border of class c, `Z` are class scores, `n_c` counts the
    positions with `M[c, i] > 0`:

    - `body`: `cwd_loss` of `Z · (1 - M)`: every class as a distribution over positions, mean over classes and images.
    - `edge`: `T² · mean over images of sum_c 1 / n_c · sum_i M[c, i] · KL(softmax(Z_teacher[:, i] · M[:, i] / T) ‖
      softmax(Z_student[:, i] · M[:, i] / T))` over classes.

    Args:
        student: class scores `[B, K, h, w]`; `teacher` and `mask` are as in `on_teacher_grid`.
        edges: M, `[B, K, h', w']` in [0, 1], see `class_border_shares`.
        temperature: T, > 0.

    Returns:
        The two terms, scalars >= 0 in nat, 0 for equal scores; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    edge = edges.to(student.dtype).masked_fill(~mask[:, None], 0)
    body = cwd_loss(student * (1 - edge), teacher * (1 - edge), temperature=temperature, mask=mask)
    divergences = temperature**2 * divergence(student * edge, teacher * edge, dim=1, tau=temperature)
    of_classes = (divergences[:, None] * edge).sum(dim=(2, 3)) / (edge > 0).sum(dim=(2, 3)).clamp_min(1)
    return {"body": body, "edge": of_classes.sum(dim=1).mean()}


class BPKDLoss(DistillationLoss):
    """`bpkd_loss` between the logits of two models.

    No training code was released; this is the paper's formula as third-party implementations read it. The paper's weights,
    20 and 50 times a factor alpha = 2 of every class, must belong to another reduction: with this one they outweigh the
    task 700 times (MobileNetV2 on CamVid) and ruin the student. The body is channel-wise distillation and has its weight,
    3; an edge counts 0.5 for each class.

    Args:
        temperature: T.
        width: side in pixels of the window that dilates and erodes the classes.
    """

    weights = {"body": 3.0, "edge": 0.5}
    needs = frozenset({"logits", "labels"})
    transfers = "where each class is active inside objects, class scores along their borders"
    checked = (
        "no official training code; formula compared with two third-party implementations, which differ in n_c: we count "
        "positions; weights are ours, as the paper's 20 and 100 belong to a reduction that is not public; void has no border"
    )
    reference = "liu2024bpkd"

    def __init__(self, pair: Pair, *, temperature: float = 4.0, width: int = 7) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature)
        check_width(width)
        self.temperature, self.width = temperature, width

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        size = spatial_size(teacher.logits)
        classes, mask = targets.class_masks(targets.size), targets.valid(targets.size)
        edges = class_border_shares(classes, mask, size, width=self.width)
        options = {"temperature": self.temperature, "mask": targets.valid(size)}
        return bpkd_loss(student.logits, teacher.logits, edges, **options)
