"""What losses read of a teacher's output: all that a store needs to hold."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..losses import DistillationCriterion
from ..losses.base import DistillationLoss
from ..losses.criterion import teacher_of
from ..losses.query_kd import teacher_answers
from ..outputs import DenseOutput, Queries, Targets
from ..utils.messages import UserError


STORED = frozenset(
    {"features", "logits", "classes", "pyramid", "labels", "boxes", "task_loss", "queries", "mask_queries", "corners"}
)
"""What losses may need of a stored teacher, or beside it; the rest is a part of the teacher that runs."""

# which fields of queries losses read that need these; all of them read the classes
OF_QUERIES = {"queries": "boxes", "mask_queries": "masks", "corners": "corners"}


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
        `logits`, `features/<level>`, `pyramid/<level>`, `queries/<field>` and the keys of `DistillationLoss.digest`.
    """
    names, found = set[str](), dict[str, Tensor]()
    student = output_like(output, criterion) if student is None else student
    for name, loss in criterion.by_name().items():
        seen = criterion.seen_by(name, output)
        if {"logits", "classes"} & loss.needs and output.logits is not None:
            names.add("logits")
        if (digest := loss.digest(seen, targets)) is not None:
            found |= digest
            continue
        if of_queries := [field for need, field in OF_QUERIES.items() if need in loss.needs]:
            names |= {f"queries/{field}" for field in (*of_queries, "softmax", "sigmoid")}
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
    found = levels | ({} if output.logits is None else {"logits": output.logits})
    return found | ({} if output.queries is None else best_answers(output.queries))


def best_answers(queries: Queries) -> dict[str, Tensor]:
    """What the last layer's queries with the highest scores say, which is all that losses read of a teacher's.

    Returns:
        Class logits `[B, K, C, 1]`, as `queries/softmax` where classes exclude each other, else as `queries/sigmoid`; `queries/boxes`
        `[B, K, 4]`, `queries/corners` `[B, K, 4 * bins, 1]` and `queries/masks` `[B, K, h, w]` of models that have them.
    """
    answers = teacher_answers(queries, 0, queries.class_logits.shape[2])
    found = {"softmax" if queries.softmax else "sigmoid": answers.classes[..., None]}
    if queries.boxes is not None:
        found["boxes"] = answers.of(queries.boxes)
    if queries.corners is not None:
        found["corners"] = answers.of(queries.corners)[..., None]
    if queries.masks is not None:
        found["masks"] = answers.of(queries.masks.flatten(3)).unflatten(2, queries.masks.shape[-2:])
    return {f"queries/{name}": x for name, x in found.items()}


def queries_from(columns: Mapping[str, Tensor]) -> Queries | None:
    """Queries of one layer from what `best_answers` gave of them; None without any."""
    found = {name.removeprefix("queries/"): x for name, x in columns.items() if name.startswith("queries/")}
    if not found:
        return None
    softmax = "softmax" in found
    corners = found["corners"][None, ..., 0] if "corners" in found else None
    boxes, masks = (found[name][None] if name in found else None for name in ("boxes", "masks"))
    return Queries(found["softmax" if softmax else "sigmoid"][None, ..., 0], boxes, softmax, corners, masks=masks)
