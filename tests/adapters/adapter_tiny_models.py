"""Tiny, randomly initialised models of every family that has an adapter."""

from collections.abc import Callable

import torch
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    ConvNextConfig,
    Data2VecVisionConfig,
    Data2VecVisionForSemanticSegmentation,
    DPTConfig,
    DPTForSemanticSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    MobileViTV2Config,
    MobileViTV2ForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_bcd.models import EspNetConfig, EspNetForSemanticSegmentation, TimmSegmentationConfig, TimmSegmentationModel


LABELS = {0: "road", 1: "traffic light", 2: "car", 3: "person", 4: "sky"}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
WIDTHS = [8, 16, 24, 32]
TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 96,
    "patch_size": 16,
}


def labels() -> dict:
    return {"id2label": dict(LABELS), "label2id": {name: index for index, name in LABELS.items()}}


def swin() -> SwinConfig:
    return SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4, out_features=STAGES)


def upernet(backbone: PreTrainedConfig) -> PreTrainedModel:
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, **labels())
    )


def segformer() -> PreTrainedModel:
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            depths=[1] * 4,
            hidden_sizes=WIDTHS,
            num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=16,
            classifier_dropout_prob=0.0,
            **labels(),
        )
    )


def mask2former() -> PreTrainedModel:
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=swin(),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=32,
            num_queries=8,
            train_num_points=64,
            **labels(),
        )
    )


def convnext() -> ConvNextConfig:
    return ConvNextConfig(hidden_sizes=WIDTHS, depths=[1] * 4, out_features=STAGES)


def resnet() -> ResNetConfig:
    return ResNetConfig(embedding_size=8, hidden_sizes=WIDTHS, depths=[1] * 4, layer_type="basic", out_features=STAGES)


def mobilenet_v2(output_stride: int, tf_padding: bool) -> PreTrainedModel:
    return MobileNetV2ForSemanticSegmentation(
        MobileNetV2Config(depth_multiplier=0.35, output_stride=output_stride, tf_padding=tf_padding, **labels())
    )


def mobilevit() -> PreTrainedModel:
    return MobileViTForSemanticSegmentation(
        MobileViTConfig(
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
            aspp_out_channels=16,
            output_stride=16,
            **labels(),
        )
    )


def mobilevitv2() -> PreTrainedModel:
    return MobileViTV2ForSemanticSegmentation(
        MobileViTV2Config(width_multiplier=0.25, aspp_out_channels=16, output_stride=8, **labels())
    )


def beit() -> PreTrainedModel:
    return BeitForSemanticSegmentation(
        BeitConfig(
            out_indices=[1, 2, 3, 4], use_relative_position_bias=True, auxiliary_channels=8, **TOKENS, **labels()
        )
    )


def data2vec() -> PreTrainedModel:
    return Data2VecVisionForSemanticSegmentation(
        Data2VecVisionConfig(
            out_indices=[1, 2, 3, 4], use_relative_position_bias=True, auxiliary_channels=8, **TOKENS, **labels()
        )
    )


def dpt() -> PreTrainedModel:
    return DPTForSemanticSegmentation(
        DPTConfig(
            backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, **TOKENS, **labels()
        )
    )


def espnet(**options) -> PreTrainedModel:
    return EspNetForSemanticSegmentation(EspNetConfig(p=1, q=1, **options, **labels()))


def timm_segmentation(backbone: str = "mobilenetv2_035", **options) -> PreTrainedModel:
    return TimmSegmentationModel(TimmSegmentationConfig(backbone=backbone, head_channels=8, **options, **labels()))


def timm_backbone(**options) -> TimmBackboneConfig:
    return TimmBackboneConfig(backbone="mobilenetv2_035", **options)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "beit": beit,
    "data2vec": data2vec,
    "dpt": dpt,
    "espnet": espnet,
    "espnet-encoder": lambda: espnet(decoder=False),
    "mask2former": mask2former,
    "mobilenet_v2": lambda: mobilenet_v2(32, tf_padding=True),
    "mobilenet_v2-stride_16": lambda: mobilenet_v2(16, tf_padding=True),
    "mobilenet_v2-stride_8": lambda: mobilenet_v2(8, tf_padding=False),
    "mobilevit": mobilevit,
    "mobilevitv2": mobilevitv2,
    "segformer": segformer,
    "timm_segmentation": lambda: timm_segmentation(auxiliary_head=True),
    "timm_segmentation-stride_8": lambda: timm_segmentation(output_stride=8),
    "timm_segmentation-four_maps": lambda: timm_segmentation("convnext_atto"),
    "upernet-convnext": lambda: upernet(convnext()),
    "upernet-resnet": lambda: upernet(resnet()),
    "upernet-swin": lambda: upernet(swin()),
    "upernet-timm": lambda: upernet(timm_backbone(out_indices=[1, 2, 3, 4])),
    "upernet-timm-stem-stride_8": lambda: upernet(timm_backbone(out_indices=[0, 1, 2, 3, 4], output_stride=8)),
}


def tiny_model(name: str) -> PreTrainedModel:
    """Builds a model of `MODELS` with weights that do not depend on what ran before, in evaluation mode."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


def images(height: int = 64, width: int = 96, batch: int = 2) -> torch.Tensor:
    """Smooth random RGB images `[B, 3, H, W]`, uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 5, 7, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)
