"""Range of a scalar field along the line between two grid points (math behind Eq. 2 of the BCD paper).

`max over p, q on a line of 1[|z_p - z_q| > theta]` equals `1[max z - min z > theta]`, so two reductions replace the
loop over pairs. The lines are IRN's (Ahn et al., CVPR 2019): all grid points of the bounding box whose
distance to the line is below one.
"""

from collections.abc import Callable
from functools import cache, reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...utils.messages import UserError


LONGEST = 16  # radius: its 390 lines take two seconds to plan
Directions = Literal["disc", "half"]
Shape = frozenset[tuple[int, int]]  # grid points (y, x) from the upper left corner of their box on
Step = tuple[int, int, tuple[tuple[int, int, int], ...]]  # height and width of a shape; its parts: number, y, x


def line_offsets(radius: int, directions: Directions = "disc") -> tuple[tuple[int, int], ...]:
    """The offsets of `path_offsets` as plain numbers, for loops over them."""
    if not 2 <= radius <= LONGEST:
        raise UserError(
            f"radius is {radius}, but a line needs radius >= 2 (neighbouring positions), and above {LONGEST} there are "
            "too many."
        )
    if directions not in ("disc", "half"):
        raise ValueError(f"directions is {directions!r}; choose 'disc' or 'half'.")
    half = [(0, x) for x in range(1, radius)]
    for y in range(1, radius):
        half += [(y, x) for x in range(-radius + 1, radius) if y * y + x * x < radius * radius]
    return tuple(half) if directions == "half" else (*half, *((-y, -x) for y, x in half))


def _line_shape(dy: int, dx: int) -> Shape:
    """Grid points of the bounding box of (0, 0)-(dy, dx) closer than 1 to the line through both, from its corner on."""
    ys = range(min(dy, 0), max(dy, 0) + 1)
    xs = range(min(dx, 0), max(dx, 0) + 1)
    length = dy * dy + dx * dx
    return frozenset((y - ys[0], x - xs[0]) for y in ys for x in xs if (dy * x - dx * y) ** 2 < length)


@cache
def _search_plan(radius: int) -> tuple[tuple[Step, ...], dict[tuple[int, int], int]]:
    """How every shape that lines of a radius have is a union of shifted shorter ones, and which shape each line has.

    The extremes of a union are the extremes of its parts, which may overlap. Almost always two parts are enough: a line
    of any length then costs one maximum and one minimum a position.

    Returns:
        Steps, of which the k-th makes shape k + 1 from earlier ones (0 is the single point), and the shape of every
        offset of `line_offsets`.
    """
    lines = {offset: _line_shape(*offset) for offset in line_offsets(radius)}
    shapes: list[Shape] = [frozenset({(0, 0)})]
    steps: list[Step] = []
    for _, shape in sorted(lines.items(), key=lambda line: line[0][0] ** 2 + line[0][1] ** 2):
        if shape in shapes:
            continue
        height, width = max(y for y, _ in shape), max(x for _, x in shape)
        candidates = {}
        for number, part in enumerate(shapes):
            for y in range(height - max(y for y, _ in part) + 1):
                for x in range(width - max(x for _, x in part) + 1):
                    shifted = frozenset((y + part_y, x + part_x) for part_y, part_x in part)
                    if shifted <= shape:
                        candidates[number, y, x] = shifted
        parts, missing = [], shape
        while missing:
            best = max(candidates, key=lambda candidate: len(candidates[candidate] & missing))
            parts.append(best)
            missing = missing - candidates[best]
        steps.append((height, width, tuple(parts)))
        shapes.append(shape)
    return tuple(steps), {offset: shapes.index(shape) for offset, shape in lines.items()}


# apart from the search, because the compiler would look through its cache and trace the search itself
@torch.compiler.assume_constant_result
def _plan(radius: int) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    steps, numbers = _search_plan(radius)
    return steps, tuple(numbers[offset] for offset in line_offsets(radius))


def path_offsets(radius: int, directions: Directions = "disc") -> Tensor:
    """Offsets `[D, 2]` as (dy, dx) from a position to the other end of its lines.

    Args:
        radius: lines are shorter than `radius` grid steps: `dy² + dx² < radius²`.
        directions: `half` lists every unordered pair once (4, 12, 22, 34 offsets for radius 2, 3, 4, 5), `disc` adds
            their negatives in the same order behind them.

    Raises:
        ValueError: if `radius` is below 2 or above 16, or `directions` is unknown.
    """
    return torch.tensor(line_offsets(radius, directions))


def line_ends(x: Tensor, radius: int, directions: Directions = "disc") -> list[Tensor]:
    """`x` `[..., H, W]` as seen from the start of each line of `line_offsets`: the value at its end, 0 outside."""
    reach, (height, width) = radius - 1, x.shape[-2:]
    padded = F.pad(x, [reach] * 4)
    corners = [(reach + dy, reach + dx) for dy, dx in line_offsets(radius, directions)]
    return [padded[..., y : y + height, x : x + width] for y, x in corners]


def path_range(z: Tensor, radius: int, directions: Directions = "disc", mask: Tensor | None = None) -> Tensor:
    """Range (maximum minus minimum) of a field on the line from every position into every direction.

    Args:
        z: scalar field `[B, H, W]`.
        radius: radius and `directions` are as in `path_offsets`.
        mask: `[B, H, W]`, True where valid. The part of a line that leaves the image or is not valid does not count; a
            line with no valid point has range 0.

    Returns:
        `[B, D, H, W]`, non-negative, D as in `path_offsets`. Differentiable in `z`.
    """
    offsets = line_offsets(radius, directions)
    reach = radius - 1
    height, width = z.shape[-2:]
    inf = float("inf")
    highs = z if mask is None else z.masked_fill(~mask, -inf)
    lows = z if mask is None else z.masked_fill(~mask, inf)
    highs, lows = F.pad(highs, [reach] * 4, value=-inf), F.pad(lows, [reach] * 4, value=inf)
    steps, numbers = _plan(radius)
    # entry (y, x) of a shape's extremes belongs to the shape with its upper left corner there
    maxima, minima = _extremes(highs, steps, torch.maximum), _extremes(lows, steps, torch.minimum)
    # out of the image the extremes are infinite: the clamp turns their difference into 0
    ranges = [(high - low).clamp_min(0) for high, low in zip(maxima, minima, strict=True)]
    out = []
    for (dy, dx), number in zip(offsets, numbers, strict=False):  # `half` is the first half of `disc`
        y, x = reach + min(dy, 0), reach + min(dx, 0)
        out.append(ranges[number][:, y : y + height, x : x + width])
    return torch.stack(out, dim=1)


def _extremes(field: Tensor, steps: tuple[Step, ...], extreme: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Running maximum or minimum of a field `[B, H, W]` over every shape, from single points to the longest lines."""
    found = [field]
    for extra_height, extra_width, parts in steps:
        height, width = field.shape[-2] - extra_height, field.shape[-1] - extra_width
        found.append(reduce(extreme, [found[part][:, y : y + height, x : x + width] for part, y, x in parts]))
    return found
