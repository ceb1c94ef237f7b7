"""Student, connectors and criterion in one forward pass: the module that Trainer wraps."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..adapters import DenseAdapter
from ..losses import DistillationCriterion
from ..outputs import DenseOutput, Targets
from .optimization import WeightAverage
from .quantization import FakeQuantizer


class Distiller(nn.Module):
    """Everything trainable, so that data-parallel wrappers and checkpoints see all of it. The teacher stays outside.

    Args:
        student: adapted student.
        criterion: weighted losses with their connectors.
        ema_decay: of an average of the student's weights, which is kept beside them; 0 for none.
        quantize: whether steps may be quantised, see `FakeQuantizer`.
    """

    student: DenseAdapter
    criterion: DistillationCriterion
    average: WeightAverage | None
    quantizer: FakeQuantizer | None

    def __init__(
        self, student: DenseAdapter, criterion: DistillationCriterion, ema_decay: float = 0.0, quantize: bool = False
    ) -> None:
        super().__init__()
        self.student = student
        self.criterion = criterion
        self.average = WeightAverage(student, ema_decay) if ema_decay else None
        self.quantizer = FakeQuantizer(student) if quantize else None

    @property
    def finished(self) -> DenseAdapter:
        """The student as it is scored and saved: the average of its weights where there is one."""
        return self.student if self.average is None else self.average.student

    def train(self, mode: bool = True) -> "Distiller":
        """As in any module; in quantised steps BatchNorm keeps its statistics, since files have it folded into convolutions."""
        super().train(mode)
        if mode and self.quantizer is not None and self.quantizer.active:
            for module in self.student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def after_step(self, step: int) -> None:
        """Ends optimizer step `step`."""
        self.criterion.after_step()
        if self.average is not None:
            self.average.update(self.student, step)
        if self.quantizer is not None:
            self.quantizer.after_step()

    def forward(
        self,
        pixel_values: Tensor,
        targets: Targets,
        teacher_output: DenseOutput | Mapping[str, DenseOutput] | None = None,
        share: float = 1.0,
    ) -> dict[str, Any]:
        """One training step's loss.

        Args:
            pixel_values: RGB images `[B, 3, H, W]`, 0..255.
            targets: ground truth.
            teacher_output: the teacher's output on the same images, or those of several by name; None trains the student without
                one.
            share: number of images over the mean of the accumulated batches, see `DistillationCriterion.forward`.

        Returns:
            `loss`, the weighted total, and `terms`, every unweighted term, detached.
        """
        output = self.student(pixel_values, targets)
        loss, terms = self.criterion(output.task_losses, output, teacher_output, targets, share)
        return {"loss": loss, "terms": {name: term.detach() for name, term in terms.items()}}

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recomputes the student's activations in the backward pass; options as for the student itself."""
        self.student.model.activation_checkpointing_enable(**options)

    def activation_checkpointing_disable(self) -> None:
        """Keeps the student's activations again."""
        self.student.model.activation_checkpointing_disable()
