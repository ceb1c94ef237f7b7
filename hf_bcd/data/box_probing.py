"""A look at pictures with boxes, so that what is wrong with them shows before training."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..utils.messages import UserError
from .boxes import BoxRow, BoxRule, is_degenerate, is_repeated, shown
from .dataset import UnlabelledError
from .detection import oriented
from .images import read_image, to_rgb


PROBED_PICTURES = 64  # of all splits together
MIN_PICTURE = 32  # pixels; nothing is trained on smaller pictures


@dataclass(eq=False)
class Scan:
    """What the annotations of a whole split hold; no picture is read.

    Attributes:
        categories: number of boxes of each stored category.
        where: the first row with each of them.
        lacking: rows without annotations: not even an empty list.
        lowest: the smallest first or second number of a box.
        useful: rows with a box that is no crowd, in a picture that is not known to be tiny.
    """

    categories: Counter[Any] = field(default_factory=Counter)
    where: dict[Any, str] = field(default_factory=dict)
    lacking: list[UnlabelledError] = field(default_factory=list)
    lowest: float = np.inf
    useful: list[int] = field(default_factory=list)


def scan(rows: Any) -> Scan:
    """Reads all annotations of a split.

    Raises:
        UserError: a box is not finite, or some rows, but not all, have no annotations.
    """
    found, truth = Scan(), getattr(rows, "truth", None) or rows.__getitem__
    for index in range(len(rows)):
        try:
            row = truth(index)
        except UnlabelledError as error:
            found.lacking.append(error)
            continue
        raw = row.label
        if not np.isfinite(raw.boxes).all():
            place = int((~np.isfinite(raw.boxes).all(axis=1)).argmax())
            raise UserError(
                f"{row.label_name}: box {place}, {shown(raw.boxes[place])}, is not finite. Correct or remove it."
            )
        for category in (here := Counter(raw.categories.tolist())):
            found.where.setdefault(category, row.label_name)
        found.categories.update(here)
        found.lowest = min(found.lowest, raw.boxes[:, :2].min(initial=np.inf))
        if not raw.crowd.all() and (raw.size is None or min(raw.size) >= MIN_PICTURE):
            found.useful.append(index)
    if 0 < len(found.lacking) < len(rows):
        raise UserError(str(found.lacking[0]))
    return found


@dataclass(eq=False)
class BoxSurvey:
    """Running counts over pictures and their boxes.

    Attributes:
        rule: how stored boxes become canonical ones.
        num_labels: number of classes.
        pictures: number of pictures.
        empty: pictures without boxes.
        sizes: (width, height) of the pictures.
        boxes: boxes of every class, int64 `[C]`.
        crowds: boxes that mark crowds.
        degenerate: boxes with a side below one pixel, or no area.
        repeated: boxes that repeat another one.
        clipped: boxes that end outside of their picture.
        farthest: how far the farthest of these ends outside, in pixels.
        most: number of boxes of the picture that has most.
    """

    rule: BoxRule
    num_labels: int
    pictures: int = 0
    empty: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)
    boxes: np.ndarray = field(init=False)
    crowds: int = 0
    degenerate: int = 0
    repeated: int = 0
    clipped: int = 0
    farthest: float = 0.0
    most: int = 0

    def __post_init__(self) -> None:
        self.boxes = np.zeros(self.num_labels, np.int64)

    def add(self, row: BoxRow) -> None:
        """Decodes a row and its picture; raises as `read_boxes` does."""
        image = oriented(read_image(row.image, row.image_name), row.label.size, row.image_name)
        size = to_rgb(image, row.image_name).size
        truth = self.rule.apply(row.label, size, self.num_labels, row.label_name)
        boxes, crowd = truth["boxes"], truth["crowd"]
        self.pictures, self.empty, self.most = (
            self.pictures + 1,
            self.empty + (not len(boxes)),
            max(self.most, len(boxes)),
        )
        self.sizes.add(size)
        self.boxes += np.bincount(truth["classes"], minlength=self.num_labels)
        self.crowds += int(crowd.sum())
        self.degenerate += int((is_degenerate(boxes, truth["areas"]) & ~crowd).sum())
        self.repeated += int(is_repeated(boxes[~crowd], truth["classes"][~crowd]).sum())
        beyond = np.abs(self.rule.corners(row.label, size) - boxes).max(axis=1, initial=0)
        self.clipped += int((beyond > 0.5).sum())
        self.farthest = max(self.farthest, float(beyond.max(initial=0)))

    def notes(self) -> list[str]:
        """What looks wrong, as sentences without a full stop, and what is made of it."""
        of = f"of the {self.boxes.sum()} boxes in {self.pictures} pictures"
        return [
            text
            for count, text in (
                (
                    self.degenerate,
                    f"{self.degenerate} {of} have a side below one pixel or no area: nothing is trained on them",
                ),
                (self.repeated, f"{self.repeated} {of} repeat another one of their class: training takes one"),
                (
                    self.clipped,
                    f"{self.clipped} {of} end outside, by up to {self.farthest:.1f} pixels, and are clipped",
                ),
            )
            if count
        ]


def survey_boxes(rows: Iterable[Any], rule: BoxRule, num_labels: int) -> BoxSurvey:
    """Counts over rows; raises as `BoxSurvey.add` does."""
    found = BoxSurvey(rule, num_labels)
    for row in rows:
        found.add(row)
    return found
