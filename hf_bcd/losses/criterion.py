"""The one place where loss terms get their weights."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec
from .at import ATLoss
from .balance import GradientBalance, squared_gradients
from .base import DistillationLoss
from .bcd import BCDLoss
from .bglsseg import BGLSSegLoss
from .bpkd import BPKDLoss
from .c2vkd import C2VKDLoss
from .cirkd import CIRKDLoss
from .crosskd import CrossKDLoss
from .cwd import CWDLoss
from .cwt import CWTLoss
from .dist import DISTLoss
from .dsd import DSDLoss
from .fam import FAMLoss
from .fgd import FGDLoss
from .fitnet import FitNetLoss
from .ifd import IFDLoss
from .ifvd import IFVDLoss
from .kd import KDLoss
from .mgd import MGDLoss
from .pkd import PKDLoss
from .schedules import decay
from .sckd import SCKDLoss
from .skd import SKDLoss
from .slimseg import SlimSegLoss
from .sstkd import SSTKDLoss
from .tat import TATLoss


LOSSES: dict[str, type[DistillationLoss]] = {
    "at": ATLoss,
    "bcd": BCDLoss,
    "bglsseg": BGLSSegLoss,
    "bpkd": BPKDLoss,
    "c2vkd": C2VKDLoss,
    "cirkd": CIRKDLoss,
    "crosskd": CrossKDLoss,
    "cwd": CWDLoss,
    "cwt": CWTLoss,
    "dist": DISTLoss,
    "dsd": DSDLoss,
    "fam": FAMLoss,
    "fgd": FGDLoss,
    "fitnet": FitNetLoss,
    "ifd": IFDLoss,
    "ifvd": IFVDLoss,
    "kd": KDLoss,
    "mgd": MGDLoss,
    "pkd": PKDLoss,
    "sckd": SCKDLoss,
    "skd": SKDLoss,
    "slimseg": SlimSegLoss,
    "sstkd": SSTKDLoss,
    "tat": TATLoss,
}
# what a loss may need, see `DistillationLoss.needs`, of any student and teacher
ALWAYS_OFFERED = frozenset({"features", "labels", "logits", "task_loss"})
# what `build_criterion` knows and a loss takes by these names
CONTEXT = ("student_specs", "teacher_specs", "head_levels", "num_labels", "ignore_index", "seed")
# how a message calls what an option may be
TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name",
    Sequence: "a list of names",
    NoneType: "null",
}


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
        shares: name -> term -> share of the task's gradient, for losses whose weights are measured, see
            `GradientBalance`; `weights` has their initial ones.

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
    ) -> None:
        super().__init__()
        self.losses: nn.ModuleDict = nn.ModuleDict(dict(losses))
        self.fixed_weights = _by_key(weights)
        wanted = _by_key(shares or {})
        self.balance = None
        if wanted:
            self.balance = GradientBalance({key: self.fixed_weights.pop(key) for key in wanted}, wanted)
        self.log_gradients = False
        self.decays = frozenset(decays)
        # a buffer, so that a compiled step does not recompile when it changes; follows from the step, so not saved
        self.register_buffer("decay", torch.ones(()), persistent=False)

    def forward(
        self,
        task_losses: Mapping[str, Tensor],
        student: DenseOutput,
        teacher: DenseOutput | None,
        labels: Tensor,
        share: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted total and the terms, those of distillation unweighted.

        Args:
            task_losses: supervised losses by name, such as `loss_task` and `loss_auxiliary`, weighted already as the
                authors of the student's family do; they are added up and come back as they are.
            student: the student's output.
            teacher: the teacher's output, or None when nothing is distilled.
            labels: `[B, H, W]`.
            share: number of images over the mean number of the batches that are accumulated, which multiplies the terms.
                They are means over images, so each of a shorter batch would otherwise weigh more.

        Returns:
            The total (scalar) and every term by name (scalars with a graph); also `weight/<term>` where weights are
            measured, and `gradient/<term>` if `log_gradients` asks for them.
        """
        terms = dict(task_losses)
        total = task_loss = torch.stack(list(task_losses.values())).sum()
        if teacher is None:
            return total, terms
        weights, factors = self._weights(), {}
        for name, loss in self.losses.items():
            factor = self.decay if name in self.decays else 1.0
            needed = {"task_loss": task_loss} if "task_loss" in loss.needs else {}  # type: ignore[operator]
            for term, value in loss(student, teacher, labels, **needed).items():
                key = f"{name}/{term}"
                terms[key], factors[key] = share * value, weights[key] * factor
                total = total + factors[key] * terms[key]
        if torch.is_grad_enabled() and (self.log_gradients or (self.balance is not None and self.balance.measuring)):
            terms |= self._observe_gradients(task_loss, terms, factors, student)
        if self.balance is not None:
            terms |= {f"weight/{key}": weight for key, weight in self.balance.by_term().items()}
        return total, terms

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
        """Measures the gradients of this forward pass for the balance; returns those for the log."""
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
        self.decay.fill_(decay(step, total))
        if self.balance is not None:
            self.balance.begin_step(step, total)

    def after_step(self) -> None:
        """Ends an optimizer step in every loss."""
        for loss in [*self.losses.values(), *([] if self.balance is None else [self.balance])]:
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


