"""Metrics of instance segmentation: those of detection, AP of masks and of their boundaries, and whether masks are whole."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..utils.masks import RLE, decode_box, mask_ious
from .boundary import band_radius
from .connectivity import FIXED_POINT_BITS, MIN_REGION_PIXELS, connectivity_scores
from .detection import Boxes, DetectionMetrics, coco_evaluation, named_scores


MATCHING_IOU = 0.5
BOUNDARY_SCORES = ("boundary_ap", "boundary_ap50", "boundary_ap75")
EIGHT_CONNECTED = np.ones((3, 3))
COUNTS = ("regions", "missed", "fragments", "completeness", "connectivity")


class InstanceMetrics(DetectionMetrics):
    """`DetectionMetrics`, and the same of masks: COCO's average precision, Boundary AP, and connectivity of instances.

    A record of each picture is kept, about 30 kB with 100 predicted masks, until `compute`.
    """

    def update(self, predictions: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> None:
        """Adds pictures, see `DetectionMetrics.update`; both sides have `masks` too, a run-length encoding for each box.

        Raises:
            ValueError: also if the masks are not as many as the boxes, or not of one size.
        """
        super().update(predictions, truth)
        for place in range(len(self._records) - len(truth), len(self._records)):
            found, true = self._records[place]
            if found.runs and true.runs and found.size != true.size:
                raise ValueError(
                    f"predicted masks of picture {place} are {found.size}, true ones {true.size} (height, width)."
                )

    def record(self, given: Mapping[str, Any], numbers: str, crowd: Tensor | None, name: str) -> Boxes:
        boxes, masks = super().record(given, numbers, crowd, name), given["masks"]
        sizes = {tuple(mask["size"]) for mask in masks}
        if len(masks) != len(boxes.labels) or len(sizes) > 1:
            raise ValueError(
                f"{name}: {len(boxes.labels)} boxes, {len(masks)} masks of the sizes {sorted(sizes)}; a box has one of one size."
            )
        return boxes._replace(size=next(iter(sizes), (0, 0)), runs=tuple(bytes(mask["counts"]) for mask in masks))

    def _compute(self) -> dict[str, Any]:
        """The numbers of `DetectionMetrics`, and of masks.

        Returns:
            Also `mask_ap`, `mask_ap50`, `mask_ap75`, `mask_ap_small`, `mask_ap_medium`, `mask_ap_large`, `mask_ar` and
            `per_class_mask_ap`, as those of boxes; `boundary_ap`, `boundary_ap50`, `boundary_ap75`, whose overlap is that of
            masks or of their boundaries, the smaller one (Cheng et al. 2021); `completeness`, `connectivity`, `fragments` and
            `missed` of true instances, see `instance_counts`.
        """
        scores = super()._compute()
        stats, per_class = coco_evaluation(self._records, self.num_labels, "segm")
        scores |= {**named_scores(stats, "mask"), "per_class_mask_ap": per_class.tolist()}
        stats, _ = coco_evaluation(self._records, self.num_labels, "segm", lowered_to_boundaries)
        scores |= {name: value for name, value in named_scores(stats, "boundary").items() if name in BOUNDARY_SCORES}
        totals = {name: torch.zeros(self.num_labels, dtype=torch.int64) for name in COUNTS}
        for found, truth in self._records:
            for label, counts in instance_counts(found, truth):
                for name, value in zip(COUNTS, counts, strict=True):
                    totals[name][label] += value
        return scores | connectivity_scores(totals)


def instance_counts(found: Boxes, truth: Boxes) -> list[tuple[int, tuple[int, ...]]]:
    """Class of every true instance that is large enough, and what `connectivity_counts` says of its regions.

    Predictions are matched to the true instances of their class, best first, each to the free one that it overlaps most,
    by at least a half. The regions of an instance are its 8-connected pieces of at least 64 pixels; what its match does not
    cover is lost, and all of it where it has none.
    """
    counts = []
    plain = np.flatnonzero(~truth.crowd)
    order = np.argsort(-found.numbers, kind="stable")
    for label in np.unique(truth.labels[plain]):
        real, guesses = plain[truth.labels[plain] == label], order[found.labels[order] == label]
        matched = matches(found.masks(guesses.tolist()), truth.masks(real.tolist()))
        for place, rle in enumerate(truth.masks(real.tolist())):
            left, top, mask = decode_box(rle)
            taken = np.zeros_like(mask)
            if matched[place] >= 0:
                x, y, guess = decode_box(*found.masks([int(guesses[matched[place]])]))
                first, last = max(top, y), min(top + len(mask), y + len(guess))
                start, end = max(left, x), min(left + mask.shape[1], x + guess.shape[1])
                taken[first - top : last - top, start - left : end - left] = guess[
                    first - y : last - y, start - x : end - x
                ]
            regions, pieces = (
                np.asarray(cast(Any, ndimage.label(part, EIGHT_CONNECTED))[0]) for part in (mask, mask & taken)
            )
            sizes, piece_sizes = (np.bincount(ids.ravel())[1:] for ids in (regions, pieces))
            owner = np.zeros(len(piece_sizes), int)
            owner[pieces[pieces > 0] - 1] = regions[pieces > 0] - 1
            for region in np.flatnonzero(sizes >= MIN_REGION_PIXELS):
                parts, size = piece_sizes[owner == region], int(sizes[region])
                largest, covered = int(parts.max(initial=0)), int(parts.sum())
                ratios = [(largest << FIXED_POINT_BITS) // all_of_it for all_of_it in (size, max(covered, 1))]
                counts.append((int(label), (1, int(not covered), int((100 * parts >= size).sum()), *ratios)))
    return counts


def matches(found: Sequence[RLE], truth: Sequence[RLE]) -> np.ndarray:
    """Which of the masks found, best first, each true mask gets, as COCO matches: int `[N]`, -1 for none."""
    taken = np.full(len(truth), -1)
    for guess, overlap in enumerate(mask_ious(found, truth)):
        free = np.where(taken < 0, overlap, 0)
        if free.max(initial=0) >= MATCHING_IOU:
            taken[len(free) - 1 - free[::-1].argmax()] = guess  # of equal ones the last, as COCO does
    return taken


class Border(NamedTuple):
    """The boundary of a mask within its box: the box's first row and column, and boolean `[h, w]`."""

    top: int
    left: int
    mask: np.ndarray

    def shared(self, other: "Border") -> int:
        """Number of common pixels."""
        starts = max(self.top, other.top), max(self.left, other.left)
        parts = []
        for one in (self, other):
            y, x = starts[0] - one.top, starts[1] - one.left
            parts.append(one.mask[y:, x:])
        h, w = (min(part.shape[axis] for part in parts) for axis in (0, 1))
        return int((parts[0][:h, :w] & parts[1][:h, :w]).sum())


