"""From a recipe's `losses` section to a criterion: the one file that knows all methods."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import torch

from ..outputs import FeatureSpec
from ..utils.messages import UserError, unknown_key_message
from .at import ATLoss
from .base import DistillationLoss, Pair, check_weight
from .bcd import BCDLoss
from .bglsseg import BGLSSegLoss
from .bpkd import BPKDLoss
from .c2vkd import C2VKDLoss
from .cirkd import CIRKDLoss
from .criterion import DistillationCriterion
from .crosskd import CrossKDLoss
from .cwd import CWDLoss
from .cwt import CWTLoss
from .ddf import DDFLoss
from .dist import DISTLoss
from .dsd import DSDLoss
from .fam import FAMLoss
from .fgd import FGDLoss
from .fitnet import FitNetLoss
from .gid import GIDLoss
from .ifd import IFDLoss
from .ifvd import IFVDLoss
from .kd import KDLoss
from .ld import LDLoss
from .mgd import MGDLoss
from .pkd import PKDLoss
from .query_kd import QueryKDLoss
from .sckd import SCKDLoss
from .skd import SKDLoss
from .slimseg import SlimSegLoss
from .sstkd import SSTKDLoss
from .tat import TATLoss


LOSSES: dict[str, type[DistillationLoss]] = {
    "at": ATLoss, "bcd": BCDLoss, "bglsseg": BGLSSegLoss, "bpkd": BPKDLoss, "c2vkd": C2VKDLoss, "cirkd": CIRKDLoss,
    "crosskd": CrossKDLoss, "cwd": CWDLoss, "cwt": CWTLoss, "dist": DISTLoss, "dsd": DSDLoss, "fam": FAMLoss,
    "ddf": DDFLoss, "fgd": FGDLoss, "fitnet": FitNetLoss, "gid": GIDLoss, "ifd": IFDLoss, "ifvd": IFVDLoss, "kd": KDLoss,
    "ld": LDLoss, "mgd": MGDLoss, "pkd": PKDLoss, "query_kd": QueryKDLoss, "sckd": SCKDLoss, "skd": SKDLoss, "slimseg": SlimSegLoss, "sstkd": SSTKDLoss, "tat": TATLoss,
}  # fmt: skip
# every student and teacher offer these of what a loss may need, see `DistillationLoss.needs`; and all of label maps
OFFERED_BY_ALL = frozenset({"features", "labels", "task_loss"})
ALWAYS_OFFERED = OFFERED_BY_ALL | {"logits"}
# of what a loss may need, the words that say what it is
NEEDS = {
    "logits": "scores of each pixel, which are compared class by class",
    "head": "that of the teacher as a function of its feature levels, which SegFormer, UperNet and timm segmenters have",
    "task_loss": "with its graph, which torch_compile hides",
    "boxes": "true boxes",
    "classes": "scores of boxes, which are compared class by class",
    "dense": "scores and boxes at the same priors, which two RetinaNets or two GFLs have",
    "final_boxes": "what a model in two stages finds, such as Mask R-CNN",
    "distributions": "of distances to a box's sides, which GFL has",
    "tower": "the convolutions before a detector's scores, which RetinaNet and GFL have, as many and as wide in both",
    "queries": "of two models of the DETR kind, whose classes exclude each other in both (DETR) or in neither",
    "mask_queries": "of two models that answer by masks and classes, such as Mask2Former",
    "corners": "D-FINE's distributions on one scale",
    "pyramid": "levels of a detector's neck",
}
# names of what an option may be, for messages
TYPES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a name", Sequence: "a list of names",
    NoneType: "null",
}  # fmt: skip
COMMON = ("weight", "decay", "features", "optional")  # options of every loss
LARGEST = 2**16  # of a number in an option: beyond it there is no tensor, or no end of time
# a loss is built for these once, on the meta device, before anybody knows the models: its options must suit one of them
_LEVELS = {name: FeatureSpec(1, 8) for name in ("stem", "stride_4", "stride_8", "stride_16", "stride_32")}
_PYRAMID = {f"p{level}": FeatureSpec(1, 8) for level in range(2, 8)}
_PROBES = {
    pyramid: [Pair(levels, levels, num_labels, tuple(levels)) for num_labels in (1, 2**16)]
    for pyramid, levels in ((False, _LEVELS), (True, _PYRAMID))
}


@dataclass(frozen=True)
class LossOptions:
    """A loss as a recipe asks for it; all of it is checked. Its needs, weights and decay are those of an instance."""

    name: str
    cls: type[DistillationLoss]
    options: Mapping[str, Any]  # arguments of the class beside the pair; nested losses are read as well
    needs: frozenset[str]
    weights: Mapping[str, float]
    decays: bool
    measured: bool  # whether weights are measured in training, after which `weights` no longer hold
    pyramid: bool = False  # whether its features are the levels of a detector's neck
    optional: bool = False  # whether it is left out where student and teacher cannot serve it

    def build(self, pair: Pair) -> DistillationLoss:
        """The loss between two models."""
        return _build(self.name, self.cls, self.options, pair)


Losses = Mapping[str, Mapping[str, Any] | LossOptions | None]


def read_losses(losses: Losses) -> dict[str, LossOptions]:
    """Reads a recipe's `losses` section, see `build_criterion`; losses that are read already stay as they are.

    Raises:
        UserError: for an unknown loss, option or term (naming the nearest known one), an option of another type than
            the loss declares or out of its range, a bad weight or decay, or weights that are all 0.
    """
    if not isinstance(losses, Mapping):
        raise UserError(
            f"losses is {losses!r}; it must map losses to options, as in {{cwd: {{temperature: 4}}, bcd: {{}}}}."
        )
    found = {name: _read(name, given) for name, given in losses.items()}
    if found and not any(weight for loss in found.values() for weight in loss.weights.values()):
        raise UserError(
            f"losses is {losses}: no term has a weight above 0, so the teacher would teach nothing. Leave the teacher "
            "out to train without distillation."
        )
    return found


def by_teacher(losses: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A recipe's `losses` section by the names of teachers, as it stands; all of it under "" if it names none.

    Raises:
        UserError: some losses belong to a teacher and others to none, or a teacher has none.
    """
    options = set(COMMON).union(*(options_of(cls) for cls in LOSSES.values()))

    def of_teacher(key: Any, value: Any) -> bool:
        if key in LOSSES or not isinstance(value, Mapping) or not value:
            return False
        return not value.keys() & options and all(
            isinstance(own, Mapping | LossOptions | None) for own in value.values()
        )

    named = [key for key, value in losses.items() if of_teacher(key, value)] if isinstance(losses, Mapping) else []
    if not named:
        return {"": losses}
    if mixed := [key for key in losses if key in LOSSES]:
        raise UserError(
            f"losses has {', '.join(mixed)} for all teachers beside the parts of {', '.join(named)}; give each teacher its own."
        )
    for key, value in losses.items():
        if not isinstance(value, Mapping) or not value:
            raise UserError(
                f"losses of the teacher {key!r} are {value!r}; give it some, as in {{{key}: {{cwd: {{}}}}}}."
            )
    return {str(key): value for key, value in losses.items()}


