"""The teachers of a student: one, or several by name, live or stored."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import FrozenTeacher
from ..adapters.loading import load_adapter
from ..losses import LOSSES
from ..outputs import DenseOutput
from ..stores import Store, StoredTeacher
from ..utils.messages import UserError


Teacher = FrozenTeacher | StoredTeacher


class Teachers:
    """Several teachers of one student; each has its own losses, see `join_teachers`.

    Args:
        parts: name -> teacher.
    """

    def __init__(self, parts: Mapping[str, Teacher]) -> None:
        self.parts = dict(parts)

    def for_batch(self, batch: Mapping[str, Any], pixel_mask: Tensor | None = None) -> dict[str, DenseOutput]:
        """The output of each teacher for a training batch, by name."""
        return {name: part.for_batch(batch, pixel_mask) for name, part in self.parts.items()}


def parts_of(teacher: Teacher | Teachers | None) -> dict[str, Teacher]:
    """The teachers by name: a single one has the name "", and there may be none."""
    if teacher is None:
        return {}
    return teacher.parts if isinstance(teacher, Teachers) else {"": teacher}


def role_of(number: int) -> str:
    """What results and cards call the teachers, counted from 1: `teacher`, `teacher_2`, `teacher_3`."""
    return "teacher" if number == 1 else f"teacher_{number}"


def by_role(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Teachers, or what belongs to them, by role instead of by name."""
    return {role_of(number): part for number, part in enumerate(parts.values(), 1)}


def answered(
    teacher: Teacher | Teachers, batch: Mapping[str, Any], pixel_mask: Tensor | None, wanted: Iterable[str]
) -> Any:
    """As `for_batch`, of the `wanted` teachers only, with the objects that each finds, see `FrozenTeacher.answers`."""
    outputs = {name: part.for_batch(batch, pixel_mask) for name, part in parts_of(teacher).items() if name in wanted}
    for name, output in outputs.items():
        output.answers = parts_of(teacher)[name].answers(batch["pixel_values"])
    return outputs if isinstance(teacher, Teachers) else outputs[""]


def short_name(source: str) -> str:
    """The name of one of several teachers: the last part of its id or folder, with `_` for dots, which modules cannot have."""
    path = Path(source.partition("@")[0])
    return (path.name or path.resolve().name).replace(".", "_")


def named_by(sources: Iterable[str]) -> dict[str, str]:
    """Short name -> source.

    Raises:
        UserError: two of the sources have one name, or one is called like a loss.
    """
    named: dict[str, str] = {}
    for source in sources:
        name = short_name(source)
        if name in named:
            raise UserError(
                f"the teachers {named[name]} and {source} would both be called {name!r}; rename a folder, or leave one out."
            )
        named[name] = source
    check_names(named)
    return named


def check_names(names: Iterable[str]) -> None:
    """Refuses names of teachers that their losses could not carry; a `UserError` names one."""
    for name in names:
        if not isinstance(name, str) or not name or set(name) & {"/", "."} or name in LOSSES:
            raise UserError(
                f"a teacher is called {name!r}; a name is text without / and . that is no loss's name, such as 'segformer'."
            )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Says in a `UserError` of the block which of several teachers it is about."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise UserError(f"teacher {name!r}: {error}") from error


def loaded(given: Any, task: str) -> Any:
    """Teachers by their names, or one alone: Hub ids and folders as adapters, stores as stored teachers, models as they are.

    A store of several gives them all.
    """
    if isinstance(given, Store):
        given = given.parts.get("", given.parts)
    if isinstance(given, Mapping):
        return {name: _loaded(one, task, name) for name, one in given.items()}
    return _loaded(given, task, "")


def _loaded(given: Any, task: str, name: str) -> Any:
    if isinstance(given, str):
        with naming(name):
            return load_adapter(given, task=task, to_teach=True)
    return StoredTeacher(given, name) if isinstance(given, Store) else given
