"""Our own `TimmSegmentationModel`: every feature map of its timm backbone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..models.modeling_timm_segmentation import AUXILIARY_LOSS_WEIGHT
from ..outputs import DenseOutput, FeatureSpec, LabelMaps
from .base import DenseAdapter, cross_entropy, stage_features, stage_specs


class TimmSegmentationAdapter(DenseAdapter):
    """Levels `stride_4` to `stride_32`, and `stem` where the backbone has a map of stride 2; logits of the head."""

    @classmethod
    def family_statistics(cls, model: PreTrainedModel) -> tuple[Sequence[float], Sequence[float]]:
        config: Any = model.config
        default_mean, default_std = cls.default_statistics
        return config.image_mean or default_mean, config.image_std or default_std

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        return stage_specs(self.model.feature_channels, self.model.feature_strides)

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        outputs = self.model(pixel_values, output_hidden_states=True)
        features = stage_features(self.feature_specs, outputs.hidden_states)
        output = DenseOutput(features, outputs.logits)
        if targets is not None and outputs.auxiliary_logits is not None:
            output.task_losses["loss_auxiliary"] = AUXILIARY_LOSS_WEIGHT * cross_entropy(
                outputs.auxiliary_logits, targets
            )
        return output

    @property
    def head_levels(self) -> tuple[str, ...]:
        return tuple(f"stride_{stride}" for stride in self.model.head.strides)

    def run_head(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.head({int(name.removeprefix("stride_")): level for name, level in features.items()})
