"""Streaming metrics: of segmentation from integer counts, of detection from a record of each picture."""

from typing import Any

from .detection import DetectionMetrics
from .instances import InstanceMetrics
from .semantic import SemanticMetrics


__all__ = ["DetectionMetrics", "InstanceMetrics", "SemanticMetrics", "load_evaluate_metric"]


def load_evaluate_metric(num_labels: int, ignore_index: int = 255) -> Any:
    """`SemanticMetrics(num_labels, ignore_index)` as a metric of `evaluate`; needs no network."""
    from .evaluate_modules import SegmentationMetric  # an optional dependency, which takes seconds to import

    return SegmentationMetric(num_labels, ignore_index)