def served(losses: Losses, offers: frozenset[str]) -> dict[str, LossOptions]:
    """The losses without optional ones that need what student and teacher do not offer."""
    return {name: loss for name, loss in read_losses(losses).items() if not loss.optional or loss.needs <= offers}


def check_needs(losses: Losses, offers: frozenset[str]) -> None:
    """Refuses losses that need what student and teacher do not offer, unless they are optional.

    Raises:
        UserError: names the loss, what it needs and what to do; or there is no loss left.
    """
    found = served(losses, offers)
    if losses and not found:
        raise UserError(
            f"all of the losses {', '.join(losses)} are optional, and student and teacher serve none of them. "
            f"Choose another loss: {', '.join(others_that_serve(offers))}."
        )
    for name, loss in found.items():
        if missing := sorted(loss.needs - offers):
            others = others_that_serve(offers)
            words = "; ".join(f"`{need}`: {NEEDS[need]}" for need in missing if need in NEEDS)
            raise UserError(
                f"loss {name!r} needs {', '.join(missing)}, but student and teacher only offer "
                f"{', '.join(sorted(offers))} ({words}). Choose another teacher or setting, or another loss: {', '.join(others)}."
            )


def serving_options(name: str, offers: frozenset[str]) -> dict[str, str] | None:
    """The options with which a loss needs no more than this: none or one of its choices, or None where nothing helps."""
    choices = {key: get_args(parameter.annotation) for key, parameter in _parameters(LOSSES[name]).items()
               if get_origin(parameter.annotation) is Literal}  # fmt: skip
    variants = [{}, *({key: value} for key, values in choices.items() for value in values)]
    return next((options for options in variants if _read(name, options).needs <= offers), None)


