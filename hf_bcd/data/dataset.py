"""Data sets of images with label maps in canonical form, their reproducible random transforms, and batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypedDict, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from ..utils.messages import UserError
from .images import match_orientation, read_image, to_rgb, upright
from .labels import IGNORE_INDEX, UNLABELLED, ColourId, LabelRule, decode_label


TASK = "semantic-segmentation"
Transform = Callable[[Mapping[str, Any]], Mapping[str, Any]]
SPLIT_ALIASES = {
    "training": "train",
    **dict.fromkeys(("val", "valid", "valid_seen", "dev", "eval", "evaluation"), "validation"),
    "testing": "test",
}


def usual_name(split: str) -> str:
    """`train`, `validation` or `test` for a split of another spelling; any other name as it is."""
    name = split.lower()
    name = SPLIT_ALIASES.get(name, name)
    return name if name in SPLIT_ALIASES.values() else split


def aliases_of(split: str) -> list[str]:
    """Other names of a split."""
    return [alias for alias, name in SPLIT_ALIASES.items() if name == split]


SPLIT_NAMES = [name for split in ("train", "validation", "test") for name in (split, *aliases_of(split))]


def named_splits(splits: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Splits by their usual names; a `UserError` names two that stand for the same one, or one without images."""
    renamed = {usual_name(split): rows for split, rows in splits.items()}
    if len(renamed) < len(splits):
        raise UserError(f"{source}: several of the splits {', '.join(splits)} stand for the same one; keep one.")
    for split, rows in renamed.items():
        if not (len(rows) if hasattr(rows, "__len__") else any(True for _ in rows)):
            raise UserError(f"{source}: split {split!r} holds no images.")
    return renamed


class Row(NamedTuple):
    """One raw sample: files, their encoded bytes or decoded images, with names for error messages; a picture may have no label."""

    image: str | Path | bytes | Image.Image
    label: str | Path | bytes | Image.Image | np.ndarray | None
    image_name: str
    label_name: str

    def mask(self) -> Image.Image | np.ndarray:
        """The mask, decoded; refused if its format does not keep ids."""
        if self.label is None:
            raise UnlabelledError(f"{self.image_name}: a picture without labels.")
        return (
            self.label if isinstance(self.label, np.ndarray) else read_image(self.label, self.label_name, exact=True)
        )

    def stored_ids(self, colours: Sequence[ColourId] = ()) -> np.ndarray:
        """The ids that the mask stores, `[H, W]`; `colours` are those of a colour-coded mask."""
        return decode_label(self.mask(), self.label_name, colours)


class UnlabelledError(UserError):
    """A row without a mask; of evaluation splits whose labels are withheld, all rows are so."""


class Rows(Protocol):
    """Random access to raw samples. Picklable, because loader workers may be spawned."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class ReadRows:
    """Rows that `read(*item)` makes of each item, such as its paths."""

    def __init__(self, items: Sequence[tuple[Any, ...]], read: Callable[..., Any]):
        self.items, self.read = items, read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.read(*self.items[index])


def read_files(image: str, mask: str) -> Row:
    """The row of an image and a mask that are files."""
    return Row(Path(image), Path(mask), image, mask)


def read_picture(rows: Rows, index: int) -> Row:
    """A row without its label."""
    row = rows[index]
    return row._replace(label=None, label_name=row.image_name)


class Sample(TypedDict):
    """RGB `image` and uint8 `label` `[H, W]` of the same size, full of `UNLABELLED` for a picture without labels."""

    image: Image.Image
    label: np.ndarray


class Samples(Protocol):
    """Random access to samples in canonical form."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def read_sample(row: Row, rule: LabelRule, num_labels: int) -> Sample:
    """Decodes a row to its canonical form.

    Raises:
        UserError: a file cannot be decoded, image and mask differ in size, or the mask holds unknown ids.
    """
    if row.label is None:
        image = to_rgb(upright(read_image(row.image, row.image_name)), row.image_name)
        return {"image": image, "label": np.full(image.size[::-1], UNLABELLED, np.uint8)}
    label = rule.apply(row.stored_ids(rule.colours), num_labels, row.label_name)
    image = match_orientation(read_image(row.image, row.image_name), label.shape[::-1], row.image_name)
    return {"image": to_rgb(image, row.image_name), "label": label}


