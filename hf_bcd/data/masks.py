"""Stored masks of objects as run lengths, and what the transforms make of these."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.masks import RLE, decode_box, run_lengths
from ..utils.messages import UserError
from .boxes import RawBoxes


MIN_POINTS = 3


def to_rle(segmentation: Any, height: int, width: int, name: str) -> RLE:
    """Run lengths of a stored mask, at the size of its picture.

    Args:
        segmentation: polygons `[x, y, x, y, ...]` in pixels, of which those of fewer than three points are left out; run
            lengths, compressed or not; either as JSON bytes; or `{"fractions": polygons}` relative to the picture.
        height: of the picture.
        width: of the picture.
        name: the picture and the object, for error messages.

    Raises:
        UserError: it is none of these, has another size, or lies far outside of the picture.
    """
    from faster_coco_eval.core import mask as library

    segmentation = json.loads(segmentation) if isinstance(segmentation, bytes) else segmentation
    if isinstance(segmentation, Mapping) and "counts" in segmentation:
        return _checked_runs(segmentation["counts"], segmentation.get("size"), height, width, name)
    scale = (1, 1)
    try:
        if isinstance(segmentation, Mapping):
            segmentation, scale = segmentation["fractions"], (width, height)
        if len(segmentation) and isinstance(segmentation[0], int | float):
            segmentation = [segmentation]
        polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) * scale for polygon in segmentation]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{name}: neither polygons nor run lengths ({error!r}). A mask is a list of polygons [x, y, x, y, ...] in "
            "pixels, or {'counts', 'size': [height, width]}. Correct or remove it."
        ) from error
    if len(polygons) >= MIN_POINTS and all(len(polygon) == 1 for polygon in polygons):
        polygons = [np.concatenate(polygons)]  # a list of points
    polygons = [polygon for polygon in polygons if len(polygon) >= MIN_POINTS]  # the library reads two points as a box
    for polygon in polygons:
        # the library's time and memory grow with the way that an outline goes outside
        near = (np.abs(polygon) <= 2 * np.array([width, height]) + 1).all(axis=1)
        if not near.all():
            far = polygon[~near][0].tolist()
            raise UserError(
                f"{name}: a polygon with the point {far} of a picture of {width}x{height} (width x height). Polygons are in "
                "pixels of the picture. Correct or remove it."
            )
    if not polygons:
        return library.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)  # type: ignore[return-value]
    return library.merge(library.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width))  # type: ignore[arg-type]


def _checked_runs(counts: Any, size: Any, height: int, width: int, name: str) -> RLE:
    from faster_coco_eval.core import mask as library

    try:
        held = [int(side) for side in size]
    except (TypeError, ValueError):
        held = size
    if held != [height, width]:
        raise UserError(
            f"{name}: run lengths of size {held!r} (height, width), but the image is {[height, width]}. A mask has the size of "
            "its picture: check that they belong together."
        )
    runs: RLE | None = None
    try:
        if isinstance(counts, str | bytes):
            runs = {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
            counts = run_lengths(runs)
        elif wrong := [count for count in counts if not isinstance(count, int | np.integer) or count < 0]:
            raise ValueError(f"{wrong[0]!r} is no number of pixels")
        if (total := sum(counts)) != height * width:  # also of a text that was cut short
            raise ValueError(f"they add up to {total} pixels, not to {height * width}")
        return runs or library.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)  # type: ignore[return-value]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: run lengths that no mask has ({error}). Correct or remove it.") from error


def canonical_masks(raw: RawBoxes, size: tuple[int, int], name: str) -> list[RLE]:
    """The masks of a picture of a size (width, height), in the order of its boxes; raises as `to_rle` and `check_masks` do."""
    check_masks(raw, name)
    return [
        to_rle(mask, size[1], size[0], f"{name}: the mask of box {place}")
        for place, mask in enumerate(raw.masks or ())
    ]


def check_masks(raw: RawBoxes, name: str) -> None:
    """Refuses boxes without a mask; `name` says of which file or row."""
    masks = [None] * len(raw.boxes) if raw.masks is None else raw.masks
    if lacking := [place for place, mask in enumerate(masks) if not mask]:
        raise UserError(
            f"{name}: {len(lacking)} of {len(masks)} boxes have no mask, such as box {lacking[0]}. Instance segmentation "
            "needs one of every object: add or remove it, or train on boxes (`--task object-detection`)."
        )


def form_of(segmentation: Any) -> str:
    """How a mask is stored, in words."""
    text = segmentation[:1] if isinstance(segmentation, bytes) else b""
    runs = text == b"{" or (isinstance(segmentation, Mapping) and "counts" in segmentation)
    return "run lengths" if runs else "polygons"


def transform_masks(masks: Sequence[RLE], height: int, width: int, flip: bool = False) -> Tensor:
    """Masks resized to another size, and then flipped, one at a time: uint8 `[N, height, ceil(width / 8)]`, see `pack`.

    A pixel is that of the source under its centre, as torchvision's `NEAREST_EXACT` takes it.
    """
    packed = np.zeros((len(masks), height, -(-width // 8)), np.uint8)
    old = masks[0]["size"] if masks else (1, 1)
    rows, columns = (
        (2 * np.arange(new) + 1) * size // (2 * new) for new, size in zip((height, width), old, strict=True)
    )
    for place, rle in enumerate(masks):
        left, top, inside = decode_box(rle)
        above, below = np.searchsorted(rows, [top, top + inside.shape[0]])
        before, behind = np.searchsorted(columns, [left, left + inside.shape[1]])
        shown = inside[rows[above:below] - top][:, columns[before:behind] - left]
        if shown.size:
            if flip:
                shown, before, behind = shown[:, ::-1], width - behind, width - before
            first, end = before // 8, -(-behind // 8)
            block = np.zeros((below - above, 8 * (end - first)), bool)
            block[:, before - 8 * first : behind - 8 * first] = shown
            packed[place, above:below, first:end] = np.packbits(block, axis=1, bitorder="little")
    return torch.from_numpy(packed)
