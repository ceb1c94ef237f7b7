"""What losses read of a teacher's output: all that a store needs to hold."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..losses import DistillationCriterion
from ..losses.base import DistillationLoss
from ..losses.criterion import teacher_of
from ..outputs import DenseOutput, Targets
from ..utils.messages import UserError


STORED = frozenset({"features", "logits", "classes", "pyramid", "labels", "boxes", "task_loss"})
"""What losses may need of a stored teacher, or beside it; the rest is a part of the teacher that runs."""


class _Noted(Mapping[str, Tensor]):
    """Levels that note which of them are read."""

    def __init__(self, levels: Mapping[str, Tensor], names: set[str], prefix: str) -> None:
        self.levels, self.names, self.prefix = levels, names, prefix

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(f"{self.prefix}/{name}")
        return self.levels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.levels)

    def __len__(self) -> int:
        return len(self.levels)


def check_storable(losses: Iterable[tuple[str, DistillationLoss]]) -> None:
    """Refuses losses that need the teacher itself.

    Raises:
        UserError: names the loss and what it needs.
    """
    for name, loss in losses:
        if live := sorted(loss.needs - STORED):
            raise UserError(
                f"loss {name!r} needs {', '.join(live)} of a teacher that runs, which no store can hold. Leave the store out "
                "and name the teacher, or choose another loss."
            )


def read_by(
    criterion: DistillationCriterion, output: DenseOutput, targets: Targets, student: DenseOutput | None = None
) -> dict[str, Tensor]:
    """The tensors of a teacher's output that the losses read, by the names of a store's columns.

    Args:
        criterion: calibrated losses of a pair in which the student has the teacher's levels, or of the real pair.
        output: of the teacher.
        targets: of the same images.
        student: the student's output for them, with a graph; None in a pair in which it has the teacher's levels.

    Returns:
        `logits`, `features/<level>`, `pyramid/<level>` and the keys of `DistillationLoss.digest`.
    """
    names, found = set[str](), dict[str, Tensor]()
    student = output_like(output, criterion) if student is None else student
    for name, loss in criterion.by_name().items():
        seen = criterion.seen_by(name, output)
        if (digest := loss.digest(seen, targets)) is not None:
            found |= digest
            continue
        if {"logits", "classes"} & loss.needs and output.logits is not None:
            names.add("logits")
        if "features" in loss.needs:
            prefix = "pyramid" if name in criterion.pyramids else "features"
            noted = replace(seen, features=_Noted(seen.features, names, prefix))  # type: ignore[arg-type]
            with torch.enable_grad():  # some losses take the gradient of a term
                copy.deepcopy(loss)(criterion.seen_by(name, student), noted, targets)
    return found | {name: tensor for name, tensor in tensors_of(output).items() if name in names}


def columns_of(
    criteria: Iterable[DistillationCriterion],
    output: DenseOutput,
    targets: Targets,
    names: Iterable[str],
    teacher: str = "",
) -> dict[str, Tensor]:
    """Columns of a store from a teacher's output, by name: those of `names` that it or the losses give.

    Args:
        criteria: with the losses that digest it.
        output: of the teacher.
        targets: of the same images.
        names: of the columns.
        teacher: its name, where the criteria have losses of several.
    """
    known, names = tensors_of(output), list(names)
    for criterion in criteria:
        for name, loss in criterion.by_name().items():
            if teacher_of(name) == teacher and any(key not in known for key in names):
                known |= loss.digest(criterion.seen_by(name, output), targets) or {}
    return {name: known[name] for name in names if name in known}


def output_like(output: DenseOutput, criterion: DistillationCriterion) -> DenseOutput:
    """A student's output of the right shapes for the criterion's losses, in the place of one that is not known yet."""
    grads = {
        key: {name: level.clone().requires_grad_() for name, level in getattr(output, key).items()}
        for key in ("features", "pyramid")
    }
    logits = None if output.logits is None else output.logits.clone().requires_grad_()
    return replace(output, logits=logits, digest={}, **grads)


def tensors_of(output: DenseOutput) -> dict[str, Tensor]:
    """The tensors of an output by the names of a store's columns."""
    levels = {f"{kind}/{name}": x for kind in ("features", "pyramid") for name, x in getattr(output, kind).items()}
    return levels | ({} if output.logits is None else {"logits": output.logits})
