"""Arithmetic of detectors: anchors, box codes, assignment of truths to priors, samples, and losses. Pure functions.

Boxes are `[..., 4]` xyxy in pixels of the tensor unless said otherwise. Everything is computed in the device's queue:
no function but `keep_best` waits for a value. Sources: mmdetection 3.3, whose numbers these functions reproduce.
"""

import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F


BACKGROUND, IGNORED = -1, -2
# mmdetection's DeltaXYWHBBoxCoder: boxes grow by at most this factor
MAX_LOG_SCALE = math.log(1000 / 16)
EPS = 1e-6
# bounds the memory of an assignment: 32 x 270,000 overlaps are 35 MB
TRUTHS_AT_ONCE = 32


def grid_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Top left corners (x, y) of the cells of a level, `[height * width, 2]`, row by row: mmdetection adds no half cell."""
    y = torch.arange(height, device=device, dtype=torch.float32) * stride
    x = torch.arange(width, device=device, dtype=torch.float32) * stride
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)


def square_priors(height: int, width: int, stride: int, device: torch.device, scale: int = 8) -> Tensor:
    """GFL's priors: one square of side `scale` strides around each cell's corner, `[height * width, 4]`."""
    centres = grid_centres(height, width, stride, device)
    return torch.cat([centres - scale * stride / 2, centres + scale * stride / 2], dim=1)


def anchor_boxes(
    height: int, width: int, stride: int, device: torch.device, scale: int = 4, octave: int = 3
) -> Tensor:
    """RetinaNet's nine anchors a cell (Lin et al., ICCV 2017, Sec. 4), `[height * width * 9, 4]`; three with `octave=1`.

    Three ratios height / width (0.5, 1, 2), in each the sides of `scale * 2^(k / octave)` strides, k < octave; neither
    rounded nor clipped.
    """
    sides = scale * stride * 2 ** (torch.arange(octave, device=device) / octave)
    roots = 2 ** ((torch.arange(3, device=device) - 1) / 2)[:, None]
    half = torch.stack([(sides / roots).flatten(), (sides * roots).flatten()], dim=-1) / 2
    centres = grid_centres(height, width, stride, device)[:, None]
    return torch.cat([centres - half, centres + half], dim=-1).flatten(0, 1)


def encode_deltas(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Offset of centres in anchor sizes and logarithm of the ratio of sizes: (dx, dy, dw, dh)."""
    size, target_size = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    offset = (boxes[..., 2:] + boxes[..., :2] - anchors[..., 2:] - anchors[..., :2]) / 2
    return torch.cat([offset / size, (target_size / size).log()], dim=-1)


