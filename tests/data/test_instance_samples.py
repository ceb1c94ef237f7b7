"""Masks through transforms, batches, cache and checks: they stay on what they show."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import DetrImageProcessor

from hf_bcd.data import BoxEvalTransform, BoxTrainTransform, collate_boxes, joined, keep_in_memory, load_dense_dataset
from hf_bcd.data import masks as data_masks
from hf_bcd.data.boxes import to_train_on
from hf_bcd.data.detection import check_box_sample
from hf_bcd.data.masks import transform_masks
from hf_bcd.utils.masks import decode, encode, mask_boxes, pack, unpack
from hf_bcd.utils.messages import UserError


def blobs(count, height, width, seed=0):
    """Discs within a picture, some of them at its border."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(count):
        centre, radius = rng.uniform(0, (height, width)), rng.uniform(2, height / 4)
        yield (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2


def sample_of(masks, height, width, crowd=None):
    """A canonical sample whose picture is white where the largest mask is."""
    rles, image = [encode(mask) for mask in masks], np.zeros((height, width, 3), np.uint8)
    image[max(map(decode, rles), key=np.sum)] = 255
    areas = np.array([mask.sum() for mask in map(decode, rles)], float)
    crowd = np.zeros(len(rles), bool) if crowd is None else np.array(crowd)
    boxes = mask_boxes(rles).astype(np.float32)
    return {
        "image": image,
        "boxes": boxes,
        "classes": np.arange(len(rles)),
        "areas": areas,
        "crowd": crowd,
        "masks": rles,
    }


@pytest.fixture(scope="module")
def scenes():
    return load_dense_dataset("synthetic_instances", num_images={"train": 6, "validation": 2}, size=(96, 128))


@pytest.mark.parametrize("size", [(60, 90), (31, 47), (123, 200), (60, 17)])
def test_masks_are_resized_as_torchvision_does(size):
    masks = list(blobs(8, 60, 90))
    shown = unpack(transform_masks([encode(mask) for mask in masks], *size), size[1])
    expected = F.resize(torch.from_numpy(np.stack(masks)).to(torch.uint8), list(size), InterpolationMode.NEAREST_EXACT)
    assert torch.equal(shown, expected.bool())
    flipped = transform_masks([encode(mask) for mask in masks], *size, flip=True)
    assert torch.equal(flipped, pack(shown.flip(-1)))


def test_flipping_twice_changes_nothing():
    masks = [encode(mask) for mask in blobs(5, 40, 52)]
    once = unpack(transform_masks(masks, 40, 52, flip=True), 52).numpy()
    twice = transform_masks([encode(mask) for mask in once], 40, 52, flip=True)
    assert torch.equal(twice, transform_masks(masks, 40, 52)) and not torch.equal(twice, pack(torch.from_numpy(once)))


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("options", [{"shortest": 60}, {"shortest": 120}, {"square": 70}, {"shortest": 33}])
def test_masks_boxes_and_picture_agree(flip, options):
    sample = sample_of(blobs(9, 60, 90), 60, 90)
    shown = BoxTrainTransform(**options, flip=flip)(sample)
    height, width = shown["pixel_values"].shape[1:]
    masks = unpack(shown["masks"], width)
    assert masks.shape == (9, height, width) and shown["crowd_masks"].shape == (0, height, -(-width // 8))
    around = mask_boxes([encode(mask) for mask in masks])
    assert np.abs(around - shown["boxes"].numpy()).max() <= 1
    white, mask = shown["pixel_values"][0] > 127, masks[masks.sum(dim=(1, 2)).argmax()]
    assert (white != mask).float().sum() <= 0.15 * white.sum()
    inner = -torch.max_pool2d(-white[None].float(), 3, 1, 1)[0] > 0
    assert inner.any() and mask[inner].all()


def test_crowds_empty_and_repeated_masks_teach_nothing():
    disc, far = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    disc[5:20, 5:20], far[25:30, 25:39] = True, True
    ring = disc.copy()
    ring[8:15, 8:15] = False
    sample = sample_of([disc, ring, disc, far, np.zeros_like(far)], 40, 40, crowd=[0, 0, 0, 1, 0])
    sample |= {"classes": np.zeros(5, int), "crowd": sample["crowd"].astype(bool)}
    # the box of the ring is that of the disc, but it is another object
    assert to_train_on(sample).tolist() == [True, True, False, False, False]
    shown = BoxTrainTransform(shortest=40, flip=0)(sample)
    assert torch.equal(unpack(shown["masks"], 40), torch.from_numpy(np.stack([disc, ring])))
    assert torch.equal(unpack(shown["crowd_masks"], 40), torch.from_numpy(far[None]))


def test_what_vanishes_in_a_small_picture_is_left_out():
    dots, disc = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    dots[[3, 40], [3, 40]], disc[10:50, 10:50] = True, True
    shown = BoxTrainTransform(shortest=16, flip=0)(sample_of([dots, disc], 64, 64))
    assert shown["classes"].tolist() == [1] and len(shown["boxes"]) == len(shown["masks"]) == 1


def test_ninety_masks_are_never_decoded_at_once():
    masks = [encode(mask) for mask in blobs(90, 400, 666)]
    transform_masks(masks[:1], 400, 666)
    tracemalloc.start()
    packed = transform_masks(masks, 800, 1333)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(packed) == 90 and peak < packed.numel() + 8 * 2**20 < 90 * 800 * 1333 / 4


def test_batches_pad_masks_like_pictures(scenes):
    transform = BoxTrainTransform(shortest=50, flip=0)
    first, second = scenes["train"].with_transform(transform)[0], scenes["train"].with_transform(transform)[1]
    second["pixel_values"] = second["pixel_values"][:, :40]
    second["masks"] = second["masks"][:, :40]
    batch = collate_boxes([first, second])
    height, width = batch["pixel_values"].shape[2:]
    for sample, masks, crowds in zip((first, second), batch["masks"], batch["crowd_masks"], strict=True):
        own = sample["pixel_values"].shape[1:]
        assert masks.shape == (len(sample["boxes"]), height, width // 8) and crowds.shape == (0, height, width // 8)
        found = unpack(masks, width)
        assert torch.equal(found[:, : own[0], : own[1]], unpack(sample["masks"], own[1])) and found.any()
        assert not found[:, own[0] :].any() and not found[:, :, own[1] :].any()


def test_evaluation_keeps_run_lengths(scenes):
    processor = DetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 80}, do_pad=False)
    data = scenes["validation"]
    shown = data.with_transform(BoxEvalTransform(processor))
    batch = collate_boxes([shown[0], shown[1]])
    assert batch["masks"] == [data[0]["masks"], data[1]["masks"]] and len(data[0]["masks"]) == len(batch["boxes"][0])
    check_box_sample(shown[0], 2, "eval_dataset", evaluated=True, masks=True)


def test_the_cache_gives_the_same_samples(scenes):
    data = scenes["train"]
    cached = keep_in_memory(data)
    for index in (0, 1, 0):
        kept, own = cached.cache[index], data[index]
        assert kept["masks"] == own["masks"] and all(np.array_equal(kept[key], own[key]) for key in own)
    nothing = data.packed(
        data[0] | {"masks": [], **{key: data[0][key][:0] for key in ("boxes", "classes", "areas", "crowd")}}
    )
    found = data.unpacked(np.zeros((4, 5, 3), np.uint8), nothing)
    assert found["masks"] == [] and found["boxes"].shape == (0, 4)
    boxes = load_dense_dataset("synthetic_detection", num_images={"train": 1})["train"]
    assert boxes.unpacked(np.zeros((4, 5, 3), np.uint8), boxes.packed(boxes[0]))["masks"] is None


def test_data_sets_of_masks(scenes):
    data = pickle.loads(pickle.dumps(scenes["train"]))
    assert data.masks and data.task == "instance-segmentation" == data.with_transform(BoxTrainTransform()).task
    assert data.select([2])[0]["masks"] == data[2]["masks"]
    boxes = load_dense_dataset("synthetic_detection", num_images={"train": 1}, size=(96, 128))["train"]
    assert boxes.task == "object-detection" and boxes[0]["masks"] is None
    with pytest.raises(UserError, match="their tasks object-detection and instance-segmentation"):
        joined(torch.utils.data.ConcatDataset([boxes, data]))


def train_sample(**changes):
    sample = {
        "index": 0,
        "pixel_values": torch.full((3, 20, 30), 9, dtype=torch.uint8),
        "boxes": torch.tensor([[1.0, 2.0, 8.0, 9.0]]),
        "classes": torch.tensor([1]),
        "crowd_boxes": torch.zeros(0, 4),
        "masks": torch.ones(1, 20, 4, dtype=torch.uint8),
        "crowd_masks": torch.zeros(0, 20, 4, dtype=torch.uint8),
    }
    return {key: value for key, value in (sample | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": None}, r"lacks masks: .*'masks': packed bits uint8 \[N, H, ceil\(W / 8\)\]"),
        ({"crowd_masks": None}, "lacks crowd_masks"),
        ({"masks": torch.ones(1, 20, 30, dtype=torch.uint8)}, r"masks of x\[0\] is torch.uint8 \[1, 20, 30\], not torch.uint8 \[1, 20, 4\]"),
        ({"masks": torch.ones(1, 20, 4)}, "torch.float32"),
        ({"masks": torch.ones(2, 20, 4, dtype=torch.uint8)}, r"\[2, 20, 4\], not torch.uint8 \[1, 20, 4\]"),
        ({"crowd_masks": []}, r"crowd_masks of x\[0\] is list"),
    ],
)  # fmt: skip
def test_training_samples_without_fitting_masks(changes, message):
    check_box_sample(train_sample(), 2, "x", masks=True)
    with pytest.raises(UserError, match=message):
        check_box_sample(train_sample(**changes), 2, "x", masks=True)


@pytest.mark.parametrize("sizes", [[], [(20, 30)] * 2, [(30, 20)]])
def test_evaluation_samples_without_fitting_masks(sizes):
    sample = train_sample(areas=torch.ones(1), crowd=torch.zeros(1).bool(), orig_size=torch.tensor([20, 30]))
    check_box_sample(sample | {"masks": [encode(np.ones((20, 30)))]}, 2, "x", evaluated=True, masks=True)
    wrong = sample | {"masks": [encode(np.ones(size)) for size in sizes]}
    with pytest.raises(UserError, match=rf"x\[0\] has {len(sizes)} masks of .* for 1 boxes of a picture \[20, 30\]"):
        check_box_sample(wrong, 2, "x", evaluated=True, masks=True)


def test_masks_are_decoded_one_at_a_time(monkeypatch):
    seen, decoded = [], data_masks.decode_box
    monkeypatch.setattr(data_masks, "decode_box", lambda rle: seen.append(rle) or decoded(rle))
    sample = sample_of(blobs(3, 30, 40), 30, 40)
    BoxTrainTransform(shortest=30, flip=0)(sample)
    assert seen == sample["masks"]
