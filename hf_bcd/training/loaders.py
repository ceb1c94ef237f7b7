"""Loaders and samples that the base class would divide, pad or draw otherwise."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler, Subset

from ..data import TransformedStream
from ..data.dataset import TransformedDataset
from ..data.transforms import VIEWS_VERSION
from ..stores import Store, StoredTeacher, StoredViews
from ..stores.views import with_stored
from ..tasks import Task
from ..utils.messages import UserError
from .config import BCDConfig


def stream_loader(
    stream: TransformedStream, args: BCDConfig, batch_size: int, collate: Callable[..., Any]
) -> DataLoader:
    """A loader of this process's part of a stream, which divides itself among processes and loader workers."""
    loader = DataLoader(
        stream.for_rank(args.process_index, args.world_size, args.dataloader_num_workers),
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
    # as Accelerator.prepare does, but for one process: more would divide the stream a second time
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


def end_workers(loader: Any) -> None:
    """Ends the persistent workers of a prepared loader that is not read any more.

    Garbage collection, which the next training starts with, would end them too, but closes the queue first that tells them to:
    they then wait for 5 seconds, until they are killed.
    """
    loader = getattr(loader, "base_dataloader", loader)
    if (iterator := getattr(loader, "_iterator", None)) is not None:
        iterator._shutdown_workers()
        loader._iterator = None


COMPARED = 8  # views of a store, before training
VIEW_NAMES = (
    "image_size", "scale_min", "scale_max", "color_jitter", "image_longest", "train_shortest", "square_size", "crop_size",
)  # fmt: skip


class ShapeSampler(Sampler[int]):
    """A random order in which pictures that are wider than high, and others, fill batches of their own.

    So less of a batch is padding, as with mmdetection's batches by aspect ratio. A batch stands where its last picture
    would; what fills none comes at the end. The order depends on the seed and the epoch only, so that a resumed run has it.

    Args:
        wide: of each picture, whether it is wider than high.
        batch_size: pictures a batch.
        seed: of all epochs.
    """

    def __init__(self, wide: Sequence[bool], batch_size: int, seed: int) -> None:
        self.wide, self.batch_size, self.seed, self.epoch = list(wide), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.wide)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.wide)).tolist()
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for index in order:
            group = waiting[self.wide[index]]
            group.append(index)
            if len(group) == self.batch_size:
                yield from group
                group.clear()
        yield from waiting[True] + waiting[False]