def others_that_serve(offers: frozenset[str]) -> list[str]:
    """The losses that need no more than this, as a recipe names them, with the option that makes them so."""
    found = {name: serving_options(name, offers) for name in LOSSES}
    return [
        name + "".join(f" ({key}: {value})" for key, value in options.items())
        for name, options in found.items()
        if options is not None
    ]


def build_criterion(
    losses: Losses,
    student_specs: Mapping[str, FeatureSpec],
    teacher_specs: Mapping[str, FeatureSpec],
    *,
    num_labels: int,
    seed: int = 0,
    offers: frozenset[str] = ALWAYS_OFFERED,
    head_levels: Sequence[str] | None = None,
    pyramids: tuple[Mapping[str, FeatureSpec], Mapping[str, FeatureSpec]] = ({}, {}),
) -> DistillationCriterion:
    """Builds the criterion of a recipe's `losses` section.

    Args:
        losses: name -> options of that loss, plus `weight` (a number for its own terms, one for each, or for some losses
            `auto`), `decay` (whether r(t) multiplies it), `features` (`backbone`, or `pyramid`: of a detector) and `optional`
            (whether it is left out where `offers` lack what it needs), e.g.
            `{"bcd": {"radius": 5, "weight": {"boundary": 3, "context": 1}}}`; or what `read_losses` made of it.
        student_specs: feature levels of the student.
        teacher_specs: feature levels of the teacher.
        num_labels: number of the student's classes.
        seed: seed of whatever a loss draws at random.
        offers: what student and teacher have of what losses may need, see `DistillationLoss.needs`.
        head_levels: the teacher's levels that its head reads; all of them by default.
        pyramids: levels of the student's and of the teacher's neck.

    Raises:
        UserError: as `read_losses` and `check_needs`, or for a level that the models do not have.
    """
    parsed = read_losses(losses)
    check_needs(parsed, offers)
    parsed = served(parsed, offers)
    levels = tuple(teacher_specs if head_levels is None else head_levels)
    pair = Pair(student_specs, teacher_specs, num_labels, levels, seed)
    return _criterion(parsed, pair, replace(pair, student=pyramids[0], teacher=pyramids[1]))


def options_of(cls: type[DistillationLoss]) -> dict[str, Any]:
    """The options of a loss in a recipe, and their defaults."""
    return {key: parameter.default for key, parameter in _parameters(cls).items()} | dict(cls.nested)


def _parameters(cls: type[DistillationLoss]) -> dict[str, inspect.Parameter]:
    return {key: value for key, value in inspect.signature(cls).parameters.items() if key != "pair"}


def _criterion(losses: Mapping[str, LossOptions], pair: Pair, pyramid: Pair | None = None) -> DistillationCriterion:
    modules = {name: loss.build(pyramid if loss.pyramid and pyramid else pair) for name, loss in losses.items()}
    return DistillationCriterion(
        modules,
        {name: loss.weights for name, loss in losses.items()},
        [name for name, loss in losses.items() if loss.decays],
        {name: modules[name].shares for name, loss in losses.items() if loss.measured},
        num_labels=pair.num_labels,
        pyramids=[name for name, loss in losses.items() if loss.pyramid],
    )


def _build(name: str, cls: type[DistillationLoss], options: Mapping[str, Any], pair: Pair) -> DistillationLoss:
    hosts = {key: _criterion(options[key], pair) for key in cls.nested}
    try:
        return cls(pair, **{**options, **hosts})
    except UserError as error:
        raise UserError(f"loss {name!r}: {error}") from error


