"""The supervised loss of semantic segmentation."""

import torch.nn.functional as F
from torch import Tensor

from .functional import at_least_float32, full_precision, resize


@full_precision
def segmentation_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, num_valid: Tensor | None = None
) -> Tensor:
    """Pixel cross-entropy of bilinearly up-sampled logits.

    Args:
        logits: `[B, num_labels, h, w]` at any stride.
        labels: class ids `[B, H, W]`, `ignore_index` where void.
        ignore_index: label that does not count.
        num_valid: number of valid pixels to divide by, a scalar; counted in `labels` by default. Ranks and accumulated
            batches with unequal void shares give the gradient of one large batch if all divide by the same number.

    Returns:
        Scalar >= 0, float32; a connected 0 if no pixel is valid.
    """
    logits = resize(at_least_float32(logits), (labels.shape[-2], labels.shape[-1]))
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    if num_valid is None:
        num_valid = (labels != ignore_index).sum()
    return total / num_valid.clamp_min(1)
