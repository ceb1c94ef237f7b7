"""A store as training reads it: an ordinary data set of Parquet files, and what they hold."""

import json
import logging
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import Tensor

from ..adapters.base import REPO_ID
from ..hub.errors import explained
from ..utils.files import numbers, read_json
from ..utils.messages import UserError
from .codecs import Column, Parts


logger = logging.getLogger(__name__)

STORE_FILE, STATE_FILE = "store.json", "losses.safetensors"
SHARD = "data/train-{:05d}-of-{:05d}.parquet"
FORMAT, FORMAT_OF_SEVERAL = 1, 2  # with several teachers, `teachers` holds of each what else the file itself does
THUMBNAIL = 16
TOLERANCE = 1.0  # grey levels that decoders may differ by, as a mean over a thumbnail


def fingerprint(pixel_values: Tensor) -> tuple[int, bytes]:
    """A checksum of a view's pixels uint8 `[3, H, W]`, and a thumbnail to compare where decoders round otherwise."""
    small = F.adaptive_avg_pool2d(pixel_values.float(), THUMBNAIL).round().to(torch.uint8)
    return zlib.crc32(pixel_values.contiguous().numpy().tobytes()), small.numpy().tobytes()


def prefix_of(teacher: str) -> str:
    """How names of columns begin that belong to one of several teachers."""
    return f"{teacher}/" if teacher else ""


def scores_file(teacher: str) -> str:
    """The file beside a store that holds a teacher's scores."""
    return f"scores-{teacher}.json" if teacher else "scores.json"


