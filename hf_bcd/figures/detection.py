"""Pictures of boxes and masks: truth and predictions side by side, with what was missed, doubled, or is not there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ..utils.masks import RLE, decode, mask_ious
from .panels import cell_size, grey, grid, rgb, save, short, to_numpy
from .segmentation import ERROR_COLOUR, palette


STRIP_SCORE = 0.3  # detections below it are not drawn into the log's pictures
MATCHING_IOU = 0.5
NOTHING_IOU = 0.1
MISSED_COLOUR = (255, 255, 255)
# what is wrong with a detection, and its colour
WRONGS = {"wrong class or place": ERROR_COLOUR, "found twice": (255, 170, 0), "nothing there": (0, 200, 220)}


class Judgement(NamedTuple):
    """Which detections are drawn, what of `WRONGS` each of these is (-1: none, it is right), and which true objects are missed."""

    shown: np.ndarray
    wrong: np.ndarray
    missed: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return self.wrong < 0


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of xyxy boxes `[N, 4]` and `[M, 4]`: `[N, M]`."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    return common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-9)


def overlaps(first: Mapping[str, Any], second: Mapping[str, Any]) -> np.ndarray:
    """IoU of masks where both have them, else of boxes: `[N, M]`."""
    if first.get("masks") is None or second.get("masks") is None or not (len(first["masks"]) and len(second["masks"])):
        return box_iou(first["boxes"], second["boxes"])
    return mask_ious(first["masks"], second["masks"])


def judge(prediction: Mapping[str, Any], truth: Mapping[str, Any], least_score: float) -> Judgement:
    """Matches detections, best first, each to the true object of its class that it overlaps most, by at least a half.

    Of the others, some find an object of their class that a better one has found already, some overlap no object by a tenth.

    Args:
        prediction: `boxes` xyxy `[K, 4]`, `scores` and `labels` `[K]`, best first; perhaps `masks`, run lengths.
        truth: `boxes` `[N, 4]`, `classes` `[N]` and perhaps `masks`; crowds are left out.
        least_score: detections below it are left out.
    """
    shown = np.flatnonzero(to_numpy(prediction["scores"]) >= least_score)
    drawn = chosen(prediction, shown)
    shared = overlaps(drawn, truth)
    of_class = shared * (drawn["classes"][:, None] == truth["classes"][None])
    free, wrong = np.ones(len(truth["boxes"]), bool), np.zeros(len(shown), int)
    for row, overlap in enumerate(of_class):
        candidates = np.where(free, overlap, 0)
        if candidates.max(initial=0) >= MATCHING_IOU:
            free[candidates.argmax()], wrong[row] = False, -1
        elif overlap.max(initial=0) >= MATCHING_IOU:
            wrong[row] = 1
        elif shared[row].max(initial=0) < NOTHING_IOU:
            wrong[row] = 2
    return Judgement(shown, wrong, free)


def chosen(prediction: Mapping[str, Any], places: np.ndarray) -> dict[str, Any]:
    """Some of the detections, in the form of a truth."""
    masks = prediction.get("masks")
    found = {"boxes": to_numpy(prediction["boxes"])[places], "classes": to_numpy(prediction["labels"])[places]}
    return found | {"masks": None if masks is None else [masks[place] for place in places]}


def detection_figure(
    samples: Sequence[Mapping[str, Any]], id2label: Mapping[int, str], path: str | Path, errors: Sequence[str] = ()
) -> Path:
    """Saves a row per sample: the picture, its true boxes and masks, those of each prediction, and the errors of some.

    Scores of two models mean different things, so of each as many of the best boxes are drawn as the samples have objects.

    A panel of errors shows what a prediction missed (dashed) and what it says beside the truth, see `WRONGS`.

    Args:
        samples: mappings with `image`, `boxes` and `classes` of the truth, perhaps `crowd` and `masks`, and `predictions`:
            name -> as `judge` takes it.
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
        row = [
            ("input", "", pixels),
            (
                "truth",
                f"{len(truth['boxes'])} object{'s' * (len(truth['boxes']) != 1)}",
                _drawn(pixels, truth, colours),
            ),
        ]
        for name, prediction in sample["predictions"].items():
            found = judged[name]
            drawn = chosen(prediction, found.shown)
            present |= {int(index) for index in drawn["classes"]}
            said = f"{found.right.sum()} found, {(~found.right).sum()} wrong"
            row.append((name, said, _drawn(pixels, drawn, colours)))
        for name in errors:
            found = judged[name]
            wrong = chosen(sample["predictions"][name], found.shown[~found.right])["boxes"]
            panel = _errors(pixels, wrong, found.wrong[~found.right], truth["boxes"][found.missed])
            row.append((f"errors of {name}", f"{found.missed.sum()} missed", panel))
        rows.append(row)
    legend: list[tuple[str, Any]] = [
        (short(id2label[index]), colours[index % 255].tolist()) for index in sorted(present)
    ]
    legend += [*WRONGS.items(), ("missed (dashed)", MISSED_COLOUR)] if errors else []
    return save(grid(rows, legend or [("no objects", MISSED_COLOUR)]), path)


