"""Tasks: one row each. Nothing outside asks which task it is."""

from typing import Any

from .base import Metric, Score, Task
from .instance_segmentation import InstanceSegmentation
from .object_detection import ObjectDetection
from .semantic_segmentation import SemanticSegmentation


TASKS: dict[str, Task] = {
    task.name: task for task in (SemanticSegmentation(), ObjectDetection(), InstanceSegmentation())
}


def task_of(dataset: Any) -> Task:
    """The task of a data set; one that names none is taken for semantic segmentation.

    Raises:
        KeyError: for a task that is not in `TASKS`.
    """
    return TASKS[getattr(dataset, "task", SemanticSegmentation.name)]


__all__ = ["TASKS", "Metric", "Score", "Task", "task_of"]
