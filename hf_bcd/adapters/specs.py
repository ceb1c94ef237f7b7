"""Models as recipes describe them; all of a description is checked before anything is loaded."""

import dataclasses
import math
from dataclasses import dataclass, field
from inspect import get_annotations
from typing import Any, get_type_hints

from ..models import EspNetConfig, TimmDetectionConfig, TimmSegmentationConfig
from ..models.configuration_timm_detection import HEAD_NAMES as DETECTION_HEADS
from ..utils.messages import UserError, unknown_key_message
from ..utils.types import converted


@dataclass
class ModelSpec:
    """Where a model comes from: a checkpoint of transformers, or a timm backbone under one of our heads.

    Attributes:
        name_or_path: Hub id or folder of a transformers segmentation model (or of a bare backbone such as
            `nvidia/mit-b0`, whose head then starts at random).
        revision: branch, tag or commit of `name_or_path`.
        backbone: timm name, instead of `name_or_path`; or `espnet`, a whole network, for which only `options` counts.
        head: `psp`, `deeplabv3plus` or `fpn` for label maps, `retinanet` or `gfl` for boxes,
            `mask_rcnn` or `cascade_mask_rcnn` for boxes with masks; `none` of a teacher of features only.
        output_stride: 8, 16 or 32; of label maps only.
        pretrained: load the backbone's ImageNet weights from the Hub.
        weights: local safetensors file with the backbone's weights.
        options: further fields of `TimmSegmentationConfig`, or those of `TimmDetectionConfig` or `EspNetConfig`; without a
            head `backbone_kwargs`, `image_mean` and `image_std`.
    """

    name_or_path: str | None = None
    revision: str | None = None
    backbone: str | None = None
    head: str = "fpn"
    output_stride: int = 32
    pretrained: bool = False
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: "str | dict[str, Any] | list[Any] | ModelSpec", role: str) -> "ModelSpec":
        """Reads a Hub id or path, or a mapping of fields with exactly one of `name_or_path` and `backbone`."""
        if isinstance(given, ModelSpec):
            return given
        if not isinstance(given, str | dict):
            raise UserError(
                f"{role} is {given!r}; give a Hub id, a folder, or a mapping such as {{backbone: resnet18}}."
            )
        fields: dict[str, Any] = {"name_or_path": given} if isinstance(given, str) else dict(given)
        known = [f.name for f in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise UserError(unknown_key_message(f"field of {role}", key, known))
        hints = get_type_hints(cls)
        spec = cls(**{key: converted(value, hints[key], f"{key} of {role}") for key, value in fields.items()})
        if bool(spec.name_or_path) == bool(spec.backbone):
            raise UserError(f"{role} needs either name_or_path (a transformers model) or backbone (a timm name).")
        if spec.head == NO_HEAD:
            check_headless(spec, role)
        spec.options = checked_options(spec, role)
        return spec

    @property
    def is_finished(self) -> bool:
        """Whether it can teach as it is loaded, without training here."""
        return self.name_or_path is not None or self.head == NO_HEAD


NO_HEAD = "none"
TIMM_FIELDS = ("head", "output_stride", "pretrained", "weights")


def check_headless(spec: ModelSpec, role: str) -> None:
    """Refuses a backbone without a head as anything but a teacher, and one that has learned nothing.

    Raises:
        UserError: as said.
    """
    if role != "teacher":
        raise UserError(f"head of {role} is none: only a teacher can do without; choose psp, deeplabv3plus or fpn.")
    if spec.backbone is None or spec.output_stride != ModelSpec.output_stride:
        raise UserError(
            "head: none is for a timm backbone with its own strides; leave name_or_path and output_stride out."
        )
    if spec.pretrained == (spec.weights is not None):
        raise UserError(
            f"the teacher {spec.backbone} without a head needs weights that it has learned elsewhere: set pretrained: true, or "
            "weights to a .safetensors file, not both."
        )


def checked_options(spec: ModelSpec, role: str) -> dict[str, Any]:
    """The options of a model that is built here, in the types of its configuration's fields.

    Raises:
        UserError: if an option is unknown, of another type or out of range.
    """
    if spec.backbone is None:
        if spec.options:
            raise UserError(f"options of {role} belong to a timm backbone; {spec.name_or_path} has its own.")
        return {}
    if spec.backbone == EspNetConfig.model_type:
        config_class: Any = EspNetConfig
    elif spec.head in DETECTION_HEADS:
        config_class = TimmDetectionConfig
        if spec.output_stride != ModelSpec.output_stride:
            raise UserError(f"output_stride of {role} is for label maps; a detector has the strides of its pyramid.")
    else:
        config_class = TimmSegmentationConfig
    own = ("model_type", "backbone", *TIMM_FIELDS)
    hints = {key: hint for key, hint in get_annotations(config_class).items() if key not in own}
    if spec.head == NO_HEAD:
        hints = {key: hints[key] for key in ("backbone_kwargs", "image_mean", "image_std")}
    options = {}
    for key, value in spec.options.items():
        if key not in hints:
            raise UserError(unknown_key_message(f"option of {role} {spec.backbone!r}", key, hints))
        options[key] = converted(value, hints[key], f"option {key} of {role}")
    for key, low, high in (("head_channels", 1, 2**16), ("dropout", 0, 1)):
        if (value := options.get(key)) is not None and not low <= value <= high:
            raise UserError(f"option {key} of {role} is {value}; it must be a number of {low} to {high}.")
    for key in ("image_mean", "image_std"):
        values = options.get(key)
        if values is not None and (len(values) != 3 or not all(map(math.isfinite, values))):
            raise UserError(f"option {key} of {role} is {values}; it must be three numbers, for R, G and B.")
    if min(options.get("image_std") or [1]) <= 0:
        raise UserError(
            f"option image_std of {role} is {options['image_std']}; images are divided by it: above 0, please."
        )
    if (channels := options.get("backbone_kwargs", {}).get("in_chans", 3)) != 3:
        raise UserError(
            f"backbone_kwargs of {role} has in_chans {channels}; pictures have 3 channels here, leave it out."
        )
    return options
