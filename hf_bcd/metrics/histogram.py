"""The one counting primitive of the metrics: a histogram for each image."""

import torch
from torch import Tensor


def image_histograms(values: Tensor, size: int) -> Tensor:
    """Counts how often each value occurs in each image.

    Args:
        values: integers in [-1, size), `[B, ...]`; -1 is not counted.
        size: number of bins.

    Returns:
        int64 counts `[B, size]`.
    """
    batch = values.shape[0]
    # -1 gets a bin of its own that is dropped afterwards: selecting the others first would cost a device sync.
    bins = values.flatten(1).long() + 1
    bins += torch.arange(batch, device=values.device)[:, None] * (size + 1)
    return torch.bincount(bins.flatten(), minlength=batch * (size + 1)).view(batch, size + 1)[:, 1:]
