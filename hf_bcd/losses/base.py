"""Distillation losses: their common interface, and the pair of models that they are built for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec, Targets
from ..utils.messages import UserError
from .ops.functional import full_precision


CalibrationBatches = Sequence[tuple[DenseOutput, Targets]]  # the teacher's outputs on some training images
Progress = Callable[[Iterable[int]], Iterable[int]]  # wraps steps, e.g. in a progress bar


@dataclass(frozen=True)
class Pair:
    """Student and teacher, as far as a loss knows them before the first forward pass."""

    student: Mapping[str, FeatureSpec]  # feature levels, from fine to coarse
    teacher: Mapping[str, FeatureSpec]
    num_labels: int  # number of the student's classes
    head_levels: tuple[str, ...]  # the teacher's levels that its head reads
    seed: int = 0  # of whatever a loss draws at random

    @property
    def levels(self) -> list[str]:
        """The levels that both models have."""
        return [name for name in self.student if name in self.teacher]

    def level(self, name: str | None = None) -> str:
        """The level at which both models are compared: `name`, or the coarsest that both have.

        Raises:
            UserError: if the models have no level in common, or one of them lacks `name`.
        """
        if name is None and self.levels:
            return self.levels[-1]
        if name not in self.levels:
            raise UserError(
                f"level is {name!r}; student ({', '.join(self.student)}) and teacher ({', '.join(self.teacher)}) share "
                f"{', '.join(self.levels) or 'no level'}."
            )
        return name

    def channels(self, level: str) -> tuple[int, int]:
        """Channels of the student and of the teacher at a level."""
        return self.student[level].channels, self.teacher[level].channels


@cache
def references() -> dict[str, str]:
    """BibTeX entries of the methods, by key."""
    entries = (files("hf_bcd.losses") / "references.bib").read_text(encoding="utf-8").strip().split("\n\n")
    return {entry.partition("{")[2].partition(",")[0]: entry for entry in entries}


class _Citation:
    def __get__(self, instance: Any, owner: Any) -> str:
        return references()[owner.reference]


class _Source:
    def __get__(self, instance: Any, owner: Any) -> str:
        return owner.citation.partition("url={")[2].partition("}")[0]


class DistillationLoss(nn.Module, ABC):
    """A distillation method: named terms, unweighted, of two models' outputs.

    A subclass takes the pair and, by keyword, the options of a recipe. Each term is a mean over images of one number an
    image, so that ranks and accumulated batches add up to the whole batch, and 0 with a gradient where no pixel is
    valid. Statistics of a batch are those of all ranks; accumulated batches each have their own, as `checked` then says. Maths runs outside autocast, in float32 (float64 for float64 input).
    """

    # these five a class states for its default options; an instance whose options change them has its own
    weights: Mapping[str, float]  # term -> weight that belongs to its reduction
    shares: Mapping[str, float] = {}  # term -> share of the task's gradient that `weight: auto` aims at, where known
    borrowed: frozenset[str] = frozenset()  # other methods' terms; a recipe's single number leaves their weights alone
    # what it reads of `logits` (in the student's classes), `scores` (these in any), `features`, `labels`, `task_loss`, `head`
    # (the teacher's), and of detectors `dense`, `distributions`, `tower`, `queries`, `corners`, `classes` (these scores in the student's classes), `boxes` (true ones)
    needs: frozenset[str]
    decays: bool = False  # whether r(t) multiplies it unless a recipe says otherwise
    features: ClassVar[str] = (
        "backbone"  # whose levels it gets unless a recipe says otherwise; or `pyramid`, a detector's neck
    )
    # option -> losses that it hosts by default; a recipe names others, and the loss gets their criterion
    nested: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    transfers: ClassVar[str]  # the knowledge that it transfers, in a few words
    keeps: ClassVar[str] = ""  # state beside connectors: `discriminator`, `memory`, or nothing
    checked: ClassVar[str]  # what our version was compared with, and where it is our own reading
    reference: ClassVar[str]  # key of its BibTeX entry in references.bib, which has the address of the paper
    citation: ClassVar[Any] = _Citation()  # that entry, and the address; a method from elsewhere states its own
    source: ClassVar[Any] = _Source()

    def __init__(self, pair: Pair) -> None:
        super().__init__()

    @full_precision
    def __call__(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, **needed: Tensor
    ) -> dict[str, Tensor]:
        return super().__call__(student, teacher, targets, **needed)

    @abstractmethod
    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        """Unweighted terms of a batch; a loss that needs `task_loss` takes it by that name too.

        Args:
            student: the student's output.
            teacher: the teacher's output on the same images, at any resolution.
            targets: ground truth of the images.

        Returns:
            Term -> scalar with a graph.
        """

    def digest(self, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor] | None:
        """All that the loss reads of a teacher's output, where that is less than the output itself.

        The loss then works with `DenseOutput.digest` in the place of the rest, whose keys these are. What its student's side
        needs of the teacher's side lies in submodules named `teacher_...`.

        Returns:
            Key -> tensor `[B, ...]`, or None where the loss reads the output's own tensors.
        """
        return None

    def lost(self, exact: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        """What the loss notices of a codec of its digest: KL divergence in nat, a scalar.

        Args:
            exact: as `digest` gives it.
            kept: what a store gives back of it.
        """
        raise NotImplementedError

    @property
    def digested(self) -> dict[str, Any]:
        """The options that decide what `digest` gives."""
        return {}

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrate` must run before the first step."""
        return False

    def calibrate(self, batches: CalibrationBatches, progress: Progress = iter) -> None:
        """Prepares the loss from the teacher's outputs on some training images."""

    def after_step(self) -> None:
        """Ends an optimizer step, on all ranks at once: what the loss keeps across steps moves on."""


def check_positive(**options: float) -> None:
    """Raises a `UserError` that names the first option that is not a number > 0; float32 is to hold its reciprocal too."""
    for name, value in options.items():
        if not (is_number(value) and 1e-6 <= value <= 1e6):
            raise UserError(f"{name} is {value!r}; it must be a number > 0, between 1e-6 and 1e6.")


def check_weight(term: str, weight: float) -> None:
    """Raises a `UserError` that names a term whose weight is not a number, negative or so large that float32 loses the rest."""
    if not (is_number(weight) and 0 <= weight < 1e9):
        raise UserError(f"weight of {term} is {weight!r}; it must be a finite number >= 0, below 1e9.")


def is_number(value: object) -> bool:
    """Whether a value is a whole number or a float; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
