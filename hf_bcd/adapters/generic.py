"""Families that hand out their stages as `hidden_states`: all but UperNet and Mask2Former."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.segmentation_model import AUXILIARY_LOSS_WEIGHT
from ..outputs import DenseOutput, FeatureSpec, LabelMaps
from ..utils.messages import UserError
from .base import HALF_MEAN, HALF_STD, DenseAdapter, cross_entropy, stage_features, stage_specs, timm_stages


class SegformerAdapter(DenseAdapter):
    """Levels `stride_4` to `stride_32`, each after its stage's layer norm; logits at stride 4."""

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        config = self.model.config
        return stage_specs(config.hidden_sizes, list(accumulate(config.strides, mul)))

    @property
    def head_levels(self) -> tuple[str, ...]:
        return tuple(self.feature_specs)

    def run_head(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.decode_head(tuple(features.values()))


class EspNetAdapter(DenseAdapter):
    """Levels `stem`, `stride_4` and `stride_8`, as they go into the decoder: with the shrunk image in the first two."""

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        return stage_specs(self.model.feature_channels, self.model.feature_strides)


class TimmSegmentationAdapter(EspNetAdapter):
    """Levels `stride_4` to `stride_32`, and `stem` where the backbone has a map of stride 2; logits of the head."""

    def stage_modules(self) -> list[nn.Module]:
        return timm_stages(self.model.backbone)

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        outputs = self.model(pixel_values, output_hidden_states=True)
        output = DenseOutput(stage_features(self.feature_specs, outputs.hidden_states), outputs.logits)
        if targets is not None and outputs.auxiliary_logits is not None:
            auxiliary = cross_entropy(outputs.auxiliary_logits, targets)
            output.task_losses["loss_auxiliary"] = AUXILIARY_LOSS_WEIGHT * auxiliary
        return output

    @property
    def head_levels(self) -> tuple[str, ...]:
        return tuple(f"stride_{stride}" for stride in self.model.head.strides)

    def run_head(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.head({int(name.removeprefix("stride_")): level for name, level in features.items()})


class ConvolutionalAdapter(DenseAdapter):
    """Models whose `hidden_states` are the outputs of a list of convolutional layers, some of which end a stage."""

    stage_ends: tuple[int, ...]
    """Index of the last layer of each stage."""

    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The layers whose outputs `hidden_states` lists."""

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        # the input has stride 2 after the stem; dilated layers have convolutions of stride 1
        stride, outputs = 2, []
        for layer in self.layers():
            convolutions = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
            stride *= math.prod(convolution.stride[0] for convolution in convolutions)
            outputs.append(FeatureSpec(convolutions[-1].out_channels, stride))
        channels, strides = zip(*(outputs[index] for index in self.stage_ends), strict=True)
        return stage_specs(channels, strides)

    def stages(self, hidden_states: Sequence[Tensor]) -> Sequence[Tensor]:
        return [hidden_states[index] for index in self.stage_ends]


class MobileNetV2Adapter(ConvolutionalAdapter):
    """Levels `stride_4` to `stride_32`: the linear bottlenecks that end the stages (24, 32, 96, 320 channels at full
    width), as in timm. The map after the stem is not among the model's outputs. Logits at the output stride.
    """

    default_statistics = (HALF_MEAN, HALF_STD)
    stage_ends = (1, 4, 11, 15)
    unused_parameters = ("mobilenet_v2.conv_1x1.",)

    def layers(self) -> Sequence[nn.Module]:
        return self.model.base_model.layer


class MobileViTAdapter(ConvolutionalAdapter):
    """MobileViT and MobileViTV2. Levels `stem` and `stride_4` to `stride_32`; logits at the output stride.

    These models take BGR images in 0..1 that are not normalised, and so does their image processor.
    """

    default_statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    channel_order = "BGR"
    stage_ends = (0, 1, 2, 3, 4)
    processor_class = "MobileViTImageProcessor"

    def __init__(self, model: PreTrainedModel, image_mean: Any = None, image_std: Any = None):
        super().__init__(model, image_mean, image_std)
        if self.image_mean.any() or (self.image_std != 1).any():
            raise UserError(
                f"{model.config.model_type} models take images in 0..1 without normalisation, but image_mean is "
                f"{list(image_mean or ())} and image_std {list(image_std or ())}; leave both out"
            )

    def layers(self) -> Sequence[nn.Module]:
        return self.model.base_model.encoder.layer

    def processor_options(self, shortest_edge: int | None) -> dict[str, Any]:
        options = super().processor_options(shortest_edge)
        del options["image_mean"], options["image_std"]
        return options | {"do_normalize": False, "do_flip_channel_order": True, "do_center_crop": False}


class TokenAdapter(DenseAdapter):
    """Plain vision transformers: levels are the four token grids that the model's neck turns into a pyramid.

    All four have the stride of a patch. They are named after the stride to which the neck brings them, so `stride_4`
    is the shallowest and `stride_32` the deepest. Teachers of these families see images at the size they were made
    for, since their position embeddings belong to it.
    """

    default_statistics = (HALF_MEAN, HALF_STD)
    takes: Literal["any size", "squares", "its own size"] = "any size"

    @property
    def fixed_size(self) -> tuple[int, int]:
        size = self.model.config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @abstractmethod
    def hidden_state_indices(self) -> list[int]:
        """Positions of the grids in `hidden_states`, whose first entry is the embedding."""

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        spec = FeatureSpec(self.model.config.hidden_size, self.model.config.patch_size)
        return {f"stride_{4 * 2**index}": spec for index in range(len(self.hidden_state_indices()))}

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        height, width = pixel_values.shape[-2:]
        if (self.takes == "squares" and height != width) or (
            self.takes == "its own size" and (height, width) != self.fixed_size
        ):
            raise UserError(
                f"{self.model.config.model_type} models take {self.takes} only ({self.fixed_size[0]}x"
                f"{self.fixed_size[1]} best), but pixel_values is {height}x{width}; resize the images, or use the "
                "model as a teacher, which resizes them itself"
            )
        outputs = self.model(pixel_values, output_hidden_states=True)
        patch = self.model.config.patch_size
        grids = [
            # the first token is the class token
            outputs.hidden_states[index][:, 1:].transpose(1, 2).unflatten(2, (height // patch, width // patch))
            for index in self.hidden_state_indices()
        ]
        return DenseOutput(stage_features(self.feature_specs, grids), outputs.logits)

    def processor_options(self, shortest_edge: int | None) -> dict[str, Any]:
        options = super().processor_options(shortest_edge)
        if self.takes != "any size":
            height, width = (shortest_edge, shortest_edge) if shortest_edge else self.fixed_size
            options |= {"do_resize": True, "size": {"height": height, "width": width}}
        return options


class BeitAdapter(TokenAdapter):
    """BEiT; logits at stride 4."""

    layer_prefix = "beit.layers."

    @property
    def unused_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        behind = range(max(self.hidden_state_indices()), self.model.config.num_hidden_layers)
        return ("auxiliary_head.", *(f"{self.layer_prefix}{index}." for index in behind))

    def hidden_state_indices(self) -> list[int]:
        return [index - 1 for index in self.model.config.out_indices]  # the model counts from one


class Data2VecVisionAdapter(BeitAdapter):
    """Data2Vec-Vision; logits at stride 4. The model folds its tokens only into the grid of `config.image_size`."""

    takes = "its own size"
    layer_prefix = "data2vec_vision.encoder.layer."


class DPTAdapter(TokenAdapter):
    """DPT; logits at stride 2. The model's neck folds its tokens only into squares."""

    takes = "squares"
    # the neck's first fusion layer has nothing to fuse with, so its first residual unit is skipped
    unused_parameters = ("auxiliary_head.", "dpt.layernorm.", "neck.fusion_stage.layers.0.residual_layer1.")

    def hidden_state_indices(self) -> list[int]:
        return [index + 1 for index in self.model.config.backbone_out_indices]
