"""The frozen teacher, and the map from its labels to the student's."""

import logging
import re
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec
from .base import DenseAdapter


logger = logging.getLogger(__name__)


class FrozenTeacher(nn.Module):
    """An adapted model as a source of constants: never trained, never in training mode, in its own precision.

    Images are resized bilinearly to a size that suits the teacher (its `fixed_size`, else the next multiple of its
    `size_multiple`), so its maps may lie on another grid than the student's; both span the whole image. Outputs are
    float32 and outside of autograd. Keep the teacher outside of any module that is wrapped, trained or saved.

    Args:
        adapter: adapted teacher; its parameters are frozen in place.
        student_id2label: label names of the student, by class id.
        dtype: precision of the teacher's autocast, such as `torch.bfloat16`; `None` computes in the precision of its
            parameters. The parameters themselves are not converted, and an outer autocast does not reach the teacher.
        image_size: height and width to which images are resized, instead of the family's rule.

    Attributes:
        label_map: the teacher's class for each class of the student, `None` if some are missing.
        missing_labels: the student's labels that the teacher does not know.
    """

    def __init__(
        self,
        adapter: DenseAdapter,
        student_id2label: dict[int, str],
        dtype: torch.dtype | None = None,
        image_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.adapter = adapter.requires_grad_(False).eval()
        self.dtype = dtype
        self.image_size = image_size or adapter.fixed_size
        matches = find_labels(adapter.id2label, student_id2label)
        self.missing_labels = [student_id2label[index] for index, match in enumerate(matches) if match is None]
        self.label_map = None if self.missing_labels else [match for match in matches if match is not None]

    @property
    def shares_labels(self) -> bool:
        """Whether logits have the student's classes in the student's order; else they have the teacher's own."""
        return self.label_map is not None

    @property
    def feature_specs(self) -> dict[str, FeatureSpec]:
        """Levels of the teacher; strides count pixels of the resized image."""
        return self.adapter.feature_specs

    @property
    def num_labels(self) -> int:
        """Number of classes in `logits`."""
        return self.adapter.num_labels if self.label_map is None else len(self.label_map)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)

    def resize(self, pixel_values: Tensor) -> Tensor:
        """Resizes RGB images `[B, 3, H, W]` to the teacher's size; float32 with values 0..255 where it differs."""
        multiple = self.adapter.size_multiple
        height, width = self.image_size or (-(-size // multiple) * multiple for size in pixel_values.shape[-2:])
        if (height, width) == tuple(pixel_values.shape[-2:]):
            return pixel_values
        return F.interpolate(
            pixel_values.float(), (height, width), mode="bilinear", align_corners=False, antialias=True
        )

    # not inference_mode: its tensors could not be saved for the student's backward pass without a copy
    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> DenseOutput:
        """Features and logits of RGB images `[B, 3, H, W]`, uint8 or float, values 0..255."""
        with torch.autocast(pixel_values.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            output = self.adapter(self.resize(pixel_values))
        logits = output.logits.float()
        if self.label_map is not None and self.label_map != list(range(logits.shape[1])):
            logits = logits[:, self.label_map]
        return DenseOutput({name: level.float() for name, level in output.features.items()}, logits)


def match_labels(teacher_id2label: dict[int, str], student_id2label: dict[int, str]) -> list[int] | None:
    """Finds the teacher's class for each class of the student, by name.

    Case and punctuation do not count, and a name may list synonyms: "Traffic_Light" is "traffic light", "car" is
    "car, auto, automobile" and "car;auto". Equal names win over equal first synonyms, and these over any shared
    synonym. Matches are one to one; where several classes would do, none is taken. Where either side has placeholder
    names ("LABEL_0") and both have as many classes, class i is taken for class i.

    Returns:
        The teacher's class id for each of the student's, or `None` if some are missing; a log line names them.
    """
    matches = find_labels(teacher_id2label, student_id2label)
    found = [match for match in matches if match is not None]
    return found if len(found) == len(matches) else None


def find_labels(teacher_id2label: dict[int, str], student_id2label: dict[int, str]) -> list[int | None]:
    """Like `match_labels`, but with `None` in place of each class that the teacher lacks."""
    if len(teacher_id2label) == len(student_id2label):
        for owner, id2label in (("teacher", teacher_id2label), ("student", student_id2label)):
            if all(re.fullmatch(r"LABEL_\d+", name) for name in id2label.values()):
                logger.warning(
                    f"The {owner}'s labels have no names (LABEL_0, ...). Class i of the teacher is taken for class i "
                    "of the student; set id2label of both models to match them by name."
                )
                return list(range(len(student_id2label)))
    teacher = {index: synonyms(name) for index, name in teacher_id2label.items()}
    student = {index: synonyms(name) for index, name in student_id2label.items()}
    matches: dict[int, int] = {}
    rules: list[Callable[[list[str], list[str]], bool]] = [
        lambda ours, theirs: set(ours) == set(theirs),
        lambda ours, theirs: ours[0] == theirs[0],
        lambda ours, theirs: not set(ours).isdisjoint(theirs),
    ]
    for alike in rules:
        taken = set(matches.values())
        candidates = {
            index: [other for other in teacher if other not in taken and alike(names, teacher[other])]
            for index, names in student.items()
            if index not in matches
        }
        claims = Counter(other for others in candidates.values() for other in others)
        for index, others in candidates.items():
            if len(others) == 1 and claims[others[0]] == 1:
                matches[index] = others[0]
    if missing := [name for index, name in student_id2label.items() if index not in matches]:
        logger.info(
            f"The teacher lacks {len(missing)} of the student's {len(student)} labels: {missing}. "
            f"It has {len(teacher)}: {list(teacher_id2label.values())}."
        )
    return [matches.get(index) for index in student]


def synonyms(label: str) -> list[str]:
    """Splits "Traffic-light, stoplight" at commas and semicolons into ["trafficlight", "stoplight"]."""
    names = [re.sub(r"[\W_]+", "", name.casefold()) for name in re.split("[,;]", label)]
    return [name for name in names if name] or [label]
