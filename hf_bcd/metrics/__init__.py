"""Streaming segmentation metrics from integer counts."""

from typing import TYPE_CHECKING, Any

from .semantic import SemanticMetrics


if TYPE_CHECKING:
    from .evaluate_modules import load_evaluate_metric


__all__ = ["SemanticMetrics", "load_evaluate_metric"]


def __getattr__(name: str) -> Any:
    # `evaluate` is an optional dependency and takes seconds to import.
    if name == "load_evaluate_metric":
        from .evaluate_modules import load_evaluate_metric

        return load_evaluate_metric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
