"""The only place that knows a model family: from models of `transformers` to named feature levels and logits."""

from .auto import ADAPTERS, adapt, build_adapter, describe, image_processor, image_statistics
from .base import DenseAdapter
from .label_matching import LabelMap, match_labels, read_synonyms
from .teacher import FrozenTeacher


__all__ = [
    "ADAPTERS",
    "DenseAdapter",
    "FrozenTeacher",
    "LabelMap",
    "adapt",
    "build_adapter",
    "describe",
    "image_processor",
    "image_statistics",
    "match_labels",
    "read_synonyms",
]
