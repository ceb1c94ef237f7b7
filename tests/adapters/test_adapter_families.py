"""What every adapter promises, checked on every family against real forward passes."""

import math

import pytest
import torch
import torch.nn.functional as F
from adapter_tiny_models import MODELS, STAGES, TOKENS, images, segformer, timm_segmentation, tiny_model, upernet
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    PvtV2Config,
    ResNetConfig,
    SegformerConfig,
    SegformerForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_bcd.adapters import ADAPTERS, build_adapter, describe, image_processor
from hf_bcd.outputs import FeatureSpec, LabelMaps


ANY_SIZES = [(96, 96), (96, 128), (100, 140), (64, 65)]
SIZES = {"data2vec": [(96, 96)], "dpt": [(96, 96), (128, 128), (100, 100)]}
CASES = [(name, size) for name in MODELS for size in SIZES.get(name, ANY_SIZES)]


def test_every_adapter_is_covered():
    assert {tiny_model(name).config.model_type for name in MODELS} == set(ADAPTERS)


@pytest.mark.parametrize(("name", "size"), CASES, ids=lambda value: str(value))
@torch.no_grad()
def test_feature_specs_equal_what_a_forward_gives(name, size):
    adapter = build_adapter(tiny_model(name))
    output = adapter(images(*size))
    assert list(output.features) == list(adapter.feature_specs)
    for level, spec in adapter.feature_specs.items():
        feature = output.features[level]
        assert feature.shape[:2] == (2, spec.channels), level
        for length, pixels in zip(feature.shape[2:], size, strict=True):
            assert abs(length - math.ceil(pixels / spec.stride)) <= 1, (level, feature.shape)
    assert adapter.num_labels == 5
    assert list(adapter.state_dict()) == [f"model.{key}" for key in adapter.model.state_dict()]
    assert output.logits.shape[:2] == (2, 5)
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mask2former"])
@torch.no_grad()
def test_logits_are_the_models_own(name):
    adapter = build_adapter(tiny_model(name))
    pixel_values = images(96, 96)
    expected = adapter.model(adapter.normalize(pixel_values)).logits
    logits = adapter(pixel_values).logits
    if name.startswith("upernet"):  # UperNet's own forward upsamples its logits to the input size
        logits = F.interpolate(logits, expected.shape[-2:], mode="bilinear", align_corners=False)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_flow_through_taps_also_with_activation_checkpointing(name):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        adapter = build_adapter(tiny_model(name)).train()
        if checkpointing:
            adapter.model.activation_checkpointing_enable()
        torch.manual_seed(1)  # drop path
        features = adapter(images(96, 96)).features
        sum(feature.square().mean() for feature in features.values()).backward()
        return {key: p.grad for key, p in adapter.model.named_parameters() if p.grad is not None}

    plain = gradients(checkpointing=False)
    assert any(gradient.any() for gradient in plain.values())
    if not tiny_model(name).supports_gradient_checkpointing:
        return
    checkpointed = gradients(checkpointing=True)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient)


@pytest.mark.parametrize("name", [*MODELS, "timm_segmentation-psp", "timm_segmentation-deeplabv3plus"])
@torch.no_grad()
def test_heads_that_read_the_levels_alone_can_be_run_on_them(name):
    head = name.removeprefix("timm_segmentation-")
    model = tiny_model(name) if name in MODELS else timm_segmentation(head=head, output_stride=16).eval()
    adapter = build_adapter(model)
    output = adapter(images(96, 96))
    if name == "upernet-timm-stem-stride_8" or not name.startswith(("segformer", "timm_segmentation", "upernet")):
        assert adapter.head_levels == ()
        with pytest.raises(ValueError, match="reads more than the feature levels"):
            adapter.head(output.features)
        return
    assert torch.equal(adapter.head(output.features), output.logits)
    assert list(adapter.head_levels) == [level for level in adapter.feature_specs if level in adapter.head_levels]
    for level in adapter.head_levels:
        changed = adapter.head(output.features | {level: output.features[level].flip(-1)})
        assert not torch.equal(changed, output.logits), level
    if name == "timm_segmentation-psp":
        assert adapter.head_levels == ("stride_32",)


def test_dilated_stages_keep_their_names():
    specs = build_adapter(tiny_model("timm_segmentation-stride_8")).feature_specs
    assert specs == {
        "stem": FeatureSpec(8, 4),
        "stride_4": FeatureSpec(8, 4),
        "stride_8": FeatureSpec(16, 8),
        "stride_16": FeatureSpec(32, 8),
        "stride_32": FeatureSpec(112, 8),
    }
    assert list(build_adapter(tiny_model("timm_segmentation-four_maps")).feature_specs) == list(specs)[1:]
    for name, strides in (("mobilevit", [4, 4, 8, 16, 16]), ("mobilenet_v2-stride_8", [4, 8, 8, 8])):
        assert [spec.stride for spec in build_adapter(tiny_model(name)).feature_specs.values()] == strides


def test_levels_of_a_full_width_mobilenet_v2():
    with torch.device("meta"):
        model = MobileNetV2ForSemanticSegmentation(MobileNetV2Config(output_stride=16, num_labels=21))
    assert build_adapter(model).feature_specs == {
        "stride_4": FeatureSpec(24, 4),
        "stride_8": FeatureSpec(32, 8),
        "stride_16": FeatureSpec(96, 16),
        "stride_32": FeatureSpec(320, 16),
    }


