"""The supervised loss of semantic segmentation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import at_least_float32, full_precision, resize


@full_precision
def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    num_valid: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Pixel cross-entropy of bilinearly up-sampled logits.

    Args:
        logits: `[B, num_labels, h, w]` at any stride.
        labels: class ids `[B, H, W]`, `ignore_index` where void.
        ignore_index: label that does not count.
        num_valid: number of valid pixels to divide by, each counted with the weight of its class, a scalar; of `labels` by
            default. Ranks and accumulated batches with unequal void shares give the gradient of one large batch if all
            divide by the same number.
        class_weights: weight of each class's pixels `[num_labels]`, >= 0; 1 by default.

    Returns:
        Scalar >= 0, float32; a connected 0 if no pixel is valid.
    """
    logits = resize(at_least_float32(logits), (labels.shape[-2], labels.shape[-1]))
    weights = None if class_weights is None else class_weights.to(logits)
    total = F.cross_entropy(logits, labels, weight=weights, ignore_index=ignore_index, reduction="sum")
    if num_valid is None:
        num_valid = count_valid(labels, ignore_index, weights)
    return total / torch.where(num_valid > 0, num_valid, 1)


def count_valid(labels: Tensor, ignore_index: int, class_weights: Tensor | None = None) -> Tensor:
    """Number of pixels that are not void, each counted with the weight of its class: scalar."""
    valid = labels != ignore_index
    if class_weights is None:
        return valid.sum()
    return class_weights[labels.long().masked_fill(~valid, 0)].masked_fill(~valid, 0).sum()
