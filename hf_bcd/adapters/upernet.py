"""UperNet (`UperNetForSemanticSegmentation`) and the levels of backbones: Swin, ConvNeXt, ResNet and those of timm."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..outputs import DenseOutput, FeatureSpec, LabelMaps
from ..utils.messages import UserError
from .base import DenseAdapter, cross_entropy, stage_features, stage_specs


# backbones of transformers whose stages halve the resolution one after the other
PYRAMIDS = ("convnext", "convnextv2", "maskformer-swin", "resnet", "swin", "swinv2")


def backbone_feature_specs(backbone: Any) -> dict[str, FeatureSpec]:
    """Names the feature maps that a `BackboneMixin` of `transformers` hands to its head.

    Raises:
        UserError: if the strides of the backbone's stages are not known, or it hands out its stem.
    """
    config = backbone.config
    if config.model_type == "timm_backbone":
        info = backbone._backbone.feature_info
        specs = stage_specs([stage["num_chs"] for stage in info.info], [stage["reduction"] for stage in info.info])
        levels = list(specs.items())
        return dict(levels[index] for index in info.out_indices)
    if config.model_type not in PYRAMIDS:
        raise UserError(
            f"the strides of backbone {config.model_type!r} are not known; "
            f"supported backbones: {', '.join([*PYRAMIDS, 'timm_backbone'])}"
        )
    if "stem" in backbone.out_features:
        raise UserError(f"backbone hands out {backbone.out_features}; leave 'stem' out of its out_features")
    first_stride = getattr(config, "patch_size", 4)  # a ResNet has no patches, and stride 4 after its stem
    specs = {}
    for name, channels in zip(backbone.out_features, backbone.channels, strict=True):
        stride = first_stride * 2 ** (backbone.stage_names.index(name) - 1)
        specs[f"stride_{stride}"] = FeatureSpec(channels, stride)
    return specs


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
        return super().family_statistics(model)

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
