"""The criterion gives loss terms their weights, and knows no method."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..outputs import DenseOutput, LabelMaps, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Progress, check_weight
from .modules.balance import GradientBalance, squared_gradients
from .modules.schedules import decay


class DistillationCriterion(nn.Module):
    """Turns named unweighted terms into one total: `task + sum of weight · r(t) · term`.

    Args:
        losses: name -> loss module; its terms are logged as `name/term`. With several teachers names are `teacher/loss`, see
            `join_teachers`.
        weights: name -> term -> weight, finite and >= 0.
        decays: names of the losses whose terms r(t) multiplies.
        shares: name -> term -> share of the task's gradient, for losses whose weights are measured, see
            `GradientBalance`; `weights` has their initial ones.
        num_labels: number of the student's classes, for label maps that come as plain tensors.
        pyramids: names of the losses whose features are the levels of the models' necks, not of their backbones.

    Raises:
        UserError: for a weight that is negative or not finite.

    Attributes:
        log_gradients: whether `gradient/<term>` comes with the terms: the norm of the gradient of each weighted term at
            the student's last stage.
    """

    decay: Tensor

    def __init__(
        self,
        losses: Mapping[str, DistillationLoss],
        weights: Mapping[str, Mapping[str, float]],
        decays: Iterable[str],
        shares: Mapping[str, Mapping[str, float]] | None = None,
        num_labels: int | None = None,
        pyramids: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.num_labels, self.pyramids = num_labels, frozenset(pyramids)
        self.losses: nn.ModuleDict = nn.ModuleDict(dict(losses))
        self.fixed_weights = _by_key(weights)
        for key, weight in self.fixed_weights.items():
            check_weight(key, weight)
        wanted = _by_key(shares or {})
        self.balance = None
        if wanted:
            self.balance = GradientBalance({key: self.fixed_weights.pop(key) for key in wanted}, wanted)
        self.log_gradients = False
        self.decays = frozenset(decays)
        # a buffer, so that a compiled step does not recompile when it changes; follows from the step, so not saved
        self.register_buffer("decay", torch.ones(()), persistent=False)

    def by_name(self) -> dict[str, DistillationLoss]:
        """The losses."""
        return cast(dict[str, DistillationLoss], dict(self.losses.items()))

    def forward(
        self,
        task_losses: Mapping[str, Tensor],
        student: DenseOutput,
        teacher: DenseOutput | Mapping[str, DenseOutput] | None,
        targets: Targets | Tensor,
        share: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted total and unweighted terms.

        Args:
            task_losses: supervised losses by name, weighted already.
            student: the student's output.
            teacher: the teacher's output, those of several by name, or None when nothing is distilled.
            targets: ground truth of the images; or their class ids `[B, H, W]`, void ones 255, which become `LabelMaps`.
            share: number of images over the mean number of the batches that are accumulated, which multiplies the terms.
                They are means over images, so each of a shorter batch would otherwise weigh more.

        Returns:
            The total (scalar) and every term by name (scalars with a graph); also `weight/<term>` where weights are
            measured, and `gradient/<term>` if `log_gradients` asks for them.

        Raises:
            UserError: for class ids that are no classes, see `LabelMaps`, or no whole numbers `[B, H, W]`.
        """
        targets = self._targets(targets)
        terms = dict(task_losses)
        total = task_loss = torch.stack(list(task_losses.values())).sum()
        if teacher is None:
            return total, terms
        weights, factors = self._weights(), {}
        for name, loss in self.by_name().items():
            factor = self.decay if name in self.decays else 1.0
            needed = {"task_loss": task_loss} if "task_loss" in loss.needs else {}
            pair = (self.seen_by(name, output) for output in (student, teacher))
            known = targets.labelled() if "labels" in loss.needs and isinstance(targets, LabelMaps) else targets
            for term, value in loss(*pair, known, **needed).items():
                key = f"{name}/{term}"
                terms[key], factors[key] = share * value, weights[key] * factor
                total = total + factors[key] * terms[key]
        if torch.is_grad_enabled() and (self.log_gradients or (self.balance is not None and self.balance.measuring)):
            terms |= self._observe_gradients(task_loss, terms, factors, student)
        if self.balance is not None:
            terms |= {f"weight/{key}": weight for key, weight in self.balance.by_term().items()}
        return total, terms

    def seen_by(self, name: str, output: DenseOutput | Mapping[str, DenseOutput]) -> DenseOutput:
        """An output as a loss gets it: of its own teacher, and with the levels of the neck as features if a recipe says so."""
        output = output if isinstance(output, DenseOutput) else output[teacher_of(name)]
        return replace(output, features=output.pyramid) if name in self.pyramids else output

    def _targets(self, targets: Targets | Tensor) -> Targets:
        if not isinstance(targets, Tensor):
            return targets
        if self.num_labels is None:
            raise ValueError("this criterion knows no num_labels; give LabelMaps(ids, num_labels) instead of ids.")
        if targets.dim() != 3 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            shape = "[" + ", ".join(map(str, targets.shape)) + "]"
            raise UserError(f"targets are {targets.dtype} {shape}; give class ids [B, H, W] of an integer type.")
        return LabelMaps(targets, self.num_labels)

    def _weights(self) -> dict[str, float | Tensor]:
        return self.fixed_weights | ({} if self.balance is None else self.balance.by_term())

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term in force, r(t) apart; measured ones wait for the device."""
        return {key: float(weight) for key, weight in self._weights().items()}

    def _observe_gradients(
        self,
        task_loss: Tensor,
        terms: Mapping[str, Tensor],
        factors: Mapping[str, float | Tensor],
        student: DenseOutput,
    ) -> dict[str, Tensor]:
        """Measures the gradients of this forward pass for the balance; returns the ones for the log."""
        last_stage = list(student.features.values())[-1]
        values = {"loss_task": task_loss} | {key: terms[key] for key in factors}
        squares = dict(zip(values, squared_gradients(values, last_stage).unbind(), strict=True))
        if self.balance is not None and self.balance.measuring:
            self.balance.observe(torch.stack([squares["loss_task"], *(squares[key] for key in self.balance.terms)]))
        if not self.log_gradients:
            return {}
        return {f"gradient/{key}": factors.get(key, 1.0) * square.sqrt() for key, square in squares.items()}

    def begin_step(self, step: int, total: int) -> None:
        """Sets r(t) for optimizer step `step` of `total`, counted from 1."""
        self.set_decay(step, total)
        if self.balance is not None:
            self.balance.begin_step(step, total)

    def set_decay(self, time: int, total: int) -> None:
        """Sets r(t) for time `time` of `total`, steps or epochs, counted from 1."""
        self.decay.fill_(decay(time, total))

    def after_step(self) -> None:
        """Ends an optimizer step in every loss."""
        for loss in [*self.by_name().values(), *([] if self.balance is None else [self.balance])]:
            loss.after_step()

    @property
    def needs_calibration(self) -> bool:
        return any(loss.needs_calibration for loss in self.by_name().values())

    def calibrate(
        self,
        batches: Sequence[tuple[DenseOutput | Mapping[str, DenseOutput], Targets | Tensor]],
        progress: Progress = iter,
    ) -> None:
        """Prepares every loss that needs it from the teacher's outputs on some training images, both as `forward` has them."""
        batches = [(teacher, self._targets(targets)) for teacher, targets in batches]
        for name, loss in self.by_name().items():
            if loss.needs_calibration:
                loss.calibrate([(self.seen_by(name, teacher), targets) for teacher, targets in batches], progress)


