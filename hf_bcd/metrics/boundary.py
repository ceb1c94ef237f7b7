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


def band_radius(height: int, width: int) -> int:
    """Width in pixels of the bands of Boundary IoU: 2 % of the picture's diagonal, at least 1."""
    return max(1, round(BAND_WIDTH * math.hypot(height, width)))


def boundary_counts(truth: Tensor, prediction: Tensor, num_labels: int) -> dict[str, Tensor]:
    """Counts contour and band pixels per image and class of two maps `[B, H, W]` of one signed integer type.

    Returns:
        int64 counts: `true_contour` and `predicted_contour` `[B, C, 4]`, contour pixels whose nearest contour pixel
        of the same class in the other map is at most 1, at most 3, at most 5 and more than 5 pixels away;
        `true_band`, `predicted_band` and `shared_band` `[B, C]`, pixels of the Boundary IoU bands.
    """
    true_edges, predicted_edges = contour(truth), contour(prediction)
    reaches = contour_reach(truth.where(true_edges, -1), prediction.where(predicted_edges, -1), num_labels)
    radius = band_radius(*truth.shape[1:])
    true_band, predicted_band = band(truth, radius), band(prediction, radius)
    shared_band = true_band & predicted_band & (truth == prediction)
    counts = {}
    for name, classes, edges, reach, in_band in (
        ("true", truth, true_edges, reaches[0], true_band),
        ("predicted", prediction, predicted_edges, reaches[1], predicted_band),
    ):
        # one histogram over class, contour bin (the last one: no contour) and band (none, own, shared)
        contour_bin = reach.where(edges, len(DISTANCES) + 1)
        place = 3 * contour_bin + in_band.to(torch.uint8) + shared_band
        places = 3 * (len(DISTANCES) + 2)
        cells = torch.where(classes >= 0, classes.int() * places + place, num_labels * places)
        histogram = image_histograms(cells, num_labels * places).unflatten(1, (num_labels, -1, 3))
        counts[f"{name}_contour"] = histogram[:, :, :-1].sum(3)
        counts[f"{name}_band"] = histogram[..., 1:].sum((2, 3))
        counts["shared_band"] = histogram[..., 2].sum(2)  # the same from both maps
    return counts


def boundary_scores(totals: dict[str, Tensor]) -> dict[str, float]:
    """Boundary F and Boundary IoU, each the mean over the classes that have a contour, or a band, in either map.

    `totals` are the counts of `boundary_counts`, summed over images.
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
    """
    edges = torch.zeros_like(classes, dtype=torch.bool)
    for dim in (1, 2):
        steps = classes.shape[dim] - 1
        before, after = classes.narrow(dim, 0, steps), classes.narrow(dim, 1, steps)
        differ = (before != after) & (before >= 0) & (after >= 0)
        edges.narrow(dim, 0, steps).logical_or_(differ)
        edges.narrow(dim, 1, steps).logical_or_(differ)
    return edges


def contour_reach(true_contour: Tensor, predicted_contour: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """How far each contour pixel is from the other map's contour of its class.

    Needs no class dimension: a contour pixel has one class, so a match is an equality between shifted maps. One
    comparison serves both directions. Shifts are offsets into the flattened batch, padded so that no match wraps around:
    few bytes a pixel and no strides make the many passes as fast as memory allows.

    Args:
        true_contour: class of each true contour pixel `[B, H, W]`, -1 elsewhere.
        predicted_contour: the same of the prediction.
        num_labels: number of classes.

    Returns:
        For the true and for the predicted contour, uint8 `[B, H, W]`: the number of `DISTANCES` (Euclidean, inclusive)
        within which the pixel has no match; `len(DISTANCES)` elsewhere.
    """
    margin = max(DISTANCES)
    # fillers that differ, so that only contour pixels match; as bytes they are 255 and 254
    fillers = (-1, -2)
    dtype = torch.uint8 if num_labels <= 254 else true_contour.dtype
    padded = [
        F.pad(classes.masked_fill(classes < 0, filler), (margin,) * 4, value=filler).to(dtype)
        for classes, filler in zip((true_contour, predicted_contour), fillers, strict=True)
    ]
    shape, width = padded[0].shape, padded[0].shape[2]
    true, predicted = (classes.flatten() for classes in padded)
    first, last = margin * (width + 1), len(true) - margin * (width + 1)
    true_hit, predicted_hit = (torch.zeros(len(true), dtype=torch.bool, device=true.device) for _ in range(2))
    reaches = [torch.zeros(len(true), dtype=torch.uint8, device=true.device) for _ in range(2)]
    match = torch.empty_like(true_hit[first:last])
    inner = -1
    for distance in DISTANCES:
        for dy in range(-distance, distance + 1):
            for dx in range(-distance, distance + 1):
                if not inner < dy**2 + dx**2 <= distance**2:
                    continue
                shift = dy * width + dx
                torch.eq(true[first:last], predicted[first + shift : last + shift], out=match)
                true_hit[first:last] |= match
                predicted_hit[first + shift : last + shift] |= match
        inner = distance**2
        for reach, hit in zip(reaches, (true_hit, predicted_hit), strict=True):
            reach += ~hit
    height, width = true_contour.shape[1:]
    window = (slice(None), slice(margin, margin + height), slice(margin, margin + width))
    return reaches[0].view(shape)[window], reaches[1].view(shape)[window]


def band(classes: Tensor, radius: int) -> Tensor:
    """Inner boundary bands of all classes at once, bool `[B, H, W]`.

    The band of a class is what `radius` erosions with a 3x3 square take away from its mask (Cheng et al. 2021,
    "Boundary IoU", and their code), where the outside of the image erodes as another class would. Ignored pixels, which
    instances lack, do not erode. A pixel is in the band of its own class exactly if the square window of that radius
    around it leaves the image or holds a pixel of another class, that is, if the largest and the smallest value in the
    window differ.
    """
    ignored = classes < 0
    lowest = torch.iinfo(classes.dtype).min
    # beyond the border: larger than any class, so that it differs from the minimum; padding holds float64's integers
    beyond = min(torch.iinfo(classes.dtype).max, 2**31 - 1)
    largest = _window_max(classes.masked_fill(ignored, lowest), radius, beyond)
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
