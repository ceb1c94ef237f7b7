"""Training data that is read while training: an endless stream that ranks and loader workers share."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..hub.errors import explained
from ..utils.messages import UserError
from .dataset import Row, Sample, Split, Transform, torch_seed
from .probing import PROBED_ROWS
from .sources.box_tables import holds_boxes
from .sources.tables import TableRows, class_names, commit_in_path, find_columns, load_hub, row_of


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 16


class Part(NamedTuple):
    """The rows `first`, `first + step`, `first + 2 * step` ... of a shard."""

    shard: int
    first: int
    step: int


@dataclass(frozen=True, eq=False)
class StreamRows:
    """Raw samples of a `datasets.IterableDataset`, shard by shard: files, or row groups of Parquet files.

    Attributes:
        table: the records, their images not decoded.
        image_column: column of the images.
        label_column: column of the masks.
        name: data set and split, for error messages.
        source: Hub id or folder.
        shuffle_buffer: number of encoded samples that a rank keeps in memory to draw from.
        commit: commit of the Hub repository that is read, where it comes from there.
    """

    table: datasets.IterableDataset
    image_column: str
    label_column: str
    name: str
    source: str
    shuffle_buffer: int
    commit: str | None = None

    @property
    def class_names(self) -> list[str] | None:
        return class_names(self.table.features or {}, self.label_column)

    @property
    def num_shards(self) -> int:
        return self.table.num_shards

    def resharded(self) -> StreamRows:
        """The same rows in the smallest shards that their format has."""
        with explained("data set", self.source):
            return replace(self, table=self.table.reshard())

    def read(self, part: Part) -> Iterator[Row]:
        """Reads some rows of a shard, and of images that are files of their own only these rows' files.

        Raises:
            UserError: a row has no image or no mask, or the connection broke off (`HubError`).
        """
        shard = self.table.shard(num_shards=self.num_shards, index=part.shard)
        with explained("data set", self.source):
            # `iter` and not a plain loop, which would share the shard among loader workers once more
            batches = shard.iter(batch_size=ROWS_AT_ONCE)
            columns = self.image_column, self.label_column
            pairs = (pair for batch in batches for pair in zip(*map(batch.__getitem__, columns), strict=True))
            for index, pair in enumerate(pairs):
                if index % part.step == part.first:
                    record = {column: with_bytes(value) for column, value in zip(columns, pair, strict=True)}
                    yield row_of(record, *columns, f"{self.name}, shard {part.shard}, row {index}")

    def __iter__(self) -> Iterator[Row]:
        """All rows in the order in which they are stored."""
        yield from self._head
        yield from itertools.islice(self._from_start(), len(self._head), None)

    @cached_property
    def _head(self) -> list[Row]:  # it is looked at several times before training starts
        return list(itertools.islice(self._from_start(), PROBED_ROWS))

    def _from_start(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self.read(Part(shard, 0, 1)) for shard in range(self.num_shards))


def with_bytes(value: Any) -> Any:
    """Reads an image that a stream names by its address; local files stay paths."""
    if isinstance(value, dict) and value.get("bytes") is None and "://" in (value.get("path") or ""):
        with fsspec.open(value["path"], "rb") as file:
            return {"path": value["path"], "bytes": file.read()}  # type: ignore[union-attr]
    return value


def share(num_shards: int, reader: int, readers: int, seed: int, epoch: int) -> list[Part]:
    """The parts of an epoch that one of several readers (ranks times loader workers) reads: together every row once.

    As many whole shards as divide evenly go to one reader each. Every reader reads the others, less than `readers` of
    them, and takes every `readers`-th row. The order of shards is drawn from `(seed, epoch)`.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_shards).tolist()
    even = num_shards - num_shards % readers
    # which reader gets the odd row of a shard changes from epoch to epoch, so that none stays without
    first = (reader + epoch) % readers
    whole = [Part(shard, 0, 1) for shard in order[:even][reader::readers]]
    return whole + [Part(shard, first, readers) for shard in order[even:]]


def shuffled(rows: Iterable[Row], size: int, generator: np.random.Generator) -> Iterator[Row]:
    """The rows in random order, each drawn from the `size` rows that were read last."""
    buffer: list[Row] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) == size:
            chosen = int(generator.integers(size))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            yield buffer.pop()
    for index in generator.permutation(len(buffer)):
        yield buffer[index]


@dataclass(frozen=True, eq=False)
class DenseStream(Split, IterableDataset[Sample]):
    """A training split without length and random access; iterating gives every sample once, in stored order.

    Attributes:
        limit: number of samples after which the data set ends; None for all.
    """

    rows: StreamRows
    limit: int | None = None

    def take(self, count: int) -> DenseStream:
        """The first `count` samples, at least one. Every reader reads all of them then, so let them be few."""
        if count < 1:
            raise UserError(f"{self.source}: cannot train on the first {count} images; take at least one.")
        return replace(self, limit=count)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.decode, itertools.islice(self.rows, self.limit))

    def epoch(self, epoch: int, seed: int, reader: int, readers: int, buffer: int) -> Iterator[Row]:
        """The rows that one of several readers gets in an epoch, shuffled; see `share` and `shuffled`."""
        if self.limit is None:
            parts = share(self.rows.num_shards, reader, readers, seed, epoch)
            rows = itertools.chain.from_iterable(map(self.rows.read, parts))
        else:
            rows = itertools.islice(self.rows, (reader + epoch) % readers, self.limit, readers)
        return shuffled(rows, buffer, np.random.default_rng((seed, epoch, reader)))

    def with_transform(self, transform: Transform, seed: int = 0) -> TransformedStream:
        """Makes an endless stream of samples to train on; see `TransformedStream`."""
        return TransformedStream(self, transform, seed)