class LossOptions(NamedTuple):
    """A loss as a recipe asks for it.

    Attributes:
        cls: its class.
        options: arguments of the class beside the context.
        weights: term -> weight.
        decays: whether r(t) multiplies its terms.
        measured: whether the weights are only the first ones, until they are measured.
    """

    cls: type[DistillationLoss]
    options: dict[str, Any]
    weights: dict[str, float]
    decays: bool
    measured: bool


def read_losses(losses: Mapping[str, Mapping[str, Any] | None]) -> dict[str, LossOptions]:
    """Reads a recipe's `losses` section, see `build_criterion`.

    Raises:
        ValueError: for an unknown loss, option or term (naming the nearest known one), an option of another type than
            the loss declares, or a bad weight or decay.
    """
    if not isinstance(losses, Mapping):
        raise ValueError(
            f"losses is {losses!r}; it must map losses to options, as in {{cwd: {{temperature: 4}}, bcd: {{}}}}."
        )
    found = {}
    for name, given in losses.items():
        if name not in LOSSES:
            raise ValueError(unknown_key_message("loss", name, LOSSES))
        if not isinstance(given, Mapping | None):
            raise ValueError(f"options of loss {name!r} are {given!r}; they must be a mapping, as in {{weight: 2}}.")
        cls, options = LOSSES[name], dict(given or {})
        weight, decay = options.pop("weight", {}), options.pop("decay", None)
        parameters = inspect.signature(cls).parameters
        known = set(parameters) - set(CONTEXT)
        for key, value in options.items():
            if key not in known:
                raise ValueError(unknown_key_message(f"option of loss {name!r}", key, known | {"weight", "decay"}))
            _check_type(name, key, value, parameters[key].annotation)
        decay = cls.decays_with(**options) if decay is None else decay
        if not isinstance(decay, bool):
            raise ValueError(f"decay of loss {name!r} is {decay!r}; it must be true or false.")
        measured = weight == "auto"
        if measured and not cls.shares:
            others = ", ".join(other for other, cls in LOSSES.items() if cls.shares)
            raise ValueError(f"weight of loss {name!r} is 'auto', which only {others} can have; give it a number.")
        weights = _term_weights(name, cls, {} if measured else weight, options)
        found[name] = LossOptions(cls, options, weights, decay, measured)
    return found


