"""Images and masks as columns of tables, of the Hub or of folders in its formats, with errors that say what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ...hub.errors import explained
from ...utils.messages import UserError
from ...utils.text import shortened
from ..dataset import Row, UnlabelledError, usual_name


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

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

    def __init__(
        self, dataset: datasets.Dataset, image_column: str, label_column: str, name: str, others: Sequence[str] = ()
    ):
        import datasets

        self.class_names = class_names(dataset.features, label_column)
        self.commit = commit_in_path(next((file["filename"] for file in dataset.cache_files), ""))
        dataset = dataset.with_format(None).select_columns([image_column, label_column, *others])
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
    image, image_name = file_of(record, image_column, name, UserError)
    label, label_name = file_of(record, label_column, name, UnlabelledError)
    return Row(image, label, image_name, label_name)


def file_of(record: Mapping[str, Any], column: str, name: str, error: type[UserError]) -> tuple[Any, str]:
    """The encoded file or array in a record, and where it is; an `error` if it is missing."""
    value, name = record[column], f"{name}, column {column!r}"
    if value is None:
        raise error(f"{name}: empty. Remove rows without image or mask.")
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


def splits_of(loaded: Any, name: str) -> Mapping[Any, datasets.Dataset]:
    """The splits of what `datasets` has loaded; a single `Dataset` is the split `train`, all else an error."""
    import datasets

    if isinstance(loaded, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise UserError(
            f"{name}: got {type(loaded).__name__}; give its Hub id with streaming=True instead (`--streaming`)."
        )
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    if not isinstance(loaded, datasets.DatasetDict):
        raise UserError(f"{name}: expected a datasets.Dataset or DatasetDict, got {type(loaded).__name__}.")
    return loaded


def read_tables(
    loaded: Any, name: str, image_column: str | None = None, label_column: str | None = None
) -> dict[str, TableRows]:
    """Finds the columns of images and label maps of every split.

    Raises:
        UserError: `loaded` is neither a `Dataset` nor a `DatasetDict`, or none or several columns fit.
    """
    rows = {}
    for split, table in splits_of(loaded, name).items():
        try:
            columns = find_columns(table.features, image_column, label_column, name)
        except UserError as error:
            others = [columns for other, columns in rows.items() if other != split]
            if not others or usual_name(str(split)) == "train" or others[0].label_column in table.features:
                raise
            logger.warning("%s: split %r is left out, since it has no labels. %s", name, split, error)
            continue
        rows[str(split)] = TableRows(table, *columns, f"{name}/{split}")
    return rows


def find_columns(
    features: Mapping[str, Any], image_column: str | None, label_column: str | None, name: str
) -> tuple[str, str]:
    """Finds the columns of images and label maps among a table's features; a `UserError` says why there are none."""
    import datasets

    is_image = {column: isinstance(feature, datasets.Image) for column, feature in features.items()}
    is_label = {column: is_label_map(feature) for column, feature in features.items()}
    image = find_column("image", is_image, image_column, IMAGE_COLUMNS, name)
    label = find_column("label", is_label, label_column, LABEL_COLUMNS, name)
    if image == label:
        raise UserError(
            f"{name}: column {image!r} cannot hold both images and label maps. Set label_column (`--label_column`)."
        )
    return image, label


def is_label_map(feature: Any) -> bool:
    """Whether a column can hold label maps: images, or tables of ids."""
    import datasets

    return isinstance(feature, datasets.Image) or _element(feature) is not None


def find_column(kind: str, fits: Mapping[str, bool], requested: str | None, synonyms: Sequence[str], name: str) -> str:
    """The one column, of those that fit, that is requested or has one of the usual names."""
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


def load_hub(
    repo: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    data_files: Mapping[str, str] | None = None,
    load: Callable[..., Any] | None = None,
) -> Any:
    """Loads a Hub id or folder with `datasets.load_dataset`, without ever running its code.

    Args:
        repo: Hub id or folder.
        config: configuration, if there are several.
        revision: branch, tag or commit.
        data_dir: folder inside the repository.
        data_files: glob pattern of the files of each split.
        load: `datasets.load_dataset_builder`, to look only at the files.

    Raises:
        HubError: the repository cannot be read.
        UserError: it holds no data, a loading script, or several configurations of which none is chosen.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    files = None if data_files is None else dict(data_files)
    try:
        with explained("data set", repo, revision=revision):
            path, load = repo, load or datasets.load_dataset
            if load is datasets.load_dataset and (files or data_dir) and not Path(repo).is_dir():
                # datasets itself cannot find a part of a repository in its cache again without the network
                patterns = list(files.values()) if files else [f"{data_dir}/*"]
                path = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
                Path(path).mkdir(exist_ok=True)  # not there if no file fits
            return load(path, name=config, revision=revision, data_dir=data_dir, data_files=files)
    except FileNotFoundError as error:
        where = data_dir or ", ".join((files or {}).values())
        kinds = sorted({path.suffix.lower() or path.name for path in Path(repo).rglob("*") if path.is_file()})
        held = f" The folder holds files of the kinds {shortened(', '.join(kinds))}." if kinds else ""
        raise UserError(
            f"{repo}: no data found{f' in {where}' if where else ''}. Expected folders {{train,val,test}}/{{images,masks}}, "
            f"an imagefolder whose metadata.jsonl has file_name and mask_file_name, or parquet files.{held}"
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{repo}: the data set is a loading script, which datasets no longer runs. The Hub may keep a converted copy: "
            "try revision refs/convert/parquet (`--dataset_revision`) with the configuration's folder as data_dir."
        ) from error
    except DatasetsError as error:
        said = shortened(f"{type(error).__name__}: {error.__cause__ or error}")
        raise UserError(
            f"{repo}: its files cannot be read as one table ({said}). If they belong to several configurations, choose one "
            "(`--dataset_config`), or its folder (`--data_dir`)."
        ) from error
    except ValueError as error:
        said = " ".join(str(error).partition("\nExample")[0].split())
        if said.startswith(("Config name is missing", "BuilderConfig")):
            raise UserError(f"{repo}: {said}. Choose one with config (`--dataset_config`).") from error
        if said.startswith(("Couldn't find cache", "There are multiple")):
            raise UserError(
                f"{repo}: it cannot be read from the Hub, and the cache holds another configuration of it ({said}). Check "
                "name, configuration and revision, or run once online."
            ) from error
        raise


def load_tables(
    repo: str,
    name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    read: Callable[..., dict[str, TableRows]] = read_tables,
    **options: Any,
) -> dict[str, TableRows]:
    """Stores a data set and gives the rows of its splits: `load_hub(repo, **options)`, then `read`."""
    return read(load_hub(repo, **options), name, image_column, label_column)


def hub_names(repo: str, revision: str | None = None) -> Path | None:
    """Fetches `id2label.json` of a dataset repository; None if it has none, or it is offline and was never fetched."""
    with explained("data set", repo, revision=revision):
        try:
            return Path(hf_hub_download(repo, "id2label.json", repo_type="dataset", revision=revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not constants.is_offline_mode():
                raise
    return None
