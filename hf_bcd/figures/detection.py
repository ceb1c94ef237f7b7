"""Pictures of boxes: truth and predictions side by side, with what was missed and what is not there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .panels import cell_size, grey, grid, rgb, save, short, to_numpy
from .segmentation import ERROR_COLOUR, palette


STRIP_SCORE = 0.3  # detections below it are not drawn into the log's pictures
MATCHING_IOU = 0.5
MISSED_COLOUR = (255, 255, 255)


class Judgement(NamedTuple):
    """Which detections are drawn, which of these are right, and which true objects none of them found."""

    shown: np.ndarray
    right: np.ndarray
    missed: np.ndarray


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of xyxy boxes `[N, 4]` and `[M, 4]`: `[N, M]`."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    return common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-9)


def judge(prediction: Mapping[str, Any], truth: Mapping[str, Any], least_score: float) -> Judgement:
    """Matches detections, best first, each to the true object of its class that it overlaps most, by at least a half.

    Args:
        prediction: `boxes` xyxy `[K, 4]`, `scores` and `labels` `[K]`, best first.
        truth: `boxes` `[N, 4]` and `classes` `[N]`; crowds are left out.
        least_score: detections below it are left out.
    """
    boxes, scores, labels = (to_numpy(prediction[key]) for key in ("boxes", "scores", "labels"))
    shown = np.flatnonzero(scores >= least_score)
    overlaps = box_iou(boxes[shown], truth["boxes"]) * (labels[shown][:, None] == truth["classes"][None])
    free, right = np.ones(len(truth["boxes"]), bool), np.zeros(len(shown), bool)
    for row, overlap in enumerate(overlaps):
        candidates = np.where(free, overlap, 0)
        if len(candidates) and candidates.max() >= MATCHING_IOU:
            free[candidates.argmax()], right[row] = False, True
    return Judgement(shown, right, free)


def detection_figure(
    samples: Sequence[Mapping[str, Any]], id2label: Mapping[int, str], path: str | Path, errors: Sequence[str] = ()
) -> Path:
    """Saves a row per sample: the picture, its true boxes, those of each prediction, and the errors of some.

    Scores of two models mean different things, so of each as many of the best boxes are drawn as the samples have objects.

    A panel of errors shows what a prediction missed (dashed) and what it says beside the truth: a wrong class or place, or an
    object for the second time.

    Args:
        samples: mappings with `image`, `boxes` and `classes` of the truth, perhaps `crowd`, and `predictions`: name -> as
            `judge` takes it.
        id2label: names of the classes.
        path: PNG file to write; it is returned.
        errors: names of the predictions whose errors get a column.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("samples is empty; a comparison needs at least one sample.")
    rows, present = [], set[int]()
    truths = [_told_apart(sample) for sample in samples]
    number = sum(len(truth["boxes"]) for truth in truths)
    least = {
        name: _score_of_best([to_numpy(sample["predictions"][name]["scores"]) for sample in samples], number)
        for name in samples[0]["predictions"]
    }
    colours = palette(min(len(id2label), 255))
    for sample, truth in zip(samples, truths, strict=True):
        pixels = rgb(sample["image"])
        judged = {name: judge(prediction, truth, least[name]) for name, prediction in sample["predictions"].items()}
        present |= {int(index) for index in truth["classes"]}
        row = [("input", "", pixels), ("truth", f"{len(truth['boxes'])} objects", _drawn(pixels, truth, colours))]
        for name, prediction in sample["predictions"].items():
            found = judged[name]
            drawn = {
                key: to_numpy(prediction[of])[found.shown] for key, of in (("boxes", "boxes"), ("classes", "labels"))
            }
            present |= {int(index) for index in drawn["classes"]}
            said = f"{found.right.sum()} found, {(~found.right).sum()} wrong"
            row.append((name, said, _drawn(pixels, drawn, colours)))
        for name in errors:
            found, boxes = judged[name], to_numpy(sample["predictions"][name]["boxes"])
            wrong = boxes[found.shown[~found.right]]
            row.append(
                (
                    f"errors of {name}",
                    f"{found.missed.sum()} missed",
                    _errors(pixels, wrong, truth["boxes"][found.missed]),
                )
            )
        rows.append(row)
    legend: list[tuple[str, Any]] = [
        (short(id2label[index]), colours[index % 255].tolist()) for index in sorted(present)
    ]
    legend += [("wrong", ERROR_COLOUR), ("missed (dashed)", MISSED_COLOUR)] if errors else []
    return save(grid(rows, legend or [("no objects", MISSED_COLOUR)]), path)


