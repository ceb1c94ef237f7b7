import logging

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from hf_bcd.models import TimmSegmentationModel


# one for each way in which timm names the parts of a feature extractor
TINY_BACKBONES = {
    "resnet10t": {"channels": [8, 16, 24, 32], "stem_width": 8},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "mobilenetv2_050": {},
    "efficientformer_l1": {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_vit": 0},
}
RESNET = {"backbone_kwargs": TINY_BACKBONES["resnet10t"], "head_channels": 8}


def classifier_file(path, backbone, edit=lambda state: None, **kwargs):
    state = timm.create_model(backbone, num_classes=7, **kwargs).state_dict()
    state = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in state.items()}
    edit(state)
    save_file(state, path)
    return state


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_weights_reach_every_key_of_the_backbone(tmp_path, backbone, caplog):
    path = tmp_path / "classifier.safetensors"
    state = classifier_file(path, backbone, **TINY_BACKBONES[backbone])
    options = {"weights": path, "backbone_kwargs": TINY_BACKBONES[backbone], "head_channels": 8}
    with caplog.at_level(logging.INFO, logger="hf_bcd"):
        model = TimmSegmentationModel.from_backbone(backbone, **options)
    assert backbone != "resnet10t" or "['fc.bias', 'fc.weight']" in caplog.text  # the unused classifier
    unused = list(state.values())
    for key, value in model.backbone.state_dict().items():
        index = next((i for i, other in enumerate(unused) if torch.equal(value, other)), None)
        assert index is not None, key
        del unused[index]


def drop(state):
    del state["layer2.0.conv1.weight"]


def grow(state):
    state["layer1.1.conv1.weight"] = torch.zeros(8, 8, 3, 3)


def shrink(state):
    state["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"][:, :4].clone()


@pytest.mark.parametrize(
    "edit, message",
    [
        (drop, r"'layer2.0.conv1.weight' has shape \(16, 8, 3, 3\), the file has no such key; check .*'resnet10t'"),
        (shrink, r"'layer2.0.conv1.weight' has shape \(16, 8, 3, 3\), the file has \(16, 4, 3, 3\); check"),
        (grow, r"has keys that the model does not have: \['layer1.1.conv1.weight'\]"),
    ],
)
def test_file_of_another_model_is_refused(tmp_path, edit, message):
    path = tmp_path / "classifier.safetensors"
    classifier_file(path, "resnet10t", edit, **TINY_BACKBONES["resnet10t"])
    with pytest.raises(ValueError, match=message):
        TimmSegmentationModel.from_backbone("resnet10t", weights=path, **RESNET)


def test_pretrained_weights_come_through_timm(tmp_path, monkeypatch):
    path = tmp_path / "hub.safetensors"
    state = classifier_file(path, "resnet10t", **TINY_BACKBONES["resnet10t"])
    create_model = timm.create_model

    def create_from_file(*args, **kwargs):
        return create_model(*args, **kwargs, pretrained_cfg_overlay={"file": str(path), "num_classes": 7})

    monkeypatch.setattr(timm, "create_model", create_from_file)
    model = TimmSegmentationModel.from_backbone("resnet10t", pretrained=True, **RESNET)
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weights": "classifier.bin"}, "'classifier.bin' must be a .safetensors file"),
        ({"weights": "classifier.safetensors", "pretrained": True}, "exclude each other"),
        ({"haed": "fpn"}, r"no such fields .*\['haed'\]; the nearest ones are {'haed': \['head'\]}"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmSegmentationModel.from_backbone("resnet10t", **arguments)


def test_a_pointer_in_place_of_weights_is_named(tmp_path):
    path = tmp_path / "backbone.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"backbone\.safetensors holds no weights .* an LFS pointer"):
        TimmSegmentationModel.from_backbone("resnet10t", weights=path, **RESNET)


def test_real_imagenet_weights(shared_data):
    path = shared_data / "weights" / "mobilenetv2_100.tf_in1k.timm.safetensors"
    options = {"backbone_kwargs": {"pad_type": "same"}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    model = TimmSegmentationModel.from_backbone("mobilenetv2_100", weights=path, **options, num_labels=21).eval()
    assert model.config.image_mean == model.config.image_std == [0.5, 0.5, 0.5]

    classifier = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    classifier.load_state_dict(load_file(path), strict=True)
    pixel_values = torch.randn(1, 3, 97, 129)
    with torch.no_grad():
        features = model(pixel_values, output_hidden_states=True).hidden_states
        expected = classifier.forward_intermediates(pixel_values, intermediates_only=True)
    assert len(features) == len(expected) == 5
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