class Store:
    """Outputs of a teacher for `views` views of each picture of a training split; of several teachers, see `parts`.

    Args:
        folder: holds `store.json` and `data/*.parquet`.
        source: folder or Hub id, as the user named it.
        teacher: the one of several whose columns are meant; "" for a single one, or for all of them.

    Raises:
        UserError: it holds no store, one of another format or without this teacher, or one that was not written to its end.

    Attributes:
        source: as given.
        teacher: as given.
        content: `store.json`, with what it says of this teacher.
        teachers: names of all teachers; "" alone where there is one.
    """

    def __init__(self, folder: Path, source: str | None = None, teacher: str = "") -> None:
        self.folder, self.source, self.teacher = folder, source or str(folder), teacher
        if not (folder / STORE_FILE).is_file():
            raise UserError(
                f"{folder} holds no stored teacher: {STORE_FILE} is missing. `hf-bcd reinforce` makes one."
            )
        self.content: dict[str, Any] = read_json(folder / STORE_FILE)
        if self.content.get("format") not in (FORMAT, FORMAT_OF_SEVERAL):
            raise UserError(
                f"{folder / STORE_FILE} has format {self.content.get('format')}, but this version reads {FORMAT} and "
                f"{FORMAT_OF_SEVERAL}; make it again with `hf-bcd reinforce`."
            )
        groups = self.content.pop("teachers", {"": {}})
        self.teachers = list(groups)
        if teacher and teacher not in groups:
            known = ", ".join(filter(None, groups)) or "one without a name"
            raise UserError(f"{self.source}: the store has no teacher {teacher!r}, only {known}.")
        named = {
            prefix_of(name) + key: x for name, group in groups.items() for key, x in group.get("columns", {}).items()
        }
        self.content |= groups.get(teacher, {"columns": named})
        missing = [path for path in self.shards if not path.is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(self.shards)} files are missing, such as {missing[0].name}, so the store "
                "is not finished. Run the same `hf-bcd reinforce` again: it goes on where it stopped."
            )

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None, token: str | None = None) -> "Store":
        """The store in a folder or, where there is none, in a data set `user/name[@revision]` of the Hub.

        One of several teachers is named after its store: `folder/teacher`, `user/name/teacher[@revision]`.
        """
        files = [STORE_FILE, STATE_FILE, scores_file(""), scores_file("*"), "data/*"]
        folder, teacher = _find(str(source), files, revision, token)
        return cls(folder, str(source), teacher)

    @classmethod
    def sources_of(cls, source: str, token: str | None = None) -> list[str]:
        """A store as `open` takes it, or each teacher of one of several; reads `store.json` only, if it is there."""
        folder, teacher = _find(source, [STORE_FILE], None, token)
        path = folder / STORE_FILE
        names = [] if teacher or not path.is_file() else list(read_json(path).get("teachers", {}))
        return [_source_of(source, name) for name in names] or [source]

    @property
    def parts(self) -> dict[str, "Store"]:
        """The stores of single teachers by name, which read the same rows; this one as "" if it is of one teacher."""
        if self.teacher or self.teachers == [""]:
            return {"": self}
        return {name: Store(self.folder, _source_of(self.source, name), name) for name in self.teachers}

    def scores(self, split: str, image_size: int | None) -> dict[str, Any]:
        """The teacher's scores on a split; empty unless they were measured when the store was made."""
        path = self.folder / scores_file(self.teacher)
        if not path.is_file():
            return {}
        found = read_json(path)
        same = (found["split"], found["image_size"]) == (split, image_size)
        return numbers(found["scores"]) if same else {}

    @property
    def views(self) -> int:
        return self.content["views"]

    @property
    def images(self) -> int:
        return self.content["images"]

    @property
    def seed(self) -> int:
        return self.content["seed"]

    @property
    def shards(self) -> list[Path]:
        return [self.folder / SHARD.format(number, self.content["shards"]) for number in range(self.content["shards"])]

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The teacher's tensors by name."""
        return {
            name: Column(column["codec"], tuple(column["shape"])) for name, column in self.content["columns"].items()
        }

    @cached_property
    def table(self) -> Any:
        """All rows with random access; they lie in the cache of `datasets`, mapped into memory."""
        import datasets

        rows = datasets.Dataset.from_parquet([str(path) for path in self.shards])
        expected = self.views * self.images
        if len(rows) != expected:  # type: ignore[arg-type]
            raise UserError(f"{self.source} has {len(rows)} rows, but {STORE_FILE} says {expected}; make it again.")  # type: ignore[arg-type]
        columns = [f"{prefix_of(self.teacher)}{name}" for name in self.columns]
        return rows.select_columns(["index", "view", "image", "checksum", "thumbnail", *columns])  # type: ignore[union-attr]

    def read(self, index: int, view: int, seen: tuple[int, bytes] | None = None) -> dict[str, Parts]:
        """The parts of all columns for a view of a picture.

        Args:
            index: of the picture in its split.
            view: number of the view.
            seen: `fingerprint` of the view itself, which is compared with what the teacher saw.

        Raises:
            UserError: rows stand in another order, or the teacher saw another picture.
        """
        row = self.table[view * self.images + index]
        if (row["index"], row["view"]) != (index, view):
            raise UserError(
                f"{self.source}: view {row['view']} of picture {row['index']} stands where view {view} of {index} should; the "
                "rows were sorted otherwise. Make the store again, or fetch it again."
            )
        if seen is not None:
            self._check_view(row, *seen)
        return {name: column.unpack(row[prefix_of(self.teacher) + name]) for name, column in self.columns.items()}

    def _check_view(self, row: Mapping[str, Any], checksum: int, thumbnail: bytes) -> None:
        if checksum == row["checksum"]:
            return
        seen, shown = (
            torch.frombuffer(bytearray(x), dtype=torch.uint8).float() for x in (row["thumbnail"], thumbnail)
        )
        difference = (seen - shown).abs().mean().item() if len(seen) == len(shown) else float("inf")
        if difference > TOLERANCE:
            raise UserError(
                f"{self.source}: view {row['view']} of picture {row['index']} ({row['image']}) is another one than the teacher saw: "
                f"its thumbnail differs by {difference:.1f} grey levels. The file, the order of the pictures or their "
                "transform has changed; make the store again."
            )

    def check(self, dataset: Any, transform: Mapping[str, Any]) -> None:
        """Compares what decides the views with a run.

        Args:
            dataset: the training split.
            transform: arguments of the training transform.

        Raises:
            UserError: names all that differs.
        """
        expected: dict[str, Any] = {
            "images": len(dataset),
            "classes": list(dataset.id2label.values()),
            "task": dataset.task,
            "unlabelled": getattr(dataset, "num_unlabelled", 0),
            **transform,
        }
        found = {key: self.content.get(key) for key in ("images", "classes", "task", "unlabelled")}
        found |= {"views_version": 1} | self.content["transform"]  # before the versions there was one
        expected = json.loads(json.dumps(expected))
        wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        if wrong:
            differs = "; ".join(f"{key} is {found.get(key)} there and {expected.get(key)} here" for key in wrong[:5])
            raise UserError(
                f"the stored teacher {self.source} is of other views than this run's: {differs}. Run with what the store has, or "
                "make another one with `hf-bcd reinforce`."
            )


def _find(source: str, files: list[str], revision: str | None, token: str | None) -> tuple[Path, str]:
    """The folder of a store, fetched from the Hub if need be, and the name of the teacher that stands behind it."""
    path = Path(source)
    if not (path / STORE_FILE).is_file() and (path.parent / STORE_FILE).is_file():
        return path.parent, path.name
    name, _, given = source.partition("@")
    repository, teacher = name.rpartition("/")[::2] if name.count("/") == 2 else (name, "")
    if path.is_dir() or (teacher and Path(repository).is_dir()) or not REPO_ID.fullmatch(repository):
        return path, ""
    with explained("data set", repository, revision=given or revision):
        options = {"repo_type": "dataset", "revision": given or revision, "token": token}
        return Path(snapshot_download(repository, allow_patterns=files, **options)), teacher


def _source_of(source: str, teacher: str) -> str:
    """One of the teachers of a store, as `Store.open` takes it."""
    name, mark, revision = (source, "", "") if Path(source).is_dir() else source.partition("@")
    return f"{name}/{teacher}{mark}{revision}"
