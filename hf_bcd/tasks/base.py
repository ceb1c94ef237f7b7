"""A kind of dense prediction: how its samples, batches, targets, predictions and scores look."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from ..outputs import Targets


class Score(NamedTuple):
    """A number that an evaluation gives.

    Attributes:
        key: its name in `results.json` and in the log, there behind `eval_`.
        title: its name in tables.
        percent: whether it is a fraction that tables show in percent.
        higher_is_better: whether larger values are better.
        headline: whether tables of models show it.
        paired: whether studies show its difference to a reference.
        plotted: whether studies plot it.
    """

    key: str
    title: str
    percent: bool = True
    higher_is_better: bool = True
    headline: bool = True
    paired: bool = False
    plotted: bool = False

    @property
    def scale(self) -> int:
        """Factor between the value and what tables show."""
        return 100 if self.percent else 1

    @property
    def label(self) -> str:
        """Title with its unit."""
        return f"{self.title} (%)" if self.percent else self.title

    def text(self, value: float) -> str:
        """The value as tables show it: two decimals, nothing if it is no number because the data have none of that kind."""
        return f"{self.scale * value:.2f}" if math.isfinite(value) else ""


class Metric(Protocol):
    """Streaming scores: only counts are kept, and only counts are exchanged between processes."""

    def update(self, predictions: Any, truth: Any) -> None: ...

    def gather(self) -> None: ...

    def compute(self) -> dict[str, Any]: ...


class Task(ABC):
    """One kind of dense prediction; a data set names its own by `task`.

    Attributes:
        name: name of the task, as `task` of a data set has it.
        title: name in a sentence.
        pipeline_tag: task of `transformers.pipeline` that runs a student.
        scores: what an evaluation gives; the first decides which checkpoint is best.
        per_class: a score of each class, whose value is a list.
        metrics: names of the metrics for the Hub.
        answer: a model's output in a sentence, with the number of classes.
        limit: a sentence on what it cannot say.
        caption: the panels of `comparison` in a sentence.
        protocol: how predictions are made and scored, sentences for `protocol` in `results.json`.
        call: Jinja template of a line that runs a student by `pipeline`.
        decay_per: what r(t) counts, `step` or `epoch`.
        snippets: Jinja templates of code that loads and runs a student, see `hf_bcd.card.usage`; one that renders to nothing
            is left out.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pipeline_tag: ClassVar[str]
    scores: ClassVar[tuple[Score, ...]]
    per_class: ClassVar[Score]
    metrics: ClassVar[tuple[str, ...]]
    answer: ClassVar[str]
    limit: ClassVar[str]
    caption: ClassVar[str]
    protocol: ClassVar[Mapping[str, str]]
    call: ClassVar[str]
    snippets: ClassVar[tuple[str, ...]]
    decay_per: ClassVar[str] = "step"

    @property
    def headline(self) -> tuple[Score, ...]:
        """The scores that tables of models show."""
        return tuple(score for score in self.scores if score.headline)

    @abstractmethod
    def check_args(self, args: Any) -> None:
        """Raises a `UserError` for training arguments that say something to other tasks only."""

    @abstractmethod
    def train_sizes(self, args: Any) -> list[tuple[int, int]]:
        """Height and width of the largest images that training will show a model."""

    @abstractmethod
    def augmentation(self, args: Any) -> str:
        """The training transform in words."""

    @abstractmethod
    def train_transform(self, args: Any) -> Callable[..., Mapping[str, Any]]:
        """The random transform of training samples that the training arguments ask for."""

    @abstractmethod
    def processor_size(self, args: Any) -> dict[str, Any]:
        """The size that the training arguments ask for, as arguments of an adapter's `processor_options`."""

    def sized(self, size: Mapping[str, int]) -> str:
        """In words how an image processor of this `size` resizes pictures."""
        if "height" in size:
            return f"resized to {size['width']} x {size['height']} (width x height), whatever its aspect ratio"
        return f"short side resized to {size['shortest_edge']}, aspect ratio kept"

    @abstractmethod
    def size_args(self, saved: Mapping[str, int], squares: bool) -> dict[str, int]:
        """The training arguments that show a finished model its pictures as its own image processor does.

        Args:
            saved: that processor's `size`; empty if it resizes nothing.
            squares: whether the model's family takes only squares.
        """

    @abstractmethod
    def eval_transform(self, processor: BaseImageProcessor) -> Callable[..., Mapping[str, Any]]:
        """Shows a model its pictures as this image processor, which is saved beside it, will."""

    @abstractmethod
    def check_sample(self, sample: Any, num_labels: int, name: str, evaluated: bool) -> None:
        """Looks at a transformed sample of a data set from elsewhere; a `UserError` says what is not as here.

        Args:
            sample: what the data set gives.
            num_labels: number of classes.
            name: the data set, for error messages.
            evaluated: whether it is for evaluation, instead of training.
        """

    @abstractmethod
    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Makes a batch of transformed samples."""

    @abstractmethod
    def targets(self, batch: Mapping[str, Any], num_labels: int) -> Targets:
        """The ground truth of a training batch as losses see it, without a copy.

        Raises:
            UserError: if images of several sizes could not be stacked.
        """

    @abstractmethod
    def denominator(self, targets: Targets) -> Tensor:
        """This batch's part of the number by which task losses divide, a scalar."""

    @abstractmethod
    def with_denominator(self, targets: Targets, denominator: Tensor) -> Targets:
        """The same targets, whose task losses divide by this number."""

    @abstractmethod
    def metric(self, num_labels: int) -> Metric:
        """Scores of a data set with so many classes."""

    @abstractmethod
    def sizes(self, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Height and width at which each picture of a batch is predicted."""

    @abstractmethod
    def truths(self, batch: Mapping[str, Any]) -> list[Any]:
        """Truth of each picture of a batch, in the form of a prediction."""

    @abstractmethod
    def score(self, metric: Metric, predictions: Sequence[Any], batch: Mapping[str, Any]) -> None:
        """Adds a batch to the metric.

        Args:
            metric: of `metric`.
            predictions: what the adapter's `predict` gave, one for each picture.
            batch: of `collate`, on the device of the predictions.
        """

    @abstractmethod
    def comparison(
        self, samples: Sequence[Mapping[str, Any]], id2label: Mapping[int, str], path: Path, errors: Sequence[str]
    ) -> None:
        """Saves a picture of truth and predictions side by side.

        Args:
            samples: canonical samples with `predictions`: title -> what the adapter's `predict` gave.
            id2label: names of the classes.
            path: PNG file to write.
            errors: titles of the predictions whose errors are marked.
        """

    @abstractmethod
    def picture(self, sample: Mapping[str, Any], prediction: Any, num_labels: int) -> np.ndarray:
        """Input, truth and prediction side by side, uint8 `[H, W, 3]`.

        Args:
            sample: transformed sample.
            prediction: what the adapter's `predict` gave for it.
            num_labels: number of classes.
        """

    def mask(self, prediction: Any, num_labels: int) -> Image.Image | None:
        """A prediction as a picture whose values are class ids; None where it is no map."""
        return None

    @abstractmethod
    def overlay(
        self, image: Image.Image, prediction: Any, id2label: Mapping[int, str], least_score: float
    ) -> Image.Image:
        """A picture with a prediction drawn over it.

        Args:
            image: in RGB.
            prediction: what the adapter's `predict` gave, at the picture's size.
            id2label: names of the classes.
            least_score: objects below it are not drawn.
        """

    @abstractmethod
    def said(self, prediction: Any, id2label: Mapping[int, str], least_score: float) -> dict[str, Any]:
        """A prediction for JSON: by class its part of the pixels, or a list of `objects`; `classes` has the ids that occur."""
