"""Tensor mathematics that several losses need."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...outputs import DenseOutput
from ...utils.distributed import all_reduce_sum
from ...utils.messages import UserError


P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the function runs outside autocast on the device of its first tensor."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = _first_tensor([*args, *kwargs.values()])
        assert first is not None, f"{function.__name__} was given no tensor"
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def _first_tensor(x: Any) -> Tensor | None:
    if isinstance(x, Tensor):
        return x
    items = [*x.features.values(), x.logits] if isinstance(x, DenseOutput) else x
    for item in items if isinstance(items, list | tuple) else ():
        if (found := _first_tensor(item)) is not None:
            return found
    return None


def check_tau(tau: float | Tensor) -> None:
    """Raises a `UserError` for a temperature that is not > 0, a tensor on the CPU alone, or that needs a gradient."""
    if isinstance(tau, Tensor) and tau.requires_grad:
        raise UserError("a temperature needs a gradient, but losses take it as a constant; give tau.detach().")
    # on another device looking would wait for it
    if isinstance(tau, Tensor) and (tau.device.type != "cpu" or torch.compiler.is_compiling()):
        return
    if not 0 < float(tau) < float("inf"):
        raise UserError(f"a temperature is {float(tau):g}; it must be > 0 and finite.")


def at_least_float32(x: Tensor) -> Tensor:
    """Promotes half precision to float32 and leaves float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def mask_fill_value(dtype: torch.dtype) -> float:
    """A logit that a softmax maps to exactly zero; finite, so that a row masked everywhere gives no NaN."""
    return torch.finfo(dtype).min / 4


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of `[B, C, H, W]` to `size` with half-pixel centres (`align_corners=False`)."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def spatial_size(x: Tensor) -> tuple[int, int]:
    """Height and width of `[..., h, w]`."""
    return x.shape[-2], x.shape[-1]


