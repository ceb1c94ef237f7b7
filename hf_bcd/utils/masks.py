"""Masks of single objects: COCO's compressed run lengths, column by column, and bits packed along the width.

Run lengths are `{"size": [height, width], "counts": bytes}`, as faster-coco-eval and pycocotools read and write them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


RLE = dict[str, Any]


def encode(mask: np.ndarray | Tensor) -> RLE:
    """Run lengths of a mask, bool or 0 and 1 `[h, w]`; what lies outside of its box costs no time."""
    mask = np.asarray(mask).astype(bool, copy=False)
    height, width = mask.shape
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return _from_bounds(np.zeros(0, np.int64), height, width)
    mask = mask[rows[0] : rows[-1] + 1]
    columns = np.flatnonzero(mask.any(axis=0))
    inside = np.zeros((columns[-1] - columns[0] + 1, len(mask) + 2), np.int8)
    inside[:, 1:-1] = mask[:, columns[0] : columns[-1] + 1].T
    column, row = np.nonzero(inside[:, 1:] != inside[:, :-1])
    bounds = (column + columns[0]) * height + row + rows[0]
    if len(mask) == height:  # a run may go on in the next column
        goes_on = bounds[1:-1:2] == bounds[2::2]
        bounds = bounds[np.concatenate([[True], ~np.repeat(goes_on, 2), [True]])]
    return _from_bounds(bounds, height, width)


def encode_ids(ids: np.ndarray) -> dict[int, RLE]:
    """Run lengths of every id but 0 in a map of integers `[h, w]`, ascending, in one pass."""
    flat = ids.T.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    ends, owners = np.append(starts[1:], flat.size), flat[starts]
    order = np.argsort(owners, kind="stable")
    order = order[owners[order] != 0]
    bounds = np.stack([starts, ends], axis=1)[order]
    found, first = np.unique(owners[order], return_index=True)
    parts = np.split(bounds, first[1:]) if len(found) else []
    return {int(index): _from_bounds(part.ravel(), *ids.shape) for index, part in zip(found, parts, strict=True)}


def _from_bounds(bounds: np.ndarray, height: int, width: int) -> RLE:
    """Run lengths of flat places, column by column, at which a mask begins and ends in turn."""
    from faster_coco_eval.core import mask as library

    counts = np.diff(np.concatenate([[0], bounds, [height * width]])).tolist()
    counts = counts[:-1] if len(counts) > 1 and not counts[-1] else counts
    return library.frPyObjects({"size": [height, width], "counts": counts}, height, width)  # type: ignore[return-value]


def decode(rle: RLE) -> np.ndarray:
    """The whole mask, bool `[h, w]`."""
    from faster_coco_eval.core import mask as library

    return library.decode(rle).astype(bool)


def decode_box(rle: RLE) -> tuple[int, int, np.ndarray]:
    """Left and top of the smallest box around a mask, and the mask inside, bool `[h, w]`; 0 x 0 if it is empty.

    Its columns only are decoded, in a tenth of the time for most masks.
    """
    from faster_coco_eval.core import mask as library

    left, top, width, height = np.asarray(library.toBbox([rle]))[0].astype(int).tolist()
    if not width:
        return 0, 0, np.zeros((0, 0), bool)
    full, counts = rle["size"][0], run_lengths(rle)
    ends = np.minimum(np.maximum(np.cumsum(counts) - left * full, 0), width * full)
    ones = np.arange(len(counts) + 1) % 2 == 1
    ones[-1] = False  # run lengths may leave out the zeros at the end
    columns = np.repeat(ones, np.diff(ends, prepend=0, append=width * full)).reshape(width, full)
    return left, top, columns[:, top : top + height].T


def run_lengths(rle: RLE) -> list[int]:
    """The numbers of pixels without and with the mask in turn, column by column."""
    from faster_coco_eval import mask_api_new_cpp as library  # type: ignore[attr-defined]

    return library.toUncompressedRLE([rle])[0]["counts"]


def mask_areas(masks: Sequence[RLE]) -> np.ndarray:
    """Number of pixels of each mask, float64 `[N]`."""
    from faster_coco_eval.core import mask as library

    return np.array(library.area(list(masks)) if len(masks) else [], np.float64)


def mask_ious(masks: Sequence[RLE], others: Sequence[RLE], crowd: np.ndarray | None = None) -> np.ndarray:
    """Intersection over union of all pairs of masks: float64 `[N, M]`; with a crowd, the intersection over the first's area."""
    from faster_coco_eval.core import mask as library

    if not len(masks) or not len(others):
        return np.zeros((len(masks), len(others)))
    return np.asarray(library.iou(list(masks), list(others), [0] * len(others) if crowd is None else crowd.tolist()))


def mask_boxes(masks: Sequence[RLE]) -> np.ndarray:
    """The smallest box around each mask: left, top, right and bottom in pixels, float64 `[N, 4]`; 0 if it is empty."""
    from faster_coco_eval.core import mask as library

    boxes = np.array(library.toBbox(list(masks)) if len(masks) else [], np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def union(masks: Sequence[RLE]) -> RLE:
    """The pixels of at least one of several masks of a size; empty, of 0 x 0 pixels, without any."""
    from faster_coco_eval.core import mask as library

    return library.merge(list(masks))  # type: ignore[return-value, arg-type]


def pack(mask: Tensor) -> Tensor:
    """Eight pixels of a row in each byte, the leftmost in its lowest bit: bool `[..., H, W]` to uint8 `[..., H, ceil(W / 8)]`."""
    bits = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, width: int) -> Tensor:
    """What `pack` has packed: uint8 `[..., H, ceil(width / 8)]` to bool `[..., H, width]`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :width].bool()
