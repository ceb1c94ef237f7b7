"""Pictures of what BCD compares: boundary maps, and the relations of one pixel to all others."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .panels import DPI, GAP, Field, Picture, cell_size, grey, place, rgb, save, title, to_numpy


if TYPE_CHECKING:
    from matplotlib.figure import Figure


MARK_COLOUR = "#39e6ff"


def boundary_figure(image: Picture, maps: Mapping[str, Field], path: str | Path) -> Path:
    """Saves boundary maps, such as the teacher's b^T and the student's b^S, over the image on one colour scale.

    Args:
        image: RGB image.
        maps: title -> field, resized bilinearly.
        path: PNG file to write; it is returned.

    Raises:
        ValueError: there is no map, or a map is not two-dimensional and finite.
    """
    fields = _fields(maps)
    low = min(0.0, *(float(field.min()) for field in fields.values()))
    high = max(float(field.max()) for field in fields.values())
    scaled = {name: (field - low) / max(high - low, 1e-12) for name, field in fields.items()}
    return save(_heat_panels(rgb(image), scaled, (low, max(high, low + 1e-12)), "boundary"), path)


def relation_figure(image: Picture, relations: Mapping[str, Field], point: tuple[int, int], path: str | Path) -> Path:
    """Saves the relations of one pixel to all positions, such as teacher's and student's, with the pixel marked.

    Each map has its own scale, from 0 or its minimum to its 99th percentile: the maps' patterns are compared, not
    their sharpness. The rest is as in `boundary_figure`.

    Args:
        relations: title -> the pixel's row of the relation matrix as a map.
        point: row and column of the pixel in the image; outside of it, a ValueError.
    """
    pixels = rgb(image)
    if not (0 <= point[0] < pixels.shape[0] and 0 <= point[1] < pixels.shape[1]):
        raise ValueError(
            f"point {tuple(point)} lies outside the image of {pixels.shape[0]} x {pixels.shape[1]} pixels."
        )
    scaled = {}
    for name, field in _fields(relations).items():
        low, high = min(0.0, float(field.min())), float(np.percentile(field, 99))
        scaled[name] = np.clip((field - low) / max(high - low, 1e-12), 0, 1)
    label = "relation / 99th percentile"
    return save(_heat_panels(pixels, scaled, (0.0, 1.0), label, point), path)


def _fields(maps: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not maps:
        raise ValueError("there is no map to draw; give at least one, e.g. {'teacher': ...}.")
    fields = {name: to_numpy(values).astype(np.float32) for name, values in maps.items()}
    for name, field in fields.items():
        if field.ndim != 2 or not np.isfinite(field).all():
            raise ValueError(f"{name!r} has shape {field.shape}; give a field [h, w] of finite numbers.")
    return fields


def _heat_panels(
    pixels: np.ndarray,
    scaled: Mapping[str, np.ndarray],
    limits: tuple[float, float],
    label: str,
    point: tuple[int, int] | None = None,
) -> "Figure":
    """Figure of the image and of fields 0..1 that glow upon its darkened copy, with one colour bar."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    (height, width), size = pixels.shape[:2], cell_size(pixels)
    panels = {"input": pixels}
    dark = 0.45 * grey(pixels)
    for name, field in scaled.items():
        field = np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BILINEAR))
        glow = colormaps["inferno"](np.clip(field, 0, 1))[..., :3]
        panels[name] = (255 * (1 - (1 - dark) * (1 - glow))).astype(np.uint8)
    head, bar_width = 30, 105
    canvas = (len(panels) * (size[0] + GAP) + GAP + bar_width, head + size[1] + GAP)
    figure = Figure(figsize=(canvas[0] / DPI, canvas[1] / DPI), dpi=DPI)
    for j, (name, picture) in enumerate(panels.items()):
        axes = place(figure, picture, GAP + j * (size[0] + GAP), head, size, smooth=True)
        title(axes, name, size[0])
        if point is not None:
            x, y = (point[1] + 0.5) * size[0] / width - 0.5, (point[0] + 0.5) * size[1] / height - 0.5
            for marker in ("o", "+"):
                axes.plot(x, y, marker, color=MARK_COLOUR, fillstyle="none", markersize=8, scalex=False, scaley=False)
    left = canvas[0] - bar_width + 5
    bar = figure.add_axes((left / canvas[0], GAP / canvas[1], 16 / canvas[0], size[1] / canvas[1]))
    figure.colorbar(ScalarMappable(Normalize(*limits), "inferno"), cax=bar, format="{x:.2g}")
    bar.tick_params(labelsize=8, length=2, pad=2)
    bar.set_ylabel(label, fontsize=8, labelpad=3)
    return figure
