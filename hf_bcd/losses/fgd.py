"""Focal and global distillation (Yang et al., CVPR 2022, https://arxiv.org/abs/2111.11837)."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..outputs import DenseOutput, Objects, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Pair, check_positive
from .modules.connectors import FeaturePair
from .ops.functional import (
    check_tau,
    class_means,
    full_precision,
    image_means,
    mask_fill_value,
    mean_squared_error,
    on_teacher_grid,
    spatial_size,
)


def activation_attention(x: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Positions and channels in which a map `[B, C, h, w]` is active.

    Returns:
        `n · softmax over the n valid positions of mean_c |x| / T`, `[B, h, w]`, 0 where void, and
        `C · softmax over channels of mean_i |x| / T`, `[B, C]`: each has mean 1.
    """
    check_tau(temperature)
    activity = x.abs()
    positions = (activity.mean(dim=1) / temperature).masked_fill(~mask, mask_fill_value(x.dtype)).flatten(1)
    num_valid = mask.flatten(1).sum(dim=1, keepdim=True)
    spatial = (num_valid * positions.softmax(dim=1)).view_as(mask).masked_fill(~mask, 0)
    channel = x.shape[1] * (class_means(activity, mask[:, None])[:, 0] / temperature).softmax(dim=1)
    return spatial, channel


@full_precision
def fgd_loss(
    student: Tensor, teacher: Tensor, regions: Tensor, *, temperature: float = 0.5, mask: Tensor | None = None
) -> Tensor:
    """Focal distillation: features follow the teacher's where it is active, every region counting the same.

    `mean over images of sum_k mean_{i in region k} S_i mean_c A_c (t_ci - s_ci)²`, S and A the teacher's attention over
    positions and channels, see `activation_attention`.

    Args:
        student: features `[B, C, h, w]`; `teacher` and `mask`, which bounds the attention, are as in `on_teacher_grid`.
        regions: `[B, K, h', w']`, boolean or in 0..1; an empty one counts 0.
        temperature: T, > 0.

    Returns:
        Scalar >= 0, 0 for equal features; float32 or float64.
    """
    error = position_errors(student, teacher, temperature=temperature, mask=mask)
    return class_means(error[:, None], regions).sum(dim=1).mean()


@full_precision
def position_errors(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.5, mask: Tensor | None = None
) -> Tensor:
    """`S_i mean_c A_c (t_ci - s_ci)²` of each position, `[B, h', w']`; arguments as of `fgd_loss`."""
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    spatial, channel = activation_attention(teacher, mask, temperature)
    return spatial * (channel[:, :, None, None] * (teacher - student).square()).mean(dim=1)


