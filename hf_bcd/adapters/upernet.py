"""UperNet (`UperNetForSemanticSegmentation`) on Swin, ConvNeXt, ResNet and timm backbones."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..outputs import DenseOutput, FeatureSpec, LabelMaps
from .backbones import backbone_feature_specs
from .base import DenseAdapter, cross_entropy, stage_features


class UperNetAdapter(DenseAdapter):
    """Levels are the maps that the backbone hands to the head; logits have the stride of the finest of them.

    The model is run part by part: its own forward returns neither those maps nor the auxiliary logits, and upsamples
    the logits to the input size, 16 times the memory.
    """

    unused_parameters = ("backbone.swin.layernorm.",)
    upsamples = True

    @classmethod
    def family_statistics(cls, model: PreTrainedModel) -> tuple[Sequence[float], Sequence[float]]:
        backbone: Any = model.backbone
        if backbone.config.model_type == "timm_backbone":
            # most timm weights were trained with ImageNet's statistics, some with 0.5
            return backbone._backbone.pretrained_cfg["mean"], backbone._backbone.pretrained_cfg["std"]
        return cls.default_statistics

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        return backbone_feature_specs(self.model.backbone)

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        model = self.model
        maps = model.backbone.forward_with_filtered_kwargs(pixel_values).feature_maps
        output = DenseOutput(stage_features(self.feature_specs, maps), model.decode_head(maps))
        if targets is not None and model.auxiliary_head is not None:
            auxiliary = cross_entropy(model.auxiliary_head(maps), targets)
            output.task_losses["loss_auxiliary"] = model.config.auxiliary_loss_weight * auxiliary
        return output

    @property
    def head_levels(self) -> tuple[str, ...]:
        # the head reads the stem at stride 2, before the pooling of its level
        return () if "stem" in self.feature_specs else tuple(self.feature_specs)

    def run_head(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.decode_head(tuple(features.values()))
