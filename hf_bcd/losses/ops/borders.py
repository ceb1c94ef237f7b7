"""Where the classes of a label map meet. Void is no class: nothing borders on it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import class_masks, spatial_size


def check_width(width: int) -> None:
    """Raises a `ValueError` for a window that has no centre or no neighbour."""
    if width < 3 or width % 2 == 0:
        raise ValueError(f"width is {width!r}; it must be an odd number of pixels >= 3.")


def _dilate(x: Tensor, width: int) -> Tensor:
    """Largest value in the window around each pixel, of what lies inside the image."""
    check_width(width)
    return F.max_pool2d(x, width, stride=1, padding=width // 2)


def class_borders(labels: Tensor, *, width: int = 7, ignore_index: int = 255) -> Tensor:
    """Pixels whose window holds more than one class.

    Args:
        labels: class ids `[B, H, W]`, `ignore_index` where void.
        width: side of the window in pixels, odd; the band reaches `width // 2` pixels to both sides of a border.
        ignore_index: void label.

    Returns:
        Boolean `[B, H, W]`, False where void.
    """
    void = labels == ignore_index
    ids = labels.float()
    highest = _dilate(ids.masked_fill(void, -torch.inf), width)
    lowest = -_dilate((-ids).masked_fill(void, -torch.inf), width)
    return (highest != lowest) & ~void


def class_border_shares(
    labels: Tensor, num_labels: int, size: tuple[int, int], *, width: int = 7, ignore_index: int = 255
) -> Tensor:
    """How much of every grid cell lies on the border of each class.

    The border of a class is its dilation without its erosion: the pixels whose window holds this class and another.

    Args:
        labels: class ids `[B, H, W]`, `ignore_index` where void.
        num_labels: number of classes K.
        size: size (h, w) of the grid.
        width: as in `class_borders`.
        ignore_index: void label.

    Returns:
        Shares `[B, K, h, w]` in [0, 1], float32: of a cell's pixels.
    """
    borders = class_borders(labels, width=width, ignore_index=ignore_index)
    shares = []
    # image by image: one-hot maps of a whole batch at full resolution would take gigabytes
    for image, border in zip(labels.split(1), borders.split(1), strict=True):
        classes = class_masks(image, num_labels, spatial_size(image)) & (image != ignore_index)[:, None]
        shares.append(F.adaptive_avg_pool2d(_dilate(classes.float(), width) * border[:, None], size))
    return torch.cat(shares)