@dataclass(frozen=True, eq=False)
class Split:
    """Rows and what makes samples of them: images in RGB and labels as class ids, with 255 for void pixels.

    Attributes:
        rows: the raw samples.
        name: name of the data set.
        split: `train`, `validation`, `test` or the source's own name.
        source: where the data are read from: Hub id, web page or folder.
        id2label: names of the classes 0..num_labels-1.
        rule: how stored ids become class ids.
        revision: commit of a Hub id that is read, or the branch or tag that was named.
        notes: what looks wrong with it, sentences that were logged and that the card repeats.
        task: what its samples are for, a key of `hf_bcd.tasks.TASKS`.
    """

    rows: Any
    name: str
    split: str
    source: str
    id2label: dict[int, str]
    rule: LabelRule = field(default_factory=LabelRule)
    revision: str | None = None
    notes: tuple[str, ...] = ()

    task: ClassVar[str] = TASK
    ignore_index: ClassVar[int] = IGNORE_INDEX

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    def decode(self, row: Row) -> Sample:
        """Decodes a row; see `read_sample`."""
        return read_sample(row, self.rule, self.num_labels)


@dataclass(frozen=True, eq=False)
class DenseDataset(Split, Dataset[Sample]):
    """A split with random access.

    Attributes:
        cache: where transforms find the samples decoded already, see `keep_in_memory`.
        labelled: number of the first samples that have labels, where others have none; None where all have.
    """

    rows: Rows
    cache: Samples | None = None
    labelled: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.decode(self.rows[range(len(self))[index]])

    def packed(self, sample: Mapping[str, Any]) -> np.ndarray:
        """The truth of a sample as bytes uint8 `[n]`, for `SampleCache`."""
        return sample["label"].reshape(-1)

    def unpacked(self, image: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
        """The sample of an image `[H, W, 3]` and its packed truth."""
        return {"image": image, "label": truth.reshape(image.shape[:2])}

    def select(self, indices: Sequence[int]) -> "DenseDataset":
        """The samples at `indices`, in this order."""
        chosen = [range(len(self))[index] for index in indices]
        labelled = self.labelled
        if labelled is not None:
            with_labels = [index < labelled for index in chosen]
            if with_labels != sorted(with_labels, reverse=True):
                raise UserError(f"{self.name}: pictures without labels are chosen before others; put them last.")
            labelled = None if all(with_labels) else sum(with_labels)
        return replace(self, rows=Subset(cast(Any, self.rows), chosen), cache=None, labelled=labelled)

    @property
    def num_unlabelled(self) -> int:
        """Number of samples without labels, which are the last ones."""
        return 0 if self.labelled is None else len(self) - self.labelled

    def with_unlabelled(self, pictures: "DenseDataset") -> "DenseDataset":
        """These samples, then pictures without labels."""
        labelled = len(self) if self.labelled is None else self.labelled
        rows: Any = ConcatDataset([cast(Any, self.rows), cast(Any, pictures.rows)])
        return replace(self, rows=rows, cache=None, labelled=labelled)

    def only_labelled(self) -> "DenseDataset":
        """The samples that have labels.

        Raises:
            UserError: none has.
        """
        if self.labelled == 0:
            raise UserError(
                f"{self.name}: none of its {len(self)} pictures has labels, and only a teacher can do without."
            )
        return self if self.labelled is None else self.select(range(self.labelled))

    def without_labels(self) -> "DenseDataset":
        """The same pictures, whose labels nobody reads."""
        rows = ReadRows([(self.rows, index) for index in range(len(self))], read_picture)
        return replace(self, rows=rows, cache=None, labelled=0)

    def with_transform(self, transform: Transform, seed: int = 0) -> "TransformedDataset":
        """Applies `transform(sample)` to every sample; see `TransformedDataset`."""
        return TransformedDataset(self, transform, seed, self.cache)


def joined(dataset: Any) -> Any:
    """A `Subset` (of `random_split` too) or `ConcatDataset` of `DenseDataset` as one `DenseDataset`; all else as it is.

    Raises:
        UserError: if data sets that are joined have other classes or another label rule.
    """
    if isinstance(dataset, Subset):
        inner = joined(dataset.dataset)
        return inner.select(dataset.indices) if isinstance(inner, DenseDataset) else dataset
    if not isinstance(dataset, ConcatDataset):
        return dataset
    parts = [joined(part) for part in dataset.datasets]
    if not all(isinstance(part, DenseDataset) for part in parts):
        return dataset
    first = parts[0]
    if any(part.labelled is not None for part in parts):
        raise UserError(f"{first.name}: join data sets first, and add pictures without labels to the result.")
    for part in parts:
        if (part.id2label, part.rule, part.task) != (first.id2label, first.rule, first.task):
            raise UserError(
                f"{first.name} and {part.name} cannot be joined: their classes are {list(first.id2label.values())[:5]} and "
                f"{list(part.id2label.values())[:5]}, their label rules {first.rule.in_words()} and {part.rule.in_words()}, their "
                f"tasks {first.task} and {part.task}."
            )
    names = "+".join(dict.fromkeys(part.name for part in parts))
    return replace(first, rows=ConcatDataset([part.rows for part in parts]), name=names, cache=None)


class DenseDatasets(Mapping[str, DenseDataset]):
    """Splits of a data set by name; `val`, `dev`, `training` and others of `SPLIT_ALIASES` stand for the usual names."""

    def __init__(self, splits: Mapping[str, Any]):
        self._splits = dict(splits)

    def __getitem__(self, split: str) -> DenseDataset:
        name = usual_name(split)
        if name not in self._splits:
            raise KeyError(f"no split {split!r}; this data set has {', '.join(self._splits)}")
        return self._splits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)

    def __repr__(self) -> str:
        sizes = [f"{name}: {len(d) if hasattr(d, '__len__') else 'a stream'}" for name, d in self.items()]
        return f"DenseDatasets({', '.join(sizes)})"


