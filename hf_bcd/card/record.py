"""A run in plain values: all that its card says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


RANDOM = "random weights"


class ModelRecord(NamedTuple):
    """A model of a run: its kind, and the Hub id and commit that it was loaded from.

    `start` is the Hub id of the weights that it rests on, whose terms bind it (of a finished model its own), or `start_words`
    says what it started from instead; both are empty where nobody said. `trained_here` says whether the run trained it, None
    where nobody said; `levels` has the channels of its feature levels; `name` is that of one of several teachers, with which the names
    of its losses begin; `views` is how many of each picture a stored teacher saw, 0 for one that ran along.
    """

    architecture: str
    repository: str | None = None
    revision: str | None = None
    start: str | None = None
    start_words: str = ""
    trained_here: bool | None = None
    levels: Mapping[str, int] = {}
    name: str = ""
    views: int = 0


class DataRecord(NamedTuple):
    """A data set: its name, Hub id and commit, web page, terms, images of each split (None: a stream) and label rule.

    `notes` are what looked wrong with it before training; `unlabelled` is the number of training images without labels.
    """

    name: str
    repository: str | None
    revision: str | None
    page: str | None
    licence: str | None
    images: Mapping[str, int | None]
    label_rule: str
    notes: Sequence[str] = ()
    unlabelled: int = 0


@dataclass(frozen=True)
class RunRecord:
    """A run; what is empty or None is not known, or there is none."""

    repository: str  # name by which readers load the student
    task: str  # key of `TASKS`
    id2label: Mapping[int, str]
    models: Mapping[
        str, ModelRecord
    ]  # the `student`, and `teacher` (`teacher_2`, ...) and `baseline` where they exist
    data: DataRecord | None = None
    results: Mapping[str, Any] = field(default_factory=dict)  # contents of results.json
    figures: Sequence[str] = ()  # paths of pictures, relative to the student's folder
    snippets: Sequence[str] = ()  # code that runs the student, with its output
    weights: Mapping[str, float] = field(default_factory=dict)  # of each distillation term
    decays: Sequence[str] = ()  # losses that r(t) multiplies
    # `source`, `citation`, changed `options` and last `temperatures` of each method, hosted ones too
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    classes: str = ""  # the student's among the teacher's, in words; empty where they are the same
    schedule: Mapping[str, str] = field(default_factory=dict)  # the training of the student, in words
    recipe: str = ""  # one that does the same, without anything private
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""  # machine and time, in words
    token: str | None = field(default=None, repr=False)  # access token in use, which no text may hold

    @property
    def teachers(self) -> dict[str, ModelRecord]:
        """The teachers by role."""
        return {role: model for role, model in self.models.items() if role.partition("_")[0] == "teacher"}
