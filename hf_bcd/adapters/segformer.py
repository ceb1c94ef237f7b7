"""SegFormer (`SegformerForSemanticSegmentation`): the four stages of the Mix Transformer."""

from itertools import accumulate
from operator import mul

from torch import Tensor

from ..outputs import DenseOutput, FeatureSpec, LabelMaps
from .base import DenseAdapter, stage_features, stage_specs


class SegformerAdapter(DenseAdapter):
    """Levels `stride_4` to `stride_32`, each after its stage's layer norm; logits at stride 4."""

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        config = self.model.config
        return stage_specs(config.hidden_sizes, list(accumulate(config.strides, mul)))

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        outputs = self.model(pixel_values, output_hidden_states=True)
        return DenseOutput(stage_features(self.feature_specs, outputs.hidden_states), outputs.logits)

    @property
    def head_levels(self) -> tuple[str, ...]:
        return tuple(self.feature_specs)

    def run_head(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.decode_head(tuple(features.values()))
