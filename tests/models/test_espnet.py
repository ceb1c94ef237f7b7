import json

import pytest
import torch
from torch.nn import functional as F

from hf_bcd.adapters import build_adapter
from hf_bcd.adapters.loading import build_model
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.models import EspNetConfig, EspNetForSemanticSegmentation
from hf_bcd.models.modeling_espnet import FEATURE_CHANNELS, EspModule


SIZES = [(64, 96), (65, 93), (67, 70), (33, 1)]


def espnet(num_labels=5, seed=0, **fields):
    torch.manual_seed(seed)
    return EspNetForSemanticSegmentation(EspNetConfig(**({"p": 1, "q": 1, "num_labels": num_labels} | fields)))


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


@pytest.mark.parametrize("depth", [0, -1, 1.5, "2", True])
def test_refuses_depths(depth):
    with pytest.raises(ValueError, match="q is .* integer of at least 1"):
        EspNetConfig(q=depth)


def test_new_label_set_keeps_the_encoder_and_initialises_the_rest(tmp_path):
    model = espnet()
    model.save_pretrained(tmp_path)
    reloaded = EspNetForSemanticSegmentation.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    before = model.encoder.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in reloaded.encoder.state_dict().items())
    slopes = [value for key, value in reloaded.decoder.state_dict().items() if value.unique().tolist() == [0.25]]
    assert len(slopes) == 4
    scores = reloaded(torch.randn(2, 3, 64, 64)).logits
    assert scores.shape == (2, 9, 64, 64)
    assert scores.isfinite().all()


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
        ({"options": {"decodr": False}}, "unknown option of student 'espnet' 'decodr'. Did you mean 'decoder'"),
        ({"options": {"num_labels": 4}}, "unknown option of student 'espnet' 'num_labels'"),
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
