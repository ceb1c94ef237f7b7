import torch
from transformers.trainer_pt_utils import find_batch_size

from hf_bcd.data import collate


def sample(index, image_size, label_size):
    return {
        "index": index,
        "pixel_values": torch.full((3, *image_size), index, dtype=torch.uint8),
        "labels": torch.full(label_size, index),
    }


def test_equal_sizes_are_stacked():
    batch = collate([sample(index, (8, 6), (8, 6)) for index in (4, 2, 9)])
    assert list(batch) == ["index", "pixel_values", "labels"]
    assert batch["index"].tolist() == [4, 2, 9] and batch["index"].dtype == torch.int64
    assert batch["pixel_values"].shape == (3, 3, 8, 6) and batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].shape == (3, 8, 6) and batch["labels"].dtype == torch.int64


def test_different_sizes_are_lists_without_padding():
    samples = [sample(0, (8, 6), (16, 12)), sample(1, (6, 8), (12, 16))]
    batch = collate(samples)
    assert [tuple(pixels.shape) for pixels in batch["pixel_values"]] == [(3, 8, 6), (3, 6, 8)]
    assert [tuple(labels.shape) for labels in batch["labels"]] == [(16, 12), (12, 16)]
    assert find_batch_size(batch) == 2


def test_labels_of_different_sizes_leave_images_stacked():
    batch = collate([sample(0, (8, 8), (16, 12)), sample(1, (8, 8), (12, 16))])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert isinstance(batch["labels"], list)


def test_trainer_sees_the_batch_size():
    assert find_batch_size(collate([sample(index, (8, 6), (8, 6)) for index in range(3)])) == 3
