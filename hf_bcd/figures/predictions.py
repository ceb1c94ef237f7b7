"""Pictures of what a model says about pictures without a truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..utils.masks import RLE, decode
from .panels import grid, rgb, save, short, to_numpy
from .segmentation import VOID_COLOUR, palette


OPACITY = 0.5  # of a class over the picture
SHEET_WIDTH = 400  # pixels of a panel


def palette_picture(labels: np.ndarray, num_labels: int) -> Image.Image:
    """A map of ids `[H, W]` as a picture whose stored values are the ids, shown in the classes' colours."""
    picture = Image.fromarray(labels.astype(np.uint8))
    colours = np.zeros((256, 3), np.uint8)
    colours[:num_labels] = palette(num_labels)
    picture.putpalette(colours.flatten().tolist())
    return picture


def label_overlay(image: Image.Image, labels: np.ndarray, num_labels: int) -> Image.Image:
    """A picture with its classes in colours half over it."""
    return Image.blend(image, palette_picture(labels, num_labels).convert("RGB"), OPACITY)


def box_overlay(
    image: Image.Image, found: Mapping[str, Any], id2label: Mapping[int, str], least_score: float
) -> Image.Image:
    """A picture with the boxes, classes and scores of what was found; masks half over it where there are any."""
    colours, picture = palette(min(len(id2label), 255)), image.copy()
    scores, labels, boxes = (to_numpy(found[name]) for name in ("scores", "labels", "boxes"))
    shown = np.flatnonzero(scores >= least_score)[::-1]  # the best on top
    masks: Sequence[RLE] | None = found.get("masks")
    if masks is not None:
        pixels = np.asarray(picture).astype(np.float32)
        for place in shown:
            inside = decode(masks[place]).astype(bool)
            pixels[inside] = (1 - OPACITY) * pixels[inside] + OPACITY * colours[int(labels[place]) % 255]
        picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw, line = ImageDraw.Draw(picture), max(2, round(max(image.size) / 400))
    for place in shown:
        colour = tuple(colours[int(labels[place]) % 255].tolist())
        left, top, right, bottom = boxes[place].tolist()
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=line)
        draw.text((left + line, top + line), f"{id2label[int(labels[place])]} {scores[place]:.2f}", fill=colour)
    return picture


def contact_sheet(
    pictures: Sequence[tuple[str, Any, Any]], present: Sequence[int], id2label: Mapping[int, str], path: Path
) -> Path:
    """Saves a row for each picture: itself, and what was found in it.

    Args:
        pictures: name, picture and overlay of each.
        present: ids of the classes that occur, for the legend.
        id2label: names of the classes.
        path: PNG file to write; it is returned.
    """
    colours = palette(min(len(id2label), 255))
    rows = [[("input", "", thumbnail(one)), ("prediction", "", thumbnail(drawn))] for _, one, drawn in pictures]
    legend = [(short(id2label[index]), colours[index % 255].tolist()) for index in sorted(present)]
    return save(grid(rows, legend or [("nothing found", VOID_COLOUR)]), path)


def thumbnail(image: Image.Image) -> np.ndarray:
    """A picture no wider than a panel."""
    if image.width > SHEET_WIDTH:
        image = image.resize((SHEET_WIDTH, max(1, round(image.height * SHEET_WIDTH / image.width))))
    return rgb(image)
