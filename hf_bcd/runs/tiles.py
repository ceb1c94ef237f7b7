"""Label maps of pictures too large for one pass: tiles that overlap, blended where they do."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..adapters import DenseAdapter
from ..losses.ops.functional import resize
from ..utils.messages import UserError


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: `tile - overlap` apart, the last one at the end."""
    step = tile - overlap
    return [*range(0, max(1, length - tile), step), *([length - tile] if length > tile else [])]


def ramp(tile: int, overlap: int) -> Tensor:
    """Weights along a side of a tile `[tile]`: they rise linearly over the overlap, are 1 inside, and fall again."""
    place = torch.arange(tile, dtype=torch.float32)
    return (torch.minimum(place + 1, tile - place) / (overlap + 1)).clamp(max=1)


@torch.no_grad()
def predict_tiled(adapter: DenseAdapter, pixels: np.ndarray, tile: int, overlap: int) -> np.ndarray:
    """The classes of a picture, from the weighted sum of the probabilities of its tiles, at the picture's own resolution.

    Probabilities are held for one row of tiles, `4 * num_labels * tile * width` bytes, and the map takes a byte a pixel; the picture
    itself is there as a whole. A picture smaller than a tile is continued by its edges.

    Args:
        adapter: the model, in evaluation mode.
        pixels: uint8 `[H, W, 3]`.
        tile: side of a tile in pixels.
        overlap: how many pixels neighbours have in common.

    Returns:
        uint8 `[H, W]`.

    Raises:
        UserError: tiles of such a size and overlap cover nothing.
    """
    check_tiles(tile, overlap)
    height, width = pixels.shape[:2]
    wide = max(width, tile)
    weight = ramp(tile, overlap)[:, None] * ramp(tile, overlap)
    summed = torch.zeros(adapter.num_labels, tile, wide)
    found = np.empty((height, width), np.uint8)
    rows = starts(height, tile, overlap)
    for top, below in zip(rows, [*rows[1:], height], strict=True):
        for left, shown in row_of(pixels, top, tile, overlap):
            logits = resize(adapter(shown[None].to(adapter.image_mean.device)).logits.float(), (tile, tile))
            summed[:, :, left : left + tile] += weight * logits[0].softmax(0).cpu()
        done = below - top
        found[top:below] = summed[:, :done, :width].argmax(0).byte().numpy()
        summed = torch.cat([summed[:, done:], torch.zeros_like(summed[:, :done])], dim=1)
    return found


def row_of(pixels: np.ndarray, top: int, tile: int, overlap: int) -> Iterator[tuple[int, Tensor]]:
    """The left edge and the pixels, uint8 `[3, tile, tile]`, of each tile of a row."""
    for left in starts(pixels.shape[1], tile, overlap):
        part = pixels[top : top + tile, left : left + tile]
        missing = [(0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)]
        yield left, torch.from_numpy(np.pad(part, missing, mode="edge")).permute(2, 0, 1)


def check_tiles(tile: int, overlap: int) -> None:
    """Refuses tiles that do not advance, or overlap so far that three of them meet."""
    if not 0 <= overlap <= tile // 2 or tile < 1:
        raise UserError(f"--overlap is {overlap} and --tile {tile}; the overlap must be from 0 to half a tile.")