def detection_strip(
    image: Any, truth: Mapping[str, Any], prediction: Mapping[str, Any], num_labels: int
) -> np.ndarray:
    """A picture with its true boxes and with the predicted ones, side by side: uint8 `[H, 2 W, 3]`."""
    pixels, colours = rgb(image), palette(min(num_labels, 255))
    shown = to_numpy(prediction["scores"]) >= STRIP_SCORE
    found = chosen(prediction, np.flatnonzero(shown))
    return np.concatenate([_drawn(pixels, boxes, colours) for boxes in (_told_apart(truth), found)], 1)


def _score_of_best(scores: Sequence[np.ndarray], number: int) -> float:
    """The lowest of the `number` best of several pictures' scores."""
    ordered = np.sort(np.concatenate(scores))[::-1]
    return float(ordered[min(number, len(ordered)) - 1]) if number and len(ordered) else np.inf


def _told_apart(truth: Mapping[str, Any]) -> dict[str, Any]:
    """True boxes, classes and masks without crowds."""
    crowd = to_numpy(truth.get("crowd", np.zeros(len(truth["boxes"]), bool)))
    return chosen({**truth, "labels": truth["classes"]}, np.flatnonzero(~crowd))


def _drawn(pixels: np.ndarray, objects: Mapping[str, Any], colours: np.ndarray) -> np.ndarray:
    own = [colours[int(index) % 255] for index in objects["classes"]]
    picture, draw, scale = _canvas(pixels)
    if objects.get("masks") is not None:
        return _tinted(picture, objects["masks"], own)
    for box, colour in zip(objects["boxes"], own, strict=True):
        draw.rectangle(_corners(box, scale), outline=tuple(colour.tolist()), width=2)
    return np.asarray(picture)


def _tinted(picture: Image.Image, masks: Sequence[RLE], colours: Sequence[np.ndarray]) -> np.ndarray:
    """Masks half transparent, best on top, with a line around each, which tells touching ones apart."""
    pixels = np.asarray(picture).astype(np.float32)
    for mask, colour in reversed(list(zip(masks, colours, strict=True))):
        whole = Image.fromarray(decode(mask)).resize(picture.size, Image.Resampling.NEAREST)
        inside = np.asarray(whole)
        line = inside & ~np.asarray(ndimage.binary_erosion(inside, iterations=2), bool)
        pixels[inside] = 0.5 * pixels[inside] + 0.5 * colour
        pixels[line] = colour
    return pixels.round().astype(np.uint8)


def _errors(pixels: np.ndarray, wrong: np.ndarray, kinds: np.ndarray, missed: np.ndarray) -> np.ndarray:
    dark = np.broadcast_to(40 + 110 * grey(pixels), pixels.shape).astype(np.uint8)
    picture, draw, scale = _canvas(dark)
    for box, kind in zip(wrong, kinds, strict=True):
        draw.rectangle(_corners(box, scale), outline=list(WRONGS.values())[kind], width=2)
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
