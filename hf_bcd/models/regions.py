"""Arithmetic of detectors that look at regions: samples, targets of boxes and masks, and masks of whole images.

Boxes are xyxy in pixels of the tensor unless said otherwise. Pure functions, none of which waits for a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from .detection_boxes import assign_max_iou, draw, encode_deltas


# whole masks that stand unpacked at a time
MASKS_AT_ONCE = 8


@dataclass
class Regions:
    """A sample of `R` regions an image, objects first.

    Attributes:
        boxes: `[B, R, 4]`.
        truth: index of the object that each is, `[B, R]`; any where it is none.
        positive: is an object, `[B, R]`.
        drawn: is part of the sample at all, `[B, R]`.
        added: is the truth itself, `[B, R]`.
    """

    boxes: Tensor
    truth: Tensor
    positive: Tensor
    drawn: Tensor
    added: Tensor


def sample_regions(
    boxes: Tensor,
    usable: Tensor,
    truths: Sequence[Tensor],
    overlap: float,
    number: int,
    generator: torch.Generator,
) -> Regions:
    """Draws regions to train on: a quarter objects at most, the truths themselves among the candidates.

    Args:
        boxes: candidates `[B, P, 4]`.
        usable: which of them are any, `[B, P]`.
        truths: boxes of each image, `[N, 4]`.
        overlap: least overlap (IoU) with a truth that makes a candidate an object; below it is background.
        number: size of the sample, or P if that is less.
        generator: what the sample is drawn by, on the CPU.
    """
    found: list[tuple[Tensor, ...]] = []
    for candidates, kept, objects in zip(boxes, usable, truths, strict=True):
        candidates = torch.cat([objects, candidates])
        kept = torch.cat([kept.new_ones(len(objects)), kept])
        assigned = assign_max_iou(candidates, objects, overlap, overlap, least=None, usable=kept)
        keys = random_keys(len(candidates), generator, boxes.device)
        size = min(number, boxes.shape[1])
        index, positive, drawn = draw(assigned, keys, size, max(size // 4, 1))
        found.append((candidates[index], assigned[index].clamp_min(0), positive, drawn, index < len(objects)))
    return Regions(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def random_keys(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random numbers in [0, 1), `[count]`: drawn on the CPU, so that they are the same on every device."""
    pinned = device.type == "cuda"  # or copying them there would wait
    return torch.rand(count, generator=generator, pin_memory=pinned).to(device, non_blocking=True)


def region_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Index of the level that a box `[R, 4]` is pooled from: a side of 56 pixels at stride 4, twice that at the next."""
    area = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(dim=1)
    return (area.sqrt() / (14 * strides[0]) + 1e-6).log2().floor().clamp(0, len(strides) - 1).long()


def delta_errors(
    deltas: Tensor, boxes: Tensor, goals: Tensor, positive: Tensor, beta: float, stds: Tensor | None = None
) -> Tensor:
    """Sum of the smooth L1 error of deltas `[..., 4]` from boxes to goals `[..., 4]`, where `positive` `[...]`."""
    unit = (torch.arange(4, device=boxes.device) >= 2).float()  # finite where nothing is positive
    wanted = encode_deltas(*(torch.where(positive[..., None], x, unit) for x in (boxes, goals)))
    wanted = wanted if stds is None else wanted / stds
    error = F.smooth_l1_loss(deltas, wanted, beta=beta, reduction="none")
    return error.masked_fill(~positive[..., None], 0).sum()


def mask_targets(masks: Tensor, boxes: Tensor, truth: Tensor, width: int, size: int) -> Tensor:
    """Masks as regions see them: 1 where at least half of a position is covered, `[objects, size, size]`.

    A few whole masks at a time are unpacked, each once, whatever their number.

    Args:
        masks: of the objects, boolean or uint8 `[N, h, w]`, or packed `[N, h, ceil(width / 8)]`.
        boxes: regions `[R, 4]`.
        truth: index of the object of each, `[R]`, on the CPU; regions with -1 have no target.
        width: of the batch's images.
        size: positions along each side.
    """
    rows = (truth >= 0).nonzero().flatten()
    boxes, truth, targets, places = boxes[rows.to(boxes.device, non_blocking=True)], truth[rows], [], []
    for numbers in truth.unique().split(MASKS_AT_ONCE):
        rows = torch.isin(truth, numbers).nonzero().flatten()
        own = torch.searchsorted(numbers, truth[rows]).to(boxes.device, non_blocking=True)
        whole = unpacked(masks[numbers.to(masks.device, non_blocking=True)], width).to(boxes.dtype)
        rois = torch.cat([own[:, None].to(boxes.dtype), boxes[rows.to(boxes.device, non_blocking=True)]], dim=1)
        targets.append(roi_align(whole[:, None], rois, size, 1.0, 0, aligned=True)[:, 0] >= 0.5)
        places.append(rows)
    if not targets:
        return boxes.new_zeros(0, size, size)
    return torch.cat(targets)[torch.cat(places).argsort().to(boxes.device, non_blocking=True)].to(boxes.dtype)


def unpacked(masks: Tensor, width: int) -> Tensor:
    """Masks `[N, h, w]` of 0 and 1 from packed ones `[N, h, ceil(width / 8)]`; whole ones stay as they are."""
    if masks.dtype != torch.uint8 or masks.shape[-1] != -(-width // 8):
        return masks
    bits = masks[..., None] >> torch.arange(8, dtype=torch.uint8, device=masks.device) & 1
    return bits.flatten(-2)[..., :width]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks inside their boxes as masks of the whole image, interpolated bilinearly, 0 outside.

    Args:
        masks: `[B, K, s, s]`.
        boxes: xyxy relative to the image, `[B, K, 4]`.
        size: height and width of the result.

    Returns:
        `[B, K, *size]`.
    """
    weights = []
    for axis, count in ((1, size[0]), (0, size[1])):
        low, high = boxes[..., axis, None], boxes[..., axis + 2, None]
        centres = (torch.arange(count, device=boxes.device) + 0.5) / count
        position = (centres - low) / (high - low).clamp_min(1e-6) * masks.shape[-1] - 0.5
        cells = torch.arange(masks.shape[-1], device=boxes.device)
        weights.append((1 - (position[..., None] - cells).abs()).clamp_min(0))
    return weights[0] @ masks @ weights[1].transpose(-1, -2)


def clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes `[B, n, 4]` inside images of the sizes `[B, 4]`."""
    return boxes.clamp_min(0).minimum(sizes[:, None])


def solid(boxes: Tensor) -> Tensor:
    """Which boxes `[..., 4]` cover anything, `[...]`."""
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def image_numbers(boxes: Tensor) -> Tensor:
    """Index of the image of each box `[B, n, 4]`, `[B * n]`."""
    return torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
