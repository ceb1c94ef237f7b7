"""From stored boxes to canonical ones: formats, how they are recognised, and what is wrong with a box."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..utils.messages import UserError


MIN_SIDE = 1.0  # pixels; smaller boxes teach nothing
FRACTIONS = 0.9  # share of the values up to 1; in pixels, the far sides of corners are above
MOST_OUTSIDE = 0.2  # of real boxes, few end outside of their picture

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
        masks: `[N]` of what `masks.to_rle` takes; None if they are not read, or there are none.
    """

    boxes: np.ndarray
    categories: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    size: tuple[int, int] | None = None
    masks: Sequence[Any] | None = None


class BoxRow(NamedTuple):
    """One raw sample: the picture as in `Row`, and its boxes as they are stored."""

    image: Any
    label: RawBoxes
    image_name: str
    label_name: str


class BoxSource(NamedTuple):
    """Raw splits of pictures with boxes, and what their files say of all of them.

    Attributes:
        splits: rows of each split.
        names: class name of each stored category, in the order of the classes; None if the files do not say.
        box_format: key of `FORMATS` that the kind of file stands for; None if boxes must tell.
        kind: the kind of file, in words.
        masks: whether its rows have masks.
        notes: what looks wrong with `train`.
    """

    splits: Mapping[str, Any]
    names: Mapping[Any, str] | None
    box_format: str | None
    kind: str
    masks: bool = False
    notes: tuple[str, ...] = ()


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
            raise UserError(
                f"{name}: box {wrong} has the category {raw.categories.tolist()[wrong]!r}, which is none of the "
                f"{num_labels} classes. Correct the annotation, or name all classes (`--id2label`)."
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

        def refuse(wrong: Any, what: str, remedy: str) -> None:
            if wrong.any():
                place = int(wrong.argmax())
                raise UserError(
                    f"{name}: box {place}, {shown(raw.boxes[place])}, {what} (read as {self.box_format}; the picture is "
                    f"{size[0]}x{size[1]}, width x height). {remedy}"
                )

        other = f"Give the format that the boxes have (`--box_format`, one of {', '.join(FORMATS)}), or mend the box."
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


def is_repeated(boxes: np.ndarray, classes: np.ndarray, masks: Sequence[Any] | None = None) -> np.ndarray:
    """Which boxes `[N, 4]` repeat an earlier one of the same class, and mask, exactly: bool `[N]`."""
    columns = [boxes, classes]
    if masks is not None:
        known: dict[bytes, int] = {}
        columns.append(np.array([known.setdefault(mask["counts"], len(known)) for mask in masks]))
    _, first = np.unique(np.column_stack(columns), axis=0, return_index=True)
    repeated = np.ones(len(boxes), bool)
    repeated[first] = False
    return repeated


def to_train_on(sample: Any) -> np.ndarray:
    """Which boxes of a canonical sample teach: no crowds, nothing degenerate, no repetition; bool `[N]`."""
    boxes, classes = sample["boxes"], sample["classes"]
    plain = ~sample["crowd"] & ~is_degenerate(boxes, sample["areas"])
    masks = None if sample.get("masks") is None else [sample["masks"][place] for place in plain.nonzero()[0]]
    plain[plain] = ~is_repeated(boxes[plain], classes[plain], masks)
    return plain


class Looked(NamedTuple):
    """Stored boxes of a picture whose width and height are known."""

    raw: RawBoxes
    size: tuple[int, int]
    name: str


def recognise(looked: Sequence[Looked], stated: str | None, by: str) -> tuple[str, str]:
    """The format of stored boxes, and a clause that says how it is known.

    Corners (xyxy) are impossible where a side would be negative; left, top, width and height (xywh) also where the box
    would end more than a pixel outside of the picture. If both are possible, the stated areas decide. Values that are
    at most 1 (but for a few boxes that end outside) are fractions of the picture's sides: of the centre and the size
    (cxcywh_normalised), of corners, or of left, top, width and height, as the same rules tell.

    Args:
        looked: some pictures.
        stated: the format that an option or the kind of file states; None for none.
        by: what states it, in words.

    Raises:
        UserError: the boxes fit no format, or several; or they fit another one than what is stated.
    """
    looked = [one for one in looked if len(one.raw.boxes) and np.isfinite(one.raw.boxes).all()]
    if stated is not None and stated not in FORMATS:
        raise UserError(f"box_format is {stated!r}; choose one of {', '.join(FORMATS)}.")
    if not looked:
        return stated or "xywh", by if stated else "and no picture that was looked at has any"
    values = np.concatenate([one.raw.boxes for one in looked])
    fractions = bool((values <= 1).mean() > FRACTIONS)
    candidates: tuple[str, ...] = ("xywh", "xyxy")
    if fractions:
        candidates = ("cxcywh_normalised", "xyxy_normalised", "xywh_normalised")
    wrong = {name: _impossible(looked, name) for name in {*candidates, stated} - {None}}

    def example(box_format: str) -> str:
        place = int(wrong[box_format].argmax())
        owner = int(np.searchsorted(np.cumsum([len(one.raw.boxes) for one in looked]), place, side="right"))
        one = looked[owner]
        return f"{shown(values[place])} in {one.name}, {one.size[0]}x{one.size[1]} (width x height)"

    if stated is not None:
        read = f"boxes are read as {stated}, {by}, but"
        others = [name for name in candidates if name != stated and not wrong[name].any()]
        if fractions != FORMATS[stated][1]:
            what = "at most 1, as fractions of the picture's sides are" if fractions else "above 1, as no fraction is"
            raise UserError(f"{read} values are {what}, such as {example(stated)}. {_remedy(*candidates[:1])}")
        if others and wrong[stated].mean() > MOST_OUTSIDE:
            raise UserError(
                f"{read} that is impossible for {int(wrong[stated].sum())} of {len(values)}, such as {example(stated)}, "
                f"while all of them could be {others[0]}. {_remedy(others[0])}"
            )
        return stated, by
    possible = [name for name in candidates if not wrong[name].any()]
    if len(possible) == 1:
        counts = [(int(wrong[name].sum()), name) for name in candidates if name not in possible]
        first, *more = (f"{count} of {len(values)} boxes looked at are impossible as {name}" for count, name in counts)
        return possible[0], " and ".join([f"since {first}", *more])
    if not possible:
        reasons = "; ".join(f"not {name}, for {example(name)}" for name in candidates)
        raise UserError(f"the boxes fit no format: {reasons}. {_remedy(candidates[0])}")
    distance = {name: _area_distance(looked, name) for name in possible}
    closest, farther, *_ = sorted(possible, key=distance.__getitem__)
    if not distance[closest] < distance[farther] / 2:
        raise UserError(
            f"the {len(values)} boxes looked at could be {' or '.join(possible)}, such as {example(possible[0])}, and "
            f"no areas tell. {_remedy(possible[0])}"
        )
    return closest, f"since the stated areas differ from those of the boxes by {distance[closest]:.0%} on average"


def _remedy(box_format: str) -> str:
    return f"Give the format that they have (`--box_format {box_format}`), or mend the annotations."


def _impossible(looked: Sequence[Looked], box_format: str) -> np.ndarray:
    """Which boxes of several pictures cannot have a format: bool `[N]`."""
    rule, parts = BoxRule(box_format), []
    for one in looked:
        corners = rule.corners(one.raw, one.size)
        negative = (corners[:, 2:] < corners[:, :2]).any(axis=1)
        beyond = ((corners[:, 2:] > np.add(one.size, 1)) | (corners[:, :2] < -1)).any(axis=1)
        # corners say where a box is, so that one which is partly outside is no other format
        parts.append(negative if FORMATS[box_format][0] in (_xyxy, _voc) else negative | beyond)
    return np.concatenate(parts)


def _area_distance(looked: Sequence[Looked], box_format: str) -> float:
    """Mean relative distance of stated areas from those of the boxes, if these had a format; inf without areas."""
    rule, parts = BoxRule(box_format), []
    for one in looked:
        corners = rule.corners(one.raw, one.size)
        known = one.raw.areas > 0
        parts.append(np.abs((corners[:, 2:] - corners[:, :2]).prod(axis=1)[known] / one.raw.areas[known] - 1))
    distances = np.concatenate(parts)
    return float(distances.mean()) if len(distances) else float("inf")
