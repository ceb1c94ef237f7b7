"""Feature levels of the backbones inside UperNet and Mask2Former."""

from typing import Any

from ..outputs import FeatureSpec
from ..utils.messages import UserError
from .base import stage_specs


# backbones of transformers whose stages halve the resolution one after the other
PYRAMIDS = ("convnext", "convnextv2", "resnet", "swin", "swinv2")


def backbone_feature_specs(backbone: Any) -> dict[str, FeatureSpec]:
    """Names the feature maps that a backbone hands to its head.

    Args:
        backbone: a `BackboneMixin` of `transformers`, such as `SwinBackbone` or `TimmBackbone`.

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