def detection_strip(
    image: Any, truth: Mapping[str, Any], prediction: Mapping[str, Any], num_labels: int
) -> np.ndarray:
    """A picture with its true boxes and with the predicted ones, side by side: uint8 `[H, 2 W, 3]`."""
    pixels, colours = rgb(image), palette(min(num_labels, 255))
    shown = to_numpy(prediction["scores"]) >= STRIP_SCORE
    found = {"boxes": to_numpy(prediction["boxes"])[shown], "classes": to_numpy(prediction["labels"])[shown]}
    return np.concatenate([_drawn(pixels, boxes, colours) for boxes in (_told_apart(truth), found)], 1)


def _score_of_best(scores: Sequence[np.ndarray], number: int) -> float:
    """The lowest of the `number` best of several pictures' scores."""
    ordered = np.sort(np.concatenate(scores))[::-1]
    return float(ordered[min(number, len(ordered)) - 1]) if number and len(ordered) else np.inf


def _told_apart(truth: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """True boxes and classes without crowds."""
    boxes, classes = to_numpy(truth["boxes"]), to_numpy(truth["classes"])
    single = ~to_numpy(truth.get("crowd", np.zeros(len(boxes), bool)))
    return {"boxes": boxes[single], "classes": classes[single]}


def _drawn(pixels: np.ndarray, objects: Mapping[str, np.ndarray], colours: np.ndarray) -> np.ndarray:
    picture, draw, scale = _canvas(pixels)
    for box, index in zip(objects["boxes"], objects["classes"], strict=True):
        draw.rectangle(_corners(box, scale), outline=tuple(colours[int(index) % 255].tolist()), width=2)
    return np.asarray(picture)


def _errors(pixels: np.ndarray, wrong: np.ndarray, missed: np.ndarray) -> np.ndarray:
    dark = np.broadcast_to(40 + 110 * grey(pixels), pixels.shape).astype(np.uint8)
    picture, draw, scale = _canvas(dark)
    for box in wrong:
        draw.rectangle(_corners(box, scale), outline=ERROR_COLOUR, width=2)
    for box in missed:
        left, top, right, bottom = _corners(box, scale)
        for start, end in (
            ((left, top), (right, top)),
            ((right, top), (right, bottom)),
            ((left, bottom), (right, bottom)),
            ((left, top), (left, bottom)),
        ):
            _dashed(draw, np.array(start), np.array(end))
    return np.asarray(picture)


def _canvas(pixels: np.ndarray) -> tuple[Image.Image, ImageDraw.ImageDraw, float]:
    """The picture as large as its panel, so that lines are as wide in each."""
    picture = Image.fromarray(pixels).resize(cell_size(pixels), Image.Resampling.LANCZOS)
    return picture, ImageDraw.Draw(picture), picture.width / pixels.shape[1]


def _corners(box: np.ndarray, scale: float) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(side) * scale for side in box)
    return left, top, max(left, right - 1), max(top, bottom - 1)


def _dashed(draw: ImageDraw.ImageDraw, start: np.ndarray, end: np.ndarray, dash: float = 5) -> None:
    length = float(np.abs(end - start).sum())  # of a line along an axis
    for at in np.arange(0, length, 2 * dash):
        first, last = (start + (end - start) * min(1, (at + step) / length) for step in (0, dash))
        draw.line([tuple(first), tuple(last)], fill=MISSED_COLOUR, width=2)
