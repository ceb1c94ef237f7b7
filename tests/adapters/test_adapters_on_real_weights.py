"""A trained DeepLabV3 of Google's on a real image, through adapter and teacher."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

from hf_bcd.adapters import FrozenTeacher, build_adapter, describe, image_statistics


@pytest.fixture(scope="module")
def deeplab(shared_data):
    return AutoModelForSemanticSegmentation.from_pretrained(shared_data / "weights/deeplabv3_mobilenet_v2_1.0_voc_hf")


@pytest.fixture(scope="module")
def voc_image(shared_data) -> tuple[torch.Tensor, torch.Tensor]:
    """A dog on an armchair: image `[1, 3, H, W]` and label map `[H, W]`."""
    folder = shared_data / "format_samples/voc/VOCdevkit/VOC2012"
    with Image.open(folder / "JPEGImages/2007_000063.jpg") as image:
        pixel_values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    with Image.open(folder / "SegmentationClass/2007_000063.png") as image:
        return pixel_values, torch.from_numpy(np.array(image)).long()


def mean_iou(logits: torch.Tensor, labels: torch.Tensor) -> float:
    predicted = F.interpolate(logits, labels.shape, mode="bilinear").argmax(1)[0][labels != 255]
    truth = labels[labels != 255]
    classes = torch.cat([predicted, truth]).unique()
    overlaps = [(predicted == c) & (truth == c) for c in classes]
    unions = [(predicted == c) | (truth == c) for c in classes]
    return float(np.mean([o.sum() / u.sum() for o, u in zip(overlaps, unions, strict=True)]))


def test_describe_names_levels_and_statistics(deeplab):
    assert describe(deeplab).splitlines()[1:] == [
        "labels: 21 (background, aeroplane, bicycle, bird, ...)",
        "input: RGB, any size, mean 0.5 0.5 0.5, std 0.5 0.5 0.5",
        "level      channels stride",
        "stride_4         24      4",
        "stride_8         32      8",
        "stride_16        96     16",
        "stride_32       320     16",
    ]


def test_segments_a_real_image(deeplab, voc_image):
    pixel_values, labels = voc_image
    adapter = build_adapter(deeplab, *image_statistics(deeplab))
    with torch.no_grad():
        score = mean_iou(adapter(pixel_values).logits, labels)
        imagenet = build_adapter(deeplab, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert score > 0.58  # measured: 0.601
        assert mean_iou(imagenet(pixel_values).logits, labels) < score - 0.03  # measured: 0.544


def test_teacher_of_a_student_with_other_labels(deeplab, voc_image):
    pixel_values, labels = voc_image
    student = {0: "Dog", 1: "background", 2: "arm-chair, chair"}
    teacher = FrozenTeacher(build_adapter(deeplab), student)
    assert teacher.label_map.sources == {0: (12,), 1: (0,), 2: (9,)}
    own_ids = labels.clone()
    for index, (original,) in teacher.label_map.sources.items():
        own_ids[labels == original] = index
    assert mean_iou(teacher(pixel_values).logits, own_ids) > 0.55