class MixedSampler(Sampler[int]):
    """An order in which every batch has as many pictures without labels as every other.

    An epoch is one pass over the pictures with labels in random order, the last batch filled up from its beginning; pictures
    without labels come one after the other in random order, again and again. The order depends on the seed and the epoch
    only, so that a resumed run has it, and batches are the same for any number of processes.

    Args:
        labelled: number of the first samples, which have labels.
        unlabelled: number of the others.
        batch_size: samples a batch.
        share: share of a batch that has no labels, rounded; at least one sample of each kind.
        seed: of all epochs.
    """

    def __init__(self, labelled: int, unlabelled: int, batch_size: int, share: float, seed: int) -> None:
        if batch_size < 2:
            raise UserError(
                "pictures without labels share batches with others: per_device_train_batch_size must be at least 2."
            )
        self.labelled, self.unlabelled, self.seed, self.epoch = labelled, unlabelled, seed, 0
        self.of_batch = min(max(1, round(batch_size * share)), batch_size - 1)
        self.with_labels = batch_size - self.of_batch
        self.batches = -(-labelled // self.with_labels)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * (self.with_labels + self.of_batch)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        ours = cycled(generator.permutation(self.labelled), self.batches * self.with_labels)
        needed = self.batches * self.of_batch
        passes = [generator.permutation(self.unlabelled) for _ in range(-(-needed // self.unlabelled))]
        theirs = (self.labelled + np.concatenate(passes)).tolist()
        for batch in range(self.batches):
            yield from ours[batch * self.with_labels : (batch + 1) * self.with_labels]
            yield from theirs[batch * self.of_batch : (batch + 1) * self.of_batch]


def cycled(order: np.ndarray, length: int) -> list[int]:
    """An order again and again, up to a length."""
    return np.resize(order, length).tolist()


def mixed(dataset: Any, args: BCDConfig) -> MixedSampler | None:
    """The sampler of a data set of which some pictures have no labels; None where all have, or none.

    Raises:
        UserError: another order is asked for.
    """
    inner = getattr(dataset, "dataset", dataset)
    if not getattr(inner, "labelled", None) or not inner.num_unlabelled:
        return None
    if args.train_sampling_strategy != "random":
        raise UserError(
            f"train_sampling_strategy is {args.train_sampling_strategy}, but pictures without labels are drawn at random; leave "
            "it out."
        )
    seed = args.seed if args.data_seed is None else args.data_seed
    return MixedSampler(inner.labelled, inner.num_unlabelled, args.train_batch_size, args.unlabelled_share, seed)


def own_sampler(dataset: Any, args: BCDConfig) -> Sampler[int] | None:
    """The sampler that `group_by_shape` or pictures without labels need; None where the trainer's own serves.

    Raises:
        UserError: the data set or the options do not allow it.
    """
    return by_shape(dataset, args) if args.group_by_shape else mixed(dataset, args)


def by_shape(dataset: Any, args: BCDConfig) -> ShapeSampler:
    """The sampler of `group_by_shape`.

    Raises:
        UserError: the data set does not know the sizes of its pictures.
    """
    inner = getattr(dataset, "dataset", dataset)
    sizes: list[Any] = inner.stated_sizes() if hasattr(inner, "stated_sizes") else [None]
    if None in sizes:
        raise UserError(
            "group_by_shape needs the width and height of every training picture from its annotations, as COCO's JSON and Pascal "
            "VOC's XML state them. Leave it out."
        )
    seed = args.seed if args.data_seed is None else args.data_seed
    return ShapeSampler([width > height for width, height in sizes], args.train_batch_size, seed)


def part_of_process(samples: Any, task: Task, args: BCDConfig, *, whole: bool = False) -> DataLoader:
    """A loader of every n-th sample for the n processes, nothing padded, dropped or read twice; or of the `whole`."""
    mine = samples if whole else Subset(samples, range(args.process_index, len(samples), args.world_size))
    workers = args.dataloader_num_workers
    return DataLoader(
        mine,
        batch_size=args.per_device_eval_batch_size,
        collate_fn=task.collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def with_masks(dataset: Any) -> Any:
    """The pictures of a data set of boxes whose files have masks too, transformed alike; the data set itself without any."""
    find = getattr(getattr(dataset, "dataset", None), "with_masks", None)
    masked = find() if find else None
    return dataset if masked is None else TransformedDataset(masked, dataset.transform, dataset.seed)


def with_stores(dataset: Any, parts: Mapping[str, Any], task: Task, args: BCDConfig) -> tuple[Any, Callable[..., Any]]:
    """Transformed training samples with what is stored of their teachers, and the function that makes batches of them."""
    stores = {name: part.store for name, part in parts.items() if isinstance(part, StoredTeacher)}
    if not stores or dataset is None:
        return dataset, task.collate
    return stored_views(stores, dataset, task, args), with_stored(task.collate)


def stored_views(stores: Mapping[str, Store], dataset: Any, task: Task, args: BCDConfig) -> StoredViews:
    """The training samples as the teachers of some stores saw them, with what is stored of each, by the teachers' names.

    Raises:
        UserError: a stream, or samples that were transformed elsewhere; stores of different views; or see `Store.check`.
    """
    if not isinstance(dataset, TransformedDataset):
        raise UserError(
            "a stored teacher belongs to the pictures of a data set with random access; leave streaming out, or name the "
            "teacher itself."
        )
    for store in stores.values():
        store.check(dataset.dataset, view_options(task, args))
    views = StoredViews(dataset.dataset, dataset.transform, stores)
    spread_samples(views, COMPARED)  # a store of other pictures fails now
    return views


def view_options(task: Task, args: BCDConfig) -> dict[str, Any]:
    """What decides what a view shows: training arguments, and the version of the code that heeds them."""
    options = {name: getattr(args, name) for name in VIEW_NAMES}
    return options | {"augmentation": task.augmentation(args), "views_version": VIEWS_VERSION}


def spread_samples(dataset: Any, count: int) -> list[Any]:
    """Up to `count` samples spread over a data set; the first ones of a stream. The same on every process."""
    if isinstance(dataset, TransformedStream):
        return dataset.first(count)
    count = min(count, len(dataset))
    return [dataset[int(index * len(dataset) / count)] for index in range(count)]
