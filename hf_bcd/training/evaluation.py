"""From a batch to per-image counts that can be gathered across ranks, and evaluations made of them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..losses.ops.functional import resize
from ..metrics import SemanticMetrics
from .config import BCDConfig
from .distiller import Distiller
from .preparation import eval_transform, with_transform


def same_size_groups(
    pixel_values: Tensor | list[Tensor], labels: Tensor | list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """A batch as one group if it is stacked, image by image if sizes differ (nothing is padded)."""
    if isinstance(pixel_values, Tensor) and isinstance(labels, Tensor):
        return [(pixel_values, labels)]
    return [(image[None], label[None]) for image, label in zip(pixel_values, labels, strict=True)]


def predict(model: nn.Module, pixel_values: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Classes `[B, H, W]` at `size`: logits are up-sampled bilinearly, then arg-max, as the exported pipeline does."""
    logits = model(pixel_values=pixel_values)["logits"].float()
    return resize(logits, (size[0], size[1])).argmax(dim=1)


def pack_counts(counts: dict[str, Tensor]) -> Tensor:
    """Per-image counts of `SemanticMetrics.counts` as one int64 tensor `[B, K]`."""
    return torch.cat([count.flatten(1) for count in counts.values()], dim=1)


def unpack_counts(rows: Tensor, metrics: SemanticMetrics) -> dict[str, Tensor]:
    """Undoes `pack_counts` for rows `[B, K]` of that metric."""
    parts = rows.split([math.prod(shape) for shape in metrics.shapes.values()], dim=1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(metrics.shapes.items(), parts, strict=True)}


class ScoringTrainer(Trainer):
    """Trainer whose evaluations stream integer counts: logits are never gathered, and every image counts once."""

    args: BCDConfig
    metrics: SemanticMetrics
    per_class_iou: Sequence[float] = ()

    @property
    def distiller(self) -> Distiller:
        """The student with its connectors and losses, unwrapped."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)  # type: ignore[return-value]

    @property
    def student(self) -> PreTrainedModel:
        """The model being trained, as `from_pretrained` will load it."""
        return self.distiller.student.model  # type: ignore[return-value]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The loader of an evaluation: every image, by workers that end with it."""
        with self._complete_loaders():
            return super().get_eval_dataloader(self._transformed(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The same for `predict`."""
        with self._complete_loaders():
            return super().get_test_dataloader(self._transformed(test_dataset))

    def _transformed(self, dataset: Any) -> Any:
        transform = eval_transform(self.distiller.student, self.args.image_size)
        return with_transform(dataset, transform, self.args.seed)

    @contextmanager
    def _complete_loaders(self) -> Iterator[None]:
        # the base class drops the last batch of evaluations too, and of persistent workers it would hand out the last
        # loader, whatever data set is asked for
        args, names = self.args, ("dataloader_drop_last", "dataloader_persistent_workers")
        chosen = {name: getattr(args, name) for name in names}
        for name in names:
            setattr(args, name, False)
        try:
            yield
        finally:
            for name, value in chosen.items():
                setattr(args, name, value)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Metrics of `SemanticMetrics` over a data set, with the prefix; `per_class_iou` is a list."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics | {f"{metric_key_prefix}_per_class_iou": self.per_class_iou}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """What `evaluate` and `predict` share; counts start anew."""
        self._share_buffers()
        self.metrics.reset()
        return super().evaluation_loop(*args, **kwargs)

    def _share_buffers(self) -> None:
        """Gives every rank the first one's BatchNorm statistics; otherwise ranks evaluate different models."""
        if self.accelerator.num_processes > 1:
            for buffer in self.student.buffers():
                dist.broadcast(buffer, 0)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Per-image counts of a batch; logits never leave the device."""
        inputs = self._prepare_inputs(inputs)
        rows = []
        with torch.no_grad():
            for pixel_values, labels in same_size_groups(inputs["pixel_values"], inputs["labels"]):
                counts = self.metrics.counts(predict(model, pixel_values, labels.shape[-2:]), labels)
                rows.append(pack_counts(counts))
        return None, torch.cat(rows), inputs["index"]

    @torch.no_grad()
    def predict_classes(self, sample: dict[str, Any]) -> Tensor:
        """The student's classes `[H, W]` for one transformed sample, at its label's size, on the CPU."""
        distiller = self.distiller.eval()
        pixel_values = sample["pixel_values"][None].to(self.args.device)
        return predict(distiller, pixel_values, sample["labels"].shape)[0].cpu()

    def add_counts(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Unpacks gathered per-image counts, from which duplicates that fill the last batch have been cut."""
        self.metrics.add(unpack_counts(cast(Tensor, prediction.predictions), self.metrics))
        if not compute_result:
            return {}
        result = self.metrics.compute()
        self.per_class_iou = result.pop("per_class_iou")  # a list is no scalar for the log
        return result
