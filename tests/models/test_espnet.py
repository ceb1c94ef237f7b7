import json
import os
import socket
import subprocess
import sys

import pytest
import tiny
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

from hf_bcd.adapters import build_adapter
from hf_bcd.adapters.loading import ModelSpec, build_model
from hf_bcd.models import EspNetConfig, EspNetForSemanticSegmentation
from hf_bcd.models.modeling_espnet import FEATURE_CHANNELS, EspModule


SIZES = [(64, 96), (65, 93), (67, 70), (33, 1)]


def espnet(num_labels=5, seed=0, **fields):
    torch.manual_seed(seed)
    return EspNetForSemanticSegmentation(EspNetConfig(**({"p": 1, "q": 1, "num_labels": num_labels} | fields)))


def disturbed(**fields):
    """A model whose every parameter and buffer differs from its initial value."""
    model = espnet(**fields).eval()
    for value in model.state_dict().values():
        value.add_(0.1 * torch.rand_like(value) if value.is_floating_point() else 3)
    return model


# -- the network of the publication


@pytest.mark.parametrize(
    "fields, published, ours",
    [
        ({"num_labels": 19}, 0.3635, 363_462),
        ({"num_labels": 19, "decoder": False}, 0.3492, 349_193),
        ({"num_labels": 20}, 0.364, 365_109),
        ({"num_labels": 20, "decoder": False}, 0.349, 349_449),
        ({"num_labels": 150}, None, 952_579),
        ({"num_labels": 150, "decoder": False}, None, 382_729),
    ],
    ids=str,
)
def test_parameter_counts(fields, published, ours):
    """Of Cityscapes, where 19 classes give both published figures (as also counted by Liu et al., SKD, CVPR 2019)."""
    with torch.device("meta"):
        count = EspNetForSemanticSegmentation(EspNetConfig(**fields)).num_parameters()
    assert count == ours
    if published is not None:
        assert count / 1e6 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("in_channels, out_channels, stride", [(64, 64, 1), (19, 64, 2), (10, 5, 1), (6, 3, 1)])
def test_module_equals_the_publications_formula(in_channels, out_channels, stride):
    """Reduce, transform, sum the dilated branches from fine to coarse, concatenate, add the input."""
    torch.manual_seed(0)
    module = EspModule(in_channels, out_channels, stride).eval()
    for value in module.norm.state_dict().values():
        value.add_(torch.rand_like(value) if value.is_floating_point() else 0)
    x = torch.randn(2, in_channels, 24, 31)
    with torch.no_grad():
        d = F.conv2d(x, module.reduce.weight, stride=stride, padding=0 if stride == 1 else 1)
        pieces, total = [], 0.0
        for k, branch in enumerate(module.branches):
            y = F.conv2d(d, branch.weight, dilation=2**k, padding=2**k)
            total = total + y if k else 0.0
            pieces.append(total if k else y)
        y = torch.cat(pieces, dim=1)
        y = y + x if in_channels == out_channels else y
        norm, prelu = module.norm
        y = (y - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + 1e-3).sqrt()
        y = y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        expected = torch.where(y > 0, y, y * prelu.weight.view(-1, 1, 1))
        torch.testing.assert_close(module(x), expected)
    assert len(module.branches) == min(5, out_channels)


@torch.no_grad()
def test_first_two_levels_carry_the_shrunk_image():
    model = espnet().eval()
    image = torch.randn(1, 3, 32, 32)
    maps = model(image, output_hidden_states=True).hidden_states
    half = F.avg_pool2d(image, 3, 2, padding=1)
    for level, shrunk, norm in (
        (maps[0], half, model.encoder.stem_norm),
        (maps[1], F.avg_pool2d(half, 3, 2, padding=1), model.encoder.level_4.norm),
    ):
        expected = shrunk / (1 + norm[0].eps) ** 0.5  # a fresh batch norm in evaluation mode
        torch.testing.assert_close(level[:, -3:], torch.where(expected > 0, expected, 0.25 * expected))