class TransformedStream(IterableDataset[dict[str, Any]]):
    """An endless stream of shuffled samples with random transforms, for one rank of a run.

    Readers (the loader workers of every rank) divide the samples, see `share`: within an epoch each is given once. A
    reader that comes to its end starts its next epoch, in another order, so no rank ever waits for another.

    Order and transforms depend on the seed, the numbers of ranks and workers, and how far a reader has come, so a run
    that resumes with the same numbers continues exactly; the samples before that point are read again.

    Args:
        dataset: samples in canonical form.
        transform: function of a sample to a mapping of tensors; its random numbers come from torch's CPU generator.
        seed: non-negative seed of order and transforms.
        rank: which of the `ranks` ranks reads.
        ranks: number of ranks.
    """

    def __init__(self, dataset: DenseStream, transform: Transform, seed: int = 0, rank: int = 0, ranks: int = 1):
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative.")
        self.dataset, self.transform, self.seed, self.rank, self.ranks = dataset, transform, seed, rank, ranks
        self.task = dataset.task

    def for_rank(self, rank: int, ranks: int, workers: int) -> TransformedStream:
        """The part of one of `ranks` ranks, each with this many loader workers or none (0).

        Shards become smaller if those of the source would be read more than twice on average.
        """
        dataset, readers = self.dataset, ranks * max(1, workers)
        num_shards = dataset.rows.num_shards
        if dataset.limit is None and num_shards % readers * (readers - 1) > num_shards:
            dataset = replace(dataset, rows=dataset.rows.resharded())
        return TransformedStream(dataset, self.transform, self.seed, rank, ranks)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples with their `index`, which is unique within an epoch over all readers."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.rank * workers + number, self.ranks * workers
        buffer = max(1, self.dataset.rows.shuffle_buffer // workers)
        for epoch in itertools.count():
            rows = self.dataset.epoch(epoch, self.seed, reader, readers, buffer)
            for position, row in enumerate(rows):
                yield self._transformed(row, epoch, reader + position * readers)

    def first(self, count: int) -> list[dict[str, Any]]:
        """The first `count` stored samples, transformed: the same ones on every rank."""
        rows = itertools.islice(self.dataset.rows, min(count, self.dataset.limit or count))
        return [self._transformed(row, 0, index) for index, row in enumerate(rows)]

    def _transformed(self, row: Row, epoch: int, index: int) -> dict[str, Any]:
        sample = self.dataset.decode(row)
        with torch_seed(self.seed, epoch, index):
            return {"index": index, **self.transform(sample)}


def open_streams(
    path: str,
    name: str,
    image_column: str | None = None,
    label_column: str | None = None,
    *,
    shuffle_buffer: int = 1000,
    max_eval_samples: int | None = None,
    **options: Any,
) -> dict[str, StreamRows | TableRows]:
    """Opens `train` as a stream and stores the other splits: `load_tables(path, name, ...)` for data of any size.

    The encoded images of the other splits are kept in the cache of `datasets`, which later runs use again; with
    `max_eval_samples`, only the first rows of each.
    """
    import datasets

    builder = load_hub(path, load=datasets.load_dataset_builder, **options)
    with explained("data set", path, revision=options.get("revision")):
        tables = builder.as_streaming_dataset()
        features = builder.info.features
        if features is None:
            raise UserError(f"{name}: its files name no columns; store it as Parquet to stream it.")
        if holds_boxes(features, label_column):
            raise UserError(f"{name}: pictures with boxes are not streamed; leave streaming out (`--streaming`).")
        columns = find_columns(features, image_column, label_column, name)
        if hasattr(builder.config, "columns") and len(features) > len(columns):
            builder.config.columns = list(columns)  # type: ignore[attr-defined] # reads no other bytes
            tables = builder.as_streaming_dataset()
        rows: dict[str, StreamRows | TableRows] = {}
        for split, table in tables.items():
            # `decode` first: it can take back the decoding that datasets adds for loose images, but only from the top
            full_name, table = f"{name}/{split}", table.decode(False).select_columns(list(columns))
            if split == "train":
                commit = commit_in_path(builder.hash or "")
                rows[split] = StreamRows(table, *columns, full_name, path, shuffle_buffer, commit)
            else:
                key = f"{builder.cache_dir} {split} {columns} {max_eval_samples}"
                rows[split] = TableRows(_stored(table, max_eval_samples, key, full_name), *columns, full_name)
    return rows


def _stored(table: datasets.IterableDataset, count: int | None, key: str, name: str) -> datasets.Dataset:
    """Copies the first `count` rows to the cache of `datasets`; `key` says what they are."""
    import datasets

    def records() -> Iterator[dict[str, Any]]:
        logger.info("%s: storing %s rows for evaluation.", name, "all" if count is None else f"the first {count}")
        for record in itertools.islice(table, count):
            yield {column: with_bytes(value) for column, value in record.items()}

    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    stored = datasets.Dataset.from_generator(records, features=table.features, fingerprint=fingerprint)
    assert isinstance(stored, datasets.Dataset)
    return stored
