"""Builds models from a recipe's description of them."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from .config import ModelSpec
from .hub import explained
from .losses.criterion import unknown_key_message
from .models import EspNetConfig, EspNetForSemanticSegmentation, TimmSegmentationModel


# fields of a configuration that name code, which `trust_remote_code` runs
CODE_FIELDS = ("auto_map", "custom_pipelines")


def load_segmentation_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_labels: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Loads a semantic or universal segmentation model of transformers from the Hub, its cache or a folder.

    Args:
        name_or_path: Hub id or folder.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run model code that lies in the repository.
        new_labels: `id2label` and `label2id` of other classes; what the checkpoint lacks for them starts at random.

    Raises:
        ValueError: if the repository cannot be read (`HubError`), needs code of its own that is not trusted, has
            no weights for a part of the model, or transformers has no segmentation class for the model's type.
    """
    from transformers import AutoModelForUniversalSegmentation

    changes = {} if new_labels is None else {"ignore_mismatched_sizes": True, **new_labels}
    with explained("model", name_or_path, revision=revision), _code_refused(name_or_path):
        commit = commit_of(name_or_path, revision)
        source: dict[str, Any] = {"revision": commit or revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(name_or_path, **source)
        own_code = getattr(config, "auto_map", None) or {}
        for auto_class in (AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation):
            if type(config) in auto_class._model_mapping or auto_class.__name__ in own_code:
                model, loaded = auto_class.from_pretrained(name_or_path, **source, **changes, output_loading_info=True)
                if new_labels is None:
                    _check_complete(name_or_path, model, loaded["missing_keys"])
                drop_foreign_code(model)
                model.config._commit_hash = commit  # where `image_statistics` and the card look for it; never saved
                return model
    raise ValueError(
        f"{name_or_path} is a {config.model_type} model, for which transformers has no segmentation class; choose a "
        "model that AutoModelForSemanticSegmentation loads, or a timm backbone."
    )


def commit_of(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a Hub id is now, so that everything is read at the same; None for a folder."""
    if Path(name_or_path).is_dir():
        return None
    file = cached_file(name_or_path, CONFIG_NAME, revision=revision)
    return None if file is None else Path(file).parent.name  # of the cache's snapshots


def drop_foreign_code(loaded: Any) -> None:
    """Removes every mention of code that lies beside the weights, so that saving does not pass it on.

    A class of transformers, or one of ours, was loaded without that code. Ours names its own again when it is saved; a
    class that came from there, which needs `trust_remote_code`, keeps it.

    Args:
        loaded: model, configuration or image processor.
    """
    if not type(loaded).__module__.startswith("transformers_modules."):
        _drop_code_fields(loaded.config if isinstance(loaded, PreTrainedModel) else loaded)


def _drop_code_fields(value: Any) -> None:
    if isinstance(value, PreTrainedConfig | BaseImageProcessor):
        value = vars(value)
    if isinstance(value, dict):
        for name in CODE_FIELDS:
            if isinstance(value.get(name), dict):  # a class may bear that name in `label2id`
                del value[name]
        for inner in value.values():
            _drop_code_fields(inner)


def saved_size(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, int]:
    """What a model's own image processor resizes to: `height` and `width`, or `shortest_edge`; empty if it does not."""
    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError):  # there is none
        return {}
    size = dict(getattr(processor, "size", None) or {}) if getattr(processor, "do_resize", False) else {}
    return {side: length for side, length in size.items() if length is not None}


def _check_complete(name_or_path: str, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Refuses a bare backbone: its head would score, or teach, from random weights."""
    absent = [name for name, _ in model.named_parameters() if name in missing]
    if absent:
        raise ValueError(
            f"{name_or_path} is no finished segmentation model: it lacks the weights of {len(absent)} parameters, such as "
            f"{absent[0]}. Name a model that was trained for segmentation."
        )


@contextmanager
def _code_refused(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise ValueError(
            f"model {name_or_path} only runs with the code in its own repository. Read that code first, then add "
            "--trust_remote_code true."
        ) from error


def build_model(spec: ModelSpec, id2label: Mapping[int, str], *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a model that predicts the classes of a data set.

    A checkpoint whose class count differs keeps its backbone and gets a fresh classifier.

    Args:
        spec: where the model comes from.
        id2label: the data set's classes.
        trust_remote_code: run model code that lies in a Hub repository.

    Raises:
        ValueError: if the model cannot be loaded or built so.
    """
    labels = {"id2label": dict(id2label), "label2id": {name: index for index, name in id2label.items()}}
    if spec.name_or_path is not None:
        return load_segmentation_model(
            spec.name_or_path,
            revision=spec.revision,
            trust_remote_code=trust_remote_code,
            new_labels=labels,
        )
    if spec.backbone == EspNetConfig.model_type:
        return build_espnet(spec, labels)
    assert spec.backbone is not None  # ModelSpec.parse allows one of the two
    with explained("model", f"timm/{spec.backbone}"):
        return TimmSegmentationModel.from_backbone(
            spec.backbone,
            pretrained=spec.pretrained,
            weights=spec.weights,
            head=spec.head,
            output_stride=spec.output_stride,
            **spec.options,
            **labels,
        )


def build_espnet(spec: ModelSpec, labels: Mapping[str, Any]) -> EspNetForSemanticSegmentation:
    """Builds an ESPNet, which is a whole network, from random weights.

    Args:
        spec: its `options` are fields of `EspNetConfig`.
        labels: `id2label` and `label2id`.

    Raises:
        ValueError: for an unknown option, or a field of `spec` that belongs to timm backbones.
    """
    for name in ("head", "output_stride", "pretrained", "weights"):
        if getattr(spec, name) != getattr(ModelSpec, name):
            raise ValueError(
                f"{name} is {getattr(spec, name)!r}, but backbone {spec.backbone!r} is a whole network without "
                f"ImageNet weights; remove {name}, and set fields of EspNetConfig in options."
            )
    for key in spec.options:
        if key not in EspNetConfig.__annotations__:
            raise ValueError(unknown_key_message(f"option of {spec.backbone!r}", key, EspNetConfig.__annotations__))
    return EspNetForSemanticSegmentation(EspNetConfig(**spec.options, **labels))
