"""Whether an exported file computes what its model computes."""

import operator
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters import DenseAdapter
from ..utils.masks import mask_areas, mask_ious


# of the logits, where the largest is below 1, else relative to it; part of the pixels with the same class
MAX_DIFFERENCE, MIN_AGREEMENT = 1e-4, 0.999
# of a detection that both have
MAX_PIXELS, MAX_SCORE, MIN_MASK_IOU = 0.5, 1e-3, 0.99
MAX_GAPS = (MAX_PIXELS, MAX_SCORE, 1 - MIN_MASK_IOU)
PICTURES = 3
BLOBS = (9, 33, 65, 129)  # in a row of random pictures; detectors of small things find none in large blobs


def images(adapter: DenseAdapter, number: int, height: int, width: int, blobs: int = BLOBS[0]) -> Tensor:
    """Random blobs of colour as the student's image processor gives them, `[number, 3, height, width]`."""
    generator = torch.Generator().manual_seed(height * width)
    colours = 255 * torch.rand(number, 3, blobs, blobs, generator=generator)
    return adapter.normalize(F.interpolate(colours, (height, width), mode="bicubic").clamp(0, 255)).contiguous()


@torch.no_grad()
def compare(file: nn.Module, model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Runs file and model on the same images.

    Returns:
        `sizes` of the images, the largest difference of a logit `max_difference`, the largest logit `max_logit`, and
        the part of the positions with the same class `argmax_agreement`; where the file cannot be run, or gives another
        shape, the difference is infinite.
    """
    differences, largest, same = [], [], []
    for pixel_values in batches:
        expected = model(pixel_values=pixel_values).logits
        try:
            found = file(pixel_values)["logits"]
        except Exception:  # the runtimes' have no common class of their own
            found = expected.new_empty(0)
        if found.shape != expected.shape:
            found = torch.full_like(expected, float("inf"))
        differences.append((found - expected).abs().max())
        largest.append(expected.abs().max())
        same.append((found.argmax(1) == expected.argmax(1)).flatten())
    return {
        "sizes": sorted({tuple(batch.shape[2:]) for batch in batches}),
        "max_difference": torch.stack(differences).max().item(),
        "max_logit": torch.stack(largest).max().item(),
        "argmax_agreement": torch.cat(same).double().mean().item(),
    }


def agrees(parity: dict[str, Any]) -> bool:
    """Whether a file computes its model's function, as far as `compare` has seen."""
    close = parity["max_difference"] <= MAX_DIFFERENCE * max(1.0, parity["max_logit"])
    return close and parity["argmax_agreement"] >= MIN_AGREEMENT


def compare_pictures(file: nn.Module, adapter: Any, size: tuple[int, int]) -> dict[str, Any]:
    """`compare_detections` on random pictures, with ever smaller blobs until something is found in them."""
    parity = dict[str, Any]()
    for blobs in BLOBS:
        parity = compare_detections(file, adapter, images(adapter, PICTURES, *size, blobs).split(1))
        if parity["detections"] or parity["file_detections"]:
            break
    return parity


@torch.no_grad()
def compare_detections(file: nn.Module, adapter: Any, pictures: Sequence[Tensor]) -> dict[str, Any]:
    """Runs file and model on the same pictures `[1, 3, H, W]`, and matches their detections of a score of at least 0.3.

    Of a model that is so sure of nothing, the ten best of a picture.

    Returns:
        `sizes`; numbers of `detections` of the model and `file_detections` of the file; how many are `matched`: same class,
        box, score and mask close; of these, the largest differences `max_pixels` and `max_score`, and where there are masks
        the smallest IoU `min_mask_iou`.
    """
    counts, differences = {"detections": 0, "file_detections": 0, "matched": 0}, [(0.0, 0.0, 0.0)]
    for pixel_values in pictures:
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        (expected,) = adapter.detections(adapter.model(pixel_values=pixel_values), [size])
        (found,) = adapter.detections(SimpleNamespace(**file(pixel_values)), [size])
        best = expected["scores"][: min(10, len(expected["scores"]))].tolist()
        sure = min([0.3, *best[-1:]]) if sum(score >= 0.3 for score in best) == 0 else 0.3
        left = list(range(len(found["scores"])))
        same = None
        if "masks" in expected:
            empty = [mask_areas(answer["masks"]) == 0 for answer in (expected, found)]
            same = mask_ious(expected["masks"], found["masks"]) + np.outer(
                *empty
            )  # COCO's IoU of two empty masks is 0
        for row in range(int((expected["scores"] >= sure).sum())):
            gaps = {
                place: (
                    float((found["boxes"][place] - expected["boxes"][row]).abs().max()),
                    float((found["scores"][place] - expected["scores"][row]).abs()),
                    0.0 if same is None else 1 - float(same[row, place]),
                )
                for place in left
                if found["labels"][place] == expected["labels"][row]
            }
            near = {place: gap for place, gap in gaps.items() if all(map(operator.le, gap, MAX_GAPS))}
            counts["detections"] += 1
            if near:
                place = min(near, key=lambda place: near[place])
                left.remove(place)
                counts["matched"] += 1
                counts["file_detections"] += 1
                differences.append(near[place])
        # what only the file is sure of, scores at the threshold apart
        counts["file_detections"] += sum(float(found["scores"][place]) >= sure + MAX_SCORE for place in left)
    pixels, scores, apart = (max(values) for values in zip(*differences, strict=True))
    sizes = sorted({tuple(picture.shape[2:]) for picture in pictures})
    masks = {"min_mask_iou": 1 - apart} if adapter.finds_masks else {}
    return {"sizes": sizes, **counts, "max_pixels": pixels, "max_score": scores, **masks}
