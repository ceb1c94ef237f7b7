"""C2VKD: features and decoupled scores, from CNN to ViT (Zheng et al., 2023, https://arxiv.org/abs/2310.07265)."""

import torch
from torch import Tensor

from ..outputs import DenseOutput, Targets
from ..utils.distributed import all_reduce_sum
from .base import DistillationLoss, Pair, check_positive
from .modules.connectors import FeaturePair
from .ops.functional import (
    check_tau,
    divergence,
    full_precision,
    image_means,
    mask_fill_value,
    on_teacher_grid,
    spatial_size,
    unit_vectors,
)


@full_precision
def dkd_loss(
    student: Tensor, teacher: Tensor, classes: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Decoupled knowledge distillation (Zhao et al., https://arxiv.org/abs/2203.08679) of every pixel.

    With `p = softmax(z / T)` and a pixel's true class y, or all of its classes together where there are several, each a
    mean over images and valid pixels:

    - `target`: `T² · KL` between the teacher's and the student's `[p_y, 1 - p_y]`.
    - `others`: `T² · KL` between their softmaxes over the classes other than y.

    Args:
        student: class scores `[B, K, h, w]`; `teacher` and `mask` are as in `on_teacher_grid`.
        classes: where each class is, `[B, K, h', w']`: boolean, or in 0..1 and there from one half on.
        temperature: T, > 0.

    Returns:
        The two terms, scalars >= 0 in nat, 0 for equal scores; float32 or float64.
    """
    check_tau(temperature)
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    true, pairs = classes >= 0.5, []
    for z in (student / temperature, teacher / temperature):
        sides = [z.masked_fill(hidden, mask_fill_value(z.dtype)).logsumexp(dim=1) for hidden in (~true, true)]
        pairs.append(torch.stack(sides, dim=1))  # its softmax is [p_y, 1 - p_y]
    target = divergence(*pairs, dim=1)
    others = divergence(student, teacher, dim=1, tau=temperature, mask=~true)
    terms = {"target": target, "others": others}
    return {name: temperature**2 * image_means(term, mask).mean() for name, term in terms.items()}


@full_precision
def c2vkd_feature_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The two feature terms of C2VKD.

    - `features`: mean over images and valid positions of `1/C · KL(softmax(t) ‖ softmax(s))` over channels.
    - `covariance`: mean over all pairs of valid positions of the batch of `(cov_t - cov_s)²`, where `cov` is the product
      of two positions' features, divided by their length and centred over channels, by `C - 1`.

    The n x n matrices are never built: `‖S Sᵀ - T Tᵀ‖² = ‖Sᵀ S‖² + ‖Tᵀ T‖² - 2 ‖Sᵀ T‖²` takes three C x C ones.

    Args:
        student: `[B, C, h, w]`; `teacher` and `mask` are as in `on_teacher_grid`.

    Returns:
        The two terms, scalars >= 0 but for rounding, 0 for equal features; float32 or float64. Pairs run
        over the batch of all ranks, which all must call this.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    channels = teacher.shape[1]
    features = image_means(divergence(student, teacher, dim=1), mask).mean() / channels
    s, t = (unit_vectors(x, dim=1) for x in (student, teacher))
    s, t = ((x - x.mean(dim=1, keepdim=True)).masked_fill(~mask[:, None], 0) for x in (s, t))
    s, t = (x.transpose(0, 1).flatten(1) for x in (s, t))
    of_student, of_teacher, of_both = all_reduce_sum(torch.stack([s @ s.mT, t @ t.mT, s @ t.mT])).square()
    count = all_reduce_sum(mask.sum().to(s.dtype)).clamp_min(1)
    squares = (of_student + of_teacher - 2 * of_both).sum()
    return {"features": features, "covariance": squares / (count * max(channels - 1, 1)).square()}


class C2VKDLoss(DistillationLoss):
    """`dkd_loss` between the logits and `c2vkd_feature_loss` between a feature level of two models.

    Defined here without the linguistic term, because it runs both models' features through a pretrained attention pool
    whose weights and code were not released. The released script calls a decoupled loss with DKD's name and arguments,
    but lacks its file: we take DKD, as a mean over pixels. Weights are the script's; its feature KL is a mean over
    channels too, its covariance over all pairs of a device's batch, as small as here. It adds no cross-entropy.

    Args:
        temperature: T of the decoupled loss; 1 as in the script.
        level: level of the features; the coarsest that both models have by default.
    """

    weights = {"target": 0.5, "others": 0.5, "features": 0.1, "covariance": 0.1}
    needs = frozenset({"logits", "features", "labels"})
    transfers = "true class and other classes of each pixel, features and their covariance between positions"
    checked = (
        "official script for the feature terms and weights, DKD's official code (mdistiller) for the decoupled loss, "
        "whose file C2VKD did not release; with its weights the feature and covariance terms are next to nothing (1e-3 and 1e-7 "
        "of the task's gradient); no linguistic term, void pixels left out, beside the task's cross-entropy; the covariance is "
        "that of a forward pass, so accumulated batches do not add up to one; lengths below 1e-4 count as 1e-4"
    )
    reference = "zheng2023distilling"

    def __init__(self, pair: Pair, *, temperature: float = 1.0, level: str | None = None) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.pair = FeaturePair(pair, level)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        size = spatial_size(teacher.logits)
        options = {"temperature": self.temperature, "mask": targets.valid(size)}
        terms = dkd_loss(student.logits, teacher.logits, targets.class_masks(size), **options)
        ours, theirs = self.pair(student.features, teacher.features)
        return terms | c2vkd_feature_loss(ours, theirs, mask=targets.valid(spatial_size(theirs)))
