"""Quality of class boundaries: boundary F and Boundary IoU, from integer counts.

Maps hold the class of each pixel and -1 at ignored pixels; prediction and truth are ignored at the same pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .histogram import image_histograms


DISTANCES = (1, 3, 5)
BAND_WIDTH = 0.02


def boundary_counts(truth: Tensor, prediction: Tensor, num_labels: int) -> dict[str, Tensor]:
    """Counts contour and band pixels per image and class.

    Args:
        truth: true classes `[B, H, W]`, signed integers.
        prediction: predicted classes `[B, H, W]`, the same dtype.
        num_labels: number of classes C.

    Returns:
        int64 counts: `true_contour` and `predicted_contour` `[B, C, 4]`, contour pixels whose nearest contour pixel
        of the same class in the other map is at most 1, at most 3, at most 5 and more than 5 pixels away;
        `true_band`, `predicted_band` and `shared_band` `[B, C]`, pixels of the Boundary IoU bands.
    """
    counts = {}
    bins = len(DISTANCES) + 1
    true_contour = truth.where(contour(truth), -1)
    predicted_contour = prediction.where(contour(prediction), -1)
    true_reach, predicted_reach = contour_reach(true_contour, predicted_contour)
    for name, classes, reach in (
        ("true_contour", true_contour, true_reach),
        ("predicted_contour", predicted_contour, predicted_reach),
    ):
        slots = torch.where(classes >= 0, classes * bins + reach, -1)
        counts[name] = image_histograms(slots, num_labels * bins).unflatten(1, (num_labels, bins))

    radius = max(1, round(BAND_WIDTH * math.hypot(*truth.shape[1:])))
    true_band = truth.where(band(truth, radius), -1)
    predicted_band = prediction.where(band(prediction, radius), -1)
    counts["true_band"] = image_histograms(true_band, num_labels)
    counts["predicted_band"] = image_histograms(predicted_band, num_labels)
    counts["shared_band"] = image_histograms(true_band.where(true_band == predicted_band, -1), num_labels)
    return counts


def boundary_scores(totals: dict[str, Tensor]) -> dict[str, float]:
    """Boundary F and Boundary IoU, each the mean over the classes that have a boundary in either map.

    Args:
        totals: the counts of `boundary_counts`, summed over images.
    """
    true_within = totals["true_contour"].double().cumsum(1)
    predicted_within = totals["predicted_contour"].double().cumsum(1)
    true_total, predicted_total = true_within[:, -1], predicted_within[:, -1]
    present = true_total + predicted_total > 0
    scores = {}
    for i, distance in enumerate(DISTANCES):
        recall = true_within[:, i] / true_total.clamp(min=1)
        precision = predicted_within[:, i] / predicted_total.clamp(min=1)
        # A vanishing denominator means no hit at all: F is 0, and never 0/0.
        f = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
        scores[f"boundary_f@{distance}"] = f[present].mean().item()

    shared = totals["shared_band"].double()
    iou = shared / (totals["true_band"] + totals["predicted_band"] - shared)
    scores["boundary_iou"] = iou.nanmean().item()
    return scores


def contour(classes: Tensor) -> Tensor:
    """Pixels with a 4-neighbour of another class, bool `[B, H, W]`.

    Ignored pixels are never contour and make none, and neither does the image's border.

    Args:
        classes: signed integer map `[B, H, W]`.
    """
    edges = torch.zeros_like(classes, dtype=torch.bool)
    for dim in (1, 2):
        steps = classes.shape[dim] - 1
        before, after = classes.narrow(dim, 0, steps), classes.narrow(dim, 1, steps)
        differ = (before != after) & (before >= 0) & (after >= 0)
        edges.narrow(dim, 0, steps).logical_or_(differ)
        edges.narrow(dim, 1, steps).logical_or_(differ)
    return edges


def contour_reach(true_contour: Tensor, predicted_contour: Tensor) -> tuple[Tensor, Tensor]:
    """How far each contour pixel is from the other map's contour of its class.

    Needs no class dimension: a contour pixel has one class, so a match is an equality between shifted maps. One
    comparison serves both directions.

    Args:
        true_contour: class of each true contour pixel `[B, H, W]`, -1 elsewhere.
        predicted_contour: the same of the prediction, in the same dtype.

    Returns:
        For the true and for the predicted contour, uint8 `[B, H, W]`: the number of `DISTANCES` (Euclidean, inclusive)
        within which the pixel has no match; `len(DISTANCES)` elsewhere.
    """
    height, width = true_contour.shape[1:]
    margin = max(DISTANCES)
    # A filler that differs from the true map's, so that only contour pixels match.
    other = F.pad(predicted_contour.masked_fill(predicted_contour < 0, -2), (margin,) * 4, value=-2)
    true_hit = torch.zeros_like(true_contour, dtype=torch.bool)
    predicted_hit = torch.zeros_like(other, dtype=torch.bool)
    true_reach = torch.zeros_like(true_contour, dtype=torch.uint8)
    predicted_reach = torch.zeros_like(other, dtype=torch.uint8)
    match = torch.empty_like(true_hit)
    inner = -1
    for distance in DISTANCES:
        for dy in range(-distance, distance + 1):
            for dx in range(-distance, distance + 1):
                if not inner < dy**2 + dx**2 <= distance**2:
                    continue
                top, left = margin + dy, margin + dx
                window = (slice(None), slice(top, top + height), slice(left, left + width))
                torch.eq(true_contour, other[window], out=match)
                true_hit |= match
                predicted_hit[window].logical_or_(match)
        inner = distance**2
        true_reach += ~true_hit
        predicted_reach += ~predicted_hit
    return true_reach, predicted_reach[:, margin : margin + height, margin : margin + width]


def band(classes: Tensor, radius: int) -> Tensor:
    """Inner boundary bands of all classes at once, bool `[B, H, W]`.

    The band of a class is what `radius` erosions with a 3x3 square take away from its mask (Cheng et al. 2021,
    "Boundary IoU"), where ignored pixels and the outside of the image do not erode. A pixel is in the band of its own
    class exactly if the square window of that radius around it holds a pixel of another class, that is, if the
    largest and the smallest class in the window differ.

    Args:
        classes: signed integer map `[B, H, W]`.
        radius: erosions, at least 1.
    """
    ignored = classes < 0
    lowest = torch.iinfo(classes.dtype).min
    largest = _window_max(classes.masked_fill(ignored, lowest), radius, lowest)
    smallest = -_window_max((-classes).masked_fill(ignored, lowest), radius, lowest)
    return (largest != smallest) & ~ignored


def _window_max(values: Tensor, radius: int, outside: int) -> Tensor:
    """Maximum over the square window of side 2 * radius + 1, by doubling: logarithmically many passes per axis."""
    side = 2 * radius + 1
    for dim, padding in ((2, (radius, radius, 0, 0)), (1, (0, 0, radius, radius))):
        values = F.pad(values, padding, value=outside)
        reach = 1
        while reach < side:
            step = min(reach, side - reach)
            length = values.shape[dim] - step
            values = torch.maximum(values.narrow(dim, 0, length), values.narrow(dim, step, length))
            reach += step
    return values