@torch.no_grad()
def test_stem_is_the_stride_2_map_after_pooling():
    model = tiny_model("timm_segmentation")
    adapter = build_adapter(model)
    stem = model.backbone(adapter.normalize(images()))[0]
    assert torch.equal(adapter(images()).features["stem"], F.max_pool2d(stem, 3, stride=2, padding=1))


@torch.no_grad()
def test_token_levels_are_the_grids_that_the_neck_takes():
    """Replays BEiT's head on the tapped levels, and compares DPT's tokens."""
    adapter = build_adapter(tiny_model("beit"))
    output = adapter(images(96, 128))
    pyramid = adapter.model.fpn(tuple(output.features.values()))
    assert torch.equal(adapter.model.decode_head(pyramid), output.logits)
    adapter = build_adapter(tiny_model("dpt"))
    output = adapter(images(96, 96))
    # readout "project" mixes the class token in, which the levels leave out
    tokens = [feature.flatten(2).transpose(1, 2) for feature in output.features.values()]
    hidden_states = adapter.model.dpt(adapter.normalize(images(96, 96)), output_hidden_states=True).hidden_states
    for grid, hidden_state in zip(tokens, hidden_states[1:], strict=True):
        assert torch.equal(grid, hidden_state[:, 1:])


@pytest.mark.parametrize(
    ("name", "auxiliary"), [("timm_segmentation", True), ("upernet-swin", True), ("segformer", False)]
)
def test_task_losses_are_weighted_as_the_model_itself_does(name, auxiliary):
    adapter = build_adapter(tiny_model(name)).train()
    labels = torch.randint(0, 5, (2, 64, 96))
    assert adapter(images()).task_losses == {}
    torch.manual_seed(0)  # dropout
    losses = adapter(images(), LabelMaps(labels, 5)).task_losses
    assert losses.keys() == {"loss_task", *(["loss_auxiliary"] if auxiliary else [])}
    torch.manual_seed(0)
    expected = adapter.model(pixel_values=adapter.normalize(images()), labels=labels).loss
    torch.testing.assert_close(sum(losses.values()), expected)


@pytest.mark.parametrize("name", ["segformer", "upernet-resnet", "mask2former"])
def test_predictions_are_those_of_the_image_processor(name):
    """In full precision whatever autocast says; as `pipeline` does, UperNet's logits are resized twice."""
    adapter = build_adapter(tiny_model(name)).eval()
    sizes = [(83, 119), (70, 50)]
    with torch.no_grad():
        outputs = adapter.model(pixel_values=adapter.normalize(images()))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = adapter.predict(images(), sizes)
    processor = image_processor(adapter, shortest_edge=None)
    expected = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    for ours, theirs in zip(predicted, expected, strict=True):
        assert (ours == theirs).float().mean() > (0.98 if name == "mask2former" else 0.9999)
    same = adapter.predict(images(), [sizes[0]] * 2)
    assert torch.equal(same[0], predicted[0]) and same[1].shape == sizes[0]


def test_runs_in_the_precision_of_the_parameters():
    adapter = build_adapter(segformer().to(torch.bfloat16))
    output = adapter(images())
    assert output.logits.dtype == torch.bfloat16
    assert adapter.image_mean.dtype == torch.float32


@pytest.mark.parametrize(("name", "pixel_values", "message"), [
    ("data2vec", images(96, 128), r"its own size only \(96x96 best\), but pixel_values is 96x128"),
    ("dpt", images(96, 128), "squares only"),
    ("segformer", images()[0], r"pixel_values has shape \[3, 64, 96\]"),
])  # fmt: skip
def test_images_that_a_model_cannot_take(name, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        build_adapter(tiny_model(name))(pixel_values)


PYRAMID = {"depths": [1] * 4, "hidden_sizes": [8] * 4}
PVT = PvtV2Config(num_attention_heads=[1] * 4, out_features=STAGES, **PYRAMID)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: ViTForImageClassification(ViTConfig(**TOKENS)), "'vit'; supported types: .*segformer.*timm_segmentation"),
    (lambda: SegformerForImageClassification(SegformerConfig(**PYRAMID)),
     "SegformerForImageClassification predicts no segmentation"),
    (lambda: upernet(PVT), "backbone 'pvt_v2' are not known; supported backbones: convnext"),
    (lambda: upernet(ResNetConfig(embedding_size=8, out_features=["stem", *STAGES], **PYRAMID)), "leave 'stem' out"),
])  # fmt: skip
def test_unsupported_models(build, message):
    with pytest.raises(ValueError, match=message):
        build_adapter(build())


def test_describe():
    assert describe(tiny_model("timm_segmentation-stride_8")).splitlines() == [
        "TimmSegmentationModel (timm_segmentation), adapted by TimmSegmentationAdapter",
        "labels: 5 (road, traffic light, car, person, ...)",
        "input: RGB, any size, mean 0.485 0.456 0.406, std 0.229 0.224 0.225",
        "level      channels stride",
        "stem              8      4",
        "stride_4          8      4",
        "stride_8         16      8",
        "stride_16        32      8",
        "stride_32       112      8",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_unused_parameters_are_frozen(name):
    adapter = build_adapter(tiny_model(name)).train()
    size = adapter.fixed_size or (64, 96)
    labels = torch.randint(0, adapter.num_labels, (2, *size))
    output = adapter(images(*size), LabelMaps(labels, adapter.num_labels))
    (sum(output.task_losses.values()) + output.logits.square().mean()).backward()
    without_gradient = {key for key, p in adapter.model.named_parameters() if p.grad is None}
    adapter.freeze_unused()
    assert {key for key, p in adapter.model.named_parameters() if not p.requires_grad} == without_gradient
