"""From stored boxes to canonical ones: formats, how they are recognised, and what is wrong with a box."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..utils.messages import UserError


MIN_SIDE = 1.0  # pixels; smaller boxes teach nothing

Corners = Callable[[np.ndarray], np.ndarray]


def _xyxy(boxes: np.ndarray) -> np.ndarray:
    return boxes


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _cxcywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def _voc(boxes: np.ndarray) -> np.ndarray:
    return boxes - [1, 1, 0, 0]


# name -> corners, and whether values are fractions of width and height
FORMATS: dict[str, tuple[Corners, bool]] = {
    "xywh": (_xywh, False),
    "xyxy": (_xyxy, False),
    "cxcywh": (_cxcywh, False),
    "voc": (_voc, False),  # corners whose first pixel is 1
    "xywh_normalised": (_xywh, True),
    "xyxy_normalised": (_xyxy, True),
    "cxcywh_normalised": (_cxcywh, True),  # YOLO's
}


class RawBoxes(NamedTuple):
    """The boxes of one picture as they are stored.

    Attributes:
        boxes: float64 `[N, 4]` in the source's own format.
        categories: `[N]`, ids or names.
        areas: float64 `[N]` in pixels; NaN where the source states none.
        crowd: bool `[N]`: marks a group of things that are not separated.
        size: (width, height) of the picture that the annotations state, if they do.
    """

    boxes: np.ndarray
    categories: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    size: tuple[int, int] | None = None


class BoxRow(NamedTuple):
    """One raw sample: the picture as in `Row`, and its boxes as they are stored."""

    image: Any
    label: RawBoxes
    image_name: str
    label_name: str


@dataclass(frozen=True)
class BoxRule:
    """How stored boxes and categories become canonical ones.

    Attributes:
        box_format: key of `FORMATS`.
        why: how the format is known, a clause.
        categories: stored category of each class, in the order of the classes; None: 0..num_labels-1.
    """

    box_format: str = "xyxy"
    why: str = field(default="", compare=False)
    categories: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if self.box_format not in FORMATS:
            raise UserError(f"box_format is {self.box_format!r}; choose one of {', '.join(FORMATS)}.")

    def in_words(self) -> str:
        """How stored boxes are read."""
        text = f"boxes are {self.box_format}" + (f", {self.why}" if self.why else "")
        gaps = self.categories is not None and self.categories != tuple(range(len(self.categories)))
        return text + ("; classes are the stored categories in their order" if gaps else "")

    def classes(self, raw: RawBoxes, num_labels: int, name: str) -> np.ndarray:
        """Class ids int64 `[N]` of stored categories; a `UserError` names one that is none of the data set's."""
        known = range(num_labels) if self.categories is None else self.categories
        index = {category: place for place, category in enumerate(known)}
        found = [index.get(category, -1) for category in raw.categories.tolist()]
        if -1 in found:
            wrong = found.index(-1)
            shown = f"0..{num_labels - 1}" if self.categories is None else ", ".join(map(repr, list(known)[:8]))
            raise UserError(
                f"{name}: box {wrong} has the category {raw.categories.tolist()[wrong]!r}, which is none of the "
                f"{num_labels} known ones ({shown}{', ...' if len(known) > 8 and self.categories else ''}). Correct the "
                "annotation, or name all classes (`--id2label`)."
            )
        return np.array(found, np.int64)

    def apply(self, raw: RawBoxes, size: tuple[int, int], num_labels: int, name: str) -> dict[str, np.ndarray]:
        """The canonical `boxes`, `classes`, `areas` and `crowd` of a picture; see `BoxSample`.

        Boxes are clipped to the picture. Crowds, degenerate boxes and duplicates stay: see `to_train_on`.

        Args:
            raw: the stored boxes.
            size: width and height of the picture.
            num_labels: number of classes.
            name: file or row, for error messages.

        Raises:
            UserError: a box is not finite, has a negative side, or lies outside of the picture, or its category is unknown.
        """
        classes = self.classes(raw, num_labels, name)
        corners = self.corners(raw, size)

        def refuse(wrong: np.ndarray, what: str, remedy: str) -> None:
            if wrong.any():
                place = int(wrong.argmax())
                raise UserError(
                    f"{name}: box {place}, {shown(raw.boxes[place])}, {what} (read as {self.box_format}; the picture is "
                    f"{size[0]}x{size[1]}, width x height). {remedy}"
                )

        other = f"Give the format that the boxes have (box_format, one of {', '.join(FORMATS)}), or mend the box."
        refuse(~np.isfinite(raw.boxes).all(axis=1), "is not finite", "Correct or remove it.")
        sides = corners[:, 2:] - corners[:, :2]
        refuse((sides < 0).any(axis=1), "has a negative width or height", other)
        clipped = corners.clip(0, [*size, *size])
        clipped_sides = clipped[:, 2:] - clipped[:, :2]
        outside = (corners[:, 2:] < 0) | (corners[:, :2] > size) | ((sides > 0) & (clipped_sides == 0))
        refuse(outside.any(axis=1), "lies outside of the picture", other)
        areas = np.where(np.isnan(raw.areas), clipped_sides.prod(axis=1), raw.areas)
        return {"boxes": clipped.astype(np.float32), "classes": classes, "areas": areas, "crowd": raw.crowd}

    def corners(self, raw: RawBoxes, size: tuple[int, int]) -> np.ndarray:
        """Corners float64 `[N, 4]` in pixels, not clipped."""
        to_corners, normalised = FORMATS[self.box_format]
        corners = to_corners(raw.boxes)
        return corners * [*size, *size] if normalised else corners


def shown(box: Sequence[float] | np.ndarray) -> str:
    """A box in a message."""
    return f"[{', '.join(f'{float(value):g}' for value in box)}]"


def is_degenerate(boxes: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Which canonical boxes `[N, 4]` have a side below one pixel or no area: bool `[N]`."""
    return ((boxes[:, 2:] - boxes[:, :2]) < MIN_SIDE).any(axis=1) | ~(areas > 0)


def is_repeated(boxes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Which boxes `[N, 4]` repeat an earlier one of the same class exactly: bool `[N]`."""
    _, first = np.unique(np.column_stack([boxes, classes]), axis=0, return_index=True)
    repeated = np.ones(len(boxes), bool)
    repeated[first] = False
    return repeated


def to_train_on(sample: Any) -> np.ndarray:
    """Which boxes of a canonical sample teach: no crowds, nothing degenerate, no repetition; bool `[N]`."""
    boxes, classes = sample["boxes"], sample["classes"]
    plain = ~sample["crowd"] & ~is_degenerate(boxes, sample["areas"])
    plain[plain] = ~is_repeated(boxes[plain], classes[plain])
    return plain
