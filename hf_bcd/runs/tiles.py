"""Label maps of pictures too large for one pass: tiles that overlap, blended where they do, one row of them after another."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..adapters import DenseAdapter
from ..losses.ops.functional import resize
from ..utils.messages import UserError


class Rows(Protocol):
    """A picture that is read from its first row to its last."""

    height: int
    width: int

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows in RGB, uint8 `[bottom - top, width, 3]`."""
        ...


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Where tiles begin along a side, and from where on they count.

    Tiles are `tile - overlap` apart. The last one ends at the end, and counts from `overlap` pixels before the end of the one before
    it, so that never more than two tiles meet and never more than `overlap` pixels are waiting for the next one.
    """
    places = [(0, 0)]
    while (end := places[-1][0] + tile) < length:
        places.append((min(end - overlap, length - tile), end - overlap))
    return places


def ramp(length: int, overlap: int, first: bool, last: bool) -> Tensor:
    """Weights `[length]`: 1, but linear over the overlap with the tile before and after; two neighbours weigh 1 together."""
    weight, rise = torch.ones(length), torch.arange(1, overlap + 1) / (overlap + 1)
    if not first:
        weight[:overlap] *= rise
    if not last:
        weight[length - overlap :] *= rise.flip(0)
    return weight


@torch.no_grad()
def predict_tiled(adapter: DenseAdapter, picture: Rows, tile: int, overlap: int) -> Iterator[np.ndarray]:
    """The classes of a picture, from the weighted sum of the probabilities of its tiles, at the picture's own resolution.

    Memory: `3 * tile * width` bytes of the picture, and probabilities where the next row of tiles is awaited,
    `4 * num_labels * overlap * width` bytes. A picture smaller than a tile is continued by its edges.

    Args:
        adapter: the model, in evaluation mode.
        picture: its pixels.
        tile: side of a tile in pixels.
        overlap: how many pixels neighbours have in common.

    Yields:
        The next rows, uint8 `[rows, W]`; all together `[H, W]`.

    Raises:
        UserError: tiles of such a size and overlap cover nothing.
    """
    check_tiles(tile, overlap)
    height, width = picture.height, picture.width
    down, along = spans(height, tile, overlap), spans(width, tile, overlap)
    waiting = torch.zeros(adapter.num_labels, overlap, max(width, tile))  # of the row of tiles above
    band = np.empty((0, width, 3), np.uint8)
    for row, (top, used) in enumerate(down):
        last_row = row == len(down) - 1
        read = 0 if row == 0 else down[row - 1][0] + tile
        band = np.concatenate([band[top - read + len(band) :], picture.read(read, min(top + tile, height))])
        rows = tile - (used - top)
        done = rows if last_row else rows - overlap
        found = np.empty((done, max(width, tile)), np.uint8)
        beside = torch.zeros(adapter.num_labels, rows, overlap)  # of the tile to the left
        for column, (left, start) in enumerate(along):
            last = column == len(along) - 1
            shown = filled(band[:, left : left + tile], tile)[None].to(adapter.image_mean.device)
            logits = resize(adapter(shown).logits.float(), (tile, tile))[0, :, used - top :, start - left :]
            columns = logits.shape[2]
            weight = ramp(rows, overlap, row == 0, last_row)[:, None] * ramp(columns, overlap, column == 0, last)
            summed = weight * logits.softmax(0).cpu()
            summed[:, :, :overlap] += beside
            whole = columns if last else columns - overlap
            beside, summed = summed[:, :, whole:].clone(), summed[:, :, :whole]
            place = slice(start, start + whole)
            summed[:, :overlap] += waiting[:, :, place]
            found[:, place] = summed[:, :done].argmax(0).byte().numpy()
            if not last_row:
                waiting[:, :, place] = summed[:, done:]
        yield found[: height - used, :width]


def filled(part: np.ndarray, tile: int) -> Tensor:
    """Pixels of a tile, uint8 `[3, tile, tile]`, continued by their edges."""
    missing = [(0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)]
    return torch.from_numpy(np.pad(part, missing, mode="edge")).permute(2, 0, 1)


def check_tiles(tile: int, overlap: int) -> None:
    """Refuses tiles that do not advance, or overlap so far that three of them meet."""
    if not 0 <= overlap <= tile // 2 or tile < 1:
        raise UserError(f"--overlap is {overlap} and --tile {tile}; the overlap must be from 0 to half a tile.")
