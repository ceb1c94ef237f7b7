"""The one place where loss terms get their weights."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec
from .base import DistillationLoss
from .bcd import BCDLoss
from .cwd import CWDLoss
from .kd import KDLoss


LOSSES: dict[str, type[DistillationLoss]] = {
    "bcd": BCDLoss,
    "cwd": CWDLoss,
    "kd": KDLoss,
}
TASK_WEIGHTS = {"loss_task": 1.0, "loss_auxiliary": 0.4}


def unknown_key_message(kind: str, key: str, known: Iterable[str]) -> str:
    """An error message that names the nearest known key."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {key!r}.{hint} Known: {', '.join(known)}."


class DistillationCriterion(nn.Module):
    """Turns named unweighted terms into one total: `task + sum of weight · r(t) · term`.

    Args:
        losses: name -> loss module; its terms are logged as `name/term`.
        weights: name -> term -> weight, finite and >= 0.
        decays: names of the losses whose terms r(t) multiplies.
    """

    decay: Tensor

    def __init__(
        self, losses: Mapping[str, DistillationLoss], weights: Mapping[str, Mapping[str, float]], decays: Iterable[str]
    ) -> None:
        super().__init__()
        self.losses: nn.ModuleDict = nn.ModuleDict(dict(losses))
        self.weights = {f"{name}/{term}": weight for name, terms in weights.items() for term, weight in terms.items()}
        self.decays = frozenset(decays)
        # a buffer, so that a compiled step does not recompile when it changes; follows from the step, so not saved
        self.register_buffer("decay", torch.ones(()), persistent=False)

    def forward(
        self, task_losses: Mapping[str, Tensor], student: DenseOutput, teacher: DenseOutput | None, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted total and unweighted terms.

        Args:
            task_losses: supervised losses by name: `loss_task`, and `loss_auxiliary`, which counts 0.4 as in PSPNet.
            student: the student's output.
            teacher: the teacher's output, or None when nothing is distilled.
            labels: `[B, H, W]`.

        Returns:
            The total (scalar) and every term by name (scalars with a graph).
        """
        terms = dict(task_losses)
        total = torch.stack([TASK_WEIGHTS[name] * value for name, value in task_losses.items()]).sum()
        if teacher is None:
            return total, terms
        for name, loss in self.losses.items():
            factor = self.decay if name in self.decays else 1.0
            for term, value in loss(student, teacher, labels).items():
                key = f"{name}/{term}"
                terms[key] = value
                total = total + self.weights[key] * factor * value
        return total, terms

    def after_step(self) -> None:
        """Ends an optimizer step in every loss."""
        for loss in self.losses.values():
            loss.after_step()  # type: ignore[operator]

    @property
    def needs_calibration(self) -> bool:
        return any(loss.needs_calibration for loss in self.losses.values())

    def calibrate(
        self,
        batches: list[tuple[DenseOutput, Tensor]],
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """Prepares every loss that needs it from the teacher's outputs on training images."""
        for loss in self.losses.values():
            if loss.needs_calibration:
                loss.calibrate(batches, progress)  # type: ignore[operator]


def build_criterion(
    losses: Mapping[str, Mapping[str, Any] | None],
    student_specs: Mapping[str, FeatureSpec],
    teacher_specs: Mapping[str, FeatureSpec],
    *,
    num_labels: int,
    ignore_index: int = 255,
    seed: int = 0,
) -> DistillationCriterion:
    """Builds the criterion of a recipe's `losses` section.

    Args:
        losses: name -> options of that loss, plus `weight` (a number for all terms or a number for each) and `decay`
            (whether r(t) multiplies it), e.g. `{"bcd": {"radius": 5, "weight": {"boundary": 3, "context": 1}}}`.
        student_specs: feature levels of the student.
        teacher_specs: feature levels of the teacher.
        num_labels: number of the student's classes.
        ignore_index: void label.
        seed: seed of whatever a loss draws at random.

    Raises:
        ValueError: for an unknown loss, option or term (naming the nearest known one) or a weight that is not a finite
            number >= 0.
    """
    context = {
        "student_specs": student_specs,
        "teacher_specs": teacher_specs,
        "num_labels": num_labels,
        "ignore_index": ignore_index,
        "seed": seed,
    }
    modules: dict[str, DistillationLoss] = {}
    weights: dict[str, dict[str, float]] = {}
    decays = []
    for name, given in losses.items():
        if name not in LOSSES:
            raise ValueError(unknown_key_message("loss", name, LOSSES))
        cls, options = LOSSES[name], dict(given or {})
        weight, decay = options.pop("weight", {}), options.pop("decay", cls.decays)
        parameters = set(inspect.signature(cls).parameters)
        known = parameters - set(context)
        for key in options:
            if key not in known:
                raise ValueError(unknown_key_message(f"option of loss {name!r}", key, known | {"weight", "decay"}))
        if not isinstance(decay, bool):
            raise ValueError(f"decay of loss {name!r} is {decay!r}; it must be true or false.")
        modules[name] = cls(**{key: value for key, value in context.items() if key in parameters}, **options)
        weights[name] = _term_weights(name, cls, weight, options)
        if decay:
            decays.append(name)
    return DistillationCriterion(modules, weights, decays)


def _term_weights(name: str, cls: type[DistillationLoss], weight: Any, options: Mapping[str, Any]) -> dict[str, float]:
    weights = cls.default_weights(**options)
    given: Mapping[str, Any] = weight if isinstance(weight, Mapping) else dict.fromkeys(weights, weight)
    for term in given:
        if term not in weights:
            raise ValueError(unknown_key_message(f"term of loss {name!r}", term, weights))
    weights.update(given)
    for term, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"weight of {name}/{term} is {value!r}; it must be a finite number >= 0.")
    return weights
