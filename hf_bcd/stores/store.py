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
from .needs import check_storable


logger = logging.getLogger(__name__)

STORE_FILE, STATE_FILE, SCORES_FILE = "store.json", "losses.safetensors", "scores.json"
SHARD = "data/train-{:05d}-of-{:05d}.parquet"
FORMAT = 1
THUMBNAIL = 16
TOLERANCE = 1.0  # grey levels that decoders may differ by, as a mean over a thumbnail


def fingerprint(pixel_values: Tensor) -> tuple[int, bytes]:
    """A checksum of a view's pixels uint8 `[3, H, W]`, and a thumbnail to compare where decoders round otherwise."""
    small = F.adaptive_avg_pool2d(pixel_values.float(), THUMBNAIL).round().to(torch.uint8)
    return zlib.crc32(pixel_values.contiguous().numpy().tobytes()), small.numpy().tobytes()


class Store:
    """Outputs of a teacher for `views` views of each picture of a training split.

    Args:
        folder: holds `store.json` and `data/*.parquet`.

    Raises:
        UserError: it holds no store, one of another format, or one that was not written to its end.

    Attributes:
        source: folder or Hub id, as the user named it.
        content: `store.json`.
    """

    def __init__(self, folder: Path, source: str | None = None) -> None:
        self.folder, self.source = folder, source or str(folder)
        if not (folder / STORE_FILE).is_file():
            raise UserError(
                f"{folder} holds no stored teacher: {STORE_FILE} is missing. `hf-bcd reinforce` makes one."
            )
        self.content: dict[str, Any] = read_json(folder / STORE_FILE)
        if self.content.get("format") != FORMAT:
            raise UserError(
                f"{folder / STORE_FILE} has format {self.content.get('format')}, but this version reads {FORMAT}; make "
                "it again with `hf-bcd reinforce`."
            )
        missing = [path for path in self.shards if not path.is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(self.shards)} files are missing, such as {missing[0].name}, so the store "
                "is not finished. Run the same `hf-bcd reinforce` again: it goes on where it stopped."
            )

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None, token: str | None = None) -> "Store":
        """The store in a folder or, where there is none, in a data set `user/name[@revision]` of the Hub."""
        if Path(source).is_dir() or not REPO_ID.fullmatch(str(source).partition("@")[0]):
            return cls(Path(source))
        name, _, given = str(source).partition("@")
        with explained("data set", name, revision=given or revision):
            options = {"repo_type": "dataset", "revision": given or revision, "token": token}
            found = snapshot_download(name, allow_patterns=[STORE_FILE, STATE_FILE, SCORES_FILE, "data/*"], **options)
        return cls(Path(found), str(source))

    def scores(self, split: str, image_size: int | None) -> dict[str, Any]:
        """The teacher's scores on a split; empty unless they were measured when the store was made."""
        path = self.folder / SCORES_FILE
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
        return rows.select_columns(["index", "view", "image", "checksum", "thumbnail", *self.columns])  # type: ignore[union-attr]

    def read(self, index: int, view: int, pixel_values: Tensor | None = None) -> dict[str, Parts]:
        """The parts of all columns for a view of a picture.

        Args:
            index: of the picture in its split.
            view: number of the view.
            pixel_values: the view itself, uint8 `[3, H, W]`, which is compared with what the teacher saw.

        Raises:
            UserError: rows stand in another order, or the teacher saw another picture.
        """
        row = self.table[view * self.images + index]
        if (row["index"], row["view"]) != (index, view):
            raise UserError(
                f"{self.source}: view {row['view']} of picture {row['index']} stands where view {view} of {index} should; the "
                "rows were sorted otherwise. Make the store again, or fetch it again."
            )
        if pixel_values is not None:
            self._check_view(row, pixel_values)
        return {name: column.unpack(row[name]) for name, column in self.columns.items()}

    def _check_view(self, row: Mapping[str, Any], pixel_values: Tensor) -> None:
        checksum, thumbnail = fingerprint(pixel_values)
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
        view = sample["index"], number, sample["pixel_values"]
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

    Attributes:
        adapter: the teacher without weights, which says of it what the teacher would.
        label_map: from the teacher's classes to the student's; None for a teacher of features only.
    """

    def __init__(self, store: Store, name: str = "") -> None:
        self.store, self.name = store, name
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
            own = {key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}
            loss.load_state_dict(own, strict=False)

    @torch.no_grad()
    def tensors(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The columns of the store for a training batch, on its device."""
        return {name: self.store.columns[name].restore(parts) for name, parts in batch["stored"][self.name].items()}

    def for_batch(self, batch: Mapping[str, Any], pixel_mask: Tensor | None = None) -> DenseOutput:
        """The teacher's output for a training batch, on its device."""
        tensors = self.tensors(batch)
        digest = {
            name: x for name, x in tensors.items() if name.partition("/")[0] not in ("logits", "features", "pyramid")
        }
        levels = {
            kind: _Levels(
                {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith(f"{kind}/")},
                self.store.source,
            )
            for kind in ("features", "pyramid")
        }
        return DenseOutput(logits=tensors.get("logits"), digest=digest, **levels)  # type: ignore[arg-type]

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
