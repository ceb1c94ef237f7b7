"""Semantic segmentation on a timm backbone, as a model of transformers."""

import torch
from torch import Tensor, nn
from transformers import initialization

from .configuration_timm_segmentation import TimmSegmentationConfig
from .heads import HEADS, FCNHead
from .segmentation_model import SegmentationModel
from .timm_backbone import TimmBackboneModel


class TimmSegmentationModel(TimmBackboneModel, SegmentationModel):
    """Any timm backbone that gives feature maps, with a PSPNet, DeepLabV3+ or light FPN head.

    Building the model from a configuration, and `from_pretrained` on a folder, never touch the network;
    `from_backbone` starts from ImageNet weights.

    Args:
        config: the configuration.

    Raises:
        ValueError: the backbone cannot be built so, cannot have this output stride, or lacks a map that the head needs.
    """

    config_class = TimmSegmentationConfig
    config: TimmSegmentationConfig

    def __init__(self, config: TimmSegmentationConfig):
        super().__init__(config)
        self.add_backbone(config.output_stride)

        channels = dict(zip(self.nominal_strides, self.feature_channels, strict=True))
        head_classes = [HEADS[config.head], *([FCNHead] if config.auxiliary_head else [])]
        for stride in {stride for head_class in head_classes for stride in head_class.required_strides}:
            if stride not in channels:
                raise ValueError(
                    f"head {config.head!r} with auxiliary_head={config.auxiliary_head} needs a feature map of stride "
                    f"{stride}, but backbone {config.backbone!r} has the strides {self.nominal_strides}; "
                    "choose another backbone, or head='psp' without an auxiliary head"
                )
        self.head = HEADS[config.head](channels, config)
        self.auxiliary_head = FCNHead(channels, config) if config.auxiliary_head else None
        self.post_init()

    def score(self, pixel_values: Tensor) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The backbone's maps, logits at the stride of the head, and those of the auxiliary head in training mode."""
        maps = self.feature_maps(pixel_values)
        features = dict(zip(self.nominal_strides, maps, strict=True))
        auxiliary_head = self.auxiliary_head if self.training else None
        return maps, self.head(features), None if auxiliary_head is None else auxiliary_head(features)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' initialisers do not touch what was loaded from a checkpoint
        if isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                initialization.zeros_(module.bias)
        else:
            super()._init_weights(module)
