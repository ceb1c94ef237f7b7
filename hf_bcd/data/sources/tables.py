"""Images and masks as columns of a `datasets.Dataset`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...utils.messages import UserError
from ..dataset import Row


if TYPE_CHECKING:
    import datasets


IMAGE_COLUMNS = ("image", "pixel_values", "rgb", "img")
LABEL_COLUMNS = (
    "annotation", "label", "mask", "semantic_segmentation", "seg", "seg_map", "semantic_seg_map", "annotations",
    "segmentation", "annotated",
)  # fmt: skip


class TableRows:
    """Rows of a `datasets.Dataset`, with encoded files kept as they are.

    Decoding by the library would turn a photograph by its EXIF orientation without its mask.

    Attributes:
        class_names: names of the classes, if the label maps are nested lists of `ClassLabel`.
        commit: commit of the Hub repository that was read, where it came from there.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str, label_column: str, name: str):
        import datasets

        self.class_names = class_names(dataset.features, label_column)
        self.commit = commit_in_path(next((file["filename"] for file in dataset.cache_files), ""))
        dataset = dataset.with_format(None).select_columns([image_column, label_column])
        for column in (image_column, label_column):
            if isinstance(dataset.features[column], datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset, self.image_column, self.label_column, self.name = dataset, image_column, label_column, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return row_of(self.dataset[index], self.image_column, self.label_column, f"{self.name}, row {index}")


def row_of(record: Mapping[str, Any], image_column: str, label_column: str, name: str) -> Row:
    """Takes image and mask, neither of which may be missing, out of a record of a table; `name` says where it is."""
    image, image_name = _file(record, image_column, name)
    label, label_name = _file(record, label_column, name)
    return Row(image, label, image_name, label_name)


def _file(record: Mapping[str, Any], column: str, name: str) -> tuple[Any, str]:
    value, name = record[column], f"{name}, column {column!r}"
    if value is None:
        raise UserError(f"{name}: empty. Remove rows without image or mask.")
    if isinstance(value, dict):
        file = value["path"] if value["bytes"] is None else value["bytes"]
        return file, f"{name} ({value['path']})" if value["path"] else name
    return np.asarray(value), name


def commit_in_path(path: str) -> str | None:
    """The commit in the path of a cached file of the Hub: `datasets` keeps it nowhere else."""
    return next((part for part in Path(path).parts if re.fullmatch("[0-9a-f]{40}", part)), None)


def class_names(features: Mapping[str, Any], label_column: str) -> list[str] | None:
    """Names of the classes, if the label maps are nested lists of `ClassLabel`."""
    return getattr(_element(features[label_column]), "names", None)


def read_tables(
    loaded: Any, name: str, image_column: str | None = None, label_column: str | None = None
) -> dict[str, TableRows]:
    """Finds the columns of images and label maps of every split; a single `Dataset` is the split `train`.

    Raises:
        UserError: `loaded` is neither a `Dataset` nor a `DatasetDict`, or none or several columns fit.
    """
    import datasets

    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    if not isinstance(loaded, datasets.DatasetDict):
        raise UserError(f"{name}: expected a datasets.Dataset or DatasetDict, got {type(loaded).__name__}.")
    rows = {}
    for split, table in loaded.items():
        columns = find_columns(table.features, image_column, label_column, name)
        rows[str(split)] = TableRows(table, *columns, f"{name}/{split}")
    return rows


def find_columns(
    features: Mapping[str, Any], image_column: str | None, label_column: str | None, name: str
) -> tuple[str, str]:
    """Finds the columns of images and label maps among the features of a table.

    Raises:
        UserError: none or several columns fit, or one is to be both.
    """
    import datasets

    is_image = {column: isinstance(feature, datasets.Image) for column, feature in features.items()}
    is_label = {column: is_image[column] or _element(features[column]) is not None for column in is_image}
    image = _find_column("image", is_image, image_column, IMAGE_COLUMNS, name)
    label = _find_column("label", is_label, label_column, LABEL_COLUMNS, name)
    if image == label:
        raise UserError(
            f"{name}: column {image!r} cannot hold both images and label maps. Set label_column (`--label_column`)."
        )
    return image, label


def _find_column(
    kind: str, fits: Mapping[str, bool], requested: str | None, synonyms: Sequence[str], name: str
) -> str:
    found = [column for column in ((requested,) if requested else synonyms) if fits.get(column)]
    if len(found) != 1:
        state = f"{requested!r} is none" if requested else f"{' and '.join(found) or 'none'} found by name"
        able = ", ".join(column for column, fit in fits.items() if fit) or "no column"
        raise UserError(
            f"{name}: needs one {kind} column, but {state}. Columns are {', '.join(fits)}, of which {able} can hold "
            f"{kind}s. Set {kind}_column (`--{kind}_column`)."
        )
    return found[0]


def _element(feature: Any) -> Any:
    """Feature of one pixel of a label map stored as a table of ids; None for every other kind of column."""
    import datasets

    if isinstance(feature, datasets.Array2D):
        return datasets.Value(feature.dtype)
    inner = getattr(getattr(feature, "feature", None), "feature", None)
    return inner if isinstance(inner, datasets.Value | datasets.ClassLabel) else None
