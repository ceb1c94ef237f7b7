"""Backbones without a head, as teachers of features: whatever `AutoBackbone` of transformers builds, and those of timm."""

import copy
from collections.abc import Sequence
from typing import Any

import timm
import torch
import transformers
from torch import Tensor
from torch.func import functional_call
from transformers import (
    HieraModel,
    PreTrainedConfig,
    PreTrainedModel,
    Sam2VisionModel,
    SamVisionModel,
    TimmBackbone,
    TimmBackboneConfig,
)
from transformers.backbone_utils import BackboneMixin

from ..models.timm_backbone import load_backbone_weights
from ..outputs import DenseOutput, FeatureSpec, LabelMaps
from ..utils.messages import UserError
from ..utils.text import shortened
from .base import DenseAdapter, stage_features, stage_specs


# what a model that is shown a picture of the wrong size raises
SIZE_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError)
# image encoders that `AutoBackbone` does not build, or, Hiera, builds without the order of tokens that its layers expect
ENCODERS: dict[str, Any] = {
    "hiera": HieraModel,
    "sam": SamVisionModel,
    "sam2": Sam2VisionModel,
    "sam2_video": Sam2VisionModel,
}
SQUARE = ("rf_detr_dinov2",)  # which cuts other pictures into windows of swapped sides
LEFT_OUT = {"focalnet": ("stage3",)}  # whose last two maps have one stride
# parameters that checkpoints of other classes lack: norms that start without scale or shift, and what gives no map
UNUSED = ("hidden_states_norms.", "pooler.")
NUM_LEVELS = 4  # of a plain transformer
MAX_STAGES = 5  # of a pyramid, with a stem of stride 2


