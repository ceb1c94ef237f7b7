"""From a teacher's classes to a student's, by name, by a file of synonyms, and many to one."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, cat

from ..utils.files import read_text
from ..utils.messages import UserError


# How the well-known lists (ADE20K, Cityscapes, COCO, COCO-Stuff, Pascal VOC, CamVid) spell the same class.
SPELLINGS = (
    {"airplane", "aeroplane"},
    {"building", "buildingother"},
    {"couch", "sofa"},
    {"motorcycle", "motorbike", "minibike"},
    {"person", "pedestrian"},
    {"sidewalk", "pavement"},
    {"sky", "skyother"},
    {"tv", "tvmonitor", "television", "televisionreceiver"},
    {"water", "waterother"},
    {"window", "windowpane", "windowother"},
)
# Second names in ADE20K's list that name something else in another one: a toilet is also a "can", a car a "machine".
HOMONYMS = frozenset((
    "bill", "can", "card", "chest", "coach", "counter", "cover", "machine", "mantle", "notice", "pot", "press", "puff",
    "rail", "range", "screen", "stand", "stool", "throne", "wheel",
))  # fmt: skip
UNUSED_SHOWN = 10


@dataclass(frozen=True)
class LabelMap:
    """Which of a teacher's classes stand for each class of the student, and how they were found.

    Attributes:
        teacher: the teacher's labels, by class id.
        student: the student's labels, by class id.
        sources: the teacher's classes for each class of the student that has any, by class id.
        rules: how they were found: by `name`, `synonym`, `file` or `number`.
    """

    teacher: dict[int, str]
    student: dict[int, str]
    sources: dict[int, tuple[int, ...]]
    rules: dict[int, str]
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def missing(self) -> list[str]:
        """The student's labels that the teacher does not know."""
        return [label for index, label in self.student.items() if index not in self.sources]

    @property
    def unused(self) -> list[str]:
        """The teacher's labels that stand for no class of the student."""
        used = {source for sources in self.sources.values() for source in sources}
        return [label for index, label in self.teacher.items() if index not in used]

    @property
    def is_complete(self) -> bool:
        """Whether no class of the student is missing."""
        return len(self.sources) == len(self.student)

    @property
    def is_identity(self) -> bool:
        """Whether class i of the one is class i of the other, for all classes of both."""
        return len(self.teacher) == len(self.student) and self.sources == {index: (index,) for index in self.student}

    def apply(self, logits: Tensor, exclusive: bool = True) -> Tensor:
        """Turns the teacher's logits `[B, C_teacher, h, w]` into the student's classes, `[B, C_student, h, w]`.

        Where several of the teacher's classes stand for one, its logit is their log-sum-exp: probabilities add; their
        largest if they do not exclude each other. Classes that stand for none are left out; classes that are missing are
        a `UserError`.
        """
        if not self.is_complete:
            raise UserError(f"the teacher has no class for {self.missing}, so its logits cannot be mapped.")
        if self.is_identity:
            return logits
        groups = list(self.sources.values())
        index = self._indices.get(logits.device)
        if index is None:  # once, since making it waits for the device
            index = torch.tensor([source for group in groups for source in group], device=logits.device)
            self._indices[logits.device] = index
        selected = logits.index_select(1, index)
        if len(groups) == selected.shape[1]:
            return selected
        parts = selected.float().split([len(group) for group in groups], dim=1)
        return cat([part.logsumexp(1, True) if exclusive else part.amax(1, True) for part in parts], dim=1)

    def report(self) -> str:
        """What matched how, and what is left over on either side, in a few lines."""
        counts = ", ".join(f"{count} by {rule}" for rule, count in Counter(self.rules.values()).items())
        lines = [
            f"The teacher's {len(self.teacher)} classes stand for {len(self.sources)} of the student's "
            f"{len(self.student)}{f' ({counts})' if counts else ''}."
        ]
        for index, sources in self.sources.items():
            if self.rules[index] != "name":
                names = " + ".join(self.teacher[source] for source in sources)
                lines.append(f"  {self.student[index]} <- {names} (by {self.rules[index]})")
        if self.missing:
            lines.append(f"  missing: {', '.join(self.missing)}. So features are distilled, but no class scores.")
        if unused := self.unused:
            more = f" and {len(unused) - UNUSED_SHOWN} more" if len(unused) > UNUSED_SHOWN else ""
            lines.append(f"  not used: {', '.join(unused[:UNUSED_SHOWN])}{more}.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The whole map by names, for JSON."""
        matches = {
            self.student[index]: {"teacher": [self.teacher[source] for source in sources], "by": self.rules[index]}
            for index, sources in self.sources.items()
        }
        return {"matches": matches, "missing": self.missing, "unused": self.unused}


def match_labels(
    teacher_id2label: Mapping[int, str],
    student_id2label: Mapping[int, str],
    synonyms: Mapping[str, Sequence[str]] | None = None,
) -> LabelMap:
    """Finds the teacher's classes for each class of the student, by name.

    What `synonyms` says holds; the rest is guessed. Case and punctuation do not count, and a label may list synonyms:
    "Traffic_Light" is "traffic light", "car" is "car, auto, automobile" and "car;auto". Equal names win over equal
    first synonyms, these over any shared synonym, and these over the spellings of other data sets ("sofa" is "couch",
    "fence-merged" is "fence"). Guesses are one to one; where several classes would do, none is taken. Where either side
    has placeholder names ("LABEL_0") and both have as many classes, class i is taken for class i.

    Args:
        teacher_id2label: the teacher's labels.
        student_id2label: the student's labels.
        synonyms: names of the teacher's classes for classes of the student, see `read_synonyms`. Several names stand
            for one class together; an empty list says that the teacher has none.

    Raises:
        UserError: if `synonyms` names a class that its side does not have, or uses one twice.
    """
    teacher, student = (dict(sorted(id2label.items())) for id2label in (teacher_id2label, student_id2label))
    given = _given_matches(teacher, student, synonyms or {})
    sources, rules = dict(given), dict.fromkeys(given, "file")
    taken = {source for group in given.values() for source in group}
    if len(teacher) == len(student) and (_has_placeholders(teacher) or _has_placeholders(student)):
        guesses = {index: (index, "number") for index in student if index not in given and index not in taken}
    else:
        guesses = _guess(
            {index: label for index, label in teacher.items() if index not in taken},
            {index: label for index, label in student.items() if index not in given},
        )
    for index, (source, rule) in guesses.items():
        sources[index], rules[index] = (source,), rule
    found = [index for index in student if sources.get(index)]
    return LabelMap(teacher, student, {i: sources[i] for i in found}, {i: rules[i] for i in found})


def read_synonyms(source: str | Path | Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
    """Reads a JSON file `{class of the data set: [names of the teacher's classes]}`, or its content; None is empty.

    Raises:
        UserError: if the file is missing, no JSON, or of another form.
    """
    if source is None:
        return {}
    content: object = source
    where = "label_synonyms"
    if isinstance(source, str | Path):
        where = f"label_synonyms {source}"
        try:
            content = json.loads(read_text(Path(source)))
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise UserError(f"{where}: is no JSON ({error}).") from error
    form = 'expected {"class of the data set": ["class of the teacher", ...], ...}'
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: holds a {type(content).__name__}; {form}.")
    for label, names in content.items():
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in (label, *names)):
            raise UserError(f"{where}: {label!r} has {names!r}; {form}.")
    return {label: list(names) for label, names in content.items()}


def alternatives(label: str) -> list[str]:
    """Splits "Traffic-light, stoplight" at commas and semicolons into ["trafficlight", "stoplight"]."""
    names = [re.sub(r"[\W_]+", "", name.casefold()) for name in re.split("[,;]", label)]
    return [name for name in names if name] or [label]


def _given_matches(
    teacher: dict[int, str], student: dict[int, str], synonyms: Mapping[str, Sequence[str]]
) -> dict[int, tuple[int, ...]]:
    matches: dict[int, tuple[int, ...]] = {}
    owners: dict[int, str] = {}
    for label, names in synonyms.items():
        index = _find_class(label, student, "the data set")
        if index in matches:
            raise UserError(f"label_synonyms: {label!r} is {student[index]!r}, which stands there already.")
        matches[index] = tuple(dict.fromkeys(_find_class(name, teacher, "the teacher") for name in names))
        for source in matches[index]:
            if source in owners:
                raise UserError(
                    f"label_synonyms: the teacher's {teacher[source]!r} is given to {owners[source]!r} and to {label!r}; "
                    "a class of the teacher can stand for one class only."
                )
            owners[source] = label
    return matches


def _find_class(name: str, id2label: dict[int, str], owner: str) -> int:
    ours = alternatives(name)
    tries = (
        [index for index, label in id2label.items() if keys_of(ours) & keys_of(alternatives(label))]
        for keys_of in (_all_names, _first_name, set)
    )
    found = next(filter(None, tries), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"label_synonyms: {name!r} could be {[id2label[index] for index in found]} of {owner}.")
    spellings = {alternative: label for label in id2label.values() for alternative in alternatives(label)}
    close = difflib.get_close_matches(ours[0], spellings, n=1)
    hint = f"Did you mean {spellings[close[0]]!r}?" if close else f"It has: {', '.join(id2label.values())}."
    raise UserError(f"label_synonyms: {name!r} is no class of {owner}. {hint}")


def _has_placeholders(id2label: dict[int, str]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+", name) for name in id2label.values())


def _guess(teacher: dict[int, str], student: dict[int, str]) -> dict[int, tuple[int, str]]:
    """The teacher's class and the rule for each class of the student that has exactly one counterpart."""
    matches: dict[int, tuple[int, str]] = {}
    for keys_of, rule in RULES:
        taken = {source for source, _ in matches.values()}
        theirs = {index: keys_of(alternatives(label)) for index, label in teacher.items() if index not in taken}
        ours = {index: keys_of(alternatives(label)) for index, label in student.items() if index not in matches}
        candidates = {index: [source for source in theirs if keys & theirs[source]] for index, keys in ours.items()}
        claims = Counter(source for sources in candidates.values() for source in sources)
        for index, sources in candidates.items():
            if len(sources) == 1 and claims[sources[0]] == 1:
                matches[index] = (sources[0], rule)
    return matches


def _all_names(names: list[str]) -> set[Any]:
    return {frozenset(names)}


def _first_name(names: list[str]) -> set[Any]:
    return {names[0]}


def _each_name(names: list[str]) -> set[Any]:
    return {names[0]} | (set(names) - HOMONYMS)


def _each_spelling(names: list[str]) -> set[Any]:
    # COCO's panoptic classes end in "-merged" or "-stuff" where they join or resemble others
    plain = {re.sub("(merged|stuff)$", "", name) for name in _each_name(names)}
    return plain.union(*(group for group in SPELLINGS if group & plain))


# from the surest to the least sure: classes with a key in common are candidates
RULES: tuple[tuple[Callable[[list[str]], set[Any]], str], ...] = (
    (_all_names, "name"),
    (_first_name, "name"),
    (_each_name, "synonym"),
    (_each_spelling, "synonym"),
)