def on_teacher_grid(
    student: Tensor, teacher: Tensor, mask: Tensor | None, *, same_channels: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Brings two maps together for a loss: the student's resized to the teacher's grid, so that no target is blurred.

    Args:
        student: `[B, C, h, w]`.
        teacher: `[B, C, h', w']`, which receives no gradient.
        mask: boolean `[B, h', w']`, True where valid; None for everywhere.
        same_channels: whether channels are compared one by one, so that their numbers must agree.

    Returns:
        Student, teacher (constant) and mask on the teacher's grid, maps in float32 or float64.

    Raises:
        ValueError: if batch, channels or the mask's size differ.
    """
    agree, words = (2, "batch and channels; project one of them first") if same_channels else (1, "batch")
    if student.shape[:agree] != teacher.shape[:agree]:
        shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        raise ValueError(f"{shapes} must agree in {words}.")
    if mask is None:
        mask = torch.ones_like(teacher[:, 0], dtype=torch.bool)
    if mask.shape != teacher[:, 0].shape:
        raise ValueError(f"mask is {tuple(mask.shape)}; it must be {tuple(teacher[:, 0].shape)}, the teacher's grid.")
    return resize(at_least_float32(student), spatial_size(teacher)), at_least_float32(teacher).detach(), mask


def grid_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Size (h, w) of the stride-`stride` grid over images of `size`, rounded up as convolutions do."""
    return -(-size[0] // stride), -(-size[1] // stride)


def image_means(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of each image `[B, ...]` over its positions where `mask` (of the same shape) is True: `[B]`, 0 without any."""
    kept = x.masked_fill(~mask, 0).flatten(1).sum(dim=1)
    return kept / mask.flatten(1).sum(dim=1).clamp_min(1)


def weighted_means(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of each image `[B, ...]`, weighted by `weight` (of the same shape, >= 0): `[B]`, 0 without any."""
    kept = (x.masked_fill(weight == 0, 0) * weight).flatten(1).sum(dim=1)
    return kept / weight.flatten(1).sum(dim=1).clamp_min(1e-6)


def mean_squared_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over images, valid positions and channels of `(student - teacher)²` of two maps `[B, C, h, w]`: scalar."""
    return image_means((student - teacher).square().mean(dim=1), mask).mean()


def attention_map(features: Tensor) -> Tensor:
    """Where a map `[B, C, h, w]` is active: the mean square of each position's channels, `[B, 1, h, w]`, >= 0."""
    return at_least_float32(features).square().mean(dim=1, keepdim=True)


def unit_vectors(x: Tensor, dim: int) -> Tensor:
    """Vectors along `dim` divided by their length, or by 1e-4 where they are shorter: 0 for 0.

    The floor is 1e-8 or 1e-12 in official codes. The gradient of a vector of zeros is divided by it, which would end a run;
    cosines of features that are shorter than 1e-4 throughout are too small here.
    """
    return F.normalize(x, dim=dim, eps=1e-4)


def unit_maps(x: Tensor, mask: Tensor) -> Tensor:
    """Every map of `[B, C, h, w]` as a vector of length 1 over the valid positions: `[B, C, h * w]`, 0 where void."""
    return F.normalize(x.masked_fill(~mask[:, None], 0).flatten(2), dim=2)


def pool_valid(x: Tensor, mask: Tensor, size: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Averages cells of `size` over the valid positions of `x` `[B, C, h, w]`; the last cells may be smaller.

    Returns:
        Means `[B, C, ⌈h / size⌉, ⌈w / size⌉]`, 0 where a cell has no valid position, and which cells have any.
    """
    fraction = F.avg_pool2d(mask[:, None].to(x.dtype), size, ceil_mode=True)
    pooled = F.avg_pool2d(x.masked_fill(~mask[:, None], 0), size, ceil_mode=True)
    return pooled / (fraction + (fraction == 0)), fraction[:, 0] > 0


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    dim: int,
    tau: float | Tensor = 1.0,
    mask: Tensor | None = None,
    entropy: bool = True,
) -> Tensor:
    """KL divergence between softmaxes of two tensors of logits along `dim`, in log space.

    Args:
        student: any shape.
        teacher: the same shape.
        dim: the dimension that a distribution runs over.
        tau: temperature, > 0.
        mask: broadcastable, True where an entry belongs to its distribution; one that is False everywhere gives 0.
        entropy: subtract the teacher's entropy (KL) or not (cross-entropy).

    Returns:
        `KL(softmax(teacher / tau) ‖ softmax(student / tau))` in nat, the shape without `dim`.

    Raises:
        UserError: as `check_tau`.
    """
    check_tau(tau)
    student, teacher = student / tau, teacher / tau
    if mask is not None:
        fill = mask_fill_value(student.dtype)
        student, teacher = student.masked_fill(~mask, fill), teacher.masked_fill(~mask, fill)
    log_q, log_p = student.log_softmax(dim), teacher.log_softmax(dim)
    terms = log_p.exp() * ((log_p - log_q) if entropy else -log_q)
    return (terms if mask is None else terms.masked_fill(~mask, 0)).sum(dim)


def class_means(features: Tensor, classes: Tensor) -> Tensor:
    """Mean feature of every class in every image: `[B, K, C]`, 0 for a class that an image lacks.

    Args:
        features: `[B, C, h, w]`.
        classes: where each class is, `[B, K, h, w]`, boolean or in 0..1; see `Targets.class_masks`.
    """
    weight = classes.flatten(2).to(features.dtype)
    return weight @ features.flatten(2).mT / weight.sum(dim=2, keepdim=True).clamp_min(1e-6)


def class_similarity(features: Tensor, classes: Tensor) -> Tensor:
    """Cosine `[B, K, h, w]` between each position's feature and the mean of every class in its image, `class_means`."""
    means = unit_vectors(class_means(features, classes), dim=2)
    # K numbers a position instead of a map of means with its C
    return (means @ unit_vectors(features.flatten(2), dim=1)).unflatten(2, spatial_size(features))


def moments(
    x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None, over_ranks: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of the whole batch, over all ranks, differentiably; arguments as of `standardize`.

    Returns:
        `x - mean` in the shape of `x`, the mean and the standard deviation, which is at least 1e-6; without a value that
        counts, the mean is 0.
    """
    total = all_reduce_sum if over_ranks else torch.Tensor.clone
    weight = torch.ones_like(x) if mask is None else mask.to(x.dtype).expand_as(x)
    count = total(weight.sum(dims, keepdim=True)).clamp_min(1)
    mean = total((x * weight).sum(dims, keepdim=True)) / count
    centred = x - mean
    variance = total((centred.square() * weight).sum(dims, keepdim=True)) / count
    # the clamp keeps the gradient of the root finite when x is constant
    return centred, mean, variance.clamp_min(1e-12).sqrt()


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
    centred, _, deviation = moments(x, dims, mask, over_ranks)
    return centred / (deviation + eps)


def match_moments(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Gives every channel of the student's map the mean and deviation of the teacher's, over the batch of all ranks.

    Maps are `[B, C, h, w]`, the mask `[B, 1, h, w]` is True where a position counts.
    """
    _, mean, deviation = moments(teacher, (0, 2, 3), mask)
    return standardize(student, (0, 2, 3), mask, eps=1e-6) * deviation + mean


def row_weights(features: Tensor, mask: Tensor | None, mean: bool) -> Tensor:
    """Weight of every row `[B, n]`: 1 / n for each of an image's n valid rows (none below two), or 1."""
    batch, positions, _ = features.shape
    if mask is None:
        mask = torch.ones(batch, positions, dtype=torch.bool, device=features.device)
    if not mean:
        return mask.to(features.dtype)
    num_valid = mask.sum(dim=-1, keepdim=True)
    return (mask & (num_valid >= 2)).to(features.dtype) / num_valid.clamp_min(1)
