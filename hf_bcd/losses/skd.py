"""Structured knowledge distillation (Liu et al., TPAMI 2023, https://arxiv.org/abs/1903.04197)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..outputs import DenseOutput, Targets
from .base import Pair, check_positive
from .modules.adversarial import AdversarialLoss
from .ops.functional import full_precision, image_means, mask_fill_value, on_teacher_grid, spatial_size, unit_vectors


@full_precision
def skd_loss(student: Tensor, teacher: Tensor, *, nodes: int = 2, mask: Tensor | None = None) -> Tensor:
    """Pair-wise structured distillation: regions resemble each other as in the teacher.

    Maps are max-pooled over windows of a side's `nodes`-th part, rounded down as in the official code, so that an odd side
    of two nodes has a third, one position wide. `a_ij` is the cosine of the pooled features of windows i and j, and
    the loss is the mean over images and pairs (i, j) of `(a_ij(student) - a_ij(teacher))²`.

    Args:
        student: features `[B, C, h, w]`; `teacher`, with any channels, and `mask` are as in `on_teacher_grid`.
        nodes: whole windows along each axis, > 0, or as many as positions; a window without a valid position does not count.

    Returns:
        Scalar in [0, 4], 0 for features that differ by a rotation; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask, same_channels=False)
    window = [max(1, length // nodes) for length in spatial_size(teacher)]

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, window, ceil_mode=True).flatten(2)

    def cosines(x: Tensor) -> Tensor:
        pooled = pool(x.masked_fill(~mask[:, None], mask_fill_value(x.dtype)))
        unit = unit_vectors(pooled.masked_fill(~node[:, None], 0), dim=1)
        return unit.mT @ unit

    node = pool(mask[:, None].to(teacher.dtype))[:, 0] > 0
    error = (cosines(student) - cosines(teacher)).square()
    return image_means(error, node[:, :, None] & node[:, None, :]).mean()


class SKDLoss(AdversarialLoss):
    """The three terms of structured distillation: `kd_loss` (pixel), `skd_loss` (pair) and an `Adversary` (holistic).

    Weights 10 and 0.5 as in the official training script. Its pixel term is a sum over the images of a batch, and
    reshapes the scores so that classes and positions mix; this one is the paper's, a mean. Its pair term takes the
    features behind the pyramid pooling, which models of other families lack; this one a backbone's level. The norms in
    its cosines receive no gradient, here they do.

    The holistic weight is 0.001, that of IFVD's and CIRKD's code, whose discriminators learn by Adam as this one does.
    The official 0.1 belongs to one that hardly learns, by SGD at rate 4e-4 with a loss that counts a tenth; against
    this one it drowns the task.

    Args:
        level: level of the pair-wise term; the coarsest that both models have by default.
        nodes: its pooling windows along each axis; the official pool_scale of 0.5 makes 2.
        discriminator_channels: width of the discriminator; 64 in the official code, 0 leaves the holistic term out.
        on: `pixels`, or `boxes`: the pixel term of a dense detector's priors, see `box_response_loss`, and no holistic term; or `features` of
            models with neither, which leaves the pair-wise term.
    """

    weights = {"pixel": 10.0, "pair": 0.5, "holistic": 0.001}
    needs = frozenset({"logits", "features"})
    transfers = "class scores of each pixel, similarity of regions, and the look of a whole score map"
    adversarial = "holistic"
    checked = (
        "official code: same pair term, its windows included (but lengths below 1e-4 count as 1e-4), and discriminator layers; pixel term as in the paper; Adam and, with it, the "
        "holistic weight as in IFVD's code; void pixels left out"
    )
    response = "pixel"
    reference = "liu2023structured"

    def __init__(
        self,
        pair: Pair,
        *,
        level: str | None = None,
        nodes: int = 2,
        discriminator_channels: int = 64,
        on: Literal["pixels", "boxes", "features"] = "pixels",
    ) -> None:
        super().__init__(pair, discriminator_channels, on)
        check_positive(nodes=nodes)
        self.level, self.nodes = pair.level(level), nodes

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = student.features[self.level], teacher.features[self.level]
        pair = skd_loss(ours, theirs, nodes=self.nodes, mask=targets.valid(spatial_size(theirs)))
        return {"pair": pair} | self.responses(student, teacher, targets)
