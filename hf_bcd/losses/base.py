"""What every distillation method states about itself and offers to the criterion."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..outputs import DenseOutput


class DistillationLoss(nn.Module, ABC):
    """A distillation method: named terms, unweighted, of two models' outputs.

    A subclass takes what it needs of `student_specs`, `teacher_specs`, `num_labels`, `ignore_index` and `seed` as
    arguments of these names; its other arguments are the options of a recipe. Each term is a mean over images of one
    number an image, so that ranks and accumulated batches add up to the whole batch, and 0 with a gradient where no
    pixel is valid. Maths runs outside autocast, in float32 (float64 for float64 input).

    Attributes:
        weights: term -> weight that belongs to its reduction.
        shares: term -> share of the task's gradient that `weight: auto` aims at; empty where nothing is known of it.
        borrowed: terms of other methods that it goes with; a recipe's single number leaves their weights alone.
        needs: which of `logits` (in the student's classes), `features`, `labels`, `task_loss` and `head` (the teacher's,
            as a function of its levels) it reads with the default options.
        decays: whether r(t) multiplies it unless a recipe says otherwise.
        transfers: the knowledge that it transfers, in a few words.
        keeps: what it has beside connectors: `discriminator`, `memory`, or nothing.
        source: address of the paper.
        checked: what our version was compared with, and where it is our own reading.
        citation: BibTeX entry.
    """

    weights: ClassVar[Mapping[str, float]]
    shares: ClassVar[Mapping[str, float]] = {}
    borrowed: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]]
    decays: ClassVar[bool] = False
    transfers: ClassVar[str]
    keeps: ClassVar[str] = ""
    source: ClassVar[str]
    checked: ClassVar[str]
    citation: ClassVar[str]

    @classmethod
    def default_weights(cls, **options: Any) -> dict[str, float]:
        """The weight of every term that the loss has with these options."""
        return dict(cls.weights)

    @classmethod
    def needed(cls, **options: Any) -> frozenset[str]:
        """What the loss needs with these options."""
        return cls.needs

    @classmethod
    def decays_with(cls, **options: Any) -> bool:
        """Whether r(t) multiplies the loss unless a recipe says otherwise, with these options."""
        return cls.decays

    @abstractmethod
    def forward(self, student: DenseOutput, teacher: DenseOutput, labels: Tensor) -> dict[str, Tensor]:
        """Unweighted terms of a batch; a loss that needs `task_loss` takes it by that name too.

        Args:
            student: the student's output.
            teacher: the teacher's output on the same images, at any resolution.
            labels: class ids `[B, H, W]` at input resolution, `ignore_index` where void.

        Returns:
            Term -> scalar with a graph.
        """

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrate` must run before the first step."""
        return False

    def calibrate(
        self,
        batches: list[tuple[DenseOutput, Tensor]],
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """Prepares the loss from the teacher's outputs and the label maps `[B, H, W]` of some training images."""

    def after_step(self) -> None:
        """Ends an optimizer step, on all ranks at once: what the loss keeps across steps moves on."""


def check_positive(**options: float) -> None:
    """Raises a `ValueError` that names the first option that is not > 0."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} is {value!r}; it must be > 0.")