def decode_deltas(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Inverse of `encode_deltas`, up to the limit of |dw| and |dh|."""
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., 2:] + anchors[..., :2]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def decode_distances(centres: Tensor, distances: Tensor) -> Tensor:
    """Boxes from the distances (left, top, right, bottom) of their sides to a point `[..., 2]`."""
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)


def expected_distances(log_probabilities: Tensor) -> Tensor:
    """Mean of distributions over the distances 0, 1, ..., bins: `[..., bins + 1]` -> `[...]`."""
    steps = torch.arange(log_probabilities.shape[-1], device=log_probabilities.device, dtype=log_probabilities.dtype)
    # no matrix product, which autocast would compute with 8 bits
    return (log_probabilities.exp() * steps).sum(dim=-1)


def box_overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes whose shapes broadcast, and the generalised one (Rezatofighi et al., CVPR 2019)."""
    ax0, ay0, ax1, ay1 = a.unbind(-1)
    bx0, by0, bx1, by1 = b.unbind(-1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp_min(0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp_min(0)
    inside = width * height
    union = ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inside).clamp_min(EPS)
    hull = (torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)) * (torch.maximum(ay1, by1) - torch.minimum(ay0, by0))
    hull = hull.clamp_min(EPS)
    iou = inside / union
    return iou, iou - (hull - union) / hull


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of each of `[N, 4]` with each of `[A, 4]`, `[N, A]`."""
    # a fraction of the passes over memory of box_overlaps, since A may be 200,000
    ax0, ay0, ax1, ay1 = a[:, :, None].unbind(1)
    bx0, by0, bx1, by1 = b.T.contiguous()
    inside = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp_min_(0)
    inside *= (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp_min_(0)
    union = ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0)).sub_(inside).clamp_min_(EPS)
    return inside.div_(union)


def assign_max_iou(
    anchors: Tensor,
    truths: Tensor,
    positive: float = 0.5,
    negative: float = 0.4,
    least: float | None = 0.0,
    usable: Tensor | None = None,
) -> Tensor:
    """RetinaNet's assignment: each anchor to the truth that it overlaps most, and each truth to its best anchors.

    Args:
        anchors: `[A, 4]`.
        truths: `[N, 4]`.
        positive: least overlap (IoU) with a truth that makes an anchor positive.
        negative: overlap below which an anchor is background; between the two it is ignored.
        least: overlap that the best anchors of a truth must have to belong to it; None where being best counts nothing.
        usable: anchors that take part at all, `[A]`; others are ignored.

    Returns:
        Index of the truth per anchor `[A]`, `BACKGROUND` or `IGNORED`. Anchors that overlap a truth most belong to it
        if they overlap it at all and by `least`, all of them in a tie; of several such truths to the last.
    """
    best, last = anchors.new_zeros(len(anchors)), anchors.new_full((len(anchors),), -1, dtype=torch.long)
    assigned = torch.zeros_like(last)
    for start in range(0, len(truths), TRUTHS_AT_ONCE):
        iou = pairwise_iou(truths[start : start + TRUTHS_AT_ONCE], anchors)
        if usable is not None:
            iou *= usable
        overlap, index = iou.max(dim=0)
        assigned = torch.where(overlap > best, index + start, assigned)
        best = torch.maximum(best, overlap)
        if least is not None:
            largest = iou.amax(dim=1, keepdim=True)
            numbers = torch.arange(start, start + len(iou), device=iou.device, dtype=torch.int32)[:, None] + 1
            # a truth that no anchor overlaps has no best anchor
            largest = largest.masked_fill((largest <= 0) | (largest < least), torch.inf)
            owners = (iou == largest).mul(numbers).amax(dim=0) - 1
            last = torch.maximum(last, owners.long())
    assigned = assigned.masked_fill(best < positive, IGNORED).masked_fill(best < negative, BACKGROUND)
    assigned = last.where(last >= 0, assigned)
    return assigned if usable is None else assigned.masked_fill(~usable, IGNORED)


def draw(assigned: Tensor, keys: Tensor, number: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a sample of priors: positives, `most` of them at most, and background in the rest of `number` places.

    Args:
        assigned: index of a truth per prior `[..., A]`, `BACKGROUND` or `IGNORED`.
        keys: random numbers in [0, 1), `[..., A]`; of either kind those with the largest are drawn.
        number: size of the sample; A at most.
        most: largest number of positives.

    Returns:
        Index of the drawn priors `[..., number]`, positives first; whether they are positive; and whether they are drawn at
        all, False in places that neither kind fills.
    """
    number = min(number, keys.shape[-1])
    positives = keys.masked_fill(assigned < 0, -1).topk(min(most, number), dim=-1)
    others = keys.masked_fill(assigned != BACKGROUND, -1).topk(number, dim=-1)
    positive = positives.values >= 0
    room = number - positive.sum(dim=-1, keepdim=True)
    background = (others.values >= 0) & (torch.arange(number, device=keys.device) < room)
    drawn, order = torch.cat([positive, background], dim=-1).byte().sort(dim=-1, descending=True, stable=True)
    index = torch.cat([positives.indices, others.indices], dim=-1).gather(-1, order)[..., :number]
    drawn = drawn[..., :number].bool()
    return index, drawn & (assigned.gather(-1, index) >= 0), drawn


def keep_best(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float) -> Tensor:
    """Scores `[B, n]`, 0 for boxes `[B, n, 4]` that a better one of the same group `[B, n]` overlaps by more than `overlap`.

    Boxes of different groups are moved apart, as mmdetection does. Every shape but that of the suppression is fixed, for
    export; on an accelerator the suppression waits, once for each image.
    """
    apart = boxes + groups[..., None] * (boxes.max() + 1)
    kept = []
    for of_image, image_scores in zip(apart, scores, strict=True):
        index = torchvision.ops.nms(of_image, image_scores, overlap)
        kept.append(image_scores * torch.zeros_like(image_scores).index_fill(0, index, 1.0))
    return torch.stack(kept)


def atss_candidates(
    priors: Tensor, level_sizes: Sequence[int], truths: Tensor, nearest: int = 9
) -> tuple[Tensor, Tensor, Tensor]:
    """What adaptive training sample selection (Zhang et al., CVPR 2020, Algorithm 1) chooses from.

    Args:
        priors: `[A, 4]`, level by level.
        level_sizes: number of priors of each level.
        truths: `[N, 4]`, at least one.
        nearest: candidates of a truth in each level, those whose centres lie nearest to its centre.

    Returns:
        Index of each truth's candidates `[N, K]`, their overlap (IoU) with it `[N, K]`, and the threshold `[N, 1]`, mean
        plus standard deviation of these overlaps.
    """
    offset = (priors[:, :2] + priors[:, 2:]).T[None] / 2 - ((truths[:, :2] + truths[:, 2:]) / 2)[:, :, None]
    candidates, start = [], 0
    for size, distance in zip(level_sizes, offset.square().sum(dim=1).split(list(level_sizes), dim=1), strict=True):
        candidates.append(distance.topk(min(nearest, size), dim=1, largest=False).indices + start)
        start += size
    index = torch.cat(candidates, dim=1)
    overlap, _ = box_overlaps(priors[index], truths[:, None])
    return index, overlap, overlap.mean(dim=1, keepdim=True) + overlap.std(dim=1, keepdim=True)


def assign_atss(priors: Tensor, level_sizes: Sequence[int], truths: Tensor) -> Tensor:
    """Index of the truth per prior `[A]`, or `BACKGROUND`; see `atss_candidates` for the arguments, of which `N` may be 0.

    A candidate is positive where its overlap reaches the threshold and its centre lies inside the truth; a prior that
    several truths want goes to the one that it overlaps most.
    """
    if not len(truths):
        return priors.new_full((len(priors),), BACKGROUND, dtype=torch.long)
    index, overlap, threshold = atss_candidates(priors, level_sizes, truths)
    points = ((priors[:, :2] + priors[:, 2:]) / 2)[index]
    inside = torch.cat([points - truths[:, None, :2], truths[:, None, 2:] - points], dim=-1).amin(dim=-1)
    chosen = (overlap >= threshold) & (inside > 0.01)
    quality = overlap.new_full((len(truths), len(priors)), -1.0)
    quality.scatter_(1, index, overlap.masked_fill(~chosen, -1.0))
    best, assigned = quality.max(dim=0)
    return assigned.masked_fill(best < 0, BACKGROUND)


def background_focal_loss(logits: Tensor) -> Tensor:
    """`BCE(z, 0) * sigma(z)^2` per element: focal loss without its weight, and quality focal loss, of a class that is absent."""
    return F.softplus(logits) * logits.sigmoid().square()


def focal_loss(logits: Tensor, classes: Tensor, positive: Tensor, counted: Tensor, alpha: float = 0.25) -> Tensor:
    """Sum of the sigmoid focal loss with exponent 2 (Lin et al., ICCV 2017, Eq. 5).

    Args:
        logits: `[..., C]`.
        classes: class where positive, `[...]`; any valid class elsewhere.
        positive: has that class, `[...]`; else none.
        counted: takes part in the sum, `[...]`.
        alpha: weight of a class that is present; one that is absent has `1 - alpha`.
    """
    absent = (1 - alpha) * background_focal_loss(logits).sum(dim=-1)
    own = logits.gather(-1, classes[..., None]).squeeze(-1)
    # what the class that is present has instead of its term as an absent one
    change = alpha * F.softplus(-own) * own.neg().sigmoid().square() - (1 - alpha) * background_focal_loss(own)
    return absent.masked_fill(~counted, 0).sum() + change.masked_fill(~positive, 0).sum()


def quality_focal_loss(logits: Tensor, classes: Tensor, quality: Tensor, positive: Tensor) -> Tensor:
    """Sum of the quality focal loss with exponent 2 (Li et al., GFL, NeurIPS 2020, Eq. 2).

    Args:
        logits: `[..., C]`.
        classes: class where positive, `[...]`; any valid class elsewhere.
        quality: target of that class in [0, 1], `[...]`, without gradient; that of all others is 0.
        positive: has a class, `[...]`.
    """
    own = logits.gather(-1, classes[..., None]).squeeze(-1)
    error = F.binary_cross_entropy_with_logits(own, quality, reduction="none") * (own.sigmoid() - quality).square()
    change = error - background_focal_loss(own)
    return background_focal_loss(logits).sum() + change.masked_fill(~positive, 0).sum()


def distribution_focal_loss(log_probabilities: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the two bins around a distance, by nearness (Li et al., GFL, NeurIPS 2020, Eq. 6).

    Args:
        log_probabilities: `[..., bins + 1]`.
        target: distance in [0, bins), `[...]`.
    """
    left = target.floor().long()
    share = target - left
    lower = log_probabilities.gather(-1, left[..., None]).squeeze(-1)
    upper = log_probabilities.gather(-1, left[..., None] + 1).squeeze(-1)
    return -(1 - share) * lower - share * upper
