import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from hf_bcd.data import EvalTransform, TrainTransform
from hf_bcd.data.transforms import PADDING_COLOUR, ColourMatrix, adjust_colours


def coordinates(height, width):
    """Image whose red and green are its column and row, and a label map of the columns."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([columns, rows, np.full_like(rows, 9)], axis=-1).astype(np.uint8)
    return Image.fromarray(image), columns.astype(np.int64)


def noise(height=32, width=40, low=60, high=190):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (3, height, width), generator=generator, dtype=torch.uint8)


def plain(crop_size, **options):
    return TrainTransform(crop_size, **{"scale": (1.0, 1.0), "flip": 0.0, "jitter": None} | options)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crop_and_flip_keep_image_and_label_aligned(flip):
    image, label = coordinates(60, 90)
    corners = set()
    for seed in range(20):
        torch.manual_seed(seed)
        output = plain((24, 32), flip=flip)(image, label)
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
    image, label = coordinates(100, 250)
    side = (round(100 * scale), round(250 * scale))
    output = plain(side, scale=(scale, scale), max_class_share=1)(image, label)
    shift = output["labels"].float() - output["pixel_values"][0].float()
    assert shift.abs().max() <= 1
    assert abs(shift.mean()) < 0.15


def test_padding_is_mean_colour_and_void():
    image, label = coordinates(10, 12)
    places = set()
    for seed in range(10):
        torch.manual_seed(seed)
        output = plain((16, 20))(image, label)
        void = output["labels"] == 255
        assert int((~void).sum()) == 10 * 12
        assert (output["pixel_values"][:, void] == torch.tensor(PADDING_COLOUR)[:, None]).all()
        rows, columns = torch.where(~void)
        assert torch.equal(output["pixel_values"][0][~void], output["labels"][~void])
        places.add((int(rows.min()), int(columns.min())))
    assert len(places) > 3


def test_image_larger_in_one_direction_only():
    image, label = coordinates(10, 40)
    output = plain((16, 20))(image, label)
    assert int((output["labels"] != 255).sum()) == 10 * 20


def test_image_size_is_the_short_side():
    image, label = coordinates(64, 128)
    output = plain((32, 64), image_size=32)(image, label)
    assert torch.equal(output["pixel_values"], F.resize(F.pil_to_tensor(image), [32, 64], antialias=True))
    assert not (output["labels"] == 255).any()


def test_random_scale_covers_its_range():
    image, label = Image.new("RGB", (20, 20)), np.zeros((20, 20), dtype=np.int64)
    transform = plain(64, scale=(0.5, 2.0), max_class_share=1)
    torch.manual_seed(0)
    sides = [int((transform(image, label)["labels"] == 0).sum()) ** 0.5 for _ in range(60)]
    assert 10 <= min(sides) < 13 and 37 < max(sides) <= 40


def test_flip_happens_with_its_probability():
    image, label = coordinates(8, 8)
    torch.manual_seed(0)
    flips = [int(plain(8, flip=0.25)(image, label)["labels"][0, 0]) == 7 for _ in range(200)]
    assert 0.15 < np.mean(flips) < 0.35


def test_crops_of_one_class_are_drawn_again():
    image, label = Image.new("RGB", (100, 40)), np.zeros((40, 100), dtype=np.int64)
    label[:, 50:] = 1

    def classes(share):
        torch.manual_seed(0)
        return [len(plain(40, max_class_share=share)(image, label)["labels"].unique()) for _ in range(50)]

    assert min(classes(1.0)) == 1
    assert min(classes(0.75)) == 2


def test_void_does_not_count_as_a_class():
    image, label = Image.new("RGB", (60, 60)), np.full((60, 60), 255, dtype=np.int64)
    label[::5, ::2], label[::5, 1::2] = 0, 1
    outputs = []
    for share in (1.0, 0.75):
        torch.manual_seed(0)
        outputs.append(torch.stack([plain(20, max_class_share=share)(image, label)["labels"] for _ in range(20)]))
    assert torch.equal(*outputs)


def test_images_without_a_varied_crop_are_accepted():
    label = np.full((20, 20), 255, dtype=np.int64)
    assert (plain(20)(Image.new("RGB", (20, 20)), label)["labels"] == 255).all()
    label[:10], label[0, 0] = 0, 1
    assert plain(20)(Image.new("RGB", (20, 20)), label)["labels"].unique().tolist() == [0, 1, 255]


def test_source_arrays_are_left_alone():
    image, label = coordinates(30, 30)
    before = np.asarray(image).copy(), label.copy()
    torch.manual_seed(0)
    TrainTransform(20)(image, label)
    assert np.array_equal(np.asarray(image), before[0]) and np.array_equal(label, before[1])


@pytest.mark.parametrize(
    "options", [{"crop_size": 0}, {"crop_size": 8, "scale": (2, 1)}, {"crop_size": 8, "image_size": 0}]
)
def test_impossible_train_options(options):
    with pytest.raises(ValueError, match="must be"):
        TrainTransform(**options)


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


def test_colours_are_rounded():
    grey = torch.tensor([99, 101, 102], dtype=torch.uint8).expand(3, 1, 3)
    assert adjust_colours(grey, brightness=0.6)[0].tolist() == [[59, 61, 61]]  # 59.4, 60.6, 61.2


def test_colours_saturate_as_torchvision_does():
    pixels = noise(low=0, high=255)
    difference = adjust_colours(pixels, brightness=1.8).int() - F.adjust_brightness(pixels, 1.8).int()
    assert difference.abs().max() <= 1


def test_identity_colours_change_nothing():
    pixels = noise(low=0, high=256)
    assert torch.equal(adjust_colours(pixels), pixels)
    assert torch.equal(ColourMatrix()(pixels), pixels)


def test_hue_turns_keep_luma_and_grey():
    pixels = noise(low=100, high=150)
    turned = adjust_colours(pixels, hue=0.2)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert ((turned * luma).sum(0) - (pixels * luma).sum(0)).abs().max() < 1
    assert (turned.int() - pixels.int()).abs().max() > 10
    grey = torch.full((3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(adjust_colours(grey, hue=0.3), grey)


def test_hue_turns_as_torchvision_does():
    pixels = torch.tensor([[150, 100, 100], [100, 150, 100], [100, 100, 150]], dtype=torch.uint8).T[:, None]
    ours, theirs = adjust_colours(pixels, hue=1 / 3), F.adjust_hue(pixels, 1 / 3)
    assert torch.equal(ours.argmax(0), theirs.argmax(0)) and ours.argmax(0).tolist() == [[1, 2, 0]]
    round_trip = adjust_colours(adjust_colours(pixels, hue=0.4), hue=-0.4)
    assert (round_trip.int() - pixels.int()).abs().max() <= 1


def test_colour_matrix_draws_within_its_ranges():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    values = [int(ColourMatrix(brightness=0.4)(grey)[0, 0, 0]) for _ in range(100)]
    assert 60 <= min(values) < 65 and 135 < max(values) <= 140


@pytest.mark.parametrize("options", [{"brightness": -0.1}, {"contrast": 1.5}, {"hue": 0.6}])
def test_impossible_colour_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ColourMatrix(**options)


@pytest.mark.parametrize("shape", [(360, 480), (90, 61), (64, 64), (33, 200), (300, 40), (40, 170), (48, 64), (7, 31)])
@pytest.mark.parametrize("side", [48, 64])
def test_eval_resize_is_that_of_the_exported_pipeline(shape, side):
    from transformers import SegformerImageProcessor

    image = F.to_pil_image(noise(*shape, low=0, high=256))
    label = np.arange(shape[0] * shape[1]).reshape(shape) % 7
    output = EvalTransform(side)(image, label)
    processor = SegformerImageProcessor(
        size={"shortest_edge": side, "longest_edge": 4 * side}, do_rescale=False, do_normalize=False
    )
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert output["pixel_values"].dtype == torch.uint8
    assert torch.equal(output["pixel_values"].float(), expected.float())
    assert np.array_equal(output["labels"].numpy(), label)


def test_eval_transform_without_resize_and_with_a_function():
    image, label = coordinates(12, 18)
    assert torch.equal(EvalTransform()(image, label)["pixel_values"], F.pil_to_tensor(image))
    output = EvalTransform(lambda pixels: pixels[:, ::2, ::2])(image, label)
    assert output["pixel_values"].shape == (3, 6, 9) and output["labels"].shape == (12, 18)


def test_impossible_eval_size():
    with pytest.raises(ValueError, match="resize is 0"):
        EvalTransform(0)
