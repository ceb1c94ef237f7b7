"""Tiny, randomly initialised models of every family of detectors that has an adapter."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from adapters.adapter_tiny_models import STAGES, mask2former, swin
from models.tiny_detectors import confident, tiny
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.hgnet_v2 import HGNetV2Config

from hf_bcd.outputs import Objects
from hf_bcd.utils.masks import pack


LABELS = {0: "person", 1: "car", 2: "dog"}
QUERIES = 12
OUT = ["stage2", "stage3", "stage4"]
ATTENTION = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 2, "decoder_ffn_dim": 32}
REAL_TIME = ATTENTION | {
    "encoder_hidden_dim": 32, "d_model": 32, "encoder_ffn_dim": 32, "num_queries": QUERIES, "num_denoising": 4,
    "decoder_in_channels": [32, 32, 32],
}  # fmt: skip
PLAIN = ATTENTION | {
    "d_model": 32, "encoder_layers": 1, "encoder_ffn_dim": 32, "num_queries": QUERIES, "auxiliary_loss": True,
    "dropout": 0.0, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip


def names(labels: dict[int, str]) -> dict[str, Any]:
    return {"id2label": dict(labels), "label2id": {name: index for index, name in labels.items()}}


def resnet(out: list[str]) -> PreTrainedConfig:
    widths = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1] * 4}
    return hf.ResNetConfig(layer_type="basic", out_features=out, **widths)


def rt_resnet() -> PreTrainedConfig:
    widths = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1] * 4}
    return hf.RTDetrResNetConfig(layer_type="basic", out_features=OUT, **widths)


def hgnet() -> PreTrainedConfig:
    widths = [16, 24, 32, 48]
    return HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 24, 32], stage_mid_channels=[8] * 4, hidden_sizes=widths,
        stage_out_channels=widths, stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4, out_features=OUT,
    )  # fmt: skip


def rt_detr(version: str, **fields: Any) -> PreTrainedModel:
    options = REAL_TIME | {"encoder_in_channels": [12, 16, 20]} | fields
    config = getattr(hf, f"{version}Config")(backbone_config=rt_resnet(), **options)
    return getattr(hf, f"{version}ForObjectDetection")(config)


def d_fine(version: str, **fields: Any) -> PreTrainedModel:
    options = REAL_TIME | {"encoder_in_channels": [24, 32, 48]} | fields
    config = getattr(hf, f"{version}Config")(backbone_config=hgnet(), **options)
    return getattr(hf, f"{version}ForObjectDetection")(config)


def detr(version: str, out: list[str], **fields: Any) -> PreTrainedModel:
    options = {"backbone_config": resnet(out)} | PLAIN | fields
    model = getattr(hf, f"{version}ForObjectDetection")(getattr(hf, f"{version}Config")(**options))
    model.model.unfreeze_backbone()  # transformers means to, but looks for layers by a name of timm's
    return model


def timm_resnet(out: list[int]) -> PreTrainedConfig:
    """As the published checkpoints of DETR have it."""
    return hf.TimmBackboneConfig(backbone="test_resnet", out_indices=out)


def rf_detr(kind: str = "ObjectDetection", **fields: Any) -> PreTrainedModel:
    vit = hf.RfDetrDinov2Config(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=2, mlp_ratio=2, image_size=64, patch_size=16, num_windows=2,
        out_features=["stage1", "stage2", "stage4", "stage5"],
    )  # fmt: skip
    options: dict[str, Any] = {
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 2,
        "decoder_layers": 2,
    }
    options |= {"decoder_ffn_dim": 32, "d_model": 32, "num_queries": QUERIES, "group_detr": 3, "dropout": 0.0}
    return getattr(hf, f"RfDetrFor{kind}")(hf.RfDetrConfig(backbone_config=vit, **options | fields))


def detr_with_masks(**fields: Any) -> PreTrainedModel:
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}  # which its mask head adds to the width
    model = hf.DetrForSegmentation(hf.DetrConfig(backbone_config=resnet(STAGES), **PLAIN | heads | fields))
    model.detr.model.unfreeze_backbone()
    return model


def mask2former_resnet(**fields: Any) -> PreTrainedModel:
    widths = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
    counts = {"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "num_queries": QUERIES}
    options = dict.fromkeys(widths, 32) | counts | {"train_num_points": 64}
    config = hf.Mask2FormerConfig(backbone_config=resnet(STAGES), **options | fields)
    return hf.Mask2FormerForUniversalSegmentation(config)


def maskformer(backbone: PreTrainedConfig, **fields: Any) -> PreTrainedModel:
    decoder = ATTENTION | {"model_type": "detr", "d_model": 32, "num_queries": QUERIES, "dropout": 0.0}
    options = {"fpn_feature_size": 32, "mask_feature_size": 32, "use_auxiliary_loss": True}
    config = hf.MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, **options | fields)
    return hf.MaskFormerForInstanceSegmentation(config)


def eomt(version: str, **fields: Any) -> PreTrainedModel:
    options: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "num_blocks": 2}
    options |= {"image_size": 192, "num_queries": QUERIES, "num_register_tokens": 2, "train_num_points": 64}
    options |= {"mlp_ratio": 2} if version == "Eomt" else {"intermediate_size": 64}
    return getattr(hf, f"{version}ForUniversalSegmentation")(getattr(hf, f"{version}Config")(**options | fields))


def yolos(**fields: Any) -> PreTrainedModel:
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    options |= {"image_size": [64, 96], "num_detection_tokens": QUERIES}
    return hf.YolosForObjectDetection(hf.YolosConfig(**options | fields))


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "gfl": lambda **fields: tiny("gfl", **fields),
    "retinanet": lambda **fields: tiny("retinanet", **fields),
    "mask_rcnn": lambda **fields: tiny("mask_rcnn", **fields),
    "cascade_mask_rcnn": lambda **fields: tiny("cascade_mask_rcnn", **fields),
    "rt_detr": lambda **fields: rt_detr("RTDetr", **fields),
    "rt_detr_v2": lambda **fields: rt_detr("RTDetrV2", **fields),
    "d_fine": lambda **fields: d_fine("DFine", **fields),
    "deimv2": lambda **fields: d_fine("Deimv2", **fields),
    "rf_detr": rf_detr,
    "rf_detr-masks": lambda **fields: rf_detr("InstanceSegmentation", **fields),
    "yolos": yolos,
    "detr": lambda **fields: detr("Detr", ["stage4"], **fields),
    "detr-timm": lambda **fields: detr("Detr", [], backbone_config=timm_resnet([4]), **fields),
    "detr-masks": detr_with_masks,
    "conditional_detr": lambda **fields: detr("ConditionalDetr", ["stage4"], **fields),
    "dab-detr": lambda **fields: detr("DabDetr", ["stage4"], hidden_size=32, **fields),
    "deformable_detr": lambda **fields: detr("DeformableDetr", OUT, num_feature_levels=4, **fields),
    "deformable_detr-timm": lambda **fields: detr(
        "DeformableDetr", [], num_feature_levels=4, backbone_config=timm_resnet([2, 3, 4]), **fields
    ),
    "mask2former": lambda **fields: mask2former(**{"num_queries": QUERIES, "decoder_layers": 3} | fields),
    "mask2former-resnet": mask2former_resnet,
    "maskformer": lambda **fields: maskformer(swin(), **fields),
    "maskformer-resnet": lambda **fields: maskformer(resnet(STAGES), **fields),
    "eomt": lambda **fields: eomt("Eomt", **fields),
    "eomt_dinov3": lambda **fields: eomt("EomtDinov3", **fields),
}
OURS = ["gfl", "retinanet"]
MASKED = ["mask_rcnn", "cascade_mask_rcnn"]
REAL_TIME_ONES = ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"]
EOMTS = ["eomt", "eomt_dinov3"]
MASK_QUERIES = ["mask2former", "mask2former-resnet", "maskformer", "maskformer-resnet", *EOMTS]
BOXES_AND_MASKS = ["rf_detr-masks", "detr-masks"]
WITH_MASKS = [*MASKED, *BOXES_AND_MASKS, *MASK_QUERIES]
SQUARES = [*REAL_TIME_ONES, "rf_detr", "rf_detr-masks", "yolos"]
TOKENS = ["rf_detr", "rf_detr-masks", "yolos", *EOMTS]
PADDED = ["detr", "detr-timm", "conditional_detr", "dab-detr", "deformable_detr", "deformable_detr-timm"]
SOFTMAX = ["yolos", "detr", "detr-timm", "detr-masks", *MASK_QUERIES]


def tiny_detector(name: str, labels: dict[int, str] = LABELS, **fields: Any) -> PreTrainedModel:
    """A model of `MODELS` whose weights do not depend on what ran before, and whose queries differ, in evaluation mode."""
    torch.manual_seed(0)
    model = MODELS[name](**names(labels), **fields)
    if name in MASKED:
        return confident(model)
    with torch.no_grad():  # as they are initialised, all answers are much the same
        for module in model.modules():
            if name in SQUARES and isinstance(module, torch.nn.BatchNorm2d):  # RT-DETR's multiply by hundredths
                module.weight.fill_(1.0)
        for key, parameter in model.named_parameters():
            if name in (*PADDED[:4], "detr-masks") and parameter.ndim > 1 and ("decoder" in key or "query" in key):
                parameter.copy_(2.0 * torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
            if (
                name in MASK_QUERIES
                and parameter.ndim > 1
                and any(part in key for part in ("transformer_module", "query", "mask_"))
            ):
                parameter.copy_(2.0 * torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
            if name in SQUARES and parameter.ndim == 4:  # or no signal passes the backbone, and all queries tie
                parameter.copy_(1.4 * torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
            if "class" in key or "cls" in key or "bbox" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def objects(
    *counts: int, size: tuple[int, int] = (96, 128), num_labels: int = 3, mask: Any = None, masks: bool = False
) -> Objects:
    """Random boxes, so many in each picture, inside of `size`, or of what a mask leaves of it; perhaps filled by their masks."""
    generator = torch.Generator().manual_seed(sum(counts))
    boxes, classes = [], []
    for index, count in enumerate(counts):
        height, width = size if mask is None else (int(mask[index].any(axis).sum()) for axis in (1, 0))
        corner = torch.rand(count, 2, generator=generator) * 0.6
        extent = 0.15 + torch.rand(count, 2, generator=generator) * 0.24
        boxes.append(torch.cat([corner, corner + extent], 1) * torch.tensor([width, height] * 2))
        classes.append(torch.randint(num_labels, (count,), generator=generator))
    targets = Objects(boxes, classes, size, num_labels, mask)
    return replace(targets, masks=[pack(inside) for inside in targets.inside(boxes, size)]) if masks else targets
