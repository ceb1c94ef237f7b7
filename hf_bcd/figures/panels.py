"""Pictures of predictions, errors, boundary maps and relation maps, written as PNG files."""

import math
from collections.abc import Mapping, Sequence
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
FIRST_COLOURS = (
    (143, 190, 222), (206, 190, 140), (140, 120, 162), (192, 120, 92), (84, 152, 86), (34, 34, 42), (216, 40, 62),
    (32, 76, 166), (242, 196, 52), (90, 196, 186), (228, 130, 190), (122, 78, 40),
)  # fmt: skip
VOID_COLOUR = (255, 255, 255)
ERROR_COLOUR = (206, 0, 130)
MARK_COLOUR = "#39e6ff"


def palette(num_labels: int) -> np.ndarray:
    """Well-separated colours, uint8 `[num_labels, 3]`; the first ones are the same for every number of labels.

    After a dozen fixed colours, each further one is the colour of a grid that is farthest from all before it and from
    the white of void pixels. Distance: https://www.compuphase.com/cmetric.htm ("redmean").

    Raises:
        ValueError: `num_labels` is not in 1..255.
    """
    if not 1 <= num_labels <= 255:
        raise ValueError(f"num_labels is {num_labels}; a palette holds 1 to 255 colours, because 255 is void.")
    levels = np.linspace(20, 236, 9)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    colours = [np.array(colour, float) for colour in FIRST_COLOURS]
    nearest = np.min([_colour_distance(grid, colour) for colour in [*colours, np.array(VOID_COLOUR, float)]], axis=0)
    while len(colours) < num_labels:
        colours.append(grid[nearest.argmax()])
        nearest = np.minimum(nearest, _colour_distance(grid, colours[-1]))
    return np.array(colours[:num_labels]).round().astype(np.uint8)


def _colour_distance(colours: np.ndarray, colour: np.ndarray) -> np.ndarray:
    difference = colours - colour
    red = (colours[:, 0] + colour[0]) / 2
    weights = np.stack((2 + red / 256, np.full_like(red, 4), 2 + (255 - red) / 256), -1)
    return np.sqrt((weights * difference**2).sum(-1))


def colorize(label_map: np.ndarray | Tensor, colours: np.ndarray, ignore_index: int = 255) -> np.ndarray:
    """Label map `[H, W]` as an RGB image, uint8 `[H, W, 3]`; void pixels are white.

    Args:
        label_map: class ids `[H, W]`.
        colours: one colour for each class, uint8 `[num_labels, 3]`.
        ignore_index: id of void pixels.

    Raises:
        ValueError: the map is not two-dimensional or has ids without a colour.
    """
    labels = _label_map(label_map, "label_map", len(colours), ignore_index)
    void = labels == ignore_index
    picture = colours[np.where(void, 0, labels)]
    picture[void] = VOID_COLOUR
    return picture


def comparison_figure(
    samples: Sequence[Mapping[str, Any]],
    id2label: Mapping[int, str],
    path: str | Path,
    errors: Sequence[str] | None = None,
    ignore_index: int = 255,
) -> Path:
    """Saves a row per sample: image, truth, each prediction with its mIoU, and maps of the wrong pixels.

    The mIoU in a title is the mean, over the classes in truth or prediction of this one image, of intersection over
    union.

    Args:
        samples: mappings with `image` (RGB: PIL, uint8 `[H, W, 3]` or `[3, H, W]`), `label` (ids `[H, W]`) and
            `predictions` (name -> ids `[H, W]`, in the order of the columns; the same names in each sample).
        id2label: names of the classes 0..num_labels-1.
        path: PNG file to write.
        errors: names of the predictions whose wrong pixels get a column; all by default.
        ignore_index: id of void pixels.

    Returns:
        The path of the picture.

    Raises:
        ValueError: there is no sample, names differ between samples, sizes differ within a sample, or ids are unknown.
    """
    if not samples:
        raise ValueError("samples is empty; a comparison needs at least one sample.")
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(f"id2label has the ids {sorted(id2label)}; it must name 0..{len(id2label) - 1}.")
    names = list(samples[0]["predictions"])
    errors = names if errors is None else list(errors)
    if unknown := set(errors) - set(names):
        raise ValueError(f"errors names {sorted(unknown)}, but the predictions are {names}.")
    colours, present, rows = palette(len(id2label)), set(), []
    for i, sample in enumerate(samples):
        if list(sample["predictions"]) != names:
            raise ValueError(f"samples[{i}] has predictions {list(sample['predictions'])}, samples[0] has {names}.")
        pixels = _rgb(sample["image"])

        def checked(labels: Any, name: str, size: tuple[int, ...] = pixels.shape[:2], i: int = i) -> np.ndarray:
            return _label_map(labels, f"{name} of samples[{i}]", len(id2label), ignore_index, size)

        truth = checked(sample["label"], "label")
        maps = {name: checked(labels, name) for name, labels in sample["predictions"].items()}
        present |= {int(id_) for labels in (truth, *maps.values()) for id_ in np.unique(labels)}
        row = [("input", "", pixels), ("truth", "", colorize(truth, colours, ignore_index))]
        for name, labels in maps.items():
            score = f"mIoU {_mean_iou(labels, truth, len(id2label), ignore_index):.2f}"
            row.append((name, score, colorize(labels, colours, ignore_index)))
        for name in errors:
            wrong = (maps[name] != truth) & (truth != ignore_index)
            share = wrong.sum() / max(1, (truth != ignore_index).sum())
            row.append((f"errors of {name}", f"{share:.1%} wrong", _error_map(pixels, wrong)))
        rows.append(row)
    legend = [(_short(id2label[id_]), colours[id_].tolist()) for id_ in sorted(present - {ignore_index})]
    legend += [("void", VOID_COLOUR)] * (ignore_index in present) + [("wrong", ERROR_COLOUR)] * bool(errors)
    return _save(_grid(rows, legend), path)


