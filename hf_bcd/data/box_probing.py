"""A look at pictures with boxes, so that what is wrong with them shows before training."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..utils.masks import RLE, mask_areas, mask_boxes, union
from ..utils.messages import UserError
from .boxes import BoxRow, BoxRule, is_degenerate, is_repeated, shown
from .dataset import UnlabelledError
from .detection import read_boxes
from .masks import check_masks, form_of


PROBED_PICTURES = 64  # of all splits together
MIN_PICTURE = 32  # pixels; nothing is trained on smaller pictures
MOST_APART = 2.0  # pixels that a mask may end outside of its box


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


def scan(rows: Any, masks: bool = False) -> Scan:
    """Reads all annotations of a split.

    Raises:
        UserError: a box is not finite, or has no mask while these are wanted, or some rows, but not all, have no annotations.
    """
    found, truth = Scan(), getattr(rows, "truth", None) or rows.__getitem__
    for index in range(len(rows)):
        try:
            row = truth(index)
        except UnlabelledError as error:
            found.lacking.append(error)
            continue
        raw = row.label
        if masks:
            check_masks(raw, row.label_name)
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
        degenerate: boxes with a side below one pixel, or no area, that are not `hollow`.
        repeated: boxes that repeat another one.
        clipped: boxes that end outside of their picture.
        farthest: how far the farthest of these ends outside, in pixels.
        most: number of boxes of the picture that has most.
        masks: whether masks are looked at, too.
        forms: number of masks by how they are stored.
        hollow: masks without a pixel, but for those of crowds.
        apart: masks that end outside of their box by more than two pixels.
        areas: pixels of each mask that is neither empty nor a crowd's.
        shared: pixels that more than one of these cover, counted once for each further one.
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
    masks: bool = False
    forms: Counter[str] = field(default_factory=Counter)
    hollow: int = 0
    apart: int = 0
    areas: list[float] = field(default_factory=list)
    shared: float = 0.0

    def __post_init__(self) -> None:
        self.boxes = np.zeros(self.num_labels, np.int64)

    def add(self, row: BoxRow) -> None:
        """Decodes a row and its picture; raises as `read_boxes` does."""
        truth = read_boxes(row, self.rule, self.num_labels, self.masks)
        size, boxes, crowd, masks = truth["image"].size, truth["boxes"], truth["crowd"], truth["masks"]
        self.pictures, self.empty, self.most = (
            self.pictures + 1,
            self.empty + (not len(boxes)),
            max(self.most, len(boxes)),
        )
        self.sizes.add(size)
        self.boxes += np.bincount(truth["classes"], minlength=self.num_labels)
        self.crowds += int(crowd.sum())
        hollow = np.zeros(len(boxes), bool) if masks is None else mask_areas(masks) == 0
        self.hollow += int((hollow & ~crowd).sum())
        self.degenerate += int((is_degenerate(boxes, truth["areas"]) & ~hollow & ~crowd).sum())
        singles = None if masks is None else [masks[place] for place in (~crowd).nonzero()[0]]
        self.repeated += int(is_repeated(boxes[~crowd], truth["classes"][~crowd], singles).sum())
        beyond = np.abs(self.rule.corners(row.label, size) - boxes).max(axis=1, initial=0)
        self.clipped += int((beyond > 0.5).sum())
        self.farthest = max(self.farthest, float(beyond.max(initial=0)))
        if masks:
            self.forms.update(map(form_of, row.label.masks or ()))
            self._add_masks(masks, boxes, crowd)

    def _add_masks(self, masks: list[RLE], boxes: np.ndarray, crowd: np.ndarray) -> None:
        areas, around = mask_areas(masks), mask_boxes(masks)
        outside = np.maximum(boxes[:, :2] - around[:, :2], around[:, 2:] - boxes[:, 2:]).max(axis=1)
        self.apart += int((outside[areas > 0] > MOST_APART).sum())
        singles = ((areas > 0) & ~crowd).nonzero()[0]
        self.areas += areas[singles].tolist()
        self.shared += areas[singles].sum() - mask_areas([union([masks[place] for place in singles])])[0]

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
                (self.hollow, f"{self.hollow} {of} have a mask without a pixel: nothing is trained on them"),
                (
                    self.apart,
                    f"{self.apart} {of} have a mask that ends outside of the box by more than {MOST_APART:g} pixels: both "
                    "stay as they are",
                ),
            )
            if count
        ]


def survey_boxes(rows: Iterable[Any], rule: BoxRule, num_labels: int, masks: bool = False) -> BoxSurvey:
    """Counts over rows, with their masks if these are wanted; raises as `BoxSurvey.add` does."""
    found = BoxSurvey(rule, num_labels, masks=masks)
    for row in rows:
        found.add(row)
    return found
