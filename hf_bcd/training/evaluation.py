"""Scores of a model on a data set: predict, count, add up the counts of all processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from ..adapters import DenseAdapter, image_processor
from ..data import DenseDataset, DenseStream, joined
from ..tasks import Task, task_of
from ..utils.distributed import is_distributed
from ..utils.messages import UserError
from .config import BCDConfig
from .loaders import part_of_process


NUM_PICTURES = 4


def evaluate(
    model: DenseAdapter,
    dataset: Any,
    args: BCDConfig,
    *,
    processor: BaseImageProcessor | None = None,
    description: str = "Evaluation",
    kept: list[tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """Scores of a model on a data set, the same on all processes, which must all call this.

    Each process predicts its own part of the pictures and counts each once; only counts are exchanged.

    Args:
        model: adapted model on the device of `args`.
        dataset: canonical samples (`DenseDataset`), or transformed ones.
        args: batch size, workers and size of the pictures.
        processor: image processor that shows the model its pictures; by default the one that `image_size` asks for.
        description: title of the progress bar.
        kept: gets prediction and truth of every picture; then each process predicts all of them.

    Returns:
        The scores of the task's metric, and `num_samples`.
    """
    task = task_of(dataset)
    processor = processor or image_processor(model, **task.processor_size(args))
    samples = with_transform(dataset, task.eval_transform(processor), args.seed)
    metric = task.metric(model.num_labels)
    with evaluated(model):
        loader = part_of_process(samples, task, args, whole=kept is not None)
        for batch in tqdm(loader, desc=description, disable=args.disable_tqdm):
            batch = {name: moved(value, args) for name, value in batch.items()}
            predictions = predict_batch(model, task, batch)
            task.score(metric, predictions, batch)
            if kept is not None:
                kept += zip(map(on_cpu, predictions), map(on_cpu, task.truths(batch)), strict=True)
    if kept is None:
        metric.gather()
    return {**metric.compute(), "num_samples": len(samples)}


def evaluate_together(
    models: Mapping[str, DenseAdapter], dataset: Any, args: BCDConfig
) -> tuple[dict[str, dict[str, Any]], float | None]:
    """Scores of several models that are shown the same pictures, as `evaluate` computes them, but by this process only.

    Returns:
        The scores by model, and the part of the pixels of label maps to which all give the same class; None of detections.
    """
    task, (first, *_) = task_of(dataset), models.values()
    processor = image_processor(first, **task.processor_size(args))
    samples = with_transform(dataset, task.eval_transform(processor), args.seed)
    metrics = {name: task.metric(model.num_labels) for name, model in models.items()}
    same = total = 0
    for model in models.values():
        model.to(args.device).eval()
    for batch in tqdm(part_of_process(samples, task, args, whole=True), desc="Evaluation", disable=args.disable_tqdm):
        batch = {name: moved(value, args) for name, value in batch.items()}
        predictions = {name: predict_batch(model, task, batch) for name, model in models.items()}
        for name, found in predictions.items():
            task.score(metrics[name], found, batch)
        for one, *others in zip(*predictions.values(), strict=True):
            if isinstance(one, Tensor):
                same += int(torch.stack([one == other for other in others]).all(0).sum())
                total += one.numel()
    return {name: metric.compute() for name, metric in metrics.items()}, same / total if total else None


def predict_batch(model: DenseAdapter, task: Task, batch: Mapping[str, Any]) -> list[Any]:
    """Predictions for a batch on the model's device; pictures of different sizes one by one, since nothing is padded."""
    pixel_values, sizes = batch["pixel_values"], task.sizes(batch)
    if isinstance(pixel_values, Tensor):
        return model.predict(pixel_values, sizes)
    return [model.predict(one[None], [size])[0] for one, size in zip(pixel_values, sizes, strict=True)]


def pictures(model: DenseAdapter, dataset: Any, args: BCDConfig) -> Iterator[np.ndarray]:
    """Input, truth and prediction of the first pictures of a transformed data set, or of the first of several."""
    dataset = next(iter(dataset.values())) if isinstance(dataset, Mapping) else dataset
    task = task_of(dataset)
    model.eval()
    for sample in (dataset[index] for index in range(min(NUM_PICTURES, len(dataset)))):
        batch = {name: moved(value, args) for name, value in task.collate([sample]).items()}
        (prediction,) = predict_batch(model, task, batch)
        yield task.picture(sample, prediction, model.num_labels)


def on_cpu(value: Any) -> Any:
    """Tensors, and mappings of them, on the CPU; what is no tensor stays, as run lengths do."""
    if isinstance(value, Mapping):
        return {key: on_cpu(one) for key, one in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def stacked(items: Sequence[Any]) -> Any:
    """Maps of one size as one array, others as a list of arrays; mappings of arrays as a list."""
    if items and isinstance(items[0], Mapping):
        return [{key: one.numpy() if isinstance(one, Tensor) else one for key, one in item.items()} for item in items]
    arrays = [item.numpy() for item in items]
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays


def moved(value: Any, args: BCDConfig) -> Any:
    """Tensors, and lists and mappings of tensors, on the device of the arguments; what is no tensor stays, as run lengths do."""
    if isinstance(value, list):
        return [moved(one, args) for one in value]
    if isinstance(value, Mapping):
        return {key: moved(one, args) for key, one in value.items()}
    return value.to(args.device, non_blocking=True) if isinstance(value, Tensor) else value


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode inside the block, with the buffers of the first process on all of them."""
    if is_distributed():  # BatchNorm's statistics differ; processes would evaluate different models
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def each(function: Callable[[Any], Any], dataset: Any) -> Any:
    """A function of a data set, or of several by name, as Trainer takes them for evaluation."""
    if isinstance(dataset, Mapping):
        return {name: function(one) for name, one in dataset.items()}
    return function(dataset)


def with_transform(dataset: Any, transform: Callable, seed: int) -> Any:
    """Adds a transform to canonical samples; leaves data sets that already yield tensors as they are.

    Raises:
        UserError: for a table of `datasets`, which has no label rule yet.
    """
    if isinstance(dataset, Mapping):
        return each(lambda one: with_transform(one, transform, seed), dataset)
    dataset = joined(dataset)
    if isinstance(dataset, DenseDataset | DenseStream):
        return dataset.with_transform(transform, seed=seed)
    columns = getattr(dataset, "column_names", None) or ()
    if columns and "pixel_values" not in columns and getattr(dataset, "format", {}).get("type") != "custom":
        raise UserError(
            f"a table with the columns {columns}, whose masks nobody has read; hf_bcd.load_dense_dataset(table) turns it "
            "into labelled images."
        )
    return dataset