def check_needs(losses: Mapping[str, Mapping[str, Any] | None], offers: frozenset[str]) -> None:
    """Refuses losses that need what student and teacher do not offer.

    Raises:
        ValueError: names the loss, what it needs and what to do.
    """
    for name, loss in read_losses(losses).items():
        if missing := sorted(loss.cls.needed(**loss.options) - offers):
            others = [other for other, cls in LOSSES.items() if cls.needs <= offers]
            raise ValueError(
                f"loss {name!r} needs {', '.join(missing)}, but student and teacher offer {', '.join(sorted(offers))} "
                "alone (`head`: that of the teacher as a function of its feature levels, which SegFormer, UperNet and timm "
                "models have; `task_loss`: with its graph, which torch_compile hides). Choose another teacher or "
                f"setting, or another loss: {', '.join(others)}."
            )


def build_criterion(
    losses: Mapping[str, Mapping[str, Any] | None],
    student_specs: Mapping[str, FeatureSpec],
    teacher_specs: Mapping[str, FeatureSpec],
    *,
    num_labels: int,
    ignore_index: int = 255,
    seed: int = 0,
    offers: frozenset[str] = ALWAYS_OFFERED,
    head_levels: Sequence[str] | None = None,
) -> DistillationCriterion:
    """Builds the criterion of a recipe's `losses` section.

    Args:
        losses: name -> options of that loss, plus `weight` (a number for its own terms, one for each, or for some losses
            `auto`) and `decay` (whether r(t) multiplies it), e.g. `{"bcd": {"radius": 5, "weight": {"boundary": 3, "context": 1}}}`.
        student_specs: feature levels of the student.
        teacher_specs: feature levels of the teacher.
        num_labels: number of the student's classes.
        ignore_index: void label.
        seed: seed of whatever a loss draws at random.
        offers: what student and teacher have of what losses may need, see `DistillationLoss.needs`.
        head_levels: the teacher's levels that its head reads; all of them by default.

    Raises:
        ValueError: for an unknown loss, option or term (naming the nearest known one), a weight that is not a finite
            number >= 0, or a loss that needs something beside `offers`.
    """
    check_needs(losses, offers)
    context = {
        "student_specs": student_specs,
        "teacher_specs": teacher_specs,
        "head_levels": head_levels,
        "num_labels": num_labels,
        "ignore_index": ignore_index,
        "seed": seed,
    }
    modules, weights, decays, shares = {}, {}, [], {}
    for name, loss in read_losses(losses).items():
        parameters = inspect.signature(loss.cls).parameters
        modules[name] = loss.cls(**{key: context[key] for key in CONTEXT if key in parameters}, **loss.options)
        weights[name] = loss.weights
        if loss.decays:
            decays.append(name)
        if loss.measured:
            shares[name] = loss.cls.shares
    return DistillationCriterion(modules, weights, decays, shares)


def _by_key(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{name}/{term}": value for name, terms in values.items() for term, value in terms.items()}


def _check_type(name: str, key: str, value: Any, annotation: Any) -> None:
    kinds = [get_origin(a) or a for a in (get_args(annotation) if isinstance(annotation, UnionType) else [annotation])]
    if Literal in kinds or Mapping in kinds:  # the loss itself names what there is to choose from
        return
    accepted = tuple(kinds + [int] * (float in kinds))
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, accepted):
        wanted = " or ".join(TYPES[kind] for kind in kinds)
        raise ValueError(f"{key} of loss {name!r} is {value!r}; it must be {wanted}.")


def _term_weights(name: str, cls: type[DistillationLoss], weight: Any, options: Mapping[str, Any]) -> dict[str, float]:
    weights = cls.default_weights(**options)
    own = [term for term in weights if term not in cls.borrowed]
    given: Mapping[str, Any] = weight if isinstance(weight, Mapping) else dict.fromkeys(own, weight)
    for term in given:
        if term not in weights:
            raise ValueError(unknown_key_message(f"term of loss {name!r}", term, weights))
    weights.update(given)
    for term, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"weight of {name}/{term} is {value!r}; it must be a finite number >= 0.")
    return weights
