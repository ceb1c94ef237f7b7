"""The segmentation metrics as a metric of Hugging Face `evaluate`; importing this module imports `evaluate`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from .semantic import SemanticMetrics


class SegmentationMetric(evaluate.Metric):
    """`SemanticMetrics` behind the interface of `evaluate`.

    `evaluate` would write every map to an Arrow file and read all of them back at the end. This metric keeps
    integer counts only.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255):
        self._metrics = SemanticMetrics(num_labels, ignore_index)
        super().__init__()

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Region, boundary and connectivity metrics of semantic segmentation.",
            citation="",
            inputs_description="Predictions and references are integer class maps of the same size, image by image.",
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Counts one image: predicted and true classes `[H, W]`, each a tensor, an array or nested lists.

        Raises:
            ValueError: if `SemanticMetrics.counts` rejects the maps.
        """
        self._metrics.update(_as_tensor(prediction)[None], _as_tensor(reference)[None])

    def add_batch(self, *, predictions: Sequence[Any] | None = None, references: Sequence[Any] | None = None) -> None:
        """Counts a batch of images, which may differ in size; of each, maps as for `add`.

        Raises:
            ValueError: if there are not as many predictions as references, or `SemanticMetrics.counts` rejects a map.
        """
        if predictions is None or references is None or len(predictions) != len(references):
            found = ["none" if maps is None else str(len(maps)) for maps in (predictions, references)]
            raise ValueError(
                f"{found[0]} predictions for {found[1]} references: pass one [H, W] map of each per image"
            )
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(self, *, predictions: Sequence[Any] | None = None, references: Sequence[Any] | None = None) -> dict:
        """Adds maps, if there are any, gives `SemanticMetrics.compute` over everything added, and starts afresh."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        results = self._metrics.compute()
        self._metrics.reset()
        return results


def _as_tensor(class_map: Any) -> Tensor:
    # The copy spares torch's warning about read-only arrays, such as views of PIL images.
    return class_map if isinstance(class_map, Tensor) else torch.from_numpy(np.array(class_map))
