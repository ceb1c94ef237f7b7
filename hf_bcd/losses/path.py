"""Range of a scalar field along the line between two grid points (math behind Eq. 2 of the BCD paper).

`max over p, q on a line of 1[|z_p - z_q| > theta]` equals `1[max z - min z > theta]`, so two reductions replace the
loop over pairs. The lines are those of IRN (Ahn et al., CVPR 2019): all grid points of the bounding box whose
distance to the line is below one.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


Directions = Literal["disc", "half"]


def line_offsets(radius: int, directions: Directions = "disc") -> tuple[tuple[int, int], ...]:
    """The offsets of `path_offsets` as plain numbers, for loops over them."""
    if radius < 2:
        raise ValueError(f"radius is {radius}, but a line needs radius >= 2 (neighbouring positions).")
    if directions not in ("disc", "half"):
        raise ValueError(f"directions is {directions!r}; choose 'disc' or 'half'.")
    half = [(0, x) for x in range(1, radius)]
    for y in range(1, radius):
        half += [(y, x) for x in range(-radius + 1, radius) if y * y + x * x < radius * radius]
    return tuple(half) if directions == "half" else (*half, *((-y, -x) for y, x in half))


def _line_points(dy: int, dx: int) -> tuple[tuple[int, int], ...]:
    """Grid points of the bounding box of (0, 0)-(dy, dx) closer than 1 to the line through both."""
    ys = range(min(dy, 0), max(dy, 0) + 1)
    xs = range(min(dx, 0), max(dx, 0) + 1)
    length = dy * dy + dx * dx
    return tuple((y, x) for y in ys for x in xs if (dy * x - dx * y) ** 2 < length)


def path_offsets(radius: int, directions: Directions = "disc") -> Tensor:
    """Offsets `[D, 2]` as (dy, dx) from a position to the other end of its lines.

    Args:
        radius: lines are shorter than `radius` grid steps: `dy² + dx² < radius²`.
        directions: `half` lists every unordered pair once (4, 12, 22, 34 offsets for radius 2, 3, 4, 5), `disc` adds
            their negatives in the same order behind them.

    Raises:
        ValueError: if `radius` is below 2 or `directions` is unknown.
    """
    return torch.tensor(line_offsets(radius, directions))


def path_range(z: Tensor, radius: int, directions: Directions = "disc", mask: Tensor | None = None) -> Tensor:
    """Range (maximum minus minimum) of a field on the line from every position into every direction.

    Args:
        z: scalar field `[B, H, W]`.
        radius: as in `path_offsets`.
        directions: as in `path_offsets`.
        mask: `[B, H, W]`, True where valid. The part of a line that leaves the image or is not valid does not count; a
            line with no valid point has range 0.

    Returns:
        `[B, D, H, W]`, non-negative, D as in `path_offsets`. Differentiable in `z`.
    """
    line_offsets(radius, directions)  # checks both
    reach = radius - 1
    height, width = z.shape[-2:]
    inf = float("inf")
    highs = z if mask is None else z.masked_fill(~mask, -inf)
    lows = z if mask is None else z.masked_fill(~mask, inf)
    # lines start up to `reach` outside the image (for the negative directions) and go on for up to `reach`
    pad = [2 * reach] * 4
    highs, lows = F.pad(highs, pad, value=-inf), F.pad(lows, pad, value=inf)

    def window(y: int, x: int) -> tuple[Tensor, Tensor]:
        rows = slice(reach + y, height + 3 * reach + y)
        columns = slice(reach + x, width + 3 * reach + x)
        return highs[:, rows, columns], lows[:, rows, columns]

    lines = {offset: _line_points(*offset) for offset in line_offsets(radius, "half")}
    windows = {point: window(*point) for points in lines.values() for point in points}  # lines share their points
    forward, backward = [], []
    for (dy, dx), points in lines.items():
        points_high, points_low = zip(*(windows[point] for point in points), strict=True)
        line = (torch.stack(points_high).amax(dim=0) - torch.stack(points_low).amin(dim=0)).clamp_min(0)
        forward.append(line[:, reach : reach + height, reach : reach + width])
        if directions == "disc":
            y, x = reach - dy, reach - dx
            backward.append(line[:, y : y + height, x : x + width])
    return torch.stack(forward + backward, dim=1)
