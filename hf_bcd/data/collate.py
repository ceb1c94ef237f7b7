"""Batches of transformed samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks B samples of a `TransformedDataset`.

    Nothing is ever padded: a model would see the padding, and predictions would differ from those of single images.

    Args:
        samples: mappings with `index`, `pixel_values` and `labels`.

    Returns:
        `index` int64 `[B]`, `pixel_values` uint8 `[B, 3, H, W]` and `labels` uint8 `[B, H, W]`. Images, and
        independently labels, of different sizes are lists of B tensors instead.
    """
    return {
        # first, because Trainer takes the batch size from the first tensor that it meets
        "index": torch.tensor([sample["index"] for sample in samples]),
        "pixel_values": _stack([sample["pixel_values"] for sample in samples]),
        "labels": _stack([sample["labels"] for sample in samples]),
    }


def _stack(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors
