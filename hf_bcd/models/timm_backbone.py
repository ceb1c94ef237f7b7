"""The timm backbone of a model of transformers: what its configuration may say, how it is built and which weights it gets."""

import difflib
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, Self

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

OUTPUT_STRIDES = (8, 16, 32, 64)
RESERVED_BACKBONE_KWARGS = ("features_only", "out_indices", "output_stride", "pretrained")
# what timm's constructors raise for arguments they do not take
TIMM_ERRORS = (AssertionError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def complete_backbone_fields(config: Any) -> None:
    """Checks the fields of a configuration that name its backbone, and fills in timm's image statistics where it has none.

    Raises:
        ValueError: timm knows no such architecture or tag, or `backbone_kwargs` holds what the model itself sets.
    """
    if not timm.is_model(config.backbone):
        near = difflib.get_close_matches(config.backbone, timm.list_models())
        raise ValueError(f"backbone {config.backbone!r} is not an architecture of timm; the nearest are {near}")
    if reserved := [key for key in RESERVED_BACKBONE_KWARGS if key in config.backbone_kwargs]:
        raise ValueError(f"backbone_kwargs must not hold {reserved}; the model sets them")
    try:
        expected = timm.get_pretrained_cfg(config.backbone)
    except RuntimeError as error:
        names = timm.list_pretrained(f"{config.backbone.split('.')[0]}.*")
        raise ValueError(f"backbone {config.backbone!r} has an unknown tag; timm knows {names}") from error
    if expected is not None:
        config.image_mean = list(expected.mean) if config.image_mean is None else config.image_mean
        config.image_std = list(expected.std) if config.image_std is None else config.image_std


class TimmBackboneModel(PreTrainedModel):
    """What the models on a timm backbone have in common; a subclass sets `config_class` and calls `add_backbone`.

    Activation checkpointing is timm's own, where the backbone has it, and takes no arguments. Batch norms in the
    checkpointed stages then see every batch twice: their running statistics move twice as fast, no gradient changes.

    Attributes:
        feature_channels: channels of each map of the backbone, fine to coarse.
        feature_strides: true stride of each map, with dilation.
        nominal_strides: stride that each map would have without dilation.
    """

    backbone: Any
    supports_gradient_checkpointing = True

    def add_backbone(self, output_stride: int) -> None:
        """Builds the backbone of the configuration."""
        self.backbone = build_backbone(self.config, output_stride)
        self.feature_channels = tuple(self.backbone.feature_info.channels())
        self.feature_strides = tuple(self.backbone.feature_info.reduction())
        self.nominal_strides = nominal_strides(self.feature_strides)
        self.gradient_checkpointing = False
        # timm has initialised the backbone; on the meta device, `from_pretrained` will fill it
        if not next(self.backbone.parameters()).is_meta:
            for module in self.backbone.modules():
                module._is_hf_initialized = True

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The backbone's maps `[B, C, h, w]`, fine to coarse."""
        maps = self.backbone(pixel_values)
        if getattr(self.backbone, "output_fmt", None) == "NHWC":
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return maps

    @classmethod
    def from_backbone(
        cls, backbone: str, *, pretrained: bool = False, weights: str | os.PathLike[str] | None = None, **config: Any
    ) -> Self:
        """A new model, in training mode, whose backbone may start from weights for classification.

        Args:
            backbone: architecture name in timm; its tag, if any, says which weights `pretrained` loads.
            pretrained: load timm's weights for that name, from the cache or the Hub.
            weights: local safetensors file of the whole timm classification model. `backbone_kwargs`, `image_mean` and
                `image_std` must be those of these weights (TensorFlow's want `{"pad_type": "same"}` and 0.5).
            config: the other fields of the model's configuration.

        Raises:
            ValueError: a field is unknown, both kinds of weights are asked for, or the file does not fit the backbone.
        """
        config_class: Any = cls.config_class
        known = [f.name for f in fields(config_class)] + ["num_labels"]
        if unknown := [key for key in config if key not in known]:
            nearest = {key: difflib.get_close_matches(key, known, n=1) for key in unknown}
            raise ValueError(f"no such fields in {config_class.__name__}: {unknown}; the nearest ones are {nearest}")
        if pretrained and weights is not None:
            raise ValueError(f"pretrained=True and weights={os.fspath(weights)!r} exclude each other; give only one")
        model = cls(config_class(backbone=backbone, **config))
        if pretrained:
            source = timm.create_model(backbone, pretrained=True, features_only=True, **model.config.backbone_kwargs)
            model.backbone.load_state_dict(source.state_dict())
        if weights is not None:
            load_backbone_weights(model.backbone, weights, model.config)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        fill_buffers = getattr(module, "init_non_persistent_buffers", None)
        if callable(fill_buffers):
            fill_buffers()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        if not hasattr(self.backbone, "set_grad_checkpointing"):
            raise ValueError(
                f"backbone {self.config.backbone!r} does not support activation checkpointing in timm; turn it off"
            )
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers={every_n_layers} is not possible: timm checkpoints every layer; use 1")
        self.backbone.set_grad_checkpointing(enable)
        self.gradient_checkpointing = enable


def nominal_strides(strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of an undilated pyramid that starts as `strides` do: (2, 4, 8, 8, 8) -> (2, 4, 8, 16, 32)."""
    return tuple(strides[0] * 2**level for level in range(len(strides)))


def build_backbone(config: Any, output_stride: int) -> Any:
    """The timm feature extractor that a configuration asks for, with timm's random initialisation.

    Raises:
        ValueError: timm cannot build it so, or its feature maps do not end at the output stride asked for.
    """
    try:
        return _build_pyramid(config, output_stride)
    except TIMM_ERRORS as error:
        working = []
        for other in OUTPUT_STRIDES:
            with suppress(*TIMM_ERRORS), torch.device("meta"):
                _build_pyramid(config, other)
                working.append(other)
        if working and hasattr(config, "output_stride"):
            remedy = f"choose one of the output strides that this backbone supports: {working}"
        else:
            remedy = "no output stride works: choose another backbone or other backbone_kwargs"
        raise ValueError(
            f"cannot build backbone {config.backbone!r} with output_stride={output_stride} and backbone_kwargs="
            f"{config.backbone_kwargs}; {remedy} ({error})"
        ) from error


def _build_pyramid(config: Any, output_stride: int) -> Any:
    # backbones that cannot dilate mostly refuse the argument whatever its value
    dilation = {"output_stride": output_stride} if output_stride < 32 else {}
    net: Any = timm.create_model(config.backbone, features_only=True, **dilation, **config.backbone_kwargs)
    strides = tuple(net.feature_info.reduction())
    pyramid = tuple(min(stride, output_stride) for stride in nominal_strides(strides))
    if strides != pyramid or strides[-1] != output_stride:
        raise ValueError(f"its feature maps have the strides {strides}")
    return net


def load_backbone_weights(backbone: nn.Module, path: str | os.PathLike[str], config: Any) -> None:
    """Load a timm classification model's safetensors file into its feature extractor, every key or none.

    Args:
        backbone: the feature extractor; its weights are replaced.
        path: the file.
        config: the configuration that the backbone was built from.

    Raises:
        ValueError: the name does not end in `.safetensors`, the file is damaged, lacks a key, has one of another shape, or has
            keys that this architecture does not have.
    """
    if not str(path).endswith(".safetensors"):
        raise ValueError(f"weights {os.fspath(path)!r} must be a .safetensors file; convert others with safetensors")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)} holds no weights ({error}); an LFS pointer? Download it again."
        ) from error
    stored_keys = {_plain(key): key for key in stored}
    remedy = f"check that the file belongs to {config.backbone!r} with backbone_kwargs={config.backbone_kwargs}"

    chosen = {}
    for key, value in backbone.state_dict().items():
        stored_key = stored_keys.pop(_plain(key), "")
        found = tuple(stored[stored_key].shape) if stored_key else "no such key"
        if found != tuple(value.shape):
            raise ValueError(
                f"{os.fspath(path)}: backbone key {key!r} has shape {tuple(value.shape)}, the file has {found}; {remedy}"
            )
        chosen[key] = stored[stored_key]

    with torch.device("meta"):
        classifier = timm.create_model(config.backbone, **config.backbone_kwargs)
    dropped = {_plain(key) for key in classifier.state_dict()}
    if foreign := sorted(key for plain, key in stored_keys.items() if plain not in dropped):
        raise ValueError(f"{os.fspath(path)} has keys that the model does not have: {foreign[:5]}; {remedy}")
    backbone.load_state_dict(chosen)
    if stored_keys:
        logger.info("unused in %s, since features need no classifier: %s", path, sorted(stored_keys.values()))


def _plain(key: str) -> str:
    # feature extractors of timm may hold the whole model as `body` or `model`, or its `stages.0` as `stages_0`
    return key.removeprefix("body.").removeprefix("model.").replace("_", ".")
