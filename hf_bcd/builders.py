"""Builds models from a recipe's description of them."""

import logging
from collections.abc import Mapping

from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedModel

from .config import ModelSpec
from .models import TimmSegmentationModel


logger = logging.getLogger(__name__)


def load_segmentation_model(name_or_path: str, **kwargs: object) -> PreTrainedModel:
    """Loads a semantic or universal segmentation model of transformers from the Hub or a folder.

    Args:
        name_or_path: Hub id or folder.
        kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: if transformers has no segmentation class for the model's type.
    """
    from transformers import AutoModelForUniversalSegmentation

    revision = kwargs.get("revision")
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    for auto_class in (AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation):
        if type(config) in auto_class._model_mapping:
            return auto_class.from_pretrained(name_or_path, **kwargs)
    raise ValueError(
        f"{name_or_path} is a {config.model_type} model, for which transformers has no segmentation class; choose a "
        "model that AutoModelForSemanticSegmentation loads, or a timm backbone."
    )


def build_model(spec: ModelSpec, id2label: Mapping[int, str]) -> PreTrainedModel:
    """Builds a model that predicts the classes of a data set.

    A checkpoint whose class count differs keeps its backbone and gets a fresh classifier.

    Args:
        spec: where the model comes from.
        id2label: the data set's classes.
    """
    labels = {"id2label": dict(id2label), "label2id": {name: index for index, name in id2label.items()}}
    if spec.name_or_path is not None:
        return load_segmentation_model(
            spec.name_or_path, revision=spec.revision, ignore_mismatched_sizes=True, **labels
        )
    assert spec.backbone is not None  # ModelSpec.parse allows one of the two
    return TimmSegmentationModel.from_backbone(
        spec.backbone,
        pretrained=spec.pretrained,
        weights=spec.weights,
        head=spec.head,
        output_stride=spec.output_stride,
        **spec.options,
        **labels,
    )
