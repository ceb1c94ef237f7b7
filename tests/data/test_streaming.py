"""The stream of training data: who reads which rows, in which order, and what goes wrong."""

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from pictures import encoded, grid, refused, save
from torch.utils.data import DataLoader

from hf_bcd.data import CATALOG, DatasetSpec, DenseDataset, DenseStream, load_dense_dataset
from hf_bcd.data.labels import LabelRule
from hf_bcd.data.sources.catalog import HubSource
from hf_bcd.data.streaming import Part, StreamRows, share, shuffled


NAMES = ["wall", "road", "tree"]


def red(value: int) -> np.ndarray:
    return np.full((8, 8, 3), [value, 0, 0], np.uint8)


def write_folder(
    folder: Path, shards: list[int], validation: int = 3, row_group: int | None = None, **columns
) -> Path:
    """A folder of Parquet files with the given numbers of rows; image k has the red value k, its mask the id k % 3."""
    number = itertools.count()
    (folder / "data").mkdir(parents=True)
    files = [(f"train-{i:05d}-of-{len(shards):05d}", rows) for i, rows in enumerate(shards)]
    for name, rows in [*files, ("validation-00000-of-00001", validation)]:
        taken = [next(number) for _ in range(rows)]
        table: dict[str, Any] = {
            "image": [{"bytes": encoded(red(k)), "path": None} for k in taken],
            "label": [{"bytes": encoded(grid(k % 3, shape=(8, 8))), "path": None} for k in taken],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
        for column, value in columns.items():
            table[column], features[column] = [value] * rows, datasets.Value("string")
        dataset = datasets.Dataset.from_dict(table, features=features)
        dataset.to_parquet(folder / "data" / f"{name}.parquet", batch_size=row_group or 100)
    return folder


def stream_of(folder: Path, **options) -> DenseStream:
    stream = load_dense_dataset(folder, streaming=True, id2label=NAMES, **options)["train"]
    assert isinstance(stream, DenseStream)
    return stream


def keep(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.tensor([np.asarray(sample["image"])[0, 0, 0]]), "draw": torch.rand(1)}


def numbers(samples) -> list[int]:
    return [int(sample["pixel_values"][0]) for sample in samples]


@pytest.mark.parametrize("num_shards", [1, 3, 4, 7])
@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_readers_share_shards_without_gap_or_overlap(num_shards: int, readers: int) -> None:
    rows = 5
    read = [
        (part.shard, row)
        for reader in range(readers)
        for part in share(num_shards, reader, readers, seed=1, epoch=2)
        for row in range(part.first, rows, part.step)
    ]
    assert sorted(read) == [(shard, row) for shard in range(num_shards) for row in range(rows)]


def test_shards_are_read_by_one_reader_where_they_divide_evenly() -> None:
    for shards, steps in ((4, [1, 1]), (5, [1, 1, 2])):  # all readers read only the one left over
        for reader in range(2):
            assert [part.step for part in share(shards, reader, 2, seed=0, epoch=0)] == steps


def test_the_buffer_keeps_every_row_and_moves_them() -> None:
    generator = np.random.default_rng(0)
    rows = list(range(50))
    drawn = list(shuffled(rows, 10, generator))  # type: ignore[arg-type]
    assert sorted(drawn) == rows and drawn != rows
    assert all(value < position + 10 for position, value in enumerate(drawn)), "a row came before it was read"
    assert list(shuffled(rows, 1, generator)) == rows  # type: ignore[arg-type]


@pytest.mark.parametrize("shards", [[12], [4, 4, 4], [3, 4, 3, 2]])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_see_every_image_once_in_an_epoch(tmp_path: Path, shards: list[int], workers: int) -> None:
    stream = stream_of(write_folder(tmp_path / "d", shards, row_group=2), shuffle_buffer=4)
    transformed = stream.with_transform(keep, seed=3)
    seen, indices = [], []
    options = {"multiprocessing_context": "fork"} if workers else {}
    for rank in range(2):
        loader = DataLoader(transformed.for_rank(rank, 2, workers), None, num_workers=workers, **options)
        last: dict[int, float] = {}
        for sample in itertools.islice(loader, 40):
            reader = sample["index"] % (2 * max(1, workers))
            if sample["index"] < last.get(reader, -1):
                last[reader] = float("inf")  # the end of this reader's epoch: its index starts again
            if last.get(reader, 0) != float("inf"):
                last[reader] = sample["index"]
                seen += numbers([sample])
                indices.append(sample["index"])
    assert sorted(seen) == list(range(12))
    assert len(set(indices)) == 12


def test_epochs_differ_in_order_and_transforms_and_repeat_exactly(tmp_path: Path) -> None:
    stream = stream_of(write_folder(tmp_path / "d", [6, 6]), shuffle_buffer=4)

    def run(seed: int) -> list[tuple[int, float]]:
        samples = itertools.islice(stream.with_transform(keep, seed=seed), 36)
        return [(int(sample["pixel_values"][0]), float(sample["draw"])) for sample in samples]

    samples = run(3)
    epochs = [[number for number, _ in samples[start : start + 12]] for start in (0, 12, 24)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert len(set(map(tuple, epochs))) == 3
    assert len({draw for _, draw in samples}) == 36
    assert run(3) == samples
    stream = pickle.loads(pickle.dumps(stream))  # as for a spawned worker
    assert run(3) == samples
    assert [number for number, _ in run(4)[:12]] != epochs[0]


def test_a_reader_without_rows_of_its_own_gets_some_later(tmp_path: Path) -> None:
    stream = stream_of(write_folder(tmp_path / "d", [2]))
    for rank in range(3):
        own = stream.with_transform(keep).for_rank(rank, 3, 0)
        assert set(numbers(itertools.islice(own, 6))) == {0, 1}


def test_samples_are_those_of_the_stored_data_set(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", [4, 3])
    options = {"id2label": ["road", "tree"], "reduce_labels": True}
    stored = load_dense_dataset(folder, **options)
    streamed = load_dense_dataset(folder, streaming=True, **options)
    assert isinstance(streamed["validation"], DenseDataset)
    assert repr(streamed) == "DenseDatasets(train: a stream, validation: 3)"
    for split in ("train", "validation"):
        new, old = streamed[split], stored[split]
        assert (new.id2label, new.name, new.source) == (old.id2label, old.name, old.source)
        for new_sample, old_sample in zip(new, old, strict=True):
            assert new_sample["image"].tobytes() == old_sample["image"].tobytes()
            assert np.array_equal(new_sample["label"], old_sample["label"])
    assert {int(v) for sample in streamed["train"] for v in np.unique(sample["label"])} == {0, 1, 255}


def test_the_first_samples_are_those_of_the_limit_for_all_readers(tmp_path: Path) -> None:
    stream = stream_of(write_folder(tmp_path / "d", [3, 5, 4])).take(5)
    assert [int(np.asarray(sample["image"])[0, 0, 0]) for sample in stream] == [0, 1, 2, 3, 4]
    transformed = stream.with_transform(keep)
    assert numbers(transformed.first(3)) == [0, 1, 2] and numbers(transformed.first(9)) == [0, 1, 2, 3, 4]
    halves = [numbers(itertools.islice(transformed.for_rank(rank, 2, 0), n)) for rank, n in ((0, 3), (1, 2))]
    assert sorted(halves[0] + halves[1]) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="first 0 images; take at least one"):
        stream.take(0)


def test_few_files_are_read_by_row_group(tmp_path: Path) -> None:
    transformed = stream_of(write_folder(tmp_path / "d", [8], row_group=2)).with_transform(keep)
    assert transformed.for_rank(0, 1, 0).dataset.rows.num_shards == 1
    assert transformed.for_rank(1, 2, 2).dataset.rows.num_shards == 4


def test_only_the_rows_wanted_of_other_splits_are_stored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", [4], validation=6, caption="not needed")
    options: dict[str, Any] = {"streaming": True, "id2label": NAMES}
    assert len(load_dense_dataset(folder, max_eval_samples=2, **options)["validation"]) == 2
    whole = load_dense_dataset(folder, **options)["validation"]
    assert len(whole) == 6 and int(np.asarray(whole[5]["image"])[0, 0, 0]) == 9
    arrow = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.arrow")]
    assert len(arrow) == 2, "train was stored, or the same rows twice"
    file = folder / "data" / "validation-00000-of-00001.parquet"  # a file that changes is stored anew
    datasets.Dataset.from_parquet(str(file)).select([1]).to_parquet(file)
    assert len(load_dense_dataset(folder, **options)["validation"]) == 1


def test_an_image_folder_with_metadata_streams(tmp_path: Path) -> None:
    folder, lines = tmp_path / "d" / "train", []
    for k in range(5):
        save(folder / f"{k}.png", red(k))
        save(folder / f"{k}_mask.png", grid(k % 3, shape=(8, 8)))
        lines.append(json.dumps({"file_name": f"{k}.png", "mask_file_name": f"{k}_mask.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    transformed = stream_of(tmp_path / "d").with_transform(keep)
    seen = [numbers(itertools.islice(transformed.for_rank(rank, 2, 0), n)) for rank, n in ((0, 3), (1, 2))]
    assert sorted(seen[0] + seen[1]) == [0, 1, 2, 3, 4]


def test_class_names_come_from_the_features(tmp_path: Path) -> None:
    label = datasets.Sequence(datasets.Sequence(datasets.ClassLabel(names=NAMES)))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    image = {"bytes": encoded(red(0)), "path": None}
    table = datasets.Dataset.from_dict({"image": [image], "label": [[[0, 1] * 4, [2, 2] * 4] * 4]}, features=features)
    (tmp_path / "d").mkdir()
    table.to_parquet(tmp_path / "d" / "train.parquet")
    stream = load_dense_dataset(tmp_path / "d", streaming=True)["train"]
    assert stream.id2label == dict(enumerate(NAMES))
    assert next(iter(stream))["label"][:2, :2].tolist() == [[0, 1], [2, 2]]


def test_errors_name_shard_row_and_column(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", [2, 3])
    refused(
        r"d/train, shard 1, row 0, column 'label': the mask holds ids \[2\]",
        folder,
        streaming=True,
        id2label=["wall", "road"],
    )
    file = folder / "data" / "train-00001-of-00002.parquet"
    damaged = datasets.Dataset.from_parquet(str(file))
    records = damaged.cast_column("image", datasets.Image(decode=False)).to_list()
    records[2]["image"] = {"bytes": b"no image", "path": "street.png"}
    datasets.Dataset.from_list(records, features=damaged.features).to_parquet(file)
    stream = stream_of(folder).with_transform(keep)
    with pytest.raises(ValueError, match=r"d/train, shard 1, row 2, column 'image' \(street.png\): cannot be decoded"):
        list(itertools.islice(stream, 5))


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", [2])
    for kind in ("images", "masks"):
        save(tmp_path / f"p/train/{kind}/0.png", grid(0))
    for source, options, message in (
        (folder, {}, "without class names.*--id2label"),
        (folder, {"id2label": NAMES, "shuffle_buffer": 0}, "shuffle_buffer is 0"),
        (folder, {"id2label": NAMES, "label_column": "mask"}, "Columns are image, label"),
        ("synthetic", {}, "synthetic: .*Leave streaming out"),
        ("camvid", {"data_dir": tmp_path}, "Leave streaming out"),
        (tmp_path / "p", {"id2label": NAMES}, "p: .*Leave streaming out"),
        (write_folder(tmp_path / "e", [0]), {"id2label": NAMES}, "'train' holds no images"),
    ):
        refused(message, source, streaming=True, **options)


def test_a_missing_mask_is_named(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    image = {"bytes": encoded(red(0)), "path": "street.png"}
    table = datasets.Dataset.from_dict({"image": [image], "label": [None]}, features=features)
    rows = StreamRows(table.to_iterable_dataset(), "image", "label", "d/train", "d", 10)
    with pytest.raises(ValueError, match="d/train, shard 0, row 0, column 'label': empty"):
        list(rows.read(Part(0, 0, 1)))


def test_a_data_set_of_the_catalog_streams_from_the_first_copy_that_fits(tmp_path, monkeypatch, caplog) -> None:
    files = {"train": "data/train-*.parquet", "validation": "data/val*.parquet"}
    copies = [
        HubSource(str(write_folder(tmp_path / name, [4, 3])), label_column=column, data_files=files)
        for name, column in (("wrong", "mask"), ("right", "label"))
    ]
    spec = DatasetSpec(
        source="https://example.org",
        licence="CC0",
        id2label=dict(enumerate(NAMES[1:])),
        rules={"ids": LabelRule(reduce_zero=True)},
        images={"train": 7, "validation": 3},
        hub=tuple(copies),
    )
    monkeypatch.setitem(CATALOG, "known", spec)
    data = load_dense_dataset("known", streaming=True, max_eval_samples=2)
    assert isinstance(data["train"], DenseStream) and len(data["validation"]) == 2
    assert "images in" not in caplog.text  # fewer rows than there are were asked for
    assert data["train"].source == str(tmp_path / "right") and data["train"].id2label == {0: "road", 1: "tree"}
    assert [int(sample["label"][0, 0]) for sample in data["train"]] == [255, 0, 1, 255, 0, 1, 255]
