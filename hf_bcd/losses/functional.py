"""Tensor mathematics that several losses share."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Promotes half precision to float32 and leaves float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def mask_fill_value(dtype: torch.dtype) -> float:
    """A logit that a softmax maps to exactly zero; finite, so that a row masked everywhere gives no NaN."""
    return torch.finfo(dtype).min / 4


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of `[B, C, H, W]` to `size` with half-pixel centres (`align_corners=False`)."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def resize_nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of an integer or boolean map `[B, H, W]` to `size`, its dtype kept."""
    if x.shape[-2:] == size:
        return x
    # integer arithmetic: exact for every id and mask, without a float copy
    rows, columns = (
        (2 * torch.arange(new, device=x.device) + 1) * old // (2 * new)
        for old, new in zip(x.shape[-2:], size, strict=True)
    )
    return x[:, rows[:, None], columns]


def grid_size(labels: Tensor, stride: int) -> tuple[int, int]:
    """Size (h, w) of the stride-`stride` grid over label maps `[B, H, W]`, rounded up as convolutions do."""
    height, width = labels.shape[-2:]
    return -(-height // stride), -(-width // stride)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose backward sums the gradients over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


def is_distributed() -> bool:
    """Whether more than one rank takes part in this run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Differentiable sum of `x` over all ranks; the identity in a single process."""
    return _AllReduceSum.apply(x) if is_distributed() else x  # type: ignore[return-value]


def standardize(
    x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None, eps: float = 1e-5, over_ranks: bool = True
) -> Tensor:
    """Standardises `x` with the mean and deviation of the whole batch, over all ranks, differentiably.

    Args:
        x: any shape.
        dims: the dimensions the statistics run over.
        mask: broadcastable to `x`, True where a value counts. Masked values are transformed but do not count.
        eps: added to the deviation.
        over_ranks: whether the batch is that of all ranks together, which then must all call this, or of this one.

    Returns:
        `(x - mean) / (std + eps)`, shape of `x`. Constant input gives zeros with a finite gradient.
    """
    total = all_reduce_sum if over_ranks else torch.Tensor.clone
    weight = torch.ones_like(x) if mask is None else mask.to(x.dtype).expand_as(x)
    count = total(weight.sum(dims, keepdim=True)).clamp_min(1)
    mean = total((x * weight).sum(dims, keepdim=True)) / count
    centred = x - mean
    variance = total((centred.square() * weight).sum(dims, keepdim=True)) / count
    # the clamp keeps the gradient of the root finite when x is constant
    return centred / (variance.clamp_min(1e-12).sqrt() + eps)


def row_weights(features: Tensor, mask: Tensor | None, mean: bool) -> Tensor:
    """Weight of every row `[B, n]`: those of an image's valid rows add up to one, or are one each."""
    batch, positions, _ = features.shape
    if mask is None:
        mask = torch.ones(batch, positions, dtype=torch.bool, device=features.device)
    if not mean:
        return mask.to(features.dtype)
    num_valid = mask.sum(dim=-1, keepdim=True)
    return (mask & (num_valid >= 2)).to(features.dtype) / num_valid.clamp_min(1)
