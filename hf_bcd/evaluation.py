"""From a batch to per-image counts that can be gathered across ranks."""

import math

import torch
from torch import Tensor, nn

from .losses.functional import resize
from .metrics import SemanticMetrics


def same_size_groups(
    pixel_values: Tensor | list[Tensor], labels: Tensor | list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """A batch as one group if it is stacked, image by image if sizes differ (nothing is padded)."""
    if isinstance(pixel_values, Tensor) and isinstance(labels, Tensor):
        return [(pixel_values, labels)]
    return [(image[None], label[None]) for image, label in zip(pixel_values, labels, strict=True)]


def predict(model: nn.Module, pixel_values: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Classes `[B, H, W]` at `size`: logits are up-sampled bilinearly, then arg-max, as the exported pipeline does."""
    logits = model(pixel_values=pixel_values)["logits"].float()
    return resize(logits, (size[0], size[1])).argmax(dim=1)


def pack_counts(counts: dict[str, Tensor]) -> Tensor:
    """Per-image counts of `SemanticMetrics.counts` as one int64 tensor `[B, K]`."""
    return torch.cat([count.flatten(1) for count in counts.values()], dim=1)


def unpack_counts(rows: Tensor, metrics: SemanticMetrics) -> dict[str, Tensor]:
    """Undoes `pack_counts` for rows `[B, K]` of that metric."""
    parts = rows.split([math.prod(shape) for shape in metrics.shapes.values()], dim=1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(metrics.shapes.items(), parts, strict=True)}
