import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import SegformerImageProcessor
from transformers.trainer_pt_utils import find_batch_size

from hf_bcd.data import DenseDataset, DenseDatasets, EvalTransform, TrainTransform, collate
from hf_bcd.data.dataset import ReadRows, Row, TransformedDataset
from hf_bcd.data.labels import LabelRule


SIZE = 24


def noise(index):
    rng = np.random.default_rng(index)
    image = Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
    return Row(image, rng.integers(0, 3, (SIZE, SIZE)), f"image {index}", f"mask {index}")


def of_noise(names="abc", rule=LabelRule()):  # noqa: B008 it is frozen
    rows = ReadRows([(index,) for index in range(6)], noise)
    return DenseDataset(rows, "noise", "train", "nowhere", dict(enumerate(names)), rule)


@pytest.fixture
def dataset():
    return of_noise()


@pytest.fixture
def transformed(dataset):
    return dataset.with_transform(TrainTransform(16), seed=3)


def read(transformed, epochs=3, **options):
    loader = DataLoader(transformed, batch_size=2, collate_fn=collate, **options)
    samples = []
    for epoch in range(epochs):
        transformed.set_epoch(epoch)
        for batch in loader:
            samples += zip(*batch.values(), strict=True)
    return samples


def same(a, b):
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_sample_is_canonical_and_indices_count_from_both_ends(dataset):
    sample = dataset[1]
    assert sample["image"].mode == "RGB" and sample["image"].size == (SIZE, SIZE)
    assert sample["label"].dtype == np.uint8 and sample["label"].shape == (SIZE, SIZE)
    assert (dataset.num_labels, dataset.ignore_index, dataset.split) == (3, 255, "train")
    assert len(list(dataset)) == 6 and np.array_equal(dataset[-1]["label"], dataset[5]["label"])
    transformed = dataset.with_transform(EvalTransform(SegformerImageProcessor(do_resize=False)))
    assert [sample["index"] for sample in transformed] == list(range(6)) and transformed[-1]["index"] == 5
    with pytest.raises(ValueError, match="seed is -1"):
        TransformedDataset(dataset, transformed.transform, seed=-1)


def test_select(dataset):
    chosen = dataset.select([4, -1, 0]).select([1, 0])
    assert len(chosen) == 2
    assert np.array_equal(chosen[0]["label"], dataset[5]["label"])
    assert np.array_equal(chosen[1]["label"], dataset[4]["label"])
    assert chosen.id2label == dataset.id2label and chosen.name == "noise"
    with pytest.raises(IndexError):
        dataset.select([6])


def test_the_rule_of_the_labels():
    with pytest.raises(ValueError, match=r"mask 3: the mask holds ids \[2\]"):
        of_noise("ab")[3]
    assert set(np.unique(of_noise("ab", LabelRule(reduce_zero=True))[3]["label"])) == {0, 1, 255}
    void = of_noise(rule=LabelRule(void_ids=(0, 1, 2)))  # which is a sample, too
    assert (void.with_transform(TrainTransform(16))[0]["labels"] == 255).all()


def test_aliases_of_splits(dataset):
    splits = DenseDatasets({"train": dataset, "validation": dataset})
    assert splits["val"] is splits["valid"] is splits["validation"]
    assert "val" in splits and "test" not in splits and splits.get("test") is None
    assert list(splits) == ["train", "validation"] and repr(splits) == "DenseDatasets(train: 6, validation: 6)"
    with pytest.raises(KeyError, match="no split 'test'; this data set has train, validation"):
        splits["test"]


def test_samples_depend_only_on_seed_epoch_and_index(transformed, dataset):
    transformed.set_epoch(2)
    first = transformed[3]
    torch.rand(7)
    again = [transformed[index] for index in (5, 3)][1]
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert first["index"] == 3 and first["pixel_values"].dtype == torch.uint8
    transformed.set_epoch(1)
    other_seed = dataset.with_transform(TrainTransform(16), seed=4)
    other_seed.set_epoch(2)
    for other in (transformed, other_seed):
        assert not torch.equal(first["pixel_values"], other[3]["pixel_values"])
    twice = dataset.select([0, 0]).with_transform(TrainTransform(16))
    assert not torch.equal(twice[0]["pixel_values"], twice[1]["pixel_values"])


def test_random_state_is_restored_and_a_pickled_copy_gives_the_same_samples(transformed):
    copy = pickle.loads(pickle.dumps(transformed))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    assert torch.equal(copy[2]["pixel_values"], transformed[2]["pixel_values"])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}, {"num_workers": 1, "prefetch_factor": 4}],
    ids=["workers", "persistent", "prefetch"],
)
def test_workers_give_the_samples_of_the_main_process(transformed, options):
    expected = read(transformed)
    assert same(read(transformed, **options), expected)
    assert not same(expected[:6], expected[6:12])


def sample(index, image_size, label_size):
    pixels = torch.full((3, *image_size), index, dtype=torch.uint8)
    return {"index": index, "pixel_values": pixels, "labels": torch.full(label_size, index)}


def test_samples_of_equal_sizes_are_stacked():
    batch = collate([sample(index, (8, 6), (8, 6)) for index in (4, 2, 9)])
    assert list(batch) == ["index", "pixel_values", "labels"] and find_batch_size(batch) == 3
    assert batch["index"].tolist() == [4, 2, 9] and batch["index"].dtype == torch.int64
    assert batch["pixel_values"].shape == (3, 3, 8, 6) and batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].shape == (3, 8, 6) and batch["labels"].dtype == torch.int64


def test_samples_of_different_sizes_are_lists_without_padding():
    batch = collate([sample(0, (8, 6), (16, 12)), sample(1, (6, 8), (12, 16))])
    assert [tuple(pixels.shape) for pixels in batch["pixel_values"]] == [(3, 8, 6), (3, 6, 8)]
    assert [tuple(labels.shape) for labels in batch["labels"]] == [(16, 12), (12, 16)]
    assert find_batch_size(batch) == 2
    batch = collate([sample(0, (8, 8), (16, 12)), sample(1, (8, 8), (12, 16))])
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and isinstance(batch["labels"], list)
