"""Metrics of many label maps: ours, streamed, beside the metric `mean_iou` of `evaluate`, which keeps every map."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hf_bcd.metrics import SemanticMetrics
from hf_bcd.metrics.semantic import confusion_counts

from .measuring import compare


NUM_LABELS = 150
SIZE = (512, 683)
DISTINCT = 8


def label_maps() -> Iterator[tuple[Tensor, Tensor]]:
    """Predictions and labels `[1, H, W]` of blocky regions of 150 classes; one pixel in ten is wrong."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(DISTINCT):
        coarse = torch.randint(0, NUM_LABELS, (1, 1, 8, 11), generator=generator).float()
        labels = torch.nn.functional.interpolate(coarse, SIZE, mode="nearest").long()[0]
        wrong = torch.rand(labels.shape, generator=generator) < 0.1
        noise = torch.randint(0, NUM_LABELS, labels.shape, generator=generator)
        yield torch.where(wrong, noise, labels), labels


def evaluation_rows(count: int, compared: int, repeats: int = 1, mean_iou: str = "mean_iou") -> list[dict[str, Any]]:
    """Time and memory of all our metrics for `compared` and for `count` maps, and of `mean_iou` for `compared`.

    `mean_iou` counts the confusion alone, so ours is measured alone as well. Where it cannot be loaded, its row is
    missing.

    Args:
        count: maps of the large set.
        compared: maps of the small set, which all measurements share.
        repeats: repeats of each measurement.
        mean_iou: what `evaluate.load` loads: the name on the Hub, or a local copy of its script.
    """
    maps = list(label_maps())

    def all_scores(number: int) -> Callable[[], Any]:
        def run() -> Any:
            metrics = SemanticMetrics(NUM_LABELS)
            for index in range(number):
                metrics.update(*maps[index % DISTINCT])
            return metrics.compute()

        return run

    stored = [(prediction, labels.to(torch.uint8)) for prediction, labels in maps]  # as our data sets keep labels

    def confusion() -> Tensor:
        total = torch.zeros(NUM_LABELS, NUM_LABELS, dtype=torch.int64)
        for index in range(compared):
            prediction, labels = stored[index % DISTINCT]
            total += confusion_counts(labels, prediction, labels != 255, NUM_LABELS).sum(0)
        return total

    runs: dict[tuple[str, int], Callable[[], Any]] = {
        ("all scores", compared): all_scores(compared),
        ("all scores", count): all_scores(count),
        ("mean IoU alone", compared): confusion,
    }
    if (metric := _load(mean_iou)) is not None:

        def theirs() -> Any:
            for index in range(compared):
                prediction, labels = maps[index % DISTINCT]
                metric.add_batch(predictions=prediction.numpy(), references=labels.numpy())
            return metric.compute(num_labels=NUM_LABELS, ignore_index=255)

        runs["evaluate's mean_iou", compared] = theirs
    rows = []
    for (name, number), run in runs.items():
        measured = compare({name: run}, torch.device("cpu"), repeats)[name]
        per_map = {"ms_per_map": 1000 * measured.median / number}
        rows.append({"scores": name, "maps": number, **per_map, name: measured.as_dict()})
    theirs_row = next((row for row in rows if row["scores"].startswith("evaluate")), None)
    for row in rows if theirs_row else []:
        row["time_ratio"] = row["ms_per_map"] / theirs_row["ms_per_map"]  # type: ignore[index]
    return rows


def _load(name: str) -> Any:
    if find_spec("evaluate") is None:
        return None
    import evaluate

    try:
        return evaluate.load(name)
    except OSError:  # offline, and not in the cache
        return None