def mask_boundary(rle: RLE) -> Border:
    """The mask without what is left of it after d erosions by 3x3 squares.

    d is 2 % of the picture's diagonal, at least 1; outside of the picture is background, so that its border counts.
    """
    left, top, mask = decode_box(rle)
    inner, length = mask.view(np.uint8), 2 * band_radius(*rle["size"]) + 1
    for axis in (0, 1):  # d squares are one of 2 d + 1
        inner = ndimage.minimum_filter1d(inner, length, axis, mode="constant", cval=0)
    return Border(top, left, mask & (inner == 0))


def lowered_to_boundaries(
    overlaps: np.ndarray, found: Sequence[RLE], truth: Sequence[RLE], crowd: np.ndarray
) -> np.ndarray:
    """IoU of masks `[K, N]`, or of their boundaries where that is less; crowds have no boundary of their own.

    Pairs below the lowest threshold of AP keep the IoU of their masks: nothing matches them, whatever their boundaries.
    """
    lowered, pairs = overlaps.copy(), np.argwhere((overlaps >= MATCHING_IOU) & ~crowd)
    theirs, true = (
        {place: mask_boundary(masks[place]) for place in set(pairs[:, side].tolist())}
        for side, masks in enumerate((found, truth))
    )
    for row, column in pairs.tolist():
        common = theirs[row].shared(true[column])
        union = int(theirs[row].mask.sum()) + int(true[column].mask.sum()) - common
        lowered[row, column] = min(overlaps[row, column], common / max(union, 1))
    return lowered
