"""How values change around each position: the divergence of softmaxes over windows, from sums over windows."""

import torch.nn.functional as F
from torch import Tensor

from .functional import mask_fill_value


LOWEST = -60.0  # in float32 exp(-60) is far from 0 still


def window_divergence(student: Tensor, teacher: Tensor, mask: Tensor, side: int = 3) -> Tensor:
    """KL divergence, in every channel and around every position, of two softmaxes over the window there.

    Positions outside of the map and those that are not valid belong to no window. A score more than 60 below the highest of its
    channel in the image counts as 60 below, so that no window is without weight and no window needs a maximum of its own.

    Args:
        student: scores `[B, C, h, w]`, float32 or float64.
        teacher: likewise; receives no gradient.
        mask: boolean `[B, h, w]`, True where valid.
        side: of the square windows, odd.

    Returns:
        `KL(softmax(teacher) ‖ softmax(student))` over each window, in nat, `[B, C, h, w]`; 0 where not valid. Only differences of
        scores matter, so that a constant added to a channel changes nothing.
    """
    mask = mask[:, None]

    def below_highest(x: Tensor) -> Tensor:
        highest = x.detach().masked_fill(~mask, mask_fill_value(x.dtype)).amax((2, 3), keepdim=True)
        return (x - highest).masked_fill(~mask, LOWEST).clamp_min(LOWEST)

    def sums(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.masked_fill(~mask, 0), side, stride=1, padding=side // 2, divisor_override=1)

    student, teacher = below_highest(student), below_highest(teacher.detach())
    weight = teacher.exp()
    ours, theirs = (total.masked_fill(~mask, 1) for total in (sums(student.exp()), sums(weight)))
    found = ours.log() - theirs.log() + sums(weight * (teacher - student)) / theirs
    return found.masked_fill(~mask, 0)
