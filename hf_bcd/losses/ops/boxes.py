"""Boxes as tensors: overlaps, assignment regions and distributions of distances, for distilling detectors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...utils.distributed import all_reduce_sum, rank_count


EPS = 1e-7


def mean_over_ranks(count: Tensor) -> Tensor:
    """A number by which a loss divides, at least 1, as a mean over ranks: gradients then are those of the whole batch."""
    return (all_reduce_sum(count.detach()) / rank_count()).clamp_min(1)


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, generalised IoU and distance IoU of xyxy boxes `[..., 4]` whose leading shapes broadcast."""
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    common = (high - low).clamp_min(0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1) for boxes in (first, second)]
    union = (areas[0] + areas[1] - common).clamp_min(EPS)
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    area, diagonal = hull.prod(-1).clamp_min(EPS), hull.square().sum(-1).clamp_min(EPS)
    centres = (first[..., :2] + first[..., 2:] - second[..., :2] - second[..., 2:]) / 2
    iou = common / union
    return iou, iou - (area - union) / area, iou - centres.square().sum(-1) / diagonal


def xyxy(boxes: Tensor) -> Tensor:
    """Boxes `[..., 4]` given by centre, width and height."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


def atss_thresholds(priors: Tensor, level_sizes: Sequence[int], truths: Tensor, nearest: int = 9) -> Tensor:
    """Overlap above which ATSS takes a prior for a truth, `[N]` (Zhang et al., CVPR 2020, Algorithm 1).

    Args:
        priors: xyxy `[A, 4]`, level by level.
        level_sizes: number of priors of each level.
        truths: xyxy `[N, 4]`, N > 0.
        nearest: candidates of a truth in each level.
    """
    centres, own = ((boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (priors, truths))
    candidates, start = [], 0
    for level in (own[:, None] - centres[None]).square().sum(-1).split(list(level_sizes), dim=1):
        candidates.append(level.topk(min(nearest, level.shape[1]), largest=False).indices + start)
        start += level.shape[1]
    iou = overlaps(priors[torch.cat(candidates, dim=1)], truths[:, None])[0]
    return iou.mean(dim=1) + iou.std(dim=1)


def valuable_region(priors: Tensor, level_sizes: Sequence[int], truths: Tensor) -> Tensor:
    """Overlap of each prior with a truth of whose valuable localisation region it is a part, `[A]`; 0 where of none.

    The region holds priors whose distance IoU lies between a quarter of ATSS's threshold and the threshold (Zheng et al.,
    CVPR 2022, Sec. 3.3).
    """
    if not len(truths):
        return priors.new_zeros(len(priors))
    threshold = atss_thresholds(priors, level_sizes, truths)[:, None]
    iou, _, diou = overlaps(truths[:, None], priors[None])
    return iou.masked_fill((diou < 0.25 * threshold) | (diou >= threshold), 0).amax(dim=0)
