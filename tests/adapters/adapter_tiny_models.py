"""Tiny, randomly initialised models of every family that has an adapter."""

from collections.abc import Callable

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

from hf_bcd.models import EspNetConfig, EspNetForSemanticSegmentation, TimmSegmentationConfig, TimmSegmentationModel


LABELS = {0: "road", 1: "traffic light", 2: "car", 3: "person", 4: "sky"}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
WIDTHS = [8, 16, 24, 32]
TOKENS = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 96,
    "patch_size": 16,
}  # fmt: skip


def labels(**fields) -> dict:
    return {"id2label": dict(LABELS), "label2id": {name: index for index, name in LABELS.items()}} | fields


def swin() -> PreTrainedConfig:
    return hf.SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4, out_features=STAGES)


def upernet(backbone: PreTrainedConfig) -> PreTrainedModel:
    config = hf.UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, **labels())
    return hf.UperNetForSemanticSegmentation(config)


def segformer() -> PreTrainedModel:
    widths = {"depths": [1] * 4, "hidden_sizes": WIDTHS, "num_attention_heads": [1, 2, 3, 4]}
    config = hf.SegformerConfig(decoder_hidden_size=16, classifier_dropout_prob=0.0, **widths, **labels())
    return hf.SegformerForSemanticSegmentation(config)


def mask2former(**fields) -> PreTrainedModel:
    widths = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
    counts = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 8}
    options = dict.fromkeys(widths, 32) | counts | {"train_num_points": 64}
    return hf.Mask2FormerForUniversalSegmentation(
        hf.Mask2FormerConfig(backbone_config=swin(), **(options | labels(**fields)))
    )


def convnext() -> PreTrainedConfig:
    return hf.ConvNextConfig(hidden_sizes=WIDTHS, depths=[1] * 4, out_features=STAGES)


def resnet() -> PreTrainedConfig:
    widths = {"embedding_size": 8, "hidden_sizes": WIDTHS, "depths": [1] * 4}
    return hf.ResNetConfig(layer_type="basic", out_features=STAGES, **widths)


def mobilenet_v2(output_stride: int, tf_padding: bool, **fields) -> PreTrainedModel:
    options = {"depth_multiplier": 0.35, "output_stride": output_stride, "tf_padding": tf_padding}
    return hf.MobileNetV2ForSemanticSegmentation(hf.MobileNetV2Config(**options, **labels(**fields)))


def mobilevit() -> PreTrainedModel:
    widths = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "aspp_out_channels": 16}
    return hf.MobileViTForSemanticSegmentation(hf.MobileViTConfig(output_stride=16, **widths, **labels()))


def mobilevitv2() -> PreTrainedModel:
    options = {"width_multiplier": 0.25, "aspp_out_channels": 16, "output_stride": 8}
    return hf.MobileViTV2ForSemanticSegmentation(hf.MobileViTV2Config(**options, **labels()))


OF_BEIT = {"out_indices": [1, 2, 3, 4], "use_relative_position_bias": True, "auxiliary_channels": 8} | TOKENS


def beit() -> PreTrainedModel:
    return hf.BeitForSemanticSegmentation(hf.BeitConfig(**OF_BEIT, **labels()))


def data2vec() -> PreTrainedModel:
    return hf.Data2VecVisionForSemanticSegmentation(hf.Data2VecVisionConfig(**OF_BEIT, **labels()))


def dpt() -> PreTrainedModel:
    options = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8} | TOKENS
    return hf.DPTForSemanticSegmentation(hf.DPTConfig(**options, **labels()))


def espnet(**options) -> PreTrainedModel:
    return EspNetForSemanticSegmentation(EspNetConfig(p=1, q=1, **options, **labels()))


def timm_segmentation(backbone: str = "mobilenetv2_035", **options) -> PreTrainedModel:
    return TimmSegmentationModel(TimmSegmentationConfig(backbone=backbone, head_channels=8, **options, **labels()))


def timm_backbone(**options) -> PreTrainedConfig:
    return hf.TimmBackboneConfig(backbone="mobilenetv2_035", **options)


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
