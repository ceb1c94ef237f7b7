"""Our own `EspNetForSemanticSegmentation`: the three levels of its encoder."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..outputs import DenseOutput, FeatureSpec, LabelMaps
from .base import DenseAdapter, stage_features, stage_specs


class EspNetAdapter(DenseAdapter):
    """Levels `stem`, `stride_4` and `stride_8`, as they go into the decoder: with the shrunk image in the first two."""

    @classmethod
    def family_statistics(cls, model: PreTrainedModel) -> tuple[Sequence[float], Sequence[float]]:
        config: Any = model.config
        return config.image_mean, config.image_std

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        return stage_specs(self.model.feature_channels, self.model.feature_strides)

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        outputs = self.model(pixel_values, output_hidden_states=True)
        return DenseOutput(stage_features(self.feature_specs, outputs.hidden_states), outputs.logits)