def boundary_figure(
    image: Image.Image | np.ndarray | Tensor, maps: Mapping[str, np.ndarray | Tensor], path: str | Path
) -> Path:
    """Saves boundary maps, such as the teacher's b^T and the student's b^S, over the image on one colour scale.

    Args:
        image: RGB image: PIL, uint8 `[H, W, 3]` or uint8 `[3, H, W]`.
        maps: title -> field `[h, w]` at any resolution, resized bilinearly.
        path: PNG file to write.

    Returns:
        The path of the picture.

    Raises:
        ValueError: there is no map, or a map is not two-dimensional and finite.
    """
    fields = _fields(maps)
    low = min(0.0, *(float(field.min()) for field in fields.values()))
    high = max(float(field.max()) for field in fields.values())
    scaled = {name: (field - low) / max(high - low, 1e-12) for name, field in fields.items()}
    return _save(_heat_panels(_rgb(image), scaled, (low, max(high, low + 1e-12)), "boundary"), path)


def relation_figure(
    image: Image.Image | np.ndarray | Tensor,
    relations: Mapping[str, np.ndarray | Tensor],
    point: tuple[int, int],
    path: str | Path,
) -> Path:
    """Saves the relations of one pixel to all positions, such as teacher's and student's, with the pixel marked.

    Each map has its own scale, from 0 or its minimum to its 99th percentile: the maps' patterns are compared, not
    their sharpness.

    Args:
        image: RGB image: PIL, uint8 `[H, W, 3]` or uint8 `[3, H, W]`.
        relations: title -> the pixel's row of the relation matrix as a map `[h, w]`, resized bilinearly.
        point: row and column of the pixel in the image.
        path: PNG file to write.

    Returns:
        The path of the picture.

    Raises:
        ValueError: there is no map, a map is not two-dimensional and finite, or the point lies outside the image.
    """
    pixels = _rgb(image)
    if not (0 <= point[0] < pixels.shape[0] and 0 <= point[1] < pixels.shape[1]):
        raise ValueError(
            f"point {tuple(point)} lies outside the image of {pixels.shape[0]} x {pixels.shape[1]} pixels."
        )
    scaled = {}
    for name, field in _fields(relations).items():
        low, high = min(0.0, float(field.min())), float(np.percentile(field, 99))
        scaled[name] = np.clip((field - low) / max(high - low, 1e-12), 0, 1)
    label = "relation / 99th percentile"
    return _save(_heat_panels(pixels, scaled, (0.0, 1.0), label, point), path)


def _to_numpy(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy has no bfloat16
    return np.asarray(values)


def _rgb(image: Image.Image | np.ndarray | Tensor) -> np.ndarray:
    """Image as uint8 `[H, W, 3]`."""
    pixels = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else _to_numpy(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"image is {pixels.dtype} of shape {pixels.shape}; give a PIL image, uint8 [H, W, 3] or uint8 [3, H, W]."
        )
    return pixels


def _label_map(
    values: Any, name: str, num_labels: int, ignore_index: int, size: tuple[int, ...] | None = None
) -> np.ndarray:
    labels = _to_numpy(values)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} is {labels.dtype} of shape {labels.shape}; give one label map of integers [H, W].")
    if size is not None and labels.shape != tuple(size):
        raise ValueError(f"{name} has shape {labels.shape}, its image {tuple(size)}; resize one to the other.")
    ids = np.unique(labels)
    if (unknown := ids[((ids < 0) | (ids >= num_labels)) & (ids != ignore_index)]).size:
        raise ValueError(f"{name} holds the ids {unknown.tolist()}; known are 0..{num_labels - 1} and {ignore_index}.")
    return labels.astype(np.int64)


