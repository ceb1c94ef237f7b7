"""Double similarity distillation (Feng et al., IEEE TIP 2021, https://arxiv.org/abs/2107.08591)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..outputs import DenseOutput, Targets, resize_nearest
from ..utils.messages import UserError
from .base import DistillationLoss, Pair, check_positive
from .ops.functional import (
    attention_map,
    check_tau,
    full_precision,
    on_teacher_grid,
    resize,
    spatial_size,
    unit_maps,
    unit_vectors,
)


@full_precision
def pixel_similarity_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor) -> Tensor:
    """From one level to the next, the student's attention changes where the teacher's does.

    `mean over images and neighbouring levels (k, k + 1) of ‖r_s - r_t‖²`, with `r = u / ‖u‖`, `u = a_(k+1) - a_k` and
    `a` the mean over channels of `f²`, of length 1 over the valid positions, all on the grid of the teacher's last level.

    Args:
        student: features `[B, C_k, h_k, w_k]` of two or more levels.
        teacher: features of the same levels, of any shape; they receive no gradient.
        mask: `[B, H, W]` at any resolution, such as the labels', True where valid.

    Returns:
        Scalar in [0, 4]; float32 or float64.
    """
    size = spatial_size(teacher[-1])
    valid = resize_nearest(mask, size)

    def residuals(levels: Sequence[Tensor]) -> list[Tensor]:
        maps = []
        for features in levels:
            # void positions vanish on both grids, so that resizing mixes none of them in
            attention = attention_map(features)
            attention = attention.masked_fill(~resize_nearest(mask, spatial_size(features))[:, None], 0)
            maps.append(unit_maps(resize(attention, size), valid))
        return [unit_vectors(later - earlier, dim=2) for earlier, later in pairwise(maps)]

    pairs = zip(residuals(student), residuals([x.detach() for x in teacher]), strict=True)
    return torch.stack([(s - t).square().sum(dim=2).mean() for s, t in pairs]).mean()


@full_precision
def category_similarity_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, mask: Tensor | None = None
) -> Tensor:
    """Two classes are as alike to the student, over an image, as they are to the teacher.

    `mean over images and pairs of classes (k, l) of (cos(p_k, p_l) - cos(q_k, q_l))²`: p and q are student's and
    teacher's `softmax(z / T)` over classes, the cosine runs over the valid positions.

    Args:
        student: class scores `[B, K, h, w]`; `teacher` and `mask` are as in `on_teacher_grid`.
        temperature: T, > 0.

    Returns:
        Scalar in [0, 1]; float32 or float64.
    """
    check_tau(temperature)
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    p, q = (unit_maps((scores / temperature).softmax(dim=1), mask) for scores in (student, teacher))
    return (p @ p.mT - q @ q.mT).square().mean()


class DSDLoss(DistillationLoss):
    """`pixel_similarity_loss` between feature levels and `category_similarity_loss` of the logits.

    Defined here from the paper, because its code is not public: residuals of neighbouring levels, on one grid since
    stages differ in stride, and cosines of the maps of softened class probabilities. Weights and temperature are from
    CIRKD's re-implementation; its 1e3 on a mean over 64 x 128 positions is divided by their number, as this is a sum. That
    re-implementation takes all pairs of levels, and softmaxes over space without normalising, which leaves its category
    term near zero.

    Args:
        levels: level names from fine to coarse, two or more; all that both models have by default.
        temperature: T of the class probabilities.
    """

    weights = {"pixel": 1e3 / (64 * 128), "category": 10.0}
    needs = frozenset({"features", "logits"})
    transfers = "how attention changes between levels, and which classes go together"
    checked = "CIRKD's re-implementation: residual attention; the category term follows the paper's text; our reading"
    reference = "feng2021double"

    def __init__(self, pair: Pair, *, levels: Sequence[str] | None = None, temperature: float = 4.0) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature)
        self.levels = [pair.level(level) for level in (pair.levels if levels is None else levels)]
        if len(self.levels) < 2:
            raise UserError(f"levels are {', '.join(self.levels) or 'none'}; residual attention needs two or more.")
        self.temperature = temperature

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = ([output.features[level] for level in self.levels] for output in (student, teacher))
        options = {"temperature": self.temperature, "mask": targets.valid(spatial_size(teacher.logits))}
        return {
            "pixel": pixel_similarity_loss(ours, theirs, mask=targets.valid(targets.size)),
            "category": category_similarity_loss(student.logits, teacher.logits, **options),
        }