# -- a model of transformers


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("num_labels", [2, 5])
@torch.no_grad()
def test_shapes(num_labels, decoder, size):
    model = espnet(num_labels, decoder=decoder).eval()
    output = model(torch.randn(2, 3, *size), output_hidden_states=True)
    eighth = tuple(-(-length // 8) for length in size)
    assert output.logits.shape == (2, num_labels, *(size if decoder else eighth))
    for x, channels, stride in zip(output.hidden_states, FEATURE_CHANNELS, model.feature_strides, strict=True):
        assert x.shape == (2, channels, *(-(-length // stride) for length in size))
    assert model(torch.randn(1, 3, *size)).hidden_states is None


@pytest.mark.parametrize("decoder", [True, False])
def test_trains_every_parameter_at_odd_sizes_on_one_image(decoder):
    model = espnet(decoder=decoder, p=2, q=2)
    labels = torch.randint(0, 5, (1, 67, 93))
    labels[:, :20] = 255
    output = model(torch.randn(1, 3, 67, 93), labels=labels)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    logits = F.interpolate(output.logits, size=(67, 93), mode="bilinear")
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels, ignore_index=255))


def test_nothing_labelled_gives_zero_loss():
    model = espnet()
    loss = model(torch.randn(1, 3, 40, 40), labels=torch.full((1, 40, 40), 255)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_labels_with_channel_axis_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 1, 40, 40\), expected \(1, height, width\)"):
        espnet()(torch.randn(1, 3, 40, 40), labels=torch.zeros(1, 1, 40, 40, dtype=torch.long))


@torch.no_grad()
def test_tuple_output():
    model = espnet().eval()
    pixel_values, labels = torch.randn(1, 3, 40, 40), torch.zeros(1, 40, 40, dtype=torch.long)
    loss, logits = model(pixel_values, labels=labels, return_dict=False)
    torch.testing.assert_close(model(pixel_values).logits, logits)
    assert loss.ndim == 0


def test_trainer_scales_the_loss_itself(tmp_path):
    trainer = Trainer(model=espnet(), args=TrainingArguments(output_dir=tmp_path, use_cpu=True))
    assert not trainer.model_accepts_loss_kwargs


@pytest.mark.parametrize("depth", [0, -1, 1.5, "2", True])
def test_refuses_depths(depth):
    with pytest.raises(ValueError, match="q is .* integer of at least 1"):
        EspNetConfig(q=depth)


# -- saving, loading, the pipeline


@pytest.mark.parametrize("decoder", [True, False])
def test_auto_class_restores_every_parameter_and_buffer(tmp_path, decoder):
    model = disturbed(decoder=decoder, image_mean=[0.1, 0.2, 0.3])
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(reloaded) is EspNetForSemanticSegmentation
    assert AutoConfig.from_pretrained(tmp_path).image_mean == [0.1, 0.2, 0.3]
    states = model.state_dict(), reloaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    pixel_values = torch.randn(1, 3, 65, 70)
    with torch.no_grad():
        # equal weights at other addresses may take other kernels
        torch.testing.assert_close(model(pixel_values).logits, reloaded(pixel_values).logits, rtol=1e-4, atol=1e-4)


def test_new_label_set_keeps_the_encoder_and_initialises_the_rest(tmp_path):
    model = disturbed()
    model.save_pretrained(tmp_path)
    reloaded = EspNetForSemanticSegmentation.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    before = model.encoder.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in reloaded.encoder.state_dict().items())
    slopes = [value for key, value in reloaded.decoder.state_dict().items() if value.unique().tolist() == [0.25]]
    assert len(slopes) == 4
    scores = reloaded(torch.randn(2, 3, 64, 64)).logits
    assert scores.shape == (2, 9, 64, 64)
    assert scores.isfinite().all()


def test_pipeline_is_silent(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("the network was touched"))
    disturbed().save_pretrained(tmp_path)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    segmenter = pipeline("image-segmentation", model=str(tmp_path), device="cpu")
    regions = segmenter(Image.new("RGB", (50, 30), "red"))
    assert [record.message for record in caplog.records] == []
    assert regions and all(region["mask"].size == (50, 30) for region in regions)
    assert {region["label"] for region in regions} <= {f"LABEL_{i}" for i in range(5)}


def test_image_processor_follows_from_the_configuration(tmp_path):
    EspNetConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert type(AutoImageProcessor.from_pretrained(tmp_path)).__name__.startswith("SegformerImageProcessor")


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
def test_files_run_without_the_package(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    monkeypatch.setattr(EspNetConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(EspNetForSemanticSegmentation, "_auto_class", "AutoModelForSemanticSegmentation")
    model = disturbed()
    model.save_pretrained(repository)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(repository)
    assert {path.name for path in repository.glob("*.py")} == {"configuration_espnet.py", "modeling_espnet.py"}
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.save({"pixel_values": pixel_values, "logits": model(pixel_values).logits}, tmp_path / "expected.pt")

    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE_CODE, str(repository), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not supported" not in result.stderr


# -- as a student


def test_a_recipe_names_it(tmp_path):
    spec = ModelSpec.parse({"backbone": "espnet", "options": {"q": 3, "decoder": False}}, "student")
    model = build_model(spec, {0: "road", 1: "sky", 2: "car"})
    assert type(model) is EspNetForSemanticSegmentation
    assert (model.config.p, model.config.q, model.config.decoder) == (2, 3, False)
    assert model.config.label2id == {"road": 0, "sky": 1, "car": 2}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "espnet"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"options": {"decodr": False}}, "unknown option of 'espnet' 'decodr'. Did you mean 'decoder'"),
        ({"options": {"num_labels": 4}}, "unknown option of 'espnet' 'num_labels'"),
        ({"head": "psp"}, "head is 'psp', but backbone 'espnet' is a whole network"),
        ({"output_stride": 8}, "output_stride is 8"),
        ({"pretrained": True}, "pretrained is True.*without ImageNet weights; remove pretrained"),
        ({"weights": "x.safetensors"}, "weights is 'x.safetensors'"),
    ],
)
def test_recipes_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelSpec.parse({"backbone": "espnet"} | fields, "student"), {0: "road", 1: "sky"})