def _fields(maps: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not maps:
        raise ValueError("there is no map to draw; give at least one, e.g. {'teacher': ...}.")
    fields = {name: _to_numpy(values).astype(np.float32) for name, values in maps.items()}
    for name, field in fields.items():
        if field.ndim != 2 or not np.isfinite(field).all():
            raise ValueError(f"{name!r} has shape {field.shape}; give a field [h, w] of finite numbers.")
    return fields


def _mean_iou(prediction: np.ndarray, label: np.ndarray, num_labels: int, ignore_index: int) -> float:
    """Mean IoU over the classes of truth or prediction; a void prediction counts as wrong."""
    valid = label != ignore_index
    predicted = np.where(prediction == ignore_index, num_labels, prediction)[valid]
    counts = np.bincount(label[valid] * (num_labels + 1) + predicted, minlength=num_labels * (num_labels + 1))
    confusion = counts.reshape(num_labels, num_labels + 1)
    hits = confusion.diagonal()
    union = confusion.sum(1) + confusion[:, :num_labels].sum(0) - hits
    return float((hits[union > 0] / union[union > 0]).mean()) if union.any() else math.nan


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Brightness 0..1 as `[H, W, 1]`."""
    return np.asarray(Image.fromarray(pixels).convert("L"), np.float32)[..., None] / 255


def _error_map(pixels: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Wrong pixels in colour upon a pale image."""
    pale = np.broadcast_to(205 + 50 * _grey(pixels), pixels.shape).astype(np.uint8)
    return np.where(wrong[..., None], np.array(ERROR_COLOUR, np.uint8), pale)


def _cell_size(pixels: np.ndarray) -> tuple[int, int]:
    """Width and height of a panel: small images are enlarged by a whole number, large ones shrunk."""
    height, width = pixels.shape[:2]
    zoom = max(1, round(256 / width)) if width <= 400 else 400 / width
    return round(zoom * width), round(zoom * height)


def _place(figure: "Figure", pixels: np.ndarray, left: int, top: int, size: tuple[int, int], smooth: bool) -> "Axes":
    """Axes that show an image of `size` with its corner at (left, top), all in pixels of the figure."""
    width, height = (round(DPI * inches) for inches in figure.get_size_inches())
    box = (left / width, 1 - (top + size[1]) / height, size[0] / width, size[1] / height)
    axes = figure.add_axes(box, xticks=[], yticks=[])
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    axes.imshow(np.asarray(resized), interpolation="nearest", aspect="auto")
    axes.spines[:].set(color="0.75", linewidth=0.5)
    return axes


def _title(axes: "Axes", text: str, width: int) -> None:
    # A letter is about 0.6 of the font size wide: long names become smaller before they touch each other.
    longest = max(1, *map(len, text.split("\n")))
    axes.set_title(text, fontsize=min(9.0, width / DPI * 72 / (0.6 * longest)), pad=3, linespacing=1.15)


def _grid(rows: Sequence[Sequence[tuple[str, str, np.ndarray]]], legend: Sequence[tuple[str, Any]]) -> "Figure":
    """Figure of panels (column name, score, pixels) with a legend of colours below."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cell_width = _cell_size(rows[0][0][2])[0]
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
            axes = _place(figure, pixels, GAP + j * (cell_width + GAP), top, size, smooth=name == "input")
            # A blank second line keeps the column names on one height.
            _title(axes, score if i else f"{name}\n{score or ' '}" if score_line else name, cell_width)
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


def _short(name: str, longest: int = 28) -> str:
    """A class name that fits into a legend: in one line, of several synonyms the first ones."""
    name = " ".join(name.split())
    if len(name) > longest:
        name = name[: longest - 1].rstrip(" ,;") + "…"
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves out what starts with an underscore


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

    (height, width), size = pixels.shape[:2], _cell_size(pixels)
    panels = {"input": pixels}
    dark = 0.45 * _grey(pixels)
    for name, field in scaled.items():
        field = np.asarray(Image.fromarray(field).resize((width, height), Image.Resampling.BILINEAR))
        glow = colormaps["inferno"](np.clip(field, 0, 1))[..., :3]
        panels[name] = (255 * (1 - (1 - dark) * (1 - glow))).astype(np.uint8)
    head, bar_width = 30, 105
    canvas = (len(panels) * (size[0] + GAP) + GAP + bar_width, head + size[1] + GAP)
    figure = Figure(figsize=(canvas[0] / DPI, canvas[1] / DPI), dpi=DPI)
    for j, (name, picture) in enumerate(panels.items()):
        axes = _place(figure, picture, GAP + j * (size[0] + GAP), head, size, smooth=True)
        _title(axes, name, size[0])
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


def _save(figure: "Figure", path: str | Path) -> Path:
    figure.savefig(path, format="png", dpi=DPI)
    return Path(path)
