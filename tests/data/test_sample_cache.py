"""Decoded samples in memory give exactly what decoding gives."""

import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import SegformerImageProcessor

from hf_bcd.data import DenseDataset, EvalTransform, TrainTransform, collate, keep_in_memory, load_dense_dataset
from hf_bcd.data import cache as cache_module
from hf_bcd.data.cache import SampleCache
from hf_bcd.runs.arguments import DataArguments
from hf_bcd.runs.experiment import load_data


class Samples:
    """Random images of several sizes that count how often each is decoded."""

    packed, unpacked = DenseDataset.packed, DenseDataset.unpacked

    def __init__(self, sizes):
        self.sizes, self.reads = sizes, [0] * len(sizes)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        self.reads[index] += 1
        generator = np.random.default_rng(index)
        image = generator.integers(0, 256, (*self.sizes[index], 3), dtype=np.uint8)
        label = generator.integers(0, 5, self.sizes[index], dtype=np.uint8)
        return {"image": Image.fromarray(image), "label": label}


def scenes():
    return load_dense_dataset("synthetic", size=(40, 56), num_images={"train": 6})["train"]


@pytest.mark.parametrize(
    "transform",
    [TrainTransform(32), TrainTransform(64), EvalTransform(SegformerImageProcessor(size={"height": 24, "width": 24}))],
)
def test_samples_are_the_same_with_and_without_cache(transform):
    plain, cached = scenes(), keep_in_memory(scenes())
    expected = [plain.with_transform(transform, seed=3)[index] for index in range(6)]
    transformed = cached.with_transform(transform, seed=3)
    for _ in range(2):  # filling, then filled
        for index in (4, 0, 5, 1, 2, 3):
            found = transformed[index]
            assert found["index"] == index
            assert torch.equal(found["pixel_values"], expected[index]["pixel_values"])
            assert torch.equal(found["labels"], expected[index]["labels"])
    assert transformed.dataset is cached and np.array_equal(cached[2]["label"], plain[2]["label"])


def test_every_sample_is_decoded_once():
    samples = Samples([(3, 4), (7, 2), (5, 5)])
    cache = SampleCache(samples, "name")
    samples.reads = [0, 0, 0]
    for _ in range(3):
        for index in (2, 0, 1):
            expected = Samples(samples.sizes)[index]
            assert np.array_equal(cache[index]["image"], np.asarray(expected["image"]))
            assert np.array_equal(cache[index]["label"], expected["label"])
    assert samples.reads == [1, 1, 1]
    again = pickle.loads(pickle.dumps(cache))  # for a spawned worker: it is empty and works
    assert np.array_equal(again[0]["label"], cache[0]["label"]) and again.capacity == cache.capacity
    assert samples.reads == [1, 1, 1] and again.samples.reads == [2, 1, 1]


def test_samples_that_no_longer_fit_are_decoded_every_time():
    samples = Samples([(4, 4)] * 3)
    cache = SampleCache(samples, "name", capacity=2 * 4 * 16)
    for _ in range(2):
        found = [cache[index] for index in range(3)]
    assert samples.reads == [1, 1, 2]
    assert all(np.array_equal(f["label"], samples[i]["label"]) for i, f in enumerate(found))


@pytest.mark.slow
def test_forked_workers_share_the_memory():
    dataset = keep_in_memory(scenes()).with_transform(EvalTransform(SegformerImageProcessor(do_resize=False)))
    loader = DataLoader(dataset, 2, num_workers=2, collate_fn=collate, multiprocessing_context="fork")
    batches = list(loader)
    dataset.dataset.cache.samples = None  # nothing can be decoded here any more
    for batch in batches:
        for position, index in enumerate(batch["index"].tolist()):
            assert torch.equal(dataset[index]["pixel_values"], batch["pixel_values"][position])


def test_the_memory_is_announced(caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        keep_in_memory(scenes())
    assert "6 decoded images will take about 0.00 GiB" in caplog.text
    monkeypatch.setattr(cache_module.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 100)
    with pytest.raises(ValueError, match=r"synthetic/train: 6 decoded images would take.*--cache_images"):
        keep_in_memory(scenes())


def test_arguments_cache_what_is_read_often():
    options = {"num_images": {"train": 2, "validation": 2, "test": 2}, "size": [32, 40]}
    data = load_data(DataArguments("synthetic", dataset_options=options, cache_images=True, max_train_samples=1))
    assert [data[name].cache is not None for name in ("train", "validation", "test")] == [True, True, False]
    assert len(data["train"].cache) == 1
    with pytest.raises(ValueError, match="--cache_images or --streaming"):
        load_data(DataArguments("synthetic", dataset_options=options, cache_images=True, streaming=True))
