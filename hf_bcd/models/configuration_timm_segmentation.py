"""Configuration of `TimmSegmentationModel`."""

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from .timm_backbone import OUTPUT_STRIDES, complete_backbone_fields


HEAD_NAMES = ("psp", "deeplabv3plus", "fpn")


class TimmSegmentationConfig(PreTrainedConfig):
    """Configuration of a segmentation model on a timm backbone.

    Creating a configuration reads timm's registry only: it builds nothing and makes no network call.

    Args:
        backbone: architecture name in timm, with or without a tag (`"resnet18"`, `"efficientnet_b1.ft_in1k"`).
        backbone_kwargs: further arguments of `timm.create_model`, as JSON values: `{"pad_type": "same"}`.
        head: `"psp"` (PSPNet), `"deeplabv3plus"` or `"fpn"`.
        head_channels: width of the head. By default a quarter of the backbone's last map for `psp`, 256 for
            `deeplabv3plus` and 128 for `fpn`.
        output_stride: input pixels per position of the backbone's last map. 8 and 16 dilate the last stages; 64 is
            for the few backbones that end there by themselves.
        auxiliary_head: add an FCN head on the stage of nominal stride 16, used in training only.
        dropout: rate of the channel dropout before each classifier.
        image_mean: mean per RGB channel of images in [0, 1] that the backbone expects; by default timm's value.
        image_std: standard deviation, likewise.
        semantic_loss_ignore_index: label of the pixels left out of the loss.
        kwargs: the common fields, `num_labels` or `id2label` and `label2id` among them.

    Raises:
        ValueError: a value is not among the possible ones.
    """

    model_type = "timm_segmentation"

    backbone: str = "resnet18"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    head: str = "psp"
    head_channels: int | None = None
    output_stride: int = 32
    auxiliary_head: bool = False
    dropout: float = 0.1
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs):
        if self.head not in HEAD_NAMES:
            raise ValueError(f"head {self.head!r} is unknown; choose one of {HEAD_NAMES}")
        if self.output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride {self.output_stride} is not possible; choose one of {OUTPUT_STRIDES}")
        complete_backbone_fields(self)
        super().__post_init__(**kwargs)
