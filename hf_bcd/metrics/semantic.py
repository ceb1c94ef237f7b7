"""Streaming metrics of semantic segmentation over a data set."""

from typing import Any

import torch
from torch import Tensor

from ..outputs import check_ignore_index
from ..utils.distributed import all_reduce_sum
from .boundary import boundary_counts, boundary_scores
from .connectivity import connectivity_counts, connectivity_scores
from .histogram import image_histograms


class SemanticMetrics:
    """Region, boundary and connectivity metrics from sums of integer counts.

    Only int64 totals are kept, so neither batch size nor order nor the split over processes changes a result, and
    memory does not grow with the data set. Feed maps at the label's own resolution: the width of the Boundary IoU
    bands follows the size of the map, padding included.

    Args:
        num_labels: number of classes C.
        ignore_index: label of pixels that do not count.

    Raises:
        UserError: if `ignore_index` is one of the classes.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255):
        check_ignore_index(ignore_index, num_labels)
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets all counts."""
        no_images = torch.empty(0, 1, 1, dtype=torch.int64)
        self._totals = {name: count.sum(0) for name, count in self.counts(no_images, no_images).items()}

    def counts(self, predictions: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Counts of a batch, one row per image; leaves the totals as they are.

        Args:
            predictions: predicted classes `[B, H, W]` in [0, C); any value where the label is ignored.
            labels: true classes `[B, H, W]` in [0, C) or `ignore_index`.

        Returns:
            int64 tensors on the device of the maps, each with leading dimension B and of a shape that depends on C
            only: `confusion` `[B, C, C]` (truth, prediction) and the entries of `boundary_counts` and
            `connectivity_counts`.

        Raises:
            ValueError: if the maps differ in shape, are not integer `[B, H, W]`, or hold ids out of range.
        """
        _check_maps(predictions, labels)
        # In int64 first: a uint8 map could not tell a negative ignore_index from a class.
        predictions, labels = predictions.long(), labels.long()
        valid = labels != self.ignore_index
        self._check_ids(predictions, labels, valid)
        # Then narrow integers: the many passes over the maps are bound by memory traffic.
        narrow = torch.int16 if self.num_labels < 2**15 else torch.int32
        truth = labels.to(narrow).masked_fill(~valid, -1)
        prediction = predictions.to(narrow).masked_fill(~valid, -1)

        return {
            "confusion": confusion_counts(labels, predictions, valid, self.num_labels),
            **boundary_counts(truth, prediction, self.num_labels),
            **connectivity_counts(truth, prediction, self.num_labels),
        }

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Adds a batch of maps; arguments and errors as for `counts`."""
        for name, counts in self.counts(predictions, labels).items():
            self._totals[name] = self._totals[name].to(counts.device) + counts.sum(0)

    def gather(self) -> None:
        """Adds up the totals of all processes, which must all call this; the identity in a single one."""
        self._totals = {name: all_reduce_sum(total) for name, total in self._totals.items()}

    def compute(self) -> dict[str, Any]:
        """Metrics over everything added so far; nan where nothing contributed.

        Returns:
            `mean_iou` over the `classes_averaged` classes present in truth or prediction; `mean_accuracy` over the
            classes present in truth; `overall_accuracy`; `per_class_iou`, a list of C values; `boundary_f@1`,
            `boundary_f@3`, `boundary_f@5`, `boundary_iou`; `completeness`, `connectivity`, `fragments`, `missed`.
        """
        totals = {name: total.cpu() for name, total in self._totals.items()}
        confusion = totals["confusion"].double()
        hits, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        iou = hits / (truth + predicted - hits)
        return {
            "mean_iou": iou.nanmean().item(),
            "mean_accuracy": (hits / truth).nanmean().item(),
            "overall_accuracy": (hits.sum() / truth.sum()).item(),
            "per_class_iou": iou.tolist(),
            "classes_averaged": int((~iou.isnan()).sum()),
            **boundary_scores(totals),
            **connectivity_scores(totals),
        }

    def _check_ids(self, predictions: Tensor, labels: Tensor, valid: Tensor) -> None:
        bad_labels = valid & ((labels < 0) | (labels >= self.num_labels))
        bad_predictions = valid & ((predictions < 0) | (predictions >= self.num_labels))
        # The only sync unless something is wrong.
        if not (bad_labels | bad_predictions).any():
            return
        problems = []
        if bad_labels.any():
            problems.append(
                f"label ids {_some_ids(labels[bad_labels])} are neither in [0, {self.num_labels}) nor "
                f"ignore_index={self.ignore_index}: correct the data set's label rule, or num_labels"
            )
        if bad_predictions.any():
            problems.append(
                f"predicted ids {_some_ids(predictions[bad_predictions])} are not in [0, {self.num_labels}): "
                "num_labels must be the number of classes that the model predicts"
            )
        raise ValueError("; ".join(problems))


def confusion_counts(truth: Tensor, prediction: Tensor, valid: Tensor, num_labels: int) -> Tensor:
    """How often each class is predicted as each: int64 `[B, C, C]` (truth, prediction) of integer maps `[B, H, W]`."""
    # counting is bound by memory: half the bytes, half the time
    fits = len(truth) * (num_labels**2 + 1) < 2**31
    prediction, truth = (ids.to(torch.int32 if fits else torch.int64) for ids in (prediction, truth))
    cells = torch.add(prediction, truth, alpha=num_labels).masked_fill_(~valid, num_labels**2)
    return image_histograms(cells, num_labels**2).unflatten(1, (num_labels, num_labels))


def _check_maps(predictions: Tensor, labels: Tensor) -> None:
    if predictions.shape != labels.shape or labels.ndim != 3:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} must both be [B, H, W]: "
            "resize logits to the label's size and take their arg-max first"
        )
    for name, ids in (("predictions", predictions), ("labels", labels)):
        if ids.is_floating_point():
            raise ValueError(f"{name} are {ids.dtype}, expected integer class ids: take the arg-max of scores first")


def _some_ids(ids: Tensor, limit: int = 10) -> str:
    found = ids.unique().tolist()
    return str(found) if len(found) <= limit else f"{found[:limit]} and {len(found) - limit} more"