class BackboneAdapter(DenseAdapter):
    """A backbone without a head: levels of features, no classes and no logits, so that it can only teach.

    A pyramid (Swin, ConvNeXt, ResNet, Hiera, ...) has a level for each stage that it hands out. A plain transformer
    (DINOv2, BEiT, ...) has four, evenly spaced over its layers and named `stride_4` to `stride_32`, all with the stride of a
    patch. Channels, strides and the sizes that a backbone takes are read off shapes on the meta device: no weight is used.
    """

    predicts = False
    min_labels = 0
    made_for: tuple[int, int] | None = None

    @classmethod
    def family_statistics(cls, model: PreTrainedModel) -> tuple[Sequence[float], Sequence[float]]:
        if isinstance(model, TimmBackbone):
            given = getattr(model.config, "image_mean", None), getattr(model.config, "image_std", None)
            own = timm_part(model).pretrained_cfg
            return given[0] or own["mean"], given[1] or own["std"]
        return super().family_statistics(model)

    @property
    def num_labels(self) -> int:
        return 0

    @property
    def id2label(self) -> dict[int, str]:
        return {}

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"features"})

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        return self.made_for

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        patch = patch_size(self.model)
        if self.config.model_type in ENCODERS and not isinstance(self.model, tuple(ENCODERS.values())):
            raise self.refusal(
                f"its tokens are in another order than its layers expect; load a {ENCODERS['hiera'].__name__}"
            )
        if patch is not None:
            self.size_multiple = patch * getattr(
                self.config, "num_windows_side", getattr(self.config, "num_windows", 1)
            )
        unit = self.size_multiple if patch is not None else 2 * self.size_multiple
        size = (6 * unit, 4 * unit)
        try:
            if self.config.model_type in SQUARE:
                raise ValueError("squares only")
            shapes = self.shapes(size)
        except SIZE_ERRORS:
            size = self.made_for = self.native_size()
            shapes = self.shapes(size)
        strides = [(size[0] / height, size[1] / width) for _, _, height, width in shapes]
        channels = [shape[1] for shape in shapes]
        if (
            any(high != wide or high % 1 for high, wide in strides)
            or strides != sorted(strides)
            or channels != list(getattr(self.model, "channels", channels))
            or len(shapes) > (MAX_STAGES if patch is None else NUM_LEVELS)
        ):
            raise self.refusal(
                f"for a picture of {size[0]}x{size[1]} its maps are {shortened([list(s) for s in shapes])}"
            )
        if patch is None:
            return stage_specs(channels, [int(stride) for stride, _ in strides])
        names = [f"stride_{4 * 2**index}" for index in range(NUM_LEVELS)][-len(shapes) :]
        return {name: FeatureSpec(width, patch) for name, width in zip(names, channels, strict=True)}

    @property
    def config(self) -> Any:
        return self.model.config

    def native_size(self) -> tuple[int, int]:
        """Height and width that the backbone was made for."""
        if isinstance(self.model, TimmBackbone):
            _, height, width = timm_part(self.model).pretrained_cfg["input_size"]
            return height, width
        size = getattr(self.config, "image_size", None)
        if size is None:
            raise self.refusal("it takes no picture of 384x256, and config.json names no image_size")
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def shapes(self, size: tuple[int, int]) -> list[torch.Size]:
        """Shapes of the maps for a picture, without a computation."""
        state = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        with torch.device("meta"), torch.no_grad():
            meta = {name: x.to("meta") for name, x in state.items()}
            found = functional_call(self.model, meta, (torch.empty(1, 3, *size),), self.asked())
            return [x.shape for x in self.fold(found, size)]

    def asked(self) -> dict[str, Any]:
        """Arguments of the model beside its pixels."""
        return {"output_hidden_states": True} if isinstance(self.model, HieraModel | SamVisionModel) else {}

    def refusal(self, reason: str) -> UserError:
        return UserError(
            f"{type(self.model).__name__} {self.model.name_or_path} cannot teach features: {reason}. Choose a backbone whose maps "
            "are [B, C, height, width], such as DINOv2, Swin or ConvNeXt."
        )

    def fold(self, outputs: Any, size: tuple[int, int]) -> list[Tensor]:
        """The model's maps of a picture `size` as `[B, C, h, w]`, from fine to coarse or from shallow to deep."""
        if isinstance(self.model, HieraModel):
            return [x.permute(0, 3, 1, 2) for x in outputs.reshaped_hidden_states[1:]]
        if isinstance(self.model, SamVisionModel):
            number = self.config.num_hidden_layers
            layers = outputs.hidden_states[-number:]
            return [layers[i - 1].permute(0, 3, 1, 2) for i in spread_layers(number)]
        if isinstance(self.model, Sam2VisionModel):
            return list(outputs.fpn_hidden_states)
        maps = outputs.feature_maps
        if isinstance(self.model, TimmBackbone) and getattr(timm_part(self.model), "output_fmt", None) == "NHWC":
            return [x.permute(0, 3, 1, 2) for x in maps]
        if (patch := patch_size(self.model)) is None:
            return list(maps)
        grid = (size[0] // patch, size[1] // patch)  # some leave their tokens in a row
        return [x.transpose(1, 2).unflatten(2, grid) if x.ndim == 3 else x for x in maps]

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        outputs = self.model(pixel_values, **self.asked())
        maps = self.fold(outputs, (pixel_values.shape[-2], pixel_values.shape[-1]))
        return DenseOutput(stage_features(self.feature_specs, maps), None)


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether a model is a backbone without a head."""
    return isinstance(model, (BackboneMixin, *ENCODERS.values()))


def patch_size(model: PreTrainedModel) -> int | None:
    """The patch of a plain transformer, whose maps all have its stride; None of a pyramid."""
    if isinstance(model, TimmBackbone):
        strides = [info["reduction"] for info in timm_part(model).feature_info.info]
        return strides[0] if len(strides) > MAX_STAGES and len(set(strides)) == 1 else None
    config: Any = model.config
    if not is_plain(config):
        return None
    return config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]


def timm_part(model: TimmBackbone) -> Any:
    """The feature extractor of timm in a backbone of transformers."""
    return model._backbone


def is_plain(config: Any) -> bool:
    """Whether a configuration of transformers is that of layers alike; a pyramid states how deep each stage is."""
    return hasattr(config, "num_hidden_layers") and hasattr(config, "patch_size") and not hasattr(config, "depths")


def spread_layers(number: int) -> list[int]:
    """Four layers of a plain transformer, counted from 1, evenly spaced up to the last."""
    return sorted({max(1, round(number * part / NUM_LEVELS)) for part in range(1, NUM_LEVELS + 1)})


def is_backbone(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is no more than a backbone: its type is known as one, and it was not saved with a head for
    segmentation or detection.
    """
    heads = ("Segmentation", "Detection")
    finished = any(head in name for name in config.architectures or () for head in heads)
    known = config.model_type in ENCODERS or type(config) in transformers.AutoBackbone._model_mapping
    return known and not finished


def load_backbone(name_or_path: str, config: PreTrainedConfig, source: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Loads a checkpoint as a backbone that hands out the levels which teach.

    Returns:
        The model, and transformers' account of keys.
    """
    model_class: Any = ENCODERS.get(config.model_type) or transformers.AutoBackbone._model_mapping[type(config)]
    own: Any = copy.deepcopy(getattr(config, "vision_config", config))
    for name, value in {
        "apply_layernorm": True,
        "normalize_backbone_outputs": True,
        "reshape_hidden_states": True,
        "return_class_token": False,
        "add_fpn": False,
    }.items():
        if hasattr(own, name):
            setattr(own, name, value)
    if names := getattr(own, "stage_names", None):
        chosen = [names[i] for i in spread_layers(len(names) - 1)] if is_plain(own) else names
        own.out_features = [name for name in chosen if name not in ("stem", *LEFT_OUT.get(own.model_type, ()))]
    renamed = {r"^vision_encoder\.": ""} if model_class is Sam2VisionModel else None
    from_pretrained: Any = model_class.from_pretrained
    model, loaded = from_pretrained(name_or_path, config=own, key_mapping=renamed, output_loading_info=True, **source)
    missing = [key for key in loaded["missing_keys"] if not key.startswith(UNUSED)]
    if own.model_type == "pixio" and "pixio.layernorm.weight" not in missing:  # which has its last norm twice
        model.layernorm.load_state_dict(model.pixio.layernorm.state_dict())
        missing = [key for key in missing if not key.startswith("layernorm.")]
    loaded["missing_keys"] = missing
    loaded["unexpected_keys"] = []  # its head for pictures, or what it was pretrained with
    return model.eval(), loaded


def build_timm(backbone: str, options: dict[str, Any], *, pretrained: bool, weights: str | None) -> TimmBackbone:
    """A backbone of timm with its weights.

    Args:
        backbone: architecture name in timm, with its tag.
        options: `backbone_kwargs` for timm, `image_mean` and `image_std`.
        pretrained: load the weights that timm has for it.
        weights: safetensors file of the whole timm model.

    Raises:
        ValueError: there is no such architecture, it takes other arguments, or the file is of another one.
    """
    kwargs = dict(options.get("backbone_kwargs") or {})
    own = {"features_only": True, "dynamic_img_size": True, **kwargs}
    try:  # a transformer of one size would squeeze every picture into a square
        with torch.device("meta"):
            probe: Any = timm.create_model(backbone, **own)
    except TypeError:
        del own["dynamic_img_size"]
        with torch.device("meta"):
            probe = timm.create_model(backbone, **own)
    strides = [info["reduction"] for info in probe.feature_info.info]
    plain = len(strides) > MAX_STAGES and len(set(strides)) == 1
    own["out_indices"] = [i - 1 for i in spread_layers(len(strides))] if plain else list(range(len(strides)))
    build: Any = TimmBackboneConfig
    config = build(backbone=backbone, out_indices=own["out_indices"])
    config.image_mean, config.image_std = options.get("image_mean"), options.get("image_std")
    config.backbone_kwargs = kwargs
    model = TimmBackbone(
        config, **{name: value for name, value in own.items() if name not in ("features_only", "out_indices")}
    )
    if pretrained:
        model._backbone.load_state_dict(timm.create_model(backbone, pretrained=True, **own).state_dict())
    else:
        load_backbone_weights(model._backbone, weights or "", config)
    return model.eval()
