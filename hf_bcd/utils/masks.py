"""Masks of objects: COCO's run-length encoding, and bits packed along the width."""

from typing import Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor


class RLE(TypedDict):
    """A mask in COCO's compressed form: height and width, and the runs."""

    size: list[int]
    counts: bytes


def encode(mask: Any) -> RLE:
    """The encoding of a mask `[h, w]`, boolean or 0 and 1; an array, or a tensor on the CPU."""
    from faster_coco_eval.core import mask as coco  # takes a while to import

    return cast(RLE, coco.encode(np.asfortranarray(np.asarray(mask), dtype=np.uint8)))


def decode(rle: RLE) -> np.ndarray:
    """The mask of an encoding, boolean `[h, w]`."""
    from faster_coco_eval.core import mask as coco

    return coco.decode(dict(rle)).astype(bool)


def pack(mask: Tensor) -> Tensor:
    """Boolean `[..., H, W]` as bits, uint8 `[..., H, ceil(W / 8)]`: the lowest bit of a byte is its leftmost pixel."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: Tensor, width: int) -> Tensor:
    """Inverse of `pack`: boolean `[..., H, width]`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :width].bool()
