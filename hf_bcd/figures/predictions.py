"""Pictures of what a model says about pictures without a truth."""

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    picture.putpalette(palette_bytes(num_labels))
    return picture


def palette_bytes(num_labels: int) -> bytes:
    """The colours of 256 ids, black beyond the classes."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:num_labels] = palette(num_labels)
    return colours.tobytes()


@contextmanager
def palette_file(path: Path, width: int, height: int, num_labels: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A PNG like that of `palette_picture`, written some rows at a time; it gets its name when it is whole.

    Args:
        path: file to write.
        width: pixels of a row.
        height: how many rows will be written.
        num_labels: number of classes.

    Yields:
        A function that writes the next rows of ids, uint8 `[rows, width]`.
    """
    part, packed = path.with_name(f"{path.name}.part"), zlib.compressobj()
    try:
        with part.open("wb") as file:

            def chunk(kind: bytes, content: bytes) -> None:
                file.write(struct.pack(">I", len(content)) + kind + content)
                file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))))

            def write(rows: np.ndarray) -> None:
                lines = np.pad(rows, ((0, 0), (1, 0)))  # each row says that it is stored as it is
                chunk(b"IDAT", packed.compress(lines.tobytes()))

            file.write(b"\x89PNG\r\n\x1a\n")
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))  # 8 bits, palette
            chunk(b"PLTE", palette_bytes(num_labels))
            yield write
            chunk(b"IDAT", packed.flush())
            chunk(b"IEND", b"")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
