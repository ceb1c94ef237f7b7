"""Student, connectors and criterion in one forward pass: the module that Trainer wraps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import DenseAdapter
from ..losses.criterion import DistillationCriterion
from ..losses.ops.functional import resize
from ..losses.ops.segmentation import segmentation_loss
from ..outputs import DenseOutput, LabelMaps
from ..utils.profiling import part


class Distiller(nn.Module):
    """Everything trainable, so that data-parallel wrappers and checkpoints see all of it. The teacher stays outside.

    Args:
        student: adapted student.
        criterion: weighted losses with their connectors.
        ignore_index: void label.
    """

    student: DenseAdapter
    criterion: DistillationCriterion

    def __init__(self, student: DenseAdapter, criterion: DistillationCriterion, ignore_index: int = 255) -> None:
        super().__init__()
        self.student = student
        self.criterion = criterion
        self.ignore_index = ignore_index

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        teacher_output: DenseOutput | None = None,
        num_valid: Tensor | None = None,
        share: float = 1.0,
    ) -> dict[str, Any]:
        """One training step's loss, or the student's logits.

        Args:
            pixel_values: RGB images `[B, 3, H, W]`, 0..255.
            labels: `[B, H, W]`, any integers; without them the student only predicts.
            teacher_output: the teacher's output on the same images.
            num_valid: number of valid pixels the task loss divides by, see `segmentation_loss`.
            share: of this batch among the accumulated ones, see `DistillationCriterion.forward`.

        Returns:
            `{"logits"}` without labels (outside autocast, as the exported pipeline computes them), else `{"loss",
            "terms"}`: the weighted total and every unweighted term, detached.
        """
        if labels is None:
            with torch.autocast(pixel_values.device.type, enabled=False):
                logits = self.student(pixel_values).logits
                size = pixel_values.shape[-2:]
                return {"logits": resize(logits, (size[0], size[1])) if self.student.upsamples else logits}
        labels = labels.long()  # they come as bytes
        with part("student"):
            output: DenseOutput = self.student(pixel_values, labels)
        with part("task"):
            task_losses = self._task_losses(output, labels, num_valid)
        targets = LabelMaps(labels, self.student.num_labels, self.ignore_index)
        loss, terms = self.criterion(task_losses, output, teacher_output, targets, share)
        return {"loss": loss, "terms": {name: term.detach() for name, term in terms.items()}}

    def _task_losses(self, output: DenseOutput, labels: Tensor, num_valid: Tensor | None) -> Mapping[str, Tensor]:
        if output.task_losses:
            return output.task_losses
        options = {"ignore_index": self.ignore_index, "num_valid": num_valid}
        losses = {"loss_task": segmentation_loss(output.logits, labels, **options)}
        if output.auxiliary_logits is not None:
            # counts 0.4 as in PSPNet
            losses["loss_auxiliary"] = 0.4 * segmentation_loss(output.auxiliary_logits, labels, **options)
        return losses

    def begin_step(self, step: int, total: int) -> None:
        """Sets r(t) for optimizer step `step` of `total`, counted from 1."""
        self.criterion.begin_step(step, total)

    def after_step(self) -> None:
        """Ends an optimizer step in every loss (temperatures)."""
        self.criterion.after_step()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recomputes the student's activations in the backward pass; options as for the student itself."""
        self.student.model.activation_checkpointing_enable(**options)

    def activation_checkpointing_disable(self) -> None:
        """Keeps the student's activations again."""
        self.student.model.activation_checkpointing_disable()
