"""Segmentation students that transformers lacks, as its own kind of model; importing registers them with Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerImageProcessor,
    SegformerImageProcessorPil,
)

from .configuration_espnet import EspNetConfig
from .configuration_timm_segmentation import TimmSegmentationConfig
from .modeling_espnet import EspNetForSemanticSegmentation
from .modeling_timm_segmentation import TimmSegmentationModel


__all__ = [
    "MODEL_TYPES",
    "EspNetConfig",
    "EspNetForSemanticSegmentation",
    "TimmSegmentationConfig",
    "TimmSegmentationModel",
]

# whose code lies beside their weights, so that readers without this package need `trust_remote_code`
MODEL_TYPES = (EspNetConfig.model_type, TimmSegmentationConfig.model_type)

for config_class, model_class in (
    (EspNetConfig, EspNetForSemanticSegmentation),
    (TimmSegmentationConfig, TimmSegmentationModel),
):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForSemanticSegmentation.register(config_class, model_class)
    # `save_pretrained` copies their files into the folder, so that the model also runs where this package is missing
    config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModelForSemanticSegmentation")
    AutoImageProcessor.register(
        config_class,
        image_processor_classes={"torchvision": SegformerImageProcessor, "pil": SegformerImageProcessorPil},
    )
