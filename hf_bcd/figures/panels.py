"""Panels of a figure: pictures in rows and columns, with titles and a legend."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 150
GAP = 10

Picture = Image.Image | np.ndarray | Tensor  # RGB: PIL, uint8 [H, W, 3] or uint8 [3, H, W]
Field = np.ndarray | Tensor  # [h, w] at any resolution


def to_numpy(values: Any) -> np.ndarray:
    """Tensor or array as an array in main memory."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy has no bfloat16
    return np.asarray(values)


def rgb(image: Picture) -> np.ndarray:
    """Image as uint8 `[H, W, 3]`."""
    pixels = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else to_numpy(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"image is {pixels.dtype} of shape {pixels.shape}; give a PIL image, uint8 [H, W, 3] or uint8 [3, H, W]."
        )
    return pixels


def grey(pixels: np.ndarray) -> np.ndarray:
    """Brightness 0..1 as `[H, W, 1]`."""
    return np.asarray(Image.fromarray(pixels).convert("L"), np.float32)[..., None] / 255


def cell_size(pixels: np.ndarray) -> tuple[int, int]:
    """Width and height of a panel: small images are enlarged by a whole number, large ones shrunk."""
    height, width = pixels.shape[:2]
    zoom = max(1, round(256 / width)) if width <= 400 else 400 / width
    return round(zoom * width), round(zoom * height)


def place(figure: "Figure", pixels: np.ndarray, left: int, top: int, size: tuple[int, int], smooth: bool) -> "Axes":
    """Axes that show an image of `size` with its corner at (left, top), all in pixels of the figure."""
    width, height = (round(DPI * inches) for inches in figure.get_size_inches())
    box = (left / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height)
    axes = figure.add_axes(box, xticks=[], yticks=[])
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    axes.imshow(np.asarray(resized), interpolation="nearest", aspect="auto")
    axes.spines[:].set(color="0.75", linewidth=0.5)
    return axes


def title(axes: "Axes", text: str, width: int) -> None:
    """Title above a panel."""
    # A letter is about 0.6 of the font size wide: long names become smaller before they touch each other.
    longest = max(1, *map(len, text.split("\n")))
    axes.set_title(text, fontsize=min(9.0, width / DPI * 72 / (0.6 * longest)), pad=3, linespacing=1.15)


def grid(rows: Sequence[Sequence[tuple[str, str, np.ndarray]]], legend: Sequence[tuple[str, Any]]) -> "Figure":
    """Figure of panels (column name, score, pixels) with a legend of colours below."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cell_width = cell_size(rows[0][0][2])[0]
    heights = [round(cell_width * row[0][2].shape[0] / row[0][2].shape[1]) for row in rows]
    score_line = 24 if len(rows[0]) > 2 else 0
    head = 30 + score_line
    width = len(rows[0]) * (cell_width + GAP) + GAP
    entry = 50 + 11 * max(len(name) for name, _ in legend)
    columns = max(1, min(len(legend), width // entry))
    legend_height = 26 * math.ceil(len(legend) / columns) + 16
    height = head + sum(heights) + (len(rows) - 1) * (GAP + score_line) + legend_height
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    top = head
    for i, (row, cell_height) in enumerate(zip(rows, heights, strict=True)):
        for j, (name, score, pixels) in enumerate(row):
            size = (cell_width, cell_height)
            axes = place(figure, pixels, GAP + j * (cell_width + GAP), top, size, smooth=name == "input")
            # A blank second line keeps the column names on one height.
            title(axes, score if i else f"{name}\n{score or ' '}" if score_line else name, cell_width)
        top += cell_height + GAP + score_line
    drawn = figure.legend(
        [Patch(facecolor="#" + bytes(colour).hex(), edgecolor="0.5", linewidth=0.5) for _, colour in legend],
        [name for name, _ in legend],
        loc="lower center", ncols=columns, fontsize=9, frameon=False, borderaxespad=0.3, borderpad=0.1,
        handlelength=1.2, handleheight=1.0, columnspacing=1.4, handletextpad=0.5, labelspacing=0.25,
    )  # fmt: skip
    for text in drawn.get_texts():
        text.set_parse_math(False)  # a class may have dollars in its name
    return figure


def short(name: str, longest: int = 28) -> str:
    """A class name that fits into a legend: in one line, of several synonyms the first ones."""
    name = " ".join(name.split())
    if len(name) > longest:
        name = name[: longest - 1].rstrip(" ,;") + "…"
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves out what starts with an underscore


def save(figure: "Figure", path: str | Path) -> Path:
    """Writes a PNG file; returns its path."""
    figure.savefig(path, format="png", dpi=DPI)
    return Path(path)
