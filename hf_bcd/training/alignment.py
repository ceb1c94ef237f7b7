"""Whether a teacher's answers lie on the labels that they are to teach: no shift, no flip, no other picture."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..outputs import LabelMaps
from ..stores import StoredTeacher
from ..tasks import Task
from ..utils.files import write_json
from ..utils.messages import UserError
from .agreement import check_agreement
from .config import BCDConfig
from .distiller import Distiller
from .evaluation import evaluated, moved
from .loaders import spread_samples
from .teachers import Teacher, Teachers, naming, parts_of


logger = logging.getLogger(__name__)

TEACHING_FILE = "teaching.json"
REACH = 8  # pixels
SMALLEST_SHIFT = 3  # pixels; models of stride 8 or more are off by less
LEAST_GAIN, LEAST_ERRORS = 0.01, 3.0  # of agreement, and standard errors over pictures
# below either a teacher's answers say nothing of places: of agreement over always answering the commonest class, and of agreement
MARGIN, LEAST_AGREEMENT = 0.05, 0.5
PICTURES, BATCH = 16, 8


class Alignment(NamedTuple):
    """Agreement of a teacher's classes with the labels of N pictures.

    Attributes:
        kinds: what was done to the answers: `as they are`, a shift, or a flip.
        agreement: share of the labelled pixels of each picture, `[N, len(kinds)]`; NaN where none is labelled.
        commonest: share of the labels' commonest class.
        per_class: share of each class's pixels that the teacher gives it; NaN for classes that do not occur.
    """

    kinds: list[str]
    agreement: Tensor
    commonest: float
    per_class: list[float]

    @property
    def means(self) -> dict[str, float]:
        """Agreement over all pictures."""
        return dict(zip(self.kinds, self.agreement.nanmean(0).tolist(), strict=True))

    def better(self) -> str | None:
        """What fits better than the answers as they are, beyond chance; None if nothing does."""
        agreement = self.agreement[~self.agreement[:, 0].isnan()]
        if len(agreement) < 2 or agreement.mean(0).max() < max(self.commonest + MARGIN, LEAST_AGREEMENT):
            return None
        gains = agreement - agreement[:, :1]
        gain, error = gains.mean(0), gains.std(0) / len(gains) ** 0.5
        gain[(gain < LEAST_GAIN) | (gain < LEAST_ERRORS * error)] = 0
        best = int(gain.argmax())
        return self.kinds[best] if gain[best] > 0 else None


def alignment(classes: Tensor, labels: Tensor, num_labels: int, ignore_index: int = 255) -> Alignment:
    """Compares a teacher's classes with labels at all shifts of `REACH` along both axes, and flipped.

    Args:
        classes: `[N, H, W]`, H and W above 2 * `REACH`.
        labels: class ids likewise.
        num_labels: number of classes.
        ignore_index: id of void pixels.
    """
    height, width = labels.shape[1:]
    rows, columns = slice(REACH, height - REACH), slice(REACH, width - REACH)
    truth = labels[:, rows, columns].long()  # the same pixels whatever the answers are
    valid = truth != ignore_index

    def agreement(answers: Tensor) -> Tensor:
        return ((answers[:, rows, columns] == truth) & valid).flatten(1).sum(1) / valid.flatten(1).sum(1)

    found = {"as they are": agreement(classes)}
    for shift in range(SMALLEST_SHIFT, REACH + 1):
        # half of the pictures are flipped, and with them the direction of a shift
        sides = [agreement(classes.roll(sign * shift, 2)) for sign in (-1, 1)]
        found[f"shifted sideways by {shift} pixels"] = torch.maximum(*sides)
        for sign, direction in ((-1, "up"), (1, "down")):
            found[f"shifted {direction} by {shift} pixels"] = agreement(classes.roll(sign * shift, 1))
    for axis, name in ((2, "left to right"), (1, "upside down")):
        found[f"flipped {name}"] = agreement(classes.flip(axis))
    counts = torch.bincount(truth[valid], minlength=num_labels)
    right = torch.bincount(truth[valid & (classes[:, rows, columns] == truth)], minlength=num_labels)
    commonest = float(counts.max() / counts.sum().clamp_min(1))
    agreements = torch.stack(list(found.values()), 1).double()
    return Alignment(list(found), agreements, commonest, (right / counts).tolist())


def check_teachers(
    teacher: Teacher | Teachers | None,
    dataset: Any,
    task: Task,
    args: BCDConfig,
    distiller: Distiller,
    collate: Callable[..., Any],
) -> None:
    """Refuses teachers whose answers lie beside the labels, and stores that lack what a loss reads.

    Writes how well the first one's answers fit, for `hf-bcd doctor`.
    """
    written = False
    for name, one in parts_of(teacher).items():
        with naming(name):
            found = check_alignment(one, dataset, task, args, distiller.student.num_labels, collate)
            if found is not None and args.should_save and not written:
                write_teaching(found, Path(args.output_dir or "."), distiller.student.id2label)
                written = True
            if isinstance(one, StoredTeacher):
                if getattr(dataset.dataset, "labelled", None) == 0:
                    check_agreement(one, dataset, task, args, distiller.criterion, collate)
                batch = moved(collate([dataset[0]]), args)
                targets = task.targets(batch, distiller.student.num_labels)
                with evaluated(distiller), torch.no_grad():
                    student = distiller.student(batch["pixel_values"])
                one.check_levels(distiller.criterion, student, batch, targets)


def write_teaching(found: Alignment, folder: Path, id2label: Mapping[int, str]) -> None:
    """Writes how well a teacher's answers fit the labels."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"agreement": found.means["as they are"], "commonest": found.commonest, "pictures": len(found.agreement)}
    per_class = dict(zip(id2label.values(), found.per_class, strict=True))
    write_json(folder / TEACHING_FILE, content | {"per_class": per_class})


