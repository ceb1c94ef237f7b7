"""Students that transformers lacks, as its own kind of model; importing registers them with Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    DeformableDetrImageProcessor,
    DeformableDetrImageProcessorPil,
    SegformerImageProcessor,
    SegformerImageProcessorPil,
)

from .configuration_espnet import EspNetConfig
from .configuration_timm_detection import TimmDetectionConfig
from .configuration_timm_segmentation import TimmSegmentationConfig
from .modeling_espnet import EspNetForSemanticSegmentation
from .modeling_timm_detection import TimmDetectionModel, TimmDetectionOutput
from .modeling_timm_segmentation import TimmSegmentationModel


__all__ = [
    "MODEL_TYPES",
    "EspNetConfig",
    "EspNetForSemanticSegmentation",
    "TimmDetectionConfig",
    "TimmDetectionModel",
    "TimmDetectionOutput",
    "TimmSegmentationConfig",
    "TimmSegmentationModel",
]

SEGFORMER = {"torchvision": SegformerImageProcessor, "pil": SegformerImageProcessorPil}
DEFORMABLE_DETR = {"torchvision": DeformableDetrImageProcessor, "pil": DeformableDetrImageProcessorPil}

# whose code lies beside their weights, so that readers without this package need `trust_remote_code`
MODEL_TYPES = (EspNetConfig.model_type, TimmSegmentationConfig.model_type, TimmDetectionConfig.model_type)

for config_class, model_class, auto_class, processors in (
    (EspNetConfig, EspNetForSemanticSegmentation, AutoModelForSemanticSegmentation, SEGFORMER),
    (TimmSegmentationConfig, TimmSegmentationModel, AutoModelForSemanticSegmentation, SEGFORMER),
    (TimmDetectionConfig, TimmDetectionModel, AutoModelForObjectDetection, DEFORMABLE_DETR),
):
    AutoConfig.register(config_class.model_type, config_class)
    auto_class.register(config_class, model_class)
    # `save_pretrained` copies their files into the folder, so that the model also runs where this package is missing
    config_class.register_for_auto_class()
    model_class.register_for_auto_class(auto_class.__name__)
    AutoImageProcessor.register(config_class, image_processor_classes=processors)

# of its heads with masks; not for label maps, which it has none of
for auto_class in (AutoModelForInstanceSegmentation, AutoModelForImageSegmentation):
    auto_class.register(TimmDetectionConfig, TimmDetectionModel)