def box_weights(targets: Objects, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How much each position of a grid counts as foreground and as background, as the official code has them: `[B, *size]`.

    A box covers the cells from ⌊x0⌋ to ⌈x1⌉, both included, and gives each `1 / ((height + 1)(width + 1))` in cells; the
    largest one holds. Background are the cells that no box covers, each with 1 over their number.
    """
    rows, columns = (torch.arange(n, device=targets.boxes[0].device) for n in size)
    scale = targets.boxes[0].new_tensor([size[1] / targets.size[1], size[0] / targets.size[0]]).repeat(2)
    foregrounds = []
    for boxes in targets.boxes:
        scaled = boxes * scale
        low, high = scaled[:, :2].floor(), scaled[:, 2:].ceil()
        inside = [
            (places >= low[:, axis, None]) & (places <= high[:, axis, None])
            for axis, places in ((1, rows), (0, columns))
        ]
        value = 1 / (high - low + 1).prod(1)
        covered = (inside[0][:, :, None] & inside[1][:, None]) * value[:, None, None]
        foregrounds.append(covered.amax(0) if len(boxes) else covered.new_zeros(size))
    foreground = torch.stack(foregrounds)
    valid = targets.valid(size)
    foreground, free = foreground.masked_fill(~valid, 0), ((foreground == 0) & valid).float()
    return foreground, free / free.sum((1, 2), keepdim=True).clamp_min(1)


@full_precision
def attention_losses(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean absolute differences between the two models' attention over positions and over channels, as `fgd_loss`."""
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    ours, theirs = (activation_attention(x, mask, temperature) for x in (student, teacher))
    return image_means((ours[0] - theirs[0]).abs(), mask).mean(), (ours[1] - theirs[1]).abs().mean()


class GlobalContext(nn.Module):
    """Adds to every position a vector that a small network makes of an attention-weighted mean; nothing at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.attend = nn.Conv2d(channels, 1, 1, bias=False)  # softmax would cancel one
        self.add = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        nn.init.kaiming_normal_(self.attend.weight)
        for parameter in self.add[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Features `[B, channels, h, w]` of the same shape; only positions where `mask` `[B, h, w]` is True are seen."""
        seen = self.attend(x).masked_fill(~mask[:, None], mask_fill_value(x.dtype)).flatten(2).softmax(dim=2)
        return x + self.add((x.flatten(2) @ seen.mT)[..., 0])[:, :, None, None]


class FGDLoss(DistillationLoss):
    """`fgd_loss`, attention and global context of feature levels, each behind a 1x1 convolution; terms are sums over levels.

    Of detectors, `on: boxes` weighs positions as the official code does, see `box_weights`; without it every class of an
    image is one object. Defined for class masks, because the official code takes the boxes of object detection: every class of an image
    is one object, weighted by 1 / area, and pixels of `background` are the background. Labels without a background
    class have no background term.

    The block of the global context is trained on the teacher's side as well, as in the official code. It cannot
    collapse: it shifts each channel of an image by one number, so what varies between positions stays the target.

    Weights: 5e-5, 2.5e-5, 5e-5 and 5e-7 of the official Mask R-CNN configuration multiply sums over channels and
    positions, ours means: hence times 256 channels (the feature pyramid's), and times 4096 positions (512 pixels at
    stride 8) where the sum runs over positions as well. Those of the RetinaNet configuration, ten to twenty times as
    large, let the connectors diverge on a backbone's features.

    Args:
        background: class id of the background, 0 in Pascal VOC; None where every class counts as an object.
        temperature: T of the attention; 0.5 as in the official code.
        levels: level names; the coarsest that both models have by default. Detectors take all five of their pyramid.
        on: `classes`, or `boxes` of detectors, whose background needs no class.
    """

    weights = {
        "foreground": 5e-5 * 256,
        "background": 2.5e-5 * 256,
        "spatial": 5e-5 * 4096,
        "channel": 5e-5 * 256,
        "global": 5e-7 * 256 * 4096,
    }
    needs = frozenset({"features", "labels"})
    transfers = "features of objects and background where the teacher is active, its attention, global context"
    checked = "official code, defined for detection; class masks instead of boxes and means instead of sums are ours"
    reference = "yang2022focal"

    def __init__(
        self,
        pair: Pair,
        *,
        background: int | None = None,
        temperature: float = 0.5,
        levels: Sequence[str] | None = None,
        on: Literal["classes", "boxes"] = "classes",
    ) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature)
        if on not in ("classes", "boxes"):
            raise UserError(f"on is {on!r}; choose classes or boxes.")
        self.on = on
        if on == "boxes":
            self.needs = frozenset({"features", "labels", "boxes"})
        elif background is None:
            self.weights = {term: value for term, value in self.weights.items() if term != "background"}
        elif background < 0:
            raise UserError(f"background is {background!r}; it must be a class id, or null.")
        elif background >= pair.num_labels:
            raise UserError(f"background is {background!r}, but the student has {pair.num_labels} classes.")
        self.background, self.temperature = background, temperature
        self.pairs = nn.ModuleList(FeaturePair(pair, level) for level in levels or [None])
        # of each level, one for the student and one for the teacher
        self.contexts = nn.ModuleList(
            nn.ModuleList(GlobalContext(cast(FeaturePair, one).channels) for _ in range(2)) for one in self.pairs
        )

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        levels = [
            self.terms_of(pair(student.features, teacher.features), cast(Any, contexts), targets)
            for pair, contexts in zip(self.pairs, self.contexts, strict=True)
        ]
        return {term: torch.stack([terms[term] for terms in levels]).sum() for term in levels[0]}

    def terms_of(
        self, maps: tuple[Tensor, Tensor], contexts: Sequence[nn.Module], targets: Targets
    ) -> dict[str, Tensor]:
        """The terms of one level, of the student's map and the teacher's."""
        ours, theirs = maps
        size = spatial_size(theirs)
        mask, k = targets.valid(size), self.background
        options = {"temperature": self.temperature, "mask": mask}
        terms = {}
        if self.on == "boxes":
            assert isinstance(targets, Objects)  # `needs` saw to it
            regions = box_weights(targets, size)
            error = position_errors(ours, theirs, **options)
            terms["foreground"], terms["background"] = ((error * weight).sum((1, 2)).mean() for weight in regions)
        classes = None if self.on == "boxes" else targets.class_masks(size)
        if classes is not None and k is not None:
            terms["background"] = fgd_loss(ours, theirs, classes[:, k, None], **options)
            classes = torch.cat([classes[:, :k], classes[:, k + 1 :]], dim=1)
        if classes is not None:
            terms["foreground"] = fgd_loss(ours, theirs, classes, **options)
        terms["spatial"], terms["channel"] = attention_losses(ours, theirs, **options)
        terms["global"] = mean_squared_error(contexts[0](ours, mask), contexts[1](theirs, mask), mask)
        return terms
