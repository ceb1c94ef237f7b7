"""A store as training reads it: an ordinary data set of Parquet files, and what they hold."""

import copy
import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from ..adapters.base import REPO_ID, DenseAdapter
from ..adapters.label_matching import LabelMap
from ..adapters.loading import empty_adapter
from ..data.dataset import TransformedDataset
from ..hub.errors import explained
from ..losses import DistillationCriterion
from ..losses.criterion import teacher_of
from ..outputs import DenseOutput, Targets
from ..utils.files import numbers, read_json
from ..utils.messages import UserError
from .codecs import Column, Parts
from .needs import check_storable, queries_from


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


class StoredViews(TransformedDataset):
    """Transformed samples of the views that a store knows: epoch e shows view e modulo their number.

    Args:
        dataset: samples in canonical form.
        transform: as `TransformedDataset` has it; its seed is the stores'.
        stores: of this split, by the names of their teachers ("" for a single one).

    Raises:
        UserError: two stores have different seeds or numbers of views.
    """

    def __init__(self, dataset: Any, transform: Callable[..., Any], stores: Mapping[str, Store]) -> None:
        first, *others = stores.values()
        for other in others:
            for what, ours, theirs in (("seed", first.seed, other.seed), ("views", first.views, other.views)):
                if ours != theirs:
                    raise UserError(
                        f"the stored teachers {first.source} and {other.source} are of different views: {what} is {ours} there and "
                        f"{theirs} here. Make one of them again with the other's --seed and --views."
                    )
        super().__init__(dataset, transform, first.seed, getattr(dataset, "cache", None))
        self.stores, self.views = dict(stores), first.views

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch % self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample, with the parts of each teacher's output for it under `stored`."""
        return self.stored_view(index, int(self._epoch))

    def stored_view(self, index: int, number: int) -> dict[str, Any]:
        """As `[index]`, of the view with a number."""
        sample = self.view(index, number)
        view = sample["index"], number, fingerprint(sample["pixel_values"])
        return {**sample, "stored": {name: store.read(*view) for name, store in self.stores.items()}}


def with_stored(collate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A task's collate that stacks what is stored of the teachers, too."""
    return _Collate(collate)


class _Collate:  # a class, because loader workers may be spawned
    def __init__(self, collate: Callable[..., dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate([{key: sample[key] for key in sample if key != "stored"} for sample in samples])
        stored = [sample["stored"] for sample in samples if "stored" in sample]
        if stored:
            batch["stored"] = {teacher: _stacked([one[teacher] for one in stored]) for teacher in stored[0]}
        return batch


def _stacked(rows: Sequence[Mapping[str, Parts]]) -> dict[str, Parts]:
    return {
        name: {part: torch.stack([row[name][part] for row in rows]) for part in parts}
        for name, parts in rows[0].items()
    }


class StoredTeacher:
    """A store in the place of the teacher that made it.

    Args:
        store: with the teacher's outputs.
        name: of the teacher, where there are several.

    Raises:
        UserError: the store is of several teachers.

    Attributes:
        adapter: the teacher without weights, which says of it what the teacher would.
        label_map: from the teacher's classes to the student's; None for a teacher of features only.
    """

    def __init__(self, store: Store, name: str = "") -> None:
        self.store, self.name = store, name
        if "" not in store.parts:
            raise UserError(f"{store.source} has the teachers {', '.join(store.teachers)}; choose one of its `parts`.")
        made = store.content["teacher"]
        self.adapter: DenseAdapter = empty_adapter(
            made["config"], made["class"], made["repo_id"], made["revision"], store.content["task"]
        )
        classes = dict(enumerate(store.content["classes"]))
        self.label_map: LabelMap | None = (
            self.adapter.match(classes, made["synonyms"]) if made["has_classes"] else None
        )

    @property
    def fingerprint(self) -> int:
        """Tells this teacher from others."""
        return self.store.content["teacher"]["fingerprint"]

    def check(self, criterion: DistillationCriterion) -> None:
        """Gives this teacher's own criterion what the store keeps for it, and refuses losses that it does not serve.

        Raises:
            UserError: a loss needs the teacher itself, or has other options than the store was made for.
        """
        check_storable(criterion.by_name().items())
        path = self.store.folder / STATE_FILE
        state = load_file(path) if path.is_file() else {}
        for name, loss in criterion.by_name().items():
            if not loss.digested:
                continue
            made, wanted = self.store.content["losses"].get(name), json.loads(json.dumps(loss.digested))
            if made is None or made != {key: wanted.get(key) for key in made}:  # an older store names fewer
                there = "was made without it" if made is None else f"has it with {made}"
                raise UserError(
                    f"loss {name!r} has the options {wanted}, but the stored teacher {self.store.source} {there}. Use these "
                    "options, or make another store."
                )
            prefix = f"{prefix_of(self.store.teacher)}{name}."
            own = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
            loss.load_state_dict(own, strict=False)

    @torch.no_grad()
    def tensors(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The columns of the store for a training batch, on its device."""
        return {name: self.store.columns[name].restore(parts) for name, parts in batch["stored"][self.name].items()}

    def for_batch(self, batch: Mapping[str, Any], pixel_mask: Tensor | None = None) -> DenseOutput:
        """The teacher's output for a training batch, on its device."""
        tensors = self.tensors(batch)
        digest = {
            name: x
            for name, x in tensors.items()
            if name.partition("/")[0] not in ("logits", "features", "pyramid", "queries")
        }
        levels = {
            kind: _Levels(
                {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith(f"{kind}/")},
                self.store.source,
            )
            for kind in ("features", "pyramid")
        }
        return DenseOutput(logits=tensors.get("logits"), queries=queries_from(tensors), digest=digest, **levels)  # type: ignore[arg-type]

    def check_levels(
        self, criterion: DistillationCriterion, student: DenseOutput, batch: Mapping[str, Any], targets: Targets
    ) -> None:
        """Computes the losses of a batch once and forgets them; a `UserError` names a level that one reads and the store lacks."""
        teacher = self.for_batch(batch, targets.pixel_mask)
        for name, loss in copy.deepcopy(criterion).by_name().items():
            if teacher_of(name) == self.name and "features" in loss.needs and not loss.digested:
                loss(criterion.seen_by(name, student), criterion.seen_by(name, teacher), targets)

    def answers(self, pixel_values: Tensor) -> None:
        """None: what it found was used when the store was made."""


class _Levels(dict[str, Tensor]):
    def __init__(self, levels: Mapping[str, Tensor], source: str) -> None:
        super().__init__(levels)
        self.source = source

    def __missing__(self, name: str) -> Tensor:
        raise UserError(
            f"the stored teacher {self.source} has no level {name!r}, only {', '.join(self) or 'none'}. Make it again with these "
            "losses, or with --columns."
        )
