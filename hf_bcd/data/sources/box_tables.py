"""Boxes in a column of tables: `objects` with `bbox` and `category`, as dict of lists or list of dicts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...utils.messages import UserError
from ...utils.text import shortened
from ..boxes import BoxRow, RawBoxes
from ..dataset import UnlabelledError, usual_name
from .tables import IMAGE_COLUMNS, LABEL_COLUMNS, TableRows, file_of, find_column, is_label_map, read_tables, splits_of


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

BOX_COLUMNS = ("objects", "annotations", "annotation", "object")
FIELDS = {
    "bbox": ("bbox", "bboxes", "boxes"),
    "category": ("category", "categories", "category_id", "label", "labels", "class", "classes"),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "iscrowds", "is_crowd"),
    "mask": ("segmentation", "segmentations", "masks"),
}
SIZE_COLUMNS = ("width", "height")


class BoxTableRows(TableRows):
    """Rows of a `datasets.Dataset` with a column of boxes, see `TableRows`."""

    def __init__(self, dataset: datasets.Dataset, image_column: str, box_column: str, name: str, masks: bool = False):
        sizes = [column for column in SIZE_COLUMNS if column in dataset.features]
        super().__init__(dataset, image_column, box_column, name, others=sizes if len(sizes) == 2 else ())
        fields = fields_of(dataset.features[box_column]) or {}
        self.masks = masks
        if masks and _found(fields, "mask") is None:
            raise UserError(
                f"{name}, column {box_column!r}: its things have {', '.join(fields)}, but no {' or '.join(FIELDS['mask'])}. "
                "Instance segmentation needs masks: add them, or train on boxes (`--task object-detection`)."
            )
        category = fields.get(_found(fields, "category") or "")
        self.class_names = getattr(getattr(category, "feature", category), "names", None)
        self.truths = self.dataset.remove_columns([image_column])

    def __getitem__(self, index: int) -> Any:
        record = self.dataset[index]
        image, image_name = file_of(record, self.image_column, f"{self.name}, row {index}", UserError)
        return self._row(record, index)._replace(image=image, image_name=image_name)

    def truth(self, index: int) -> BoxRow:
        """The row without its picture, which is not read."""
        return self._row(self.truths[index], index)

    def _row(self, record: Mapping[str, Any], index: int) -> BoxRow:
        name = f"{self.name}, row {index}, column {self.label_column!r}"
        width, height = (record.get(column) for column in SIZE_COLUMNS)
        size = (int(width), int(height)) if width and height else None
        return BoxRow(None, raw_boxes(record[self.label_column], name, size, self.masks), name, name)


def fields_of(feature: Any) -> Mapping[str, Any] | None:
    """The features of the fields of a column of things; None for every other kind of column."""
    fields = getattr(feature, "feature", feature)  # of a list of dicts
    return fields if isinstance(fields, Mapping) and _found(fields, "bbox") else None


def _found(fields: Mapping[str, Any], field: str) -> str | None:
    return next((name for name in FIELDS[field] if name in fields), None)


def raw_boxes(value: Any, name: str, size: tuple[int, int] | None = None, masks: bool = False) -> RawBoxes:
    """The boxes of one row.

    Args:
        value: dict of lists, or list of dicts.
        name: the row, for error messages.
        size: (width, height) that the row states.

    Raises:
        UnlabelledError: the row has none, not even an empty list.
        UserError: the lists differ in length, or boxes are not four numbers each.
    """
    if value is None:
        raise UnlabelledError(
            f"{name}: empty. A picture without things has empty lists there; remove unlabelled rows."
        )
    if isinstance(value, Sequence):
        value = {key: [one[key] for one in value] for key in (value[0] if value else ())}
    found: dict[str, Any] = {
        field: value.get(_found(value, field) or "") for field in FIELDS if masks or field != "mask"
    }
    boxes, categories = found["bbox"], found["category"]
    if not value or boxes is None:
        boxes = categories = []
    if categories is None:
        raise UserError(f"{name}: its things have {', '.join(value)}, but no {' or '.join(FIELDS['category'][:4])}.")
    counts = {field: len(column) for field, column in found.items() if column is not None and field != "bbox"}
    if any(count != len(boxes) for count in counts.values()):
        raise UserError(f"{name}: {len(boxes)} boxes, but {counts}; a thing has one of each.")
    for box in boxes:
        if box is None or len(box) != 4 or any(number is None for number in box):
            raise UserError(f"{name}: {shortened(repr(box))} is no box of four numbers. Correct or remove it.")
    if any(category is None for category in categories):
        raise UserError(f"{name}: box {list(categories).index(None)} has no category. Correct or remove it.")
    areas = [np.nan if area is None else float(area) for area in found["area"] or [None] * len(boxes)]
    crowd = [bool(one) for one in found["iscrowd"] or [False] * len(boxes)]
    array = np.array(boxes, np.float64).reshape(-1, 4)
    numbers = array, np.array(categories, None), np.array(areas, np.float64), np.array(crowd, bool)
    return RawBoxes(*numbers, size, (found["mask"] or ()) if masks else None)


def holds_boxes(features: Mapping[str, Any], label_column: str | None) -> bool:
    """Whether a table with these columns has boxes and no label maps, or `label_column` is one of boxes."""
    if label_column is not None:
        return fields_of(features.get(label_column)) is not None
    if any(is_label_map(features[column]) for column in LABEL_COLUMNS if column in features):
        return False
    return any(fields_of(features[column]) is not None for column in BOX_COLUMNS if column in features)


def read_box_tables(
    loaded: Any,
    name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    masks: bool = False,
) -> dict[str, BoxTableRows]:
    """Finds the columns of images and boxes of every split; raises as `read_tables` does."""
    import datasets

    rows: dict[str, BoxTableRows] = {}
    for split, table in splits_of(loaded, name).items():
        features = table.features
        images = {column: isinstance(feature, datasets.Image) for column, feature in features.items()}
        boxes = {column: fields_of(feature) is not None for column, feature in features.items()}
        if rows and not any(boxes.values()) and usual_name(str(split)) != "train":
            logger.warning("%s: split %r is left out, since it has no column of boxes.", name, split)
            continue
        image = find_column("image", images, image_column, IMAGE_COLUMNS, name)
        label = find_column("label", boxes, label_column, BOX_COLUMNS, name)
        rows[str(split)] = BoxTableRows(table, image, label, f"{name}/{split}", masks)
    return rows


def read_either(
    loaded: Any,
    name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    boxes: bool | None = None,
    masks: bool = False,
) -> dict[str, Any]:
    """The rows of a table with label maps or with boxes (and their masks).

    `boxes` asks for one of them, None takes what is there.
    """
    if boxes is None:
        first = next(iter(splits_of(loaded, name).values()), None)
        boxes = first is not None and holds_boxes(first.features, label_column)
    if boxes:
        return read_box_tables(loaded, name, image_column, label_column, masks)
    return read_tables(loaded, name, image_column, label_column)
