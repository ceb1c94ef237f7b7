"""Pictures with boxes: generated scenes, transforms, cache and batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from transformers import DetrImageProcessor, RTDetrImageProcessor

from hf_bcd.data import (
    BoxDataset,
    BoxEvalTransform,
    BoxTrainTransform,
    collate_boxes,
    joined,
    keep_in_memory,
    load_dense_dataset,
)
from hf_bcd.data.detection import check_box_sample
from hf_bcd.data.synthetic.scenes import SyntheticScenes
from hf_bcd.utils.messages import UserError


SIZE = (96, 128)


@pytest.fixture(scope="module")
def scenes():
    return load_dense_dataset("synthetic_detection", size=SIZE, num_images={"train": 8, "test": 2})


def sample_of(boxes, size=(60, 40), **others):
    """A sample whose picture is black, but white inside of the boxes."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    image = np.zeros((*size[::-1], 3), np.uint8)
    for left, top, right, bottom in boxes.astype(int):
        image[top:bottom, left:right] = 255
    count = len(boxes)
    plain = {
        "image": Image.fromarray(image),
        "boxes": boxes,
        "classes": np.arange(count),
        "areas": (boxes[:, 2:] - boxes[:, :2]).prod(1).astype(float),
        "crowd": np.zeros(count, bool),
    }
    return plain | others


def test_scenes_have_boxes_and_the_pixels_of_the_label_maps(scenes):
    train, maps = scenes["train"], SyntheticScenes(size=SIZE, num_images=8)
    assert isinstance(train, BoxDataset) and train.task == "object-detection"
    assert train.id2label == {0: "person", 1: "vehicle"} and train.num_labels == 2 and len(scenes["test"]) == 2
    for index in range(8):
        sample, scene = train[index], maps[index]
        assert sample["image"].tobytes() == scene["image"].tobytes()
        assert sample["boxes"].dtype == np.float32 and sample["classes"].dtype == np.int64
        assert sample["areas"].dtype == np.float64 and sample["crowd"].dtype == bool and not sample["crowd"].any()
        things = np.isin(scene["label"], [6, 7])
        covered = np.zeros(SIZE, bool)
        for (left, top, right, bottom), area in zip(sample["boxes"].astype(int), sample["areas"], strict=True):
            covered[top:bottom, left:right] = True
            inside = things[top:bottom, left:right]
            assert 12 <= area <= inside.size and inside[0].any() and inside[-1].any() and inside[:, 0].any()
        # what is left has fewer than 12 visible pixels
        assert (things & ~covered).sum() < 60
        for kind, stored in enumerate((6, 7)):
            areas = sample["areas"][sample["classes"] == kind].sum()
            assert abs(areas - (scene["label"] == stored).sum()) < 60


def test_transforms_depend_on_the_index_only_and_not_on_the_cache(scenes):
    transform = BoxTrainTransform(shortest=[64, 96], longest=160, scale=(0.5, 1.5), jitter=0.3)
    plain, cached = scenes["train"].with_transform(transform, 3), keep_in_memory(scenes["train"])
    kept = cached.with_transform(transform, 3)
    assert kept.task == "object-detection" and isinstance(cached, BoxDataset)
    for index in (2, 5, 2):
        one, other = plain[index], kept[index]
        assert one.keys() == other.keys() == {"index", "pixel_values", "boxes", "classes", "crowd_boxes"}
        assert all(torch.equal(one[name], other[name]) for name in one if name != "index")
    assert np.array_equal(kept.samples[2]["areas"], cached[2]["areas"])


def test_joined_and_selected_sets_stay_sets_with_boxes(scenes):
    both = joined(ConcatDataset([Subset(scenes["train"], [3, 1]), scenes["test"]]))
    assert isinstance(both, BoxDataset) and len(both) == 4
    assert np.array_equal(both[1]["boxes"], scenes["train"][1]["boxes"])
    assert np.array_equal(both[2]["boxes"], scenes["test"][0]["boxes"])


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"shortest": 80, "longest": 400}, (80, 120)),
        ({"shortest": 80, "longest": 90}, (60, 90)),
        ({"square": 64}, (64, 64)),
        ({"shortest": 40, "longest": 400, "scale": (0.5, 0.5)}, (20, 30)),
    ],
)
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_stay_on_what_they_show(options, shape, flip):
    shown = BoxTrainTransform(flip=flip, **options)(sample_of([[6, 4, 30, 20], [40, 24, 60, 40]]))
    assert shown["pixel_values"].shape[1:] == shape and shown["pixel_values"].dtype == torch.uint8
    expected = torch.tensor([[6.0, 4, 30, 20], [40, 24, 60, 40]]) * (
        torch.tensor(shape[::-1] * 2) / torch.tensor([60, 40] * 2)
    )
    if flip:
        expected = torch.stack(
            [shape[1] - expected[:, 2], expected[:, 1], shape[1] - expected[:, 0], expected[:, 3]], 1
        )
    assert torch.allclose(shown["boxes"], expected, atol=1e-4) and shown["classes"].tolist() == [0, 1]
    for left, top, right, bottom in shown["boxes"].round().int().tolist():
        inside = shown["pixel_values"][0, top:bottom, left:right]
        assert inside.float().mean() > 200 and inside[2:-2, 2:-2].min() > 230