@torch.no_grad()
def check_alignment(
    teacher: Any, dataset: Any, task: Task, args: BCDConfig, num_labels: int, collate: Callable[..., Any]
) -> Alignment | None:
    """Compares a live or stored teacher's answers with the labels of some training pictures, as training shows them.

    Nothing is compared where the teacher has no scores of the student's classes, or the pictures no label maps.

    Raises:
        UserError: they fit better shifted or flipped.
    """
    answers, labels = [], []
    samples = spread_samples(dataset, min(PICTURES, args.calibration_images))
    for start in range(0, len(samples), BATCH):
        batch = moved(collate(samples[start : start + BATCH]), args)
        targets = task.targets(batch, num_labels)
        logits = teacher.for_batch(batch, targets.pixel_mask).logits
        if not isinstance(targets, LabelMaps) or logits is None or logits.shape[1] != num_labels:
            return None
        if min(targets.size) <= 2 * REACH + 1:
            return None
        answers.append(F.interpolate(logits, targets.size, mode="bilinear", align_corners=False).argmax(1))
        labels.append(targets.ids)
    found = alignment(torch.cat(answers), torch.cat(labels), num_labels)
    if found.agreement.isnan().all():  # no picture has labels
        return None
    means = found.means
    here = means["as they are"]
    if (better := found.better()) is not None:
        raise UserError(
            f"the teacher's classes agree with the labels on {here:.1%} of the pixels, but on {means[better]:.1%} if they are {better}. "
            "Pictures and masks, or pictures and the stored teacher, do not lie on each other; look at "
            "some of both, and check names, sizes and transform."
        )
    if here < found.commonest:
        logger.warning(
            "The teacher's classes agree with the labels on %.1f %% of the pixels of %d pictures, less than always answering their "
            "commonest class would (%.1f %%). Are its classes, its image processor and the labels right?",
            100 * here, len(samples), 100 * found.commonest,
        )  # fmt: skip
    return found