def _read(name: str, given: Mapping[str, Any] | LossOptions | None) -> LossOptions:
    if isinstance(given, LossOptions):
        return given
    if name not in LOSSES:
        raise UserError(unknown_key_message("loss", name, LOSSES))
    if not isinstance(given, Mapping | None):
        raise UserError(f"options of loss {name!r} are {given!r}; they must be a mapping, as in {{weight: 2}}.")
    cls = LOSSES[name]
    options = dict(cls.nested) | dict(given or {})
    optional: Any = options.pop("optional", False)
    decay: Any = options.pop("decay", None)
    weight = options.pop("weight", {})
    features = options.pop("features", cls.features)
    if features not in ("backbone", "pyramid"):
        raise UserError(f"features of loss {name!r} is {features!r}; choose backbone or pyramid.")
    parameters = _parameters(cls)
    for key, value in options.items():
        if key not in parameters:
            raise UserError(unknown_key_message(f"option of loss {name!r}", key, {*parameters, *COMMON}))
        if key in cls.nested:
            if not (isinstance(value, Mapping) and value):
                raise UserError(f"{key} of loss {name!r} is {value!r}; it must map losses to options: {{ifvd: {{}}}}.")
            options[key] = {host: _read(host, own) for host, own in value.items()}
        else:
            _check_type(name, key, value, parameters[key].annotation)
    pyramid = features == "pyramid"
    probe = _probe(name, cls, options, pyramid)
    decay = probe.decays if decay is None else decay
    for key, value in (("decay", decay), ("optional", optional)):
        if not isinstance(value, bool):
            raise UserError(f"{key} of loss {name!r} is {value!r}; it must be true or false.")
    measured = weight == "auto"
    if measured and not probe.shares:
        others = ", ".join(other for other, cls in LOSSES.items() if cls.shares)
        raise UserError(f"weight of loss {name!r} is 'auto', which only {others} can have; give it a number.")
    weights = _term_weights(name, probe, {} if measured else weight)
    needs = probe.needs | ({"pyramid"} if pyramid else set())
    return LossOptions(name, cls, options, needs, weights, decay, measured, pyramid, optional)


def _probe(name: str, cls: type[DistillationLoss], options: Mapping[str, Any], pyramid: bool) -> DistillationLoss:
    """An instance without storage, for what it says of itself."""
    refusals = []
    for pair in _PROBES[pyramid]:
        try:
            with torch.device("meta"):
                return _build(name, cls, options, pair)
        except UserError as error:
            refusals.append(error)
    raise refusals[0]


def _check_type(name: str, key: str, value: Any, annotation: Any) -> None:
    kinds = [get_origin(a) or a for a in (get_args(annotation) if isinstance(annotation, UnionType) else [annotation])]
    if Literal in kinds:  # the loss itself names what there is to choose from
        return
    accepted = tuple(kinds + [int] * (float in kinds))
    names = isinstance(value, Sequence) and Sequence in kinds and str not in kinds
    wrong_list = names and (
        isinstance(value, str | bytes) or not value or not all(isinstance(entry, str) for entry in value)
    )
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, accepted) or wrong_list:
        wanted = " or ".join(TYPES[kind] for kind in kinds)
        raise UserError(f"{key} of loss {name!r} is {value!r}; it must be {wanted}.")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise UserError(f"{key} of loss {name!r} is {value!r}; it must be between {-LARGEST} and {LARGEST}.")


def _term_weights(name: str, loss: DistillationLoss, weight: Any) -> dict[str, float]:
    weights = dict(loss.weights)
    own = [term for term in weights if term not in loss.borrowed]
    given: Mapping[str, Any] = weight if isinstance(weight, Mapping) else dict.fromkeys(own, weight)
    for term in given:
        if term not in weights:
            raise UserError(unknown_key_message(f"term of loss {name!r}", term, weights))
    weights.update(given)
    for term, value in weights.items():
        check_weight(f"{name}/{term}", value)
    return weights
