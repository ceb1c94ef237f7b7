import os
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, SegformerImageProcessor, pipeline
from transformers.utils import logging as transformers_logging

from hf_bcd.models import TimmSegmentationConfig, TimmSegmentationModel


BACKBONES = {
    "resnet10t": {"channels": [8, 16, 24, 32], "stem_width": 8},
    # has parameters called gamma, which older checkpoints of transformers rename
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    # has buffers that no checkpoint holds
    "efficientformerv2_s0": {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_vit": 1, "img_size": 64},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("the network was touched"))


def disturbed(backbone="resnet10t", **fields):
    """A model whose every parameter and buffer differs from its initial value."""
    torch.manual_seed(0)
    config = TimmSegmentationConfig(
        backbone=backbone, backbone_kwargs=BACKBONES[backbone], num_labels=4, head_channels=8, **fields
    )
    model = TimmSegmentationModel(config).eval()
    for value in model.state_dict().values():
        value.add_(0.1 * torch.rand_like(value) if value.is_floating_point() else 3)
    return model


@pytest.mark.parametrize("backbone", BACKBONES)
def test_auto_class_restores_every_parameter_and_buffer(tmp_path, backbone):
    model = disturbed(backbone, head="deeplabv3plus", auxiliary_head=True)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)

    assert type(reloaded) is TimmSegmentationModel
    buffers = dict(reloaded.named_buffers())
    assert all(torch.equal(value, reloaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        # equal weights at other addresses may take other kernels; logits reach a hundred
        torch.testing.assert_close(model(pixel_values).logits, reloaded(pixel_values).logits, rtol=1e-4, atol=1e-3)


def test_new_label_set_changes_the_classifier_alone(tmp_path):
    model = disturbed()
    model.save_pretrained(tmp_path)
    reloaded = TimmSegmentationModel.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, reloaded.state_dict()[key])]
    assert changed == ["head.classifier.1.weight", "head.classifier.1.bias"]
    weight = reloaded.head.classifier[1].weight
    assert weight.shape == (9, 8, 1, 1)
    assert weight.std().item() == pytest.approx((2 / 8) ** 0.5, rel=0.5)


def test_pipeline_is_silent(tmp_path, caplog, monkeypatch):
    disturbed().save_pretrained(tmp_path)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    segmenter = pipeline("image-segmentation", model=str(tmp_path), device="cpu")
    regions = segmenter(Image.new("RGB", (50, 30), "red"))

    assert [record.message for record in caplog.records] == []
    assert regions and all(region["mask"].size == (50, 30) for region in regions)
    assert {region["label"] for region in regions} <= {f"LABEL_{i}" for i in range(4)}


@pytest.mark.parametrize(
    "backend, name", [("torchvision", "SegformerImageProcessor"), ("pil", "SegformerImageProcessorPil")]
)
def test_image_processor_follows_from_the_configuration(tmp_path, backend, name):
    disturbed().config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend=backend)).__name__ == name


REMOTE_CODE = """
import sys, torch
from PIL import Image
from transformers import pipeline
segmenter = pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=True, device="cpu")
assert not any(name.startswith("hf_bcd") for name in sys.modules)
assert segmenter(Image.new("RGB", (50, 30), "red"))
expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.testing.assert_close(segmenter.model(expected["pixel_values"]).logits, expected["logits"])
"""


@pytest.mark.slow
def test_files_run_without_the_package(tmp_path):
    repository = tmp_path / "repository"
    model = disturbed()
    model.save_pretrained(repository)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(repository)
    assert {path.name for path in repository.glob("*.py")} == {
        "configuration_timm_segmentation.py",
        "heads.py",
        "modeling_timm_segmentation.py",
    }
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.save({"pixel_values": pixel_values, "logits": model(pixel_values).logits}, tmp_path / "expected.pt")

    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE_CODE, str(repository), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not supported" not in result.stderr
