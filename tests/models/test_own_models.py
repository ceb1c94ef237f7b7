"""Promises that both of our models keep: losses, and files that `transformers` reads, alone if need be."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerImageProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from hf_bcd.models import EspNetConfig, EspNetForSemanticSegmentation, TimmSegmentationConfig, TimmSegmentationModel


def espnet(**fields):
    return EspNetForSemanticSegmentation(EspNetConfig(p=1, q=1, num_labels=5, **fields))


def timm_model(backbone="resnet10t", **fields):
    widths = {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_vit": 1, "img_size": 64}
    kwargs = {
        "resnet10t": {"channels": [8, 16, 24, 32], "stem_width": 8},
        # has parameters called gamma, which older checkpoints of transformers rename
        "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
        # has buffers that no checkpoint holds
        "efficientformerv2_s0": widths,
    }[backbone]
    fields = {"head_channels": 8, "dropout": 0.0, "num_labels": 5} | fields
    return TimmSegmentationModel(TimmSegmentationConfig(backbone=backbone, backbone_kwargs=kwargs, **fields))


DEEPLAB = {"head": "deeplabv3plus", "auxiliary_head": True}
MODELS = {
    "espnet": espnet,
    "espnet-encoder": lambda: espnet(decoder=False, image_mean=[0.1, 0.2, 0.3]),
    "timm": timm_model,
    "timm-convnext": lambda: timm_model("convnext_atto", **DEEPLAB),
    "timm-efficientformer": lambda: timm_model("efficientformerv2_s0", **DEEPLAB),
}


@pytest.fixture(params=["espnet", "timm"])
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def disturbed(name):
    """A model whose every parameter and buffer differs from its initial value."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for value in model.state_dict().values():
        value.add_(0.1 * torch.rand_like(value) if value.is_floating_point() else 3)
    return model


def test_loss_is_cross_entropy_of_resized_logits(model):
    labels = torch.randint(0, 5, (2, 67, 93))
    labels[:, :20] = 255
    output = model(torch.randn(2, 3, 67, 93), labels=labels)
    logits = F.interpolate(output.logits, size=(67, 93), mode="bilinear")
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels, ignore_index=255))


def test_nothing_labelled_gives_zero_loss(model):
    loss = model(torch.randn(1, 3, 40, 40), labels=torch.full((1, 40, 40), 255)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_labels_with_channel_axis_are_refused(model):
    with pytest.raises(ValueError, match=r"shape \(1, 1, 40, 40\), expected \(1, height, width\)"):
        model(torch.randn(1, 3, 40, 40), labels=torch.zeros(1, 1, 40, 40, dtype=torch.long))


@torch.no_grad()
def test_tuple_output(model):
    pixel_values, labels = torch.randn(1, 3, 40, 40), torch.zeros(1, 40, 40, dtype=torch.long)
    loss, logits = model.eval()(pixel_values, labels=labels, return_dict=False)
    torch.testing.assert_close(model(pixel_values).logits, logits)
    assert loss.ndim == 0


def test_trainer_scales_the_loss_itself(model, tmp_path):
    # a model of transformers with **kwargs in forward is taken to divide its loss by num_items_in_batch
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=tmp_path, use_cpu=True))
    assert not trainer.model_accepts_loss_kwargs


@pytest.mark.parametrize("name", MODELS)
def test_auto_class_restores_every_parameter_and_buffer(tmp_path, name):
    model = disturbed(name)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert AutoConfig.from_pretrained(tmp_path).image_mean == model.config.image_mean
    state, buffers = reloaded.state_dict(), dict(reloaded.named_buffers())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        # equal weights at other addresses may take other kernels; logits reach a hundred
        torch.testing.assert_close(model(pixel_values).logits, reloaded(pixel_values).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["espnet", "timm"])
def test_pipeline_is_silent(tmp_path, caplog, monkeypatch, name):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("the network was touched"))
    disturbed(name).save_pretrained(tmp_path)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    segmenter = pipeline("image-segmentation", model=str(tmp_path), device="cpu")
    regions = segmenter(Image.new("RGB", (50, 30), "red"))
    assert [record.message for record in caplog.records] == []
    assert regions and all(region["mask"].size == (50, 30) for region in regions)
    assert {region["label"] for region in regions} <= {f"LABEL_{i}" for i in range(5)}


@pytest.mark.parametrize("backend, suffix", [("torchvision", ""), ("pil", "Pil")])
def test_image_processor_follows_from_the_configuration(model, tmp_path, backend, suffix):
    model.config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(processor).__name__ == f"SegformerImageProcessor{suffix}"


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
    """Of ESPNet; tests/hub/test_round_trip.py does it with a model of timm."""
    repository = tmp_path / "repository"
    model = disturbed("espnet")
    model.save_pretrained(repository)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(repository)
    assert {path.name for path in repository.glob("*.py")} == {
        "configuration_espnet.py",
        "modeling_espnet.py",
        "segmentation_model.py",
    }
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.save({"pixel_values": pixel_values, "logits": model(pixel_values).logits}, tmp_path / "expected.pt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE_CODE, str(repository), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not supported" not in result.stderr
