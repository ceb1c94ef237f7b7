"""The only place that knows a model family: from models of `transformers` to named feature levels and logits."""

from .auto import ADAPTERS, build_adapter, describe, image_processor, image_statistics
from .base import DenseAdapter
from .teacher import FrozenTeacher, match_labels


__all__ = [
    "ADAPTERS",
    "DenseAdapter",
    "FrozenTeacher",
    "build_adapter",
    "describe",
    "image_processor",
    "image_statistics",
    "match_labels",
]