class TransformedDataset(Dataset[dict[str, Any]]):
    """A data set whose random transform depends only on `(seed, epoch, index)`.

    So a run gives the same samples with any number of loader workers, started in any way, and after resuming. The
    epoch lives in shared memory: `set_epoch` also reaches workers that are already running.

    Args:
        dataset: samples in canonical form.
        transform: function of a sample to a mapping of tensors; its random numbers come from torch's CPU generator.
        seed: non-negative seed of the transform.
        cache: the same samples, if they are kept decoded; images are arrays there.
    """

    def __init__(self, dataset: Dataset[Sample], transform: Transform, seed: int = 0, cache: Samples | None = None):
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative.")
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.task: str = getattr(dataset, "task", TASK)
        self.samples = cast(Samples, dataset) if cache is None else cache
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the random numbers of the samples that are read from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The transformed sample and its `index`."""
        return self.view(index, int(self._epoch))

    def view(self, index: int, epoch: int) -> dict[str, Any]:
        """The sample as it is in an epoch."""
        index = range(len(self))[index]
        sample = self.samples[index]
        with torch_seed(self.seed, epoch, index):
            return {"index": index, **self.transform(sample)}


@contextmanager
def torch_seed(*entropy: int) -> Iterator[None]:
    """Seeds torch's CPU generator from several numbers; restores it afterwards."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the accelerators
        yield


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks B samples: `index` int64 `[B]`, `pixel_values` uint8 `[B, 3, H, W]` and `labels` uint8 `[B, H, W]`.

    Images, and independently labels, of different sizes are lists of B tensors instead. Nothing is ever padded: a model
    would see the padding, and predictions would differ from those of single images. Where a picture has no labels, these are
    255 (void) and `seen`, boolean `[B, H, W]`, tells its pixels from padding; it is False where labels of others are void.
    """
    labels, seen = _stack([sample["labels"] for sample in samples]), {}
    if isinstance(labels, Tensor) and bool((unlabelled := labels == UNLABELLED).any()):
        seen["seen"] = labels != IGNORE_INDEX
        labels = labels.masked_fill(unlabelled, IGNORE_INDEX)
    return {
        # first, because Trainer takes the batch size from the first tensor that it meets
        "index": torch.tensor([sample["index"] for sample in samples]),
        "pixel_values": _stack([sample["pixel_values"] for sample in samples]),
        "labels": labels,
        **seen,
    }


def _stack(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors


def check_sample(sample: Any, name: str) -> None:
    """Refuses a sample that no model here could use; `name` says which data set it comes from.

    Models normalise images themselves, so that images which an image processor has normalised would be so twice.
    """
    form = "{'index': int, 'pixel_values': raw RGB 0..255 [3, H, W], 'labels': class ids [H, W]}"
    advice = f"a sample must be {form}; load_dense_dataset makes such samples of images and masks"
    keys = [key for key in ("index", "pixel_values", "labels") if not isinstance(sample, Mapping) or key not in sample]
    if keys:
        held = list(sample) if isinstance(sample, Mapping) else type(sample).__name__
        raise UserError(f"{name}[0] holds {held} and lacks {', '.join(keys)}: {advice}.")
    pixels, labels = sample["pixel_values"], sample["labels"]
    for key, value, shape in (("pixel_values", pixels, "[3, H, W]"), ("labels", labels, "[H, W]")):
        if not isinstance(value, Tensor):
            raise UserError(f"{key} of {name}[0] is a {type(value).__name__}, not a tensor {shape}: {advice}.")
    if pixels.ndim != 3 or pixels.shape[0] != 3 or labels.ndim != 2:
        shapes = f"pixel_values {list(pixels.shape)} and labels {list(labels.shape)}"
        raise UserError(f"{name}[0] has {shapes}: {advice}.")
    if labels.is_floating_point():
        raise UserError(f"labels of {name}[0] are {labels.dtype}; class ids are integers.")
    check_pixels(pixels, name, advice)


def check_pixels(pixels: Any, name: str, advice: str) -> None:
    """Refuses pictures that are no RGB of 0..255, such as those that an image processor has normalised."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or pixels.shape[0] != 3:
        shape = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UserError(f"pixel_values of {name}[0] is {shape}, not a tensor [3, H, W]: {advice}.")
    low, high = (float(value) for value in pixels.aminmax())
    if low < 0 or high > 255 or (pixels.is_floating_point() and 0 < high <= 2):
        raise UserError(
            f"pixel_values of {name}[0] lie in {low:.2f}..{high:.2f}, as if scaled or normalised already; models here do "
            f"that themselves: {advice}."
        )


def check_one_size(batch: Mapping[str, Any]) -> None:
    """Refuses a training batch that could not be stacked; the `UserError` names two sizes of its images or masks."""
    for key, kind in (("pixel_values", "images"), ("labels", "masks")):
        if isinstance(batch[key], list):
            sizes = sorted({tuple(tensor.shape[-2:]) for tensor in batch[key]})
            (height, width), (other_height, other_width) = sizes[0], sizes[-1]
            raise UserError(
                f"training {kind} of {height} x {width} and of {other_height} x {other_width} pixels cannot be stacked into "
                "one batch. Crop or resize them to one size in the data set's transform; a set of load_dense_dataset is "
                "cropped to crop_size by itself."
            )
