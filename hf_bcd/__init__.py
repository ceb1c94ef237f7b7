"""Boundary and context distillation of dense-prediction models for the Hugging Face ecosystem.

Public names load on first use, so that `import hf_bcd.losses` needs only torch. Our models are registered with the
Auto classes of transformers when these are imported, before or after this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .utils.auto_classes import register_models


if TYPE_CHECKING:
    from .adapters import describe
    from .data import load_dense_dataset
    from .metrics import DetectionMetrics, SemanticMetrics
    from .models import TimmDetectionConfig, TimmDetectionModel, TimmSegmentationConfig, TimmSegmentationModel
    from .training.config import BCDConfig
    from .training.trainer import BCDTrainer

__version__ = "0.1.0"

_HOMES = {
    "BCDConfig": "training.config",
    "BCDTrainer": "training.trainer",
    "DetectionMetrics": "metrics",
    "SemanticMetrics": "metrics",
    "TimmDetectionConfig": "models",
    "TimmDetectionModel": "models",
    "TimmSegmentationConfig": "models",
    "TimmSegmentationModel": "models",
    "describe": "adapters",
    "load_dense_dataset": "data",
}

__all__ = [
    "BCDConfig",
    "BCDTrainer",
    "DetectionMetrics",
    "SemanticMetrics",
    "TimmDetectionConfig",
    "TimmDetectionModel",
    "TimmSegmentationConfig",
    "TimmSegmentationModel",
    "describe",
    "load_dense_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_models()
