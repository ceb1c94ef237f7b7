"""Pictures without labels: a folder of them, or the image column of a table."""

import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..utils.messages import UserError
from ..utils.text import shortened
from .dataset import DenseDataset, ReadRows, Row, read_sample, usual_name
from .labels import LabelRule
from .probing import probed_rows
from .sources.layouts import EXTENSIONS, other_kinds
from .sources.tables import IMAGE_COLUMNS, file_of, find_column, load_tables, splits_of


logger = logging.getLogger(__name__)

LABELS = ("masks", "labels", "instances")  # folders of them
TABLES = (".parquet", ".arrow", ".csv", ".json", ".jsonl")


def load_pictures(
    source: str | Path, *, image_column: str | None = None, config: str | None = None, revision: str | None = None
) -> DenseDataset:
    """Loads pictures without labels, as a data set of no classes that is to be added to another, or named by a teacher.

    Args:
        source: a folder with pictures at any depth, in the order of their names (`2.png` before `10.png`); a folder of tables
            that `datasets` reads; or a Hub id, of which the split `train` is taken, or its only one.
        image_column: column of the images in a table; found by its name if None.
        config: configuration of a table.
        revision: branch, tag or commit of a Hub id.

    Raises:
        UserError: there are no pictures, one that is looked at cannot be read, or the folder seems to hold masks too.
    """
    root = Path(source).expanduser()
    if isinstance(source, Path) and not root.is_dir():
        raise UserError(f"{root}: this folder does not exist.")
    if root.is_dir() and (files := picture_files(root)):
        check_no_masks(root, files)
        if kinds := other_kinds(root.rglob("*")):
            logger.warning(
                "%s: %d pictures; files of other kinds are left out: %s", root, len(files), shortened(kinds)
            )
        rows: Any = ReadRows([(str(path),) for path in files], read_file)
        found = DenseDataset(rows, root.resolve().name, "train", str(root), {}, labelled=0)
    else:
        read: Any = read_pictures
        tables = load_tables(str(source), str(source), image_column, None, read, config=config, revision=revision)
        split = next((name for name in tables if usual_name(name) == "train"), None)
        if split is None and len(tables) > 1:
            raise UserError(
                f"{source}: pictures are taken from a split 'train', but the splits are {', '.join(tables)}."
            )
        split = split or next(iter(tables))
        found = DenseDataset(tables[split], str(source), "train", str(source), {}, revision=revision, labelled=0)
    for row in probed_rows(found.rows):
        read_sample(row, LabelRule(), 0)
    return found


def picture_files(root: Path) -> list[Path]:
    """The pictures in a folder at any depth, in natural order, without hidden files; none where tables describe them."""
    paths = [
        path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    if any(path.suffix.lower() in TABLES for path in paths):
        return []
    return sorted(
        (path for path in paths if path.suffix.lower() in EXTENSIONS and path.is_file()),
        key=lambda path: natural(str(path.relative_to(root))),
    )


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts numbers inside names by their value."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def check_no_masks(root: Path, files: list[Path]) -> None:
    """Refuses a folder in which two folders have files of one name, as images and their masks do."""
    folders: dict[str, set[Path]] = {}
    for path in files:
        folders.setdefault(path.stem, set()).add(path.parent)
    twice = {stem: parents for stem, parents in folders.items() if len(parents) > 1}
    if len(twice) > len(folders) / 2:
        stem, parents = next(iter(twice.items()))
        names = " and ".join(sorted(str(parent.relative_to(root)) for parent in parents)[:2])
        raise UserError(
            f"{root}: {stem} lies in {names}, as a picture and its mask would. Name the folder of the pictures; or, if these "
            "are masks to learn from, call the folders {train,val,test}/{images,masks}."
        )


def holds_only_pictures(root: Path) -> bool:
    """Whether a folder has pictures, and nothing that `load_dense_dataset` would look for labels in."""
    paths = list(root.rglob("*"))
    if any(path.name.lower() in LABELS and path.is_dir() for path in paths):
        return False
    return not other_kinds(paths) and bool(picture_files(root))


def pictures_and_more(root: Path) -> str | None:
    """What to do about a folder of pictures in which files of other kinds might be labels; None where there is no such thing."""
    if not (kinds := other_kinds(root.rglob("*"))) or not picture_files(root):
        return None
    return (
        f"{root} holds pictures, and also files of the kinds {shortened(kinds)}: a folder of pictures without labels holds nothing "
        "else."
    )


def read_file(path: str) -> Row:
    """The row of a picture that is a file."""
    return Row(Path(path), None, path, path)


def read_pictures(
    loaded: Any, name: str, image_column: str | None = None, label_column: str | None = None
) -> Mapping[str, ReadRows]:
    """Rows of the image column of every split of what `datasets` has loaded; `label_column` is there for `load_tables`."""
    import datasets

    rows = {}
    for split, table in splits_of(loaded, name).items():
        fits = {column: isinstance(feature, datasets.Image) for column, feature in table.features.items()}
        column = find_column("image", fits, image_column, IMAGE_COLUMNS, name)
        table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        read = partial(read_record, table, column, f"{name}/{split}")
        rows[str(split)] = ReadRows([(index,) for index in range(len(table))], read)
    return rows


def read_record(table: Any, column: str, name: str, index: int) -> Row:
    """The row of a table's record."""
    image, image_name = file_of(table[index], column, f"{name}, row {index}", UserError)
    return Row(image, None, image_name, image_name)