def test_crowds_degenerate_and_repeated_boxes_teach_nothing():
    boxes = [[1, 1, 9, 9], [1, 1, 9, 9], [1, 1, 9, 9], [5, 5, 5.5, 30], [2, 2, 40, 30], [3, 3, 20, 20]]
    areas, crowd = np.array([64.0, 64, 64, 12, 900, 0]), np.array([0, 0, 0, 0, 1, 0], bool)
    sample = sample_of(boxes, classes=np.array([0, 0, 1, 1, 1, 1]), areas=areas, crowd=crowd)
    shown = BoxTrainTransform(40, 100, flip=0)(sample)
    assert shown["boxes"].tolist() == [[1, 1, 9, 9]] * 2 and shown["classes"].tolist() == [0, 1]
    assert shown["crowd_boxes"].tolist() == [[2, 2, 40, 30]]
    kept = BoxEvalTransform(RTDetrImageProcessor(size={"height": 32, "width": 32}))(sample)
    assert kept["boxes"].tolist() == boxes and kept["crowd"].tolist() == crowd.tolist()


def test_evaluation_shows_what_the_processor_shows_and_keeps_the_truth():
    sample = sample_of([[6, 4, 30, 20]])
    shown = BoxEvalTransform(DetrImageProcessor(size={"shortest_edge": 20, "longest_edge": 100}))(sample)
    assert shown["pixel_values"].shape == (3, 20, 30) and shown["orig_size"].tolist() == [40, 60]
    assert shown["boxes"].tolist() == [[6, 4, 30, 20]] and shown["areas"].tolist() == [384]
    batch = collate_boxes([shown | {"index": 0}, shown | {"index": 1, "pixel_values": torch.zeros(3, 20, 20)}])
    assert [one.shape[-1] for one in batch["pixel_values"]] == [30, 20] and "pixel_mask" not in batch
    assert next(iter(batch)) == "index"


def test_training_batches_are_padded_to_multiples_of_32():
    transform = BoxTrainTransform(40, 100, flip=0)
    samples = [transform(sample_of([[6, 4, 30, 20]], size)) | {"index": 0} for size in ((60, 40), (40, 70))]
    batch = collate_boxes(samples)
    assert batch["pixel_values"].shape == (2, 3, 96, 64) and batch["pixel_mask"].dtype == torch.bool
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [2400, 2800] and batch["pixel_mask"][1, :70, :40].all()
    assert (batch["pixel_values"][0, :, 40:].flatten(1).T == torch.tensor([124, 116, 104])).all()
    assert torch.equal(batch["pixel_values"][0, :, :40, :60], samples[0]["pixel_values"])
    whole = collate_boxes([BoxTrainTransform(square=64)(sample_of([])) | {"index": 3}])
    assert "pixel_mask" not in whole and whole["boxes"][0].shape == (0, 4) and whole["crowd_boxes"][0].shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortest": 0}, "must be positive"),
        ({"shortest": []}, "must be positive"),
        ({"shortest": 900, "longest": 800}, "more than longest"),
        ({"flip": 2}, "a probability"),
        ({"scale": (2, 1)}, "smallest, largest"),
    ],
)
def test_wrong_options_of_the_transform(options, message):
    with pytest.raises(UserError, match=message):
        BoxTrainTransform(**options)


def sample_from_elsewhere(evaluated, **changes):
    sample = {
        "index": 0, "pixel_values": torch.zeros(3, 60, 90, dtype=torch.uint8), "boxes": torch.tensor([[10.0, 5, 90, 60]]),
        "classes": torch.tensor([1]),
    }  # fmt: skip
    if evaluated:  # twice as large as it is shown
        truth = {"areas": torch.ones(1), "crowd": torch.tensor([False]), "orig_size": torch.tensor([120, 180])}
        sample |= truth | {"boxes": 2 * sample["boxes"]}
    else:
        sample["crowd_boxes"] = torch.zeros(0, 4)
    return {name: value for name, value in (sample | changes).items() if value is not None}


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.tensor([[60.0, 40, 20, 20]])}, r"are no corners, such as \[60.0, 40.0, 20.0, 20.0\]"),
        ({"boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5]])}, "lie in 0..1"),
        (
            {"boxes": torch.tensor([[10.0, 10, 500, 50]])},
            r"end outside of its picture, \d+x\d+ .* \[10.0, 10.0, 500.0",
        ),
        ({"boxes": torch.tensor([[-9.0, 10, 50, 50]])}, "end outside of its picture"),
        ({"classes": torch.tensor([3])}, r"has the classes \[3\]; class ids are 0 to 2"),
        ({"classes": torch.tensor([1, 1])}, r"boxes \[1, 4\] and classes \[2\]"),
        ({"classes": None}, "lacks classes"),
    ],
)
def test_samples_from_elsewhere_that_no_detector_can_use(changes, message, evaluated):
    check_box_sample(sample_from_elsewhere(evaluated), 3, "data", evaluated)
    with pytest.raises(UserError, match=message):
        check_box_sample(sample_from_elsewhere(evaluated, **changes), 3, "data", evaluated)


def test_samples_to_train_on_and_to_evaluate_on_have_keys_of_their_own():
    with pytest.raises(UserError, match=r"lacks areas, crowd, orig_size: a sample must be .*'orig_size': height and"):
        check_box_sample(sample_from_elsewhere(False), 3, "data", True)
    with pytest.raises(UserError, match=r"lacks crowd_boxes: a sample must be .*'crowd_boxes': \[M, 4\]"):
        check_box_sample(sample_from_elsewhere(True), 3, "data")
    nothing = {"boxes": torch.zeros(0, 4), "classes": torch.zeros(0, dtype=torch.int64)}
    check_box_sample(sample_from_elsewhere(False, **nothing), 3, "data")
