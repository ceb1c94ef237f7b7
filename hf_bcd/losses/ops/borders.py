"""Borders of classes. Void is no class: nothing borders on it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...utils.messages import UserError


def check_width(width: int) -> None:
    """Raises a `UserError` for a window that has no centre or no neighbour."""
    if not 3 <= width < 1000 or width % 2 == 0:
        raise UserError(f"width is {width!r}; it must be an odd number of pixels >= 3 and < 1000.")


def _dilate(x: Tensor, width: int) -> Tensor:
    """Largest value in the window around each pixel, of what lies inside the image."""
    # along one axis and then the other: fewer reads
    x = F.max_pool2d(x, (width, 1), stride=1, padding=(width // 2, 0))
    return F.max_pool2d(x, (1, width), stride=1, padding=(0, width // 2))


def _borders(classes: Tensor, mask: Tensor, width: int) -> Tensor:
    """The dilation of each class `[B, K, H, W]` without its erosion, where valid: in 0..1, float32."""
    classes, void = classes.float(), ~mask[:, None]
    highest, lowest = _dilate(classes.masked_fill(void, 0), width), -_dilate((-classes).masked_fill(void, -1), width)
    return (highest - lowest).masked_fill(void, 0)


def class_borders(classes: Tensor, mask: Tensor, *, width: int = 7) -> Tensor:
    """Border strength of every pixel: its window holds a class and, beside it, valid pixels without this class.

    Args:
        classes: where each class is, `[B, K, H, W]`, boolean or in 0..1.
        mask: `[B, H, W]`, True where valid.
        width: side of the window in pixels, odd; the band reaches `width // 2` pixels to both sides of a border.

    Returns:
        `[B, H, W]` in [0, 1], float32, 0 where void: 0 or 1 for boolean classes.
    """
    check_width(width)
    # image by image: maps of a whole batch in float32 would take gigabytes
    images = zip(classes.split(1), mask.split(1), strict=True)
    return torch.cat([_borders(one, valid, width).amax(dim=1) for one, valid in images])


def class_border_shares(classes: Tensor, mask: Tensor, size: tuple[int, int], *, width: int = 7) -> Tensor:
    """Part `[B, K, h, w]` of every cell of a grid of `size` that lies on the border of each class, see `class_borders`."""
    check_width(width)
    images = zip(classes.split(1), mask.split(1), strict=True)
    return torch.cat([F.adaptive_avg_pool2d(_borders(one, valid, width), size) for one, valid in images])
