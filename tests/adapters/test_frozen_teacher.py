"""The frozen teacher: constants, precision, sizes and label order."""

import pytest
import torch
import torch.nn.functional as F
from adapter_tiny_models import LABELS, MODELS, images, tiny_model
from torch import nn

from hf_bcd.adapters import FrozenTeacher, build_adapter


def teacher(name: str = "segformer", id2label: dict[int, str] = LABELS, **options) -> FrozenTeacher:
    return FrozenTeacher(build_adapter(tiny_model(name)), id2label, **options)


def test_stays_in_evaluation_mode():
    frozen = teacher("timm_segmentation")
    assert frozen.train() is frozen
    nn.ModuleList([frozen]).train()
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize("name", ["mask2former", "segformer", "timm_segmentation"])
def test_unchanged_by_a_students_training(name):
    """Batch norms included; and its outputs serve as constants in the student's backward pass."""
    frozen = teacher(name)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    student = nn.Conv2d(3, 5, kernel_size=8, stride=8)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(3):
        frozen.train()
        output = frozen(images())
        predicted = student(images().float() / 255)
        target = F.interpolate(output.logits, predicted.shape[-2:], mode="bilinear")
        # both products save the teacher's tensors for the backward pass
        loss = (predicted * target).mean() + (predicted.mean() * output.features["stride_8"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert student.weight.grad is not None and student.weight.grad.any()
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    after = frozen.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_float32_constants(name):
    output = teacher(name, dtype=torch.bfloat16)(images(100, 140))
    assert (output.head is None) == (build_adapter(tiny_model(name)).head_levels == ())
    for tensor in (output.logits, *output.features.values()):
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad and not tensor.is_inference()
        assert tensor.isfinite().all()
    assert output.task_losses == {}


def test_precision_is_its_own():
    frozen = teacher()
    expected = frozen(images()).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(images()).logits, expected)
    rounded = teacher(dtype=torch.bfloat16)
    logits = rounded(images()).logits
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}


def test_images_are_resized_to_the_next_multiple_of_32():
    frozen = teacher()
    pixel_values = images(100, 140)
    assert frozen(pixel_values).features["stride_4"].shape[-2:] == (32, 40)
    expected = F.interpolate(pixel_values.float(), (128, 160), mode="bilinear", align_corners=False)
    torch.testing.assert_close(frozen.resize(pixel_values), expected, rtol=0, atol=1e-3)
    assert frozen.resize(images(64, 96)).dtype == torch.uint8  # nothing to do


def test_images_are_resized_to_the_size_of_position_embeddings_or_the_one_asked_for():
    output = teacher("data2vec")(images(128, 64))
    assert output.features["stride_16"].shape[-2:] == (6, 6)
    assert teacher("beit")(images(128, 64)).logits.shape[-2:] == (24, 24)
    assert teacher("beit", image_size=(64, 128))(images()).logits.shape[-2:] == (16, 32)


@pytest.mark.parametrize("name", ["mask2former", "segformer"])
def test_logits_follow_the_students_order(name):
    student = {0: "Sky", 1: "car", 2: "Traffic-Light"}
    frozen = teacher(name, student)
    assert frozen.shares_labels and frozen.label_map.missing == []
    assert frozen.num_labels == 3
    own = teacher(name)(images()).logits
    assert torch.equal(frozen(images()).logits, own[:, [4, 2, 1]])


@pytest.mark.parametrize("name", ["mask2former", "segformer"])
def test_scores_of_several_classes_add_up_to_the_students(name):
    """Mask2Former's logits are log-scores, so that its scores add up too."""
    synonyms = {"vehicle": ["car", "person"]}
    frozen = teacher(name, {0: "vehicle", 1: "sky"}, label_synonyms=synonyms, dtype=torch.bfloat16)
    own = teacher(name, dtype=torch.bfloat16)(images()).logits
    mapped = frozen(images()).logits
    torch.testing.assert_close(mapped[:, 0].exp(), own[:, 2].exp() + own[:, 3].exp())
    assert torch.equal(mapped[:, 1], own[:, 4])
    assert frozen.num_labels == 2 and frozen.adapter.id2label == {0: "vehicle", 1: "sky"}


@pytest.mark.parametrize("name", ["segformer", "timm_segmentation", "upernet-swin"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_head_computes_as_the_teacher_does(name, dtype):
    """Precision and classes: on the teacher's own levels, it gives the teacher's logits, and gradients for these alone."""
    synonyms = {"vehicle": ["car", "person"]}
    frozen = teacher(name, {0: "sky", 1: "vehicle"}, label_synonyms=synonyms, dtype=dtype)
    output = frozen(images())
    assert output.head is not None and output.logits.shape[1] == 2
    with torch.autocast("cpu", torch.float16):  # an outer one does not reach it
        logits = output.head(output.features)
    assert logits.dtype == torch.float32 and torch.equal(logits, output.logits)
    levels = {level: x.clone().requires_grad_() for level, x in output.features.items()}
    output.head(levels).square().sum().backward()
    read = frozen.adapter.head_levels
    assert all((x.grad is not None and bool(x.grad.any())) == (level in read) for level, x in levels.items())
    assert not any(parameter.grad is not None for parameter in frozen.parameters())


def test_placeholder_names_are_taken_by_number_with_a_warning(caplog):
    frozen = teacher("segformer", {index: f"LABEL_{index}" for index in range(5)})
    assert frozen.label_map.is_identity
    assert [record.levelname for record in caplog.records if "have no names" in record.message] == ["WARNING"]


def test_logits_stay_as_they_are_when_labels_are_missing(caplog):
    with caplog.at_level("INFO", "hf_bcd"):
        frozen = teacher("segformer", {0: "car", 1: "unicorn", 2: "sky", 3: "dragon"})
    assert caplog.text.count("stand for 2 of the student's 4") == 1 and "missing: unicorn, dragon" in caplog.text
    assert not frozen.shares_labels
    assert frozen.label_map.missing == ["unicorn", "dragon"]
    assert frozen.num_labels == 5
    assert torch.equal(frozen(images()).logits, teacher()(images()).logits)


def test_own_normalisation():
    pixel_values = images()
    statistics = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    adapter = build_adapter(tiny_model("segformer"), *statistics)
    mean, std = torch.tensor(statistics).view(2, 3, 1, 1)
    with torch.no_grad():
        expected = adapter.model((pixel_values / 255 - mean) / std).logits
    torch.testing.assert_close(FrozenTeacher(adapter, LABELS)(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)