def test_student_sees_images_by_its_own_statistics():
    adapter = build_adapter(espnet(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]))
    image = torch.full((1, 3, 8, 8), 51)
    expected = torch.tensor([(0.2 - 0.1) / 0.4, 0.0, (0.2 - 0.3) / 0.6])
    torch.testing.assert_close(adapter.normalize(image)[0, :, 0, 0], expected)
    assert adapter.feature_specs == {"stem": (19, 4), "stride_4": (131, 4), "stride_8": (256, 8)}


def test_learns_from_a_teacher_and_comes_back_from_disk(tmp_path):
    labels = {"id2label": tiny.ID2LABEL, "label2id": {name: index for index, name in tiny.ID2LABEL.items()}}
    model = espnet(num_labels=8, **labels)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = tiny.trainer(tmp_path, model=model, max_steps=2)
    run.train()
    assert run.state.global_step == 2
    for key in ("loss_task", "bcd/boundary", "bcd/context"):
        values = tiny.history(run, key)
        assert len(values) == 2 and all(0 < value < float("inf") for value in values), key
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    run.save_model(str(tmp_path / "final"))
    reloaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "final").eval()
    pixel_values = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        # trained channels-last, which takes other kernels
        torch.testing.assert_close(
            model.eval()(pixel_values).logits, reloaded(pixel_values).logits, rtol=1e-4, atol=1e-4
        )
    assert all(torch.equal(value, reloaded.state_dict()[key]) for key, value in model.state_dict().items())
