"""Pictures of label maps: colours, comparisons of predictions, maps of wrong pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .panels import Field, grey, grid, rgb, save, short, to_numpy


FIRST_COLOURS = (
    (143, 190, 222), (206, 190, 140), (140, 120, 162), (192, 120, 92), (84, 152, 86), (34, 34, 42), (216, 40, 62),
    (32, 76, 166), (242, 196, 52), (90, 196, 186), (228, 130, 190), (122, 78, 40),
)  # fmt: skip
VOID_COLOUR = (255, 255, 255)
ERROR_COLOUR = (206, 0, 130)


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


def colorize(label_map: Field, colours: np.ndarray, ignore_index: int = 255) -> np.ndarray:
    """Label map `[H, W]` as an RGB image, uint8 `[H, W, 3]`, in `colours` of `palette`; void pixels are white.

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
    """Saves a row per sample: image, truth, each prediction with its score, and maps of the wrong pixels.

    Args:
        samples: mappings with `image` (RGB: PIL, uint8 `[H, W, 3]` or `[3, H, W]`), `label` (ids `[H, W]`),
            `predictions` (name -> ids `[H, W]`, in the order of the columns; the same names in each sample) and
            perhaps `scores` (name -> text above the prediction).
        id2label: names of the classes 0..num_labels-1.
        path: PNG file to write; it is returned.
        errors: names of the predictions whose wrong pixels get a column; all by default.
        ignore_index: id of void pixels.

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
        pixels = rgb(sample["image"])

        def checked(labels: Any, name: str, size: tuple[int, ...] = pixels.shape[:2], i: int = i) -> np.ndarray:
            return _label_map(labels, f"{name} of samples[{i}]", len(id2label), ignore_index, size)

        truth = checked(sample["label"], "label")
        maps = {name: checked(labels, name) for name, labels in sample["predictions"].items()}
        present |= {int(id_) for labels in (truth, *maps.values()) for id_ in np.unique(labels)}
        row = [("input", "", pixels), ("truth", "", colorize(truth, colours, ignore_index))]
        for name, labels in maps.items():
            row.append((name, sample.get("scores", {}).get(name, ""), colorize(labels, colours, ignore_index)))
        for name in errors:
            wrong = (maps[name] != truth) & (truth != ignore_index)
            share = wrong.sum() / max(1, (truth != ignore_index).sum())
            row.append((f"errors of {name}", f"{share:.1%} wrong", _error_map(pixels, wrong)))
        rows.append(row)
    legend = [(short(id2label[id_]), colours[id_].tolist()) for id_ in sorted(present - {ignore_index})]
    legend += [("void", VOID_COLOUR)] * (ignore_index in present) + [("wrong", ERROR_COLOUR)] * bool(errors)
    return save(grid(rows, legend), path)


def prediction_strip(pixel_values: Tensor, labels: Tensor, prediction: Tensor, num_labels: int) -> np.ndarray:
    """Input uint8 `[3, h, w]`, truth and prediction `[H, W]` side by side: uint8 `[H, 3 W, 3]`."""
    height, width = prediction.shape
    image = Image.fromarray(pixel_values.permute(1, 2, 0).numpy()).resize((width, height))
    colours = palette(num_labels)
    return np.concatenate([np.asarray(image), colorize(labels, colours), colorize(prediction, colours)], 1)


def _label_map(
    values: Any, name: str, num_labels: int, ignore_index: int, size: tuple[int, ...] | None = None
) -> np.ndarray:
    labels = to_numpy(values)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} is {labels.dtype} of shape {labels.shape}; give one label map of integers [H, W].")
    if size is not None and labels.shape != tuple(size):
        raise ValueError(f"{name} has shape {labels.shape}, its image {tuple(size)}; resize one to the other.")
    ids = np.unique(labels)
    if (unknown := ids[((ids < 0) | (ids >= num_labels)) & (ids != ignore_index)]).size:
        raise ValueError(f"{name} holds the ids {unknown.tolist()}; known are 0..{num_labels - 1} and {ignore_index}.")
    return labels.astype(np.int64)


def _error_map(pixels: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Wrong pixels in colour upon a pale image."""
    pale = np.broadcast_to(205 + 50 * grey(pixels), pixels.shape).astype(np.uint8)
    return np.where(wrong[..., None], np.array(ERROR_COLOUR, np.uint8), pale)
