"""A first look at a data set's rows, so that what is wrong with it shows before training."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..utils.messages import UserError
from .dataset import Row, Rows, read_sample
from .images import read_image
from .labels import IGNORE_INDEX, LabelRule


logger = logging.getLogger(__name__)

PROBED_ROWS = 4


@dataclass(frozen=True)
class Findings:
    """What some rows hold.

    Attributes:
        sizes: (width, height) of the images.
        modes: how the masks are stored: modes of images, or the kind of array.
        stored_ids: ids that occur in the masks.
        pixels: number of pixels of every class, and of void at 255, int64 `[256]`.
        void_share: fraction of the pixels that is void.
    """

    sizes: list[tuple[int, int]]
    modes: list[str]
    stored_ids: list[int]
    pixels: np.ndarray

    @property
    def void_share(self) -> float:
        return float(self.pixels[IGNORE_INDEX] / max(1, self.pixels.sum()))


def first_rows(rows: Any) -> list[Row]:
    """The rows that are looked at; fewer if there are fewer."""
    return list(islice(rows, PROBED_ROWS))


def examine(rows: Iterable[Row], rule: LabelRule, num_labels: int) -> Findings:
    """Decodes rows completely; raises as `read_sample` does."""
    sizes, modes, stored_ids, pixels = set(), set(), set(), np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
    deep = None
    for row in rows:
        image = read_image(row.image, row.image_name)
        mask = row.label if isinstance(row.label, np.ndarray) else read_image(row.label, row.label_name)
        row = row._replace(image=image, label=mask)  # decoded once for all that follows
        if image.mode.startswith("I"):
            deep = deep or row.image_name
        sample = read_sample(row, rule, num_labels)
        sizes.add(sample["image"].size)
        modes.add(f"array of {mask.dtype}" if isinstance(mask, np.ndarray) else mask.mode)
        stored_ids.update(np.unique(row.stored_ids(rule.colours)).tolist())
        pixels += np.bincount(sample["label"].ravel(), minlength=len(pixels))
    if deep is not None:
        logger.warning(
            "%s: an image of 16 bits a pixel, of which the high byte is read here; pipelines of transformers clip such "
            "values at 255 and would see another picture. Store the images with 8 bits.",
            deep,
        )
    return Findings(sorted(sizes), sorted(modes), sorted(stored_ids), pixels)


def check_masks(rows: Rows, rule: LabelRule, num_labels: int, name: str) -> None:
    """Decodes every mask, so that unknown ids show (as `UserError`) before training, not at the first evaluation."""
    for index in tqdm(range(len(rows)), desc=f"Masks of {name}", leave=False):
        row = rows[index]
        rule.apply(row.stored_ids(rule.colours), num_labels, row.label_name)


def choose_encoding(rows: Sequence[Row], rules: Mapping[str, LabelRule], num_labels: int, name: str) -> str:
    """The one encoding whose rule fits all masks; the ids of a single one may be legal in two encodings.

    Raises:
        UserError: none fits, or several do.
    """
    if len(rules) == 1:
        return next(iter(rules))
    reasons: dict[str, str] = {}
    for encoding, rule in rules.items():
        try:
            for row in rows:
                rule.apply(row.stored_ids(rule.colours), num_labels, row.label_name)
        except ValueError as error:
            reasons[encoding] = str(error)
    fitting = [encoding for encoding in rules if encoding not in reasons]
    if not fitting:
        why = " ".join(f"Not {encoding}: {reason}" for encoding, reason in reasons.items())
        raise UserError(f"{name}: the first {len(rows)} masks are in none of the known encodings. {why}")
    if len(fitting) > 1:
        raise UserError(
            f"{name}: the first {len(rows)} masks could be {' or '.join(fitting)}: their ids occur in both. Use a local "
            "copy (`--data_dir`), whose file names tell."
        )
    return fitting[0]
