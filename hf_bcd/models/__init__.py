"""Segmentation students that transformers lacks, as its own kind of model; importing registers them with Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerImageProcessor,
    SegformerImageProcessorPil,
)

from .configuration_timm_segmentation import TimmSegmentationConfig
from .modeling_timm_segmentation import TimmSegmentationModel


__all__ = ["TimmSegmentationConfig", "TimmSegmentationModel"]

AutoConfig.register(TimmSegmentationConfig.model_type, TimmSegmentationConfig)
AutoModelForSemanticSegmentation.register(TimmSegmentationConfig, TimmSegmentationModel)
AutoImageProcessor.register(
    TimmSegmentationConfig,
    image_processor_classes={"torchvision": SegformerImageProcessor, "pil": SegformerImageProcessorPil},
)
