"""Pictures of boxes and masks: which detections are right, doubled or made up, and that these show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_bcd.figures.detection import MISSED_COLOUR, WRONGS, detection_figure, detection_strip, judge
from hf_bcd.figures.segmentation import palette
from hf_bcd.utils.masks import encode


SIZE = (60, 80)
NAMES = {0: "cat", 1: "dog"}
TRUTH = [[0, 0, 30, 30], [40, 0, 70, 30], [0, 35, 20, 55]]
FOUND = {
    "right": ([0, 0, 30, 30], 0, 0.9),
    "twice": ([0, 0, 30, 29], 0, 0.8),
    "class": ([40, 0, 70, 30], 1, 0.7),
    "place": ([40, 5, 62, 50], 0, 0.6),
    "nothing": ([60, 40, 79, 59], 0, 0.5),
    "unsure": ([0, 35, 20, 55], 0, 0.1),
}


def masks_of(boxes: list[list[int]]) -> list[Any]:
    masks = np.zeros((len(boxes), *SIZE), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return [encode(mask) for mask in masks]


def truth(masks: bool) -> dict[str, Any]:
    found = {"boxes": np.array(TRUTH, np.float32), "classes": np.zeros(3, np.int64)}
    return found | ({"masks": masks_of(TRUTH)} if masks else {})


def prediction(masks: bool) -> dict[str, Any]:
    boxes, labels, scores = zip(*FOUND.values(), strict=True)
    found = {"boxes": np.array(boxes, np.float32), "labels": np.array(labels), "scores": np.array(scores, np.float32)}
    return found | ({"masks": masks_of(list(boxes))} if masks else {})


@pytest.mark.parametrize("masks", [False, True])
def test_detections_are_right_doubled_misplaced_or_made_up(masks: bool) -> None:
    judged = judge(prediction(masks), truth(masks), 0.4)
    assert judged.shown.tolist() == [0, 1, 2, 3, 4]
    assert judged.wrong.tolist() == [-1, 1, 0, 0, 2] and judged.right.tolist() == [True, *[False] * 4]
    assert judged.missed.tolist() == [False, True, True]
    assert judge(prediction(masks), truth(masks), 0.05).missed.tolist() == [False, True, False]


def test_masks_decide_where_there_are_any() -> None:
    """Two crossing objects have boxes alike, and masks that share little."""
    down, up = np.eye(60, dtype=bool), np.eye(60, dtype=bool)[::-1]
    box = np.array([[0, 0, 60, 60]], np.float32)
    found = {"boxes": box, "labels": np.zeros(1, int), "scores": np.ones(1)}
    true = {"boxes": box, "classes": np.zeros(1, int)}
    assert judge(found, true, 0.5).right.all()
    crossed = judge(found | {"masks": [encode(down)]}, true | {"masks": [encode(up)]}, 0.5)
    assert crossed.wrong.tolist() == [2] and crossed.missed.all()


def test_nothing_found_and_nothing_there() -> None:
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0), "masks": []}
    empty = {"boxes": np.zeros((0, 4)), "classes": np.zeros(0, int), "masks": []}
    assert judge(nothing, truth(True), 0.5).missed.all()
    assert judge(prediction(True), empty, 0.4).wrong.tolist() == [2] * 5


@pytest.mark.parametrize("masks", [False, True])
def test_the_figure_shows_errors_in_their_colours(masks: bool, tmp_path: Path) -> None:
    image = Image.fromarray(np.full((*SIZE, 3), 128, np.uint8))
    boxes = [*TRUTH, [22, 35, 36, 55], [22, 56, 30, 59]]  # five, for so many of the best detections are drawn
    true = {"boxes": np.array(boxes, np.float32), "classes": np.zeros(5, np.int64), "crowd": np.zeros(5, bool)}
    true |= {"masks": masks_of(boxes)} if masks else {}
    samples = [{"image": image, **true, "predictions": {"student": prediction(masks)}}] * 2
    path = detection_figure(samples, NAMES, tmp_path / "a.png", ["student"])
    pixels = np.asarray(Image.open(path).convert("RGB"))
    panel = pixels[:, 3 * pixels.shape[1] // 4 :]  # the last of four
    for colour in [*WRONGS.values(), MISSED_COLOUR]:
        assert (np.abs(panel.astype(int) - colour).sum(-1) < 12).sum() > 20, colour


def test_masks_are_half_transparent_with_a_line_around_each() -> None:
    image = np.full((*SIZE, 3), 200, np.uint8)
    strip = detection_strip(image, truth(True) | {"crowd": np.array([False, False, True])}, prediction(True), 2)
    height, width = strip.shape[0], strip.shape[1] // 2
    colour, scale = palette(2)[0].astype(int), width / SIZE[1]
    inside, line = strip[int(15 * scale), int(15 * scale)], strip[int(15 * scale), 1]
    assert np.abs(inside - (colour + 200) / 2).max() <= 1 and np.abs(line - colour).max() <= 1
    assert strip[int(45 * scale), int(10 * scale)].tolist() == [200] * 3, "a crowd is not drawn"
    assert strip[height - 3, width + 3].tolist() == [200] * 3, "what is below the score is not drawn"
