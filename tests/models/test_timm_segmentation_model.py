import pytest
import timm
import torch
from torch.nn import functional as F

from hf_bcd.models import TimmSegmentationConfig, TimmSegmentationModel
from hf_bcd.models.heads import HEADS


BACKBONES = {
    "resnet10t": {"channels": [8, 16, 24, 32], "stem_width": 8},
    "mobilenetv2_050": {},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    # channels-last feature maps
    "mambaout_femto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
}


def tiny(backbone="resnet10t", **fields):
    fields = {"num_labels": 5, "head_channels": 8, **fields}
    return TimmSegmentationModel(
        TimmSegmentationConfig(backbone=backbone, backbone_kwargs=BACKBONES[backbone], **fields)
    )


def random_batch(batch=2, height=67, width=93):
    return torch.randn(batch, 3, height, width), torch.randint(0, 5, (batch, height, width))


@pytest.mark.parametrize("auxiliary_head", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_trains_at_odd_sizes_on_one_image(backbone, head, auxiliary_head):
    model = tiny(backbone, head=head, auxiliary_head=auxiliary_head)
    pixel_values, labels = random_batch(batch=1)
    output = model(pixel_values, labels=labels, output_hidden_states=True)
    output.loss.backward()

    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (output.auxiliary_logits is not None) == auxiliary_head
    assert tuple(x.shape[1] for x in output.hidden_states) == model.feature_channels
    expected = output.hidden_states[-1 if head == "psp" else model.nominal_strides.index(4)]
    assert output.logits.shape == (1, 5, *expected.shape[-2:])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("backbone", ["resnet10t", "mobilenetv2_050", "convnext_atto"])
def test_output_stride(backbone, output_stride, head):
    model = tiny(backbone, head=head, output_stride=output_stride).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 96), output_hidden_states=True)
    assert model.nominal_strides[-4:] == (4, 8, 16, 32)
    assert model.feature_strides[-1] == output_stride
    assert [x.shape[-2:] for x in output.hidden_states] == [(64 // s, 96 // s) for s in model.feature_strides]


def test_auxiliary_loss_counts_in_training_only():
    model = tiny(auxiliary_head=True, dropout=0.0)
    pixel_values, labels = random_batch()
    output = model(pixel_values, labels=labels)

    def cross_entropy(logits):
        return F.cross_entropy(F.interpolate(logits, size=(67, 93), mode="bilinear"), labels)

    expected = cross_entropy(output.logits) + 0.4 * cross_entropy(output.auxiliary_logits)
    torch.testing.assert_close(output.loss, expected)

    output = model.eval()(pixel_values, labels=labels)
    assert output.auxiliary_logits is None
    torch.testing.assert_close(output.loss, cross_entropy(output.logits))


def test_backbone_keeps_timms_initialisation_and_heads_get_kaiming():
    torch.manual_seed(0)
    expected = timm.create_model("resnet10t", features_only=True, **BACKBONES["resnet10t"]).state_dict()
    torch.manual_seed(0)
    model = tiny(head="deeplabv3plus", head_channels=64)
    assert all(torch.equal(value, expected[key]) for key, value in model.backbone.state_dict().items())

    weight = model.head.decoder[1][0].weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert model.head.classifier[1].bias.abs().max() == 0


@pytest.mark.parametrize("backbone", ["resnet10t", "mobilenetv2_050"])
def test_activation_checkpointing_changes_no_gradient(backbone):
    model = tiny(backbone, dropout=0.0)
    pixel_values, labels = random_batch()

    def gradients():
        model.zero_grad()
        model(pixel_values, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    def kept_for_backward():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            model(pixel_values)
        return sum(saved)

    plain, without = gradients(), kept_for_backward()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing and kept_for_backward() < without
    torch.testing.assert_close(gradients(), plain)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing and kept_for_backward() == without


def test_activation_checkpointing_is_refused_where_timm_has_none():
    config = TimmSegmentationConfig(
        backbone="efficientformer_l1", backbone_kwargs={"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]}
    )
    with pytest.raises(ValueError, match="'efficientformer_l1' does not support activation checkpointing"):
        TimmSegmentationModel(config).activation_checkpointing_enable()
    with pytest.raises(ValueError, match="every_n_layers=2 is not possible"):
        tiny().activation_checkpointing_enable(every_n_layers=2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"backbone": "repvit_m0_9", "output_stride": 8}, r"'repvit_m0_9' with output_stride=8 .* supports: \[32\]"),
        ({"backbone": "efficientvit_m0", "output_stride": 32}, r"supports: \[64\] .* strides \(16, 32, 64\)"),
        (
            {"backbone": "resnet18", "backbone_kwargs": {"widht": 2}},
            "no output stride works: .* keyword argument 'widht'",
        ),
        ({"backbone": "vit_tiny_patch16_224"}, r"no output stride works: .* strides \(16, 16, 16\)"),
        (
            {"backbone": "efficientvit_m0", "output_stride": 64, "head": "fpn"},
            r"'fpn' .* needs a feature map of stride 4, but backbone 'efficientvit_m0' has the strides \(16, 32, 64\)",
        ),
    ],
)
def test_refuses_backbones_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        TimmSegmentationModel(TimmSegmentationConfig(**fields))


def test_psp_takes_backbones_that_end_at_stride_64():
    model = TimmSegmentationModel(TimmSegmentationConfig(backbone="efficientvit_m0", output_stride=64)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 128, 128)).logits.shape[-2:] == (2, 2)


def test_new_label_set_changes_only_the_classifier(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    reloaded = TimmSegmentationModel.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, reloaded.state_dict()[key])]
    assert changed == ["head.classifier.1.weight", "head.classifier.1.bias"]
    weight = reloaded.head.classifier[1].weight
    assert weight.shape == (9, 8, 1, 1)
    assert weight.std().item() == pytest.approx((2 / 8) ** 0.5, rel=0.5)
