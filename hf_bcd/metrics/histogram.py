"""The one counting primitive of the metrics: a histogram for each image."""

import torch
from torch import Tensor


def image_histograms(values: Tensor, size: int) -> Tensor:
    """How often each value occurs in each image: int64 `[B, size]`.

    Values are integers in [0, size], `[B, ...]`, of a type that holds `B·(size + 1)`; `size` itself is not counted.
    """
    batch = values.shape[0]
    # what is not counted gets a bin of its own: selecting the others first would cost a device sync
    bins = values.flatten(1)
    if batch > 1:
        bins = bins + torch.arange(batch, device=values.device, dtype=bins.dtype)[:, None] * (size + 1)
    return torch.bincount(bins.flatten(), minlength=batch * (size + 1)).view(batch, size + 1)[:, :-1]
