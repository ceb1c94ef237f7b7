import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from transformers import MobileViTImageProcessor, SegformerImageProcessor

from hf_bcd.data import EvalTransform, TrainTransform
from hf_bcd.data.transforms import Augmentation, adjust_colours


def coordinates(height, width):
    """Sample with an image whose red and green are its column and row, and a label map of the columns."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([columns, rows, np.full_like(rows, 9)], axis=-1).astype(np.uint8)
    return {"image": Image.fromarray(image), "label": columns.astype(np.int64)}


def noise(height=32, width=40, low=60, high=190):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (3, height, width), generator=generator, dtype=torch.uint8)


def plain(crop_size, **options):
    return TrainTransform(crop_size, **{"scale": (1.0, 1.0), "flip": 0.0, "jitter": 0} | options)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crop_and_flip_keep_image_and_label_aligned(flip):
    sample = coordinates(60, 90)
    corners = set()
    for seed in range(20):
        torch.manual_seed(seed)
        output = plain((24, 32), flip=flip)(sample)
        pixels, labels = output["pixel_values"], output["labels"]
        assert pixels.dtype == torch.uint8 and labels.dtype == torch.uint8
        assert pixels.shape == (3, 24, 32) and labels.shape == (24, 32)
        assert torch.equal(pixels[0], labels)
        steps = labels.int().diff(dim=1).unique().tolist()
        assert steps == ([-1] if flip else [1])
        corners.add((int(pixels[1, 0, 0]), int(labels[0, 0])))
    assert len(corners) > 10


@pytest.mark.parametrize("scale", [0.4, 0.73, 1.7])
def test_scaling_shifts_neither_image_nor_label(scale):
    sample = coordinates(100, 250)
    side = (round(100 * scale), round(250 * scale))
    output = plain(side, scale=(scale, scale), max_class_share=1)(sample)
    shift = output["labels"].float() - output["pixel_values"][0].float()
    assert shift.abs().max() <= 1
    assert abs(shift.mean()) < 0.15


def test_padding_is_mean_colour_and_void():
    sample = coordinates(10, 12)
    places = set()
    for seed in range(10):
        torch.manual_seed(seed)
        output = plain((16, 20))(sample)
        void = output["labels"] == 255
        assert int((~void).sum()) == 10 * 12
        assert (output["pixel_values"][:, void] == torch.tensor([124, 116, 104])[:, None]).all()
        rows, columns = torch.where(~void)
        assert torch.equal(output["pixel_values"][0][~void], output["labels"][~void])
        places.add((int(rows.min()), int(columns.min())))
    assert len(places) > 3
    assert int((plain((16, 20))(coordinates(10, 40))["labels"] != 255).sum()) == 10 * 20  # larger in one direction


def test_image_size_is_the_short_side():
    sample = coordinates(64, 128)
    output = plain((32, 64), image_size=32)(sample)
    assert torch.equal(output["pixel_values"], F.resize(F.pil_to_tensor(sample["image"]), [32, 64], antialias=True))
    assert not (output["labels"] == 255).any()


def test_random_scale_and_flip_cover_their_range():
    image, label = Image.new("RGB", (20, 20)), np.zeros((20, 20), dtype=np.int64)
    transform = plain(64, scale=(0.5, 2.0), max_class_share=1)
    torch.manual_seed(0)
    sides = [int((transform({"image": image, "label": label})["labels"] == 0).sum()) ** 0.5 for _ in range(60)]
    assert 10 <= min(sides) < 13 and 37 < max(sides) <= 40
    flips = [int(plain(8, flip=0.25)(coordinates(8, 8))["labels"][0, 0]) == 7 for _ in range(200)]
    assert 0.15 < np.mean(flips) < 0.35


def crops(label, size, share, count):
    torch.manual_seed(0)
    sample = {"image": Image.new("RGB", label.shape[::-1]), "label": label}
    return torch.stack([plain(size, max_class_share=share)(sample)["labels"] for _ in range(count)])


def test_crops_of_one_class_are_drawn_again():
    label = np.zeros((40, 100), dtype=np.int64)
    label[:, 50:] = 1
    for share, fewest in ((1.0, 1), (0.75, 2)):
        assert min(len(crop.unique()) for crop in crops(label, 40, share, 50)) == fewest


def test_void_does_not_count_as_a_class():
    label = np.full((60, 60), 255, dtype=np.int64)
    label[::5, ::2], label[::5, 1::2] = 0, 1
    assert torch.equal(crops(label, 20, 1.0, 20), crops(label, 20, 0.75, 20))


def test_images_without_a_varied_crop_are_accepted():
    label = np.full((20, 20), 255, dtype=np.int64)
    assert (crops(label, 20, 0.75, 1) == 255).all()
    label[:10], label[0, 0] = 0, 1
    assert crops(label, 20, 0.75, 1).unique().tolist() == [0, 1, 255]


def test_source_arrays_stay_as_they_are():
    sample, before = coordinates(30, 30), coordinates(30, 30)
    TrainTransform(20)(sample)
    assert all(np.array_equal(np.asarray(sample[key]), np.asarray(before[key])) for key in before)


@pytest.mark.parametrize("options", [{"crop_size": 0}, {"scale": (2, 1)}, {"image_size": 0}, {"jitter": 2}])
def test_impossible_train_options(options):
    with pytest.raises(ValueError, match="must"):
        TrainTransform(**{"crop_size": 8} | options)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"brightness": 0.6}, lambda x: F.adjust_brightness(x, 0.6)),
        ({"brightness": 1.3}, lambda x: F.adjust_brightness(x, 1.3)),
        ({"contrast": 0.5}, lambda x: F.adjust_contrast(x, 0.5)),
        ({"contrast": 1.4}, lambda x: F.adjust_contrast(x, 1.4)),
        ({"saturation": 0.0}, lambda x: F.adjust_saturation(x, 0.0)),
        ({"saturation": 1.2}, lambda x: F.adjust_saturation(x, 1.2)),
        ({"brightness": 0.9, "contrast": 0.7, "saturation": 0.6},
         lambda x: F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(x, 0.9), 0.7), 0.6)),
    ],
)  # fmt: skip
def test_colours_agree_with_torchvision_where_nothing_is_clipped(ours, theirs):
    pixels = noise()
    difference = (adjust_colours(pixels, **ours).int() - theirs(pixels).int()).abs()
    assert difference.max() <= (3 if len(ours) > 1 else 1)  # torchvision truncates after every step
    assert not torch.equal(adjust_colours(pixels, **ours), pixels)


def test_colours_are_rounded_and_saturate_as_torchvision_does():
    grey = torch.tensor([99, 101, 102], dtype=torch.uint8).expand(3, 1, 3)
    assert adjust_colours(grey, brightness=0.6)[0].tolist() == [[59, 61, 61]]  # 59.4, 60.6, 61.2
    pixels = noise(low=0, high=256)
    difference = adjust_colours(pixels, brightness=1.8).int() - F.adjust_brightness(pixels, 1.8).int()
    assert difference.abs().max() <= 1
    assert torch.equal(adjust_colours(pixels), pixels)


def test_colours_are_drawn_within_their_range_and_leave_padding_as_it_is():
    sample = {"image": Image.new("RGB", (4, 4), (100, 100, 100)), "label": np.zeros((4, 4), np.uint8)}
    torch.manual_seed(0)
    outputs = [plain((4, 8), jitter=0.4)(sample) for _ in range(100)]
    values = [int(output["pixel_values"][0][output["labels"] == 0][0]) for output in outputs]
    assert 60 <= min(values) < 65 and 135 < max(values) <= 140
    assert all((output["pixel_values"][0][output["labels"] == 255] == 124).all() for output in outputs)


def test_boxes_and_masks_come_along():
    """A bright rectangle, its box and its mask still lie on each other after scale, crop, padding and flip."""
    picture, mask = torch.zeros(3, 60, 90, dtype=torch.uint8), torch.zeros(2, 60, 90, dtype=torch.uint8)
    picture[:, 20:40, 30:70], mask[0, 20:40, 30:70] = 255, 1
    items = {
        "image": tv_tensors.Image(picture),
        "boxes": tv_tensors.BoundingBoxes([[30, 20, 70, 40]], format="XYXY", canvas_size=(60, 90)),
        "masks": tv_tensors.Mask(mask),
    }
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        shown = Augmentation((64, 64), scale=(0.5, 1.5), jitter=0, max_class_share=1)(items)
        left, top, right, bottom = shown["boxes"][0].tolist()
        rows, columns = torch.where(shown["masks"][0] == 1)
        near = (columns.min() - left, rows.min() - top, right - 1 - columns.max(), bottom - 1 - rows.max())
        assert all(abs(float(difference)) <= 1 for difference in near)
        assert shown["masks"].shape == (2, 64, 64)
        assert ((shown["masks"][0] == 1) == (shown["image"][0] >= 128)).float().mean() > 0.98
        seen.add((round(left), round(top)))
    assert len(seen) > 10


SHAPES = [(360, 480), (90, 61), (64, 64), (33, 200), (300, 40), (40, 170), (48, 64), (7, 31)]
PROCESSORS = {
    "none": SegformerImageProcessor(do_resize=False),
    "short side": SegformerImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}),
    "square": SegformerImageProcessor(size={"height": 48, "width": 48}),
    "crop": MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_shows_the_picture_of_the_image_processor(shape, name):
    processor = PROCESSORS[name]
    image, label = F.to_pil_image(noise(*shape, low=0, high=256)), np.arange(shape[0] * shape[1]).reshape(shape) % 7
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    for given in (image, np.array(image)):
        output = EvalTransform(processor)({"image": given, "label": label})
        pixels = output["pixel_values"]
        assert pixels.dtype == torch.uint8 and np.array_equal(output["labels"].numpy(), label)
        if name == "crop":  # MobileViT: BGR in 0..1
            torch.testing.assert_close(pixels.flip(0) / 255, expected)
            continue
        mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
        assert torch.equal((pixels.float() - mean * 255) / (std * 255), expected)


def test_crops_around_classes_hold_a_rare_one_as_often_as_a_common_one():
    label = np.zeros((60, 90), np.int64)
    label[50, 80] = 1
    sample = {**coordinates(60, 90), "label": label}

    def share(class_crops):
        seen = []
        for seed in range(200):
            torch.manual_seed(seed)
            labels = plain((16, 16), class_crops=class_crops, max_class_share=1)(sample)["labels"]
            seen.append(bool((labels == 1).any()))
        return np.mean(seen)

    assert share(0.0) < 0.2
    assert 0.4 < share(1.0) < 0.75  # half are drawn around the rare class, some around the other hold it by chance
    assert share(0.0) < share(0.5) < share(1.0)


def test_crops_around_classes_leave_void_pictures_alone():
    sample = {**coordinates(20, 30), "label": np.full((20, 30), 255)}
    assert (plain((16, 16), class_crops=1.0)(sample)["labels"] == 255).all()
