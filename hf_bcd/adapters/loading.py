"""Models of the Hub, of folders and of timm, loaded and built from a recipe's description of them."""

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from .. import models
from ..hub.errors import explained
from ..models import (
    EspNetConfig,
    EspNetForSemanticSegmentation,
    TimmDetectionModel,
    TimmSegmentationModel,
)
from ..models.configuration_timm_detection import HEAD_NAMES as DETECTION_HEADS
from ..utils.files import check_readable
from ..utils.messages import UserError
from ..utils.text import shortened
from .auto import adapt, build_adapter
from .backbones import build_timm, is_backbone, load_backbone
from .base import DenseAdapter
from .specs import NO_HEAD, TIMM_FIELDS, ModelSpec


logger = logging.getLogger(__name__)


# fields of a configuration that name code, which `trust_remote_code` runs
CODE_FIELDS = ("auto_map", "custom_pipelines")


def load_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_labels: Mapping[str, Any] | None = None,
    to_teach: bool = False,
) -> PreTrainedModel:
    """Loads a semantic or universal segmentation model, or a detector, of transformers: from the Hub, its cache or a folder.

    Args:
        name_or_path: Hub id or folder.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run model code that lies in the repository.
        new_labels: `id2label` and `label2id` of other classes; what the checkpoint lacks for them starts at random.
        to_teach: take a checkpoint without a head for a teacher of features, see `BackboneAdapter`.

    Raises:
        UserError: if the repository cannot be read (`HubError`), needs code of its own that is not trusted, has
            no weights for a part of the model, or transformers has no segmentation class for the model's type.
    """
    changes = {} if new_labels is None else {"ignore_mismatched_sizes": True, **new_labels}
    with explained("model", name_or_path, revision=revision), _readable(name_or_path):
        commit = commit_of(name_or_path, revision)
        source: dict[str, Any] = {"revision": commit or revision, "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(name_or_path, **source)
        own_code = getattr(config, "auto_map", None) or {}
        if to_teach and is_backbone(config):
            logger.info("%s has no head for the task: it teaches features only", name_or_path)
            model, loaded = load_backbone(name_or_path, config, source)
            _check_complete(name_or_path, model, loaded["missing_keys"])
            return _at_commit(name_or_path, model, loaded, commit)
        for auto_class in auto_classes(config):
            if type(config) in auto_class._model_mapping or auto_class.__name__ in own_code:
                model, loaded = auto_class.from_pretrained(name_or_path, **source, **changes, output_loading_info=True)
                if new_labels is None:
                    _check_complete(name_or_path, model, loaded["missing_keys"])
                    if unused := sorted(loaded["unexpected_keys"]):
                        logger.warning(
                            "%s: the model of config.json has no place for %d of the stored weights, such as %s; please "
                            "check that they belong together.", name_or_path, len(unused), unused[0],
                        )  # fmt: skip
                return _at_commit(name_or_path, model, loaded, commit)
    remedy = (
        "choose a model that AutoModelForSemanticSegmentation or AutoModelForObjectDetection loads, or a timm backbone"
    )
    if is_backbone(config):
        remedy = f"it can only be a teacher, of features; {remedy}"
    elif config.model_type == "timm_wrapper":
        remedy = "name it as timm does: {backbone: ..., head: none, pretrained: true} for a teacher of features"
    raise UserError(
        f"{name_or_path} is a {config.model_type} model, for which transformers has no segmentation class and none for boxes; "
        f"{remedy}."
    )


def _at_commit(name_or_path: str, model: PreTrainedModel, loaded: Any, commit: str | None) -> PreTrainedModel:
    _check_mismatches(name_or_path, loaded["mismatched_keys"])
    drop_foreign_code(model)
    model.config._commit_hash = commit  # where `image_statistics` and the card look for it; never saved
    return model


load_segmentation_model = load_model  # what it was called before it loaded detectors


def auto_classes(config: Any) -> list[Any]:
    """The Auto classes to try for a configuration: the one of the class that it was saved from first."""
    segmenters = [
        transformers.AutoModelForSemanticSegmentation,
        transformers.AutoModelForUniversalSegmentation,
        transformers.AutoModelForInstanceSegmentation,
    ]
    detectors = [transformers.AutoModelForObjectDetection]
    # a type may stand in both
    segments = any("Segmentation" in name for name in getattr(config, "architectures", None) or ())
    return [*segmenters, *detectors] if segments else [*detectors, *segmenters]


def load_adapter(
    spec: ModelSpec | str, *, trust_remote_code: bool = False, task: str | None = None, to_teach: bool = False
) -> DenseAdapter:
    """Loads a finished model and adapts it: weights, image statistics and names come from one revision.

    Args:
        spec: names the model.
        trust_remote_code: run model code that lies in the repository.
        task: what a model that serves two tasks is for, see `adapter_class`.
        to_teach: as in `load_model`.

    Raises:
        UserError: as `load_model`, or if the model's type has no adapter.
    """
    spec = ModelSpec.parse(spec, "model")
    if spec.head == NO_HEAD:
        assert spec.backbone is not None
        with _buildable(spec), explained("model", f"timm/{spec.backbone}"):
            return adapt(build_timm(spec.backbone, spec.options, pretrained=spec.pretrained, weights=spec.weights))
    assert spec.name_or_path is not None
    model = load_model(
        spec.name_or_path, revision=spec.revision, trust_remote_code=trust_remote_code, to_teach=to_teach
    )
    return adapt(model, task)


def empty_adapter(
    config: Mapping[str, Any], class_name: str, repo_id: str | None, revision: str | None, task: str | None = None
) -> DenseAdapter:
    """An adapted model without weights, which says of itself what the model would, but cannot run.

    Args:
        config: of the model, as `to_dict` gives it.
        class_name: name of the model's class, in transformers or here.
        repo_id: its Hub id.
        revision: its commit there.
        task: as in `load_adapter`.
    """
    model_class = getattr(transformers, class_name, None) or getattr(models, class_name)
    settings = model_class.config_class.from_dict(dict(config))
    with torch.device("meta"):
        model = model_class(settings)
    model.config._name_or_path, model.config._commit_hash = repo_id or "", revision
    return build_adapter(model, task=task)


def commit_of(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a Hub id is now, so that everything is read at the same; None for a folder."""
    if os.path.isdir(name_or_path):  # of a name that is too long for a file, too
        return None
    file = cached_file(name_or_path, CONFIG_NAME, revision=revision)
    return None if file is None else Path(file).parent.name  # of the cache's snapshots


def class_names_of(spec: ModelSpec, *, trust_remote_code: bool = False) -> dict[int, str]:
    """The classes of a finished teacher, which a run without any labels takes.

    Raises:
        UserError: it has none, or its configuration cannot be read (`HubError`).
    """
    name = spec.name_or_path or spec.backbone
    if spec.name_or_path is None:
        raise UserError(
            f"without labels the classes are the teacher's, but {name} has none; name a teacher that was trained for the task."
        )
    with explained("model", spec.name_or_path, revision=spec.revision), _readable(spec.name_or_path):
        source: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(spec.name_or_path, **source)
    if is_backbone(config):
        raise UserError(
            f"without labels the classes are the teacher's, but {name} has no head for any; name a teacher that was trained for "
            "the task, or a data set for its classes with label_free: true."
        )
    return {int(index): str(label) for index, label in (config.id2label or {}).items()}


def drop_foreign_code(loaded: Any) -> None:
    """Removes from a model, configuration or image processor the code that it names, so that saving does not pass it on.

    A class of transformers, or one of ours, was loaded without that code. Ours names its own again when it is saved; a
    class that came from there, which needs `trust_remote_code`, keeps it.
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
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        processor: Any = transformers.AutoImageProcessor.from_pretrained(name_or_path, **options)
    except (OSError, ValueError):  # there is none
        return {}
    size = dict(getattr(processor, "size", None) or {}) if getattr(processor, "do_resize", False) else {}
    return {side: length for side, length in size.items() if length is not None}


def _check_complete(name_or_path: str, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Refuses a bare backbone: its head would score, or teach, from random weights."""
    if absent := [name for name, _ in model.named_parameters() if name in missing]:
        raise UserError(
            f"{name_or_path} is no finished {type(model).__name__}: it lacks the weights of {len(absent)} parameters, such as "
            f"{absent[0]}. Name a model that was trained for the task."
        )


def _check_mismatches(name_or_path: str, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Refuses weights that differ from the configuration in more than the number of classes, which would start at random."""
    for name, stored, expected in mismatched:
        if tuple(stored)[1:] != tuple(expected)[1:]:
            raise UserError(
                f"{name_or_path}: config.json and the weights disagree: {name} is {list(stored)} in the file and "
                f"{list(expected)} by the configuration. They belong to different models; fetch both again."
            )


@contextmanager
def _readable(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise all kinds of errors for a broken file
        if "trust_remote_code=True" in str(error):
            raise UserError(
                f"model {name_or_path} only runs with the code in its own repository. Read that code first, then add "
                "--trust_remote_code true."
            ) from error
        if isinstance(error, OSError) and not os.path.isdir(name_or_path):
            raise  # of the Hub
        if os.path.isdir(name_or_path) and not Path(name_or_path, CONFIG_NAME).is_file():
            raise UserError(
                f"{name_or_path} holds no model, for it has no {CONFIG_NAME}. A run saves its student at its end; until then, name one "
                "of its checkpoints."
            ) from error
        for path in sorted(Path(name_or_path).glob("*")):
            check_readable(path, "Fetch it again.")
        if "ignore_mismatched_sizes" in str(error):
            raise UserError(
                f"{name_or_path}: config.json and the weights disagree in shapes or in the number of classes. They belong to "
                "different models; fetch both again."
            ) from error
        said = shortened(f"{type(error).__name__}: {error}")
        raise UserError(f"{name_or_path}: the model cannot be loaded. {said}") from error


def build_model(spec: ModelSpec, id2label: Mapping[int, str], *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a model that predicts the classes `id2label` of a data set.

    A checkpoint whose class count differs keeps its backbone and gets a fresh classifier.

    Raises:
        UserError: if the model cannot be loaded or built so.
    """
    labels = {"id2label": dict(id2label), "label2id": {name: index for index, name in id2label.items()}}
    if spec.name_or_path is not None:
        options = {"revision": spec.revision, "trust_remote_code": trust_remote_code}
        return load_model(spec.name_or_path, **options, new_labels=labels)
    if spec.backbone == EspNetConfig.model_type:
        return _build_espnet(spec, labels)
    assert spec.backbone is not None  # ModelSpec.parse allows one of the two
    own = {name: getattr(spec, name) for name in TIMM_FIELDS}
    model_class: Any = TimmSegmentationModel
    if spec.head in DETECTION_HEADS:
        model_class = TimmDetectionModel
        del own["output_stride"]
    with _buildable(spec), explained("model", f"timm/{spec.backbone}"):
        return model_class.from_backbone(spec.backbone, **own, **spec.options, **labels)


@contextmanager
def _buildable(spec: ModelSpec) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError) as error:  # which say themselves what is wrong
        raise UserError(str(error)) from error
    except Exception as error:  # whatever an option of the wrong kind does inside timm
        said = shortened(f"{type(error).__name__}: {error}")
        raise UserError(
            f"backbone {spec.backbone!r} cannot be built with the options {spec.options} ({said})."
        ) from error


def _build_espnet(spec: ModelSpec, labels: Mapping[str, Any]) -> EspNetForSemanticSegmentation:
    for name in TIMM_FIELDS:
        if getattr(spec, name) != getattr(ModelSpec, name):
            raise UserError(
                f"{name} is {getattr(spec, name)!r}, but backbone {spec.backbone!r} is a whole network without "
                f"ImageNet weights; remove {name}, and set fields of EspNetConfig in options."
            )
    with _buildable(spec):
        return EspNetForSemanticSegmentation(EspNetConfig(**spec.options, **labels))