def teacher_of(name: str) -> str:
    """The teacher of a loss's name in a criterion; empty where there is only one."""
    return name.rpartition("/")[0]


def join_teachers(criteria: Mapping[str, DistillationCriterion]) -> DistillationCriterion:
    """One criterion of the criteria between a student and each of several teachers, by the teachers' names.

    Its total is the task's losses and the weighted terms of all; `forward` takes the teachers' outputs by the same names.
    """
    modules, weights, shares = {}, {}, {}
    for teacher, criterion in criteria.items():
        shared = (
            {}
            if criterion.balance is None
            else dict(zip(criterion.balance.terms, criterion.balance.shares.tolist(), strict=True))
        )
        for name, loss in criterion.by_name().items():
            key = f"{teacher}/{name}"
            modules[key] = loss
            for own, found in ((weights, criterion.weights), (shares, shared)):
                terms = {term.removeprefix(f"{name}/"): x for term, x in found.items() if term.startswith(f"{name}/")}
                if terms:
                    own[key] = terms
    named = [(f"{teacher}/", criterion) for teacher, criterion in criteria.items()]
    return DistillationCriterion(
        modules,
        weights,
        [prefix + name for prefix, criterion in named for name in criterion.decays],
        shares,
        num_labels=next((criterion.num_labels for criterion in criteria.values()), None),
        pyramids=[prefix + name for prefix, criterion in named for name in criterion.pyramids],
    )


def _by_key(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{name}/{term}": value for name, terms in values.items() for term, value in terms.items()}
