"""Batches of transformed samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..utils.messages import UserError


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks B samples: `index` int64 `[B]`, `pixel_values` uint8 `[B, 3, H, W]` and `labels` uint8 `[B, H, W]`.

    Images, and independently labels, of different sizes are lists of B tensors instead. Nothing is ever padded: a model
    would see the padding, and predictions would differ from those of single images.
    """
    return {
        # first, because Trainer takes the batch size from the first tensor that it meets
        "index": torch.tensor([sample["index"] for sample in samples]),
        "pixel_values": _stack([sample["pixel_values"] for sample in samples]),
        "labels": _stack([sample["labels"] for sample in samples]),
    }


def _stack(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors


def check_one_size(batch: Mapping[str, Any]) -> None:
    """Refuses a training batch that could not be stacked; the `UserError` names two sizes of its images or masks."""
    for key, kind in (("pixel_values", "images"), ("labels", "masks")):
        if isinstance(batch[key], list):
            sizes = sorted({tuple(tensor.shape[-2:]) for tensor in batch[key]})
            (height, width), (other_height, other_width) = sizes[0], sizes[-1]
            raise UserError(
                f"training {kind} of {height} x {width} and of {other_height} x {other_width} pixels cannot be stacked into "
                "one batch. Crop or resize them to one size in the data set's transform; a set of load_dense_dataset is "
                "cropped to crop_size by itself."
            )
