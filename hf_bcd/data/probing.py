"""A look at a data set's rows, so that what is wrong with it shows before training."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from ..utils.messages import UserError
from .dataset import Row, UnlabelledError, read_sample
from .images import read_image
from .labels import IGNORE_INDEX, MAX_LABELS, VOID_NAMES, LabelRule


logger = logging.getLogger(__name__)

PROBED_ROWS = 4  # looked at with their images
PROBED_MASKS = 16  # spread over a split
FEWEST_MASKS = 4  # a trial with fewer is only warned of
# of real masks at most 1.5 % of the pixels on borders, after JPEG or interpolation at least 3 %
MAX_ISOLATED = 0.025


@dataclass(eq=False)
class Survey:
    """Running counts over rows: what they hold, whatever the names say.

    Attributes:
        rule: how stored ids become class ids.
        num_labels: number of classes; `MAX_LABELS` where they are not known yet.
        masks: number of masks.
        sizes: (width, height) of the images.
        modes: how the masks are stored: modes of images, or the kind of array.
        stored: pixels of every stored id.
        pixels: pixels of every class, and of void at 255, int64 `[256]`.
        border: pixels that differ from one of their four neighbours.
        isolated: pixels that differ from all of them.
    """

    rule: LabelRule
    num_labels: int
    masks: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)
    modes: set[str] = field(default_factory=set)
    stored: Counter[int] = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE_INDEX + 1, dtype=np.int64))
    border: int = 0
    isolated: int = 0
    _grey: bool = False
    _colours: dict[int, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def compare_palettes(self, other: "Survey", split: str) -> None:
        """Warns of an index that is another colour in another split, where files may come from another tool."""
        for index, (colour, name) in self._colours.items():
            theirs, where = other._colours.get(index, (colour, name))
            if theirs != colour:
                logger.warning(
                    "%s: index %d of the palette is the colour %s, but %s in %s. Please check that %r has the same ids.",
                    name,
                    index,
                    colour,
                    theirs,
                    where,
                    split,
                )
                return

    def add(self, row: Row, *, with_image: bool) -> None:
        """Decodes a row, its image too if asked; raises as `read_sample` does, and for palettes that differ."""
        mask = row.mask()
        row = row._replace(label=mask)  # decoded once for all that follows
        ids = row.stored_ids(self.rule.colours)
        if self.num_labels == MAX_LABELS and int(ids[ids != IGNORE_INDEX].max(initial=0)) >= MAX_LABELS:
            raise UserError(
                f"{row.label_name}: the mask holds ids up to {ids.max()}, but without class names its ids are the classes, "
                f"of which there are at most {MAX_LABELS}: 0..{MAX_LABELS - 1}, and 255 for void. Store the masks so."
            )
        if with_image:
            image = read_image(row.image, row.image_name)
            for picture, name in ((image, row.image_name), (mask, row.label_name)):
                if getattr(picture, "n_frames", 1) > 1 and getattr(picture, "format", "") != "MPO":
                    logger.warning("%s: the first of %d pages is read.", name, picture.n_frames)  # type: ignore
            sample = read_sample(row._replace(image=image), self.rule, self.num_labels)
            self.sizes.add(sample["image"].size)
            labels = sample["label"]
        else:
            labels = self.rule.apply(ids, self.num_labels, row.label_name)
        self.masks += 1
        self.modes.add(f"array of {mask.dtype}" if isinstance(mask, np.ndarray) else mask.mode)
        found, counts = np.unique(ids, return_counts=True)
        self.stored.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
        self.pixels += np.bincount(labels.ravel(), minlength=len(self.pixels))
        alone, border = _neighbours(ids)
        self.isolated, self.border = self.isolated + alone, self.border + border
        if isinstance(mask, Image.Image) and mask.mode == "P":
            self._compare_palette(mask, found.tolist(), row.label_name)

    def _compare_palette(self, mask: Image.Image, found: Iterable[int], name: str) -> None:
        palette = np.array(mask.getpalette("RGB"), dtype=int).reshape(-1, 3)
        shades = palette[[index for index in found if index < len(palette)]]
        if (shades == shades[:, :1]).all() and not self._grey and shades[:, 0].tolist() != list(found):
            self._grey = True
            logger.warning(
                "%s: the palette has the shades %s for the indices %s. Indices are read as ids, not shades; please check.",
                name,
                _shown(shades[:, 0].tolist()),
                _shown(found),
            )
        for index in found:
            colour = tuple(palette[index].tolist()) if index < len(palette) else ()
            first, where = self._colours.setdefault(index, (colour, name))
            if colour != first:
                raise UserError(
                    f"{name}: index {index} of the palette is the colour {colour}, but {first} in {where}. Files that were "
                    "quantised one by one have other indices for the same class: store the masks with one palette, or "
                    "as one channel of class ids."
                )

    @property
    def classes(self) -> list[int]:
        """Classes that occur."""
        return self.pixels[:IGNORE_INDEX].nonzero()[0].tolist()

    @property
    def void_share(self) -> float:
        """Fraction of the pixels that is void."""
        return float(self.pixels[IGNORE_INDEX] / max(1, self.pixels.sum()))

    @property
    def looks_lossy(self) -> bool:
        """Whether many pixels on borders are like none of their neighbours, as after JPEG or interpolation."""
        return len(self.stored) > 2 and self.isolated > MAX_ISOLATED * max(self.border, 2000)


def _neighbours(ids: np.ndarray) -> tuple[int, int]:
    """How many pixels of a map differ from all of their four neighbours, and from any."""
    same_row, same_column = ids[:, 1:] == ids[:, :-1], ids[1:] == ids[:-1]
    like, unlike = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
    for same, ends in (
        (same_row, np.s_[:, 1:]),
        (same_row, np.s_[:, :-1]),
        (same_column, np.s_[1:]),
        (same_column, np.s_[:-1]),
    ):
        like[ends] |= same
        unlike[ends] |= ~same
    return int((~like & unlike).sum()), int(unlike.sum())


def survey(rows: Iterable[Row], rule: LabelRule, num_labels: int, images: int | None = None) -> Survey:
    """Counts over rows, the first `images` of them (None: all) with their images; raises as `Survey.add` does."""
    found = Survey(rule, num_labels)
    for index, row in enumerate(rows):
        found.add(row, with_image=images is None or index < images)
    return found


def probed_rows(rows: Any) -> list[Row]:
    """The rows that are looked at: spread over a split, since neighbours are alike; the first ones of a stream.

    Raises:
        UserError: some, but not all, have no mask (`UnlabelledError` if none has one).
    """
    if not hasattr(rows, "__len__"):
        return list(islice(rows, PROBED_ROWS))
    count = min(len(rows), PROBED_MASKS)
    found: list[Row] = []
    lacking: list[UnlabelledError] = []
    for index in range(count):
        try:
            found.append(rows[index * len(rows) // count])
        except UnlabelledError as error:
            lacking.append(error)
    if lacking:
        raise lacking[0] if not found else UserError(str(lacking[0]))
    return found


def infer_id2label(found: Survey, name: str) -> dict[int, str]:
    """Names `class_0` .. `class_n` for the ids 0 to the largest one that occurs in any mask after the label rule.

    Args:
        found: counts over all masks.
        name: data set, for messages.

    Raises:
        UserError: fewer than two classes occur, or the ids are no classes but shades.
    """
    classes = found.classes
    if not classes or classes[-1] == 0:
        raise UserError(
            f"{name}: no class beside {'0' if classes else 'void'} occurs in any mask. 255 marks void pixels: if it stands for the "
            "foreground in these masks, store the foreground as 1."
        )
    if found.looks_lossy and len(found.stored) >= 8:
        raise UserError(
            f"{name}: {len(found.stored)} ids occur in the masks, {_shown(found.stored)}, and {found.isolated / found.border:.0%} of the "
            "pixels on borders are like none of their neighbours: these are shades (soft edges, lossy compression, resizing "
            "with interpolation), not classes. Store the annotations themselves, as PNG of class ids."
        )
    if 2 * len(classes) <= classes[-1]:
        logger.warning(
            "%s: of the ids 0..%d only %d occur in the masks, and the others become classes, too. If these are grey levels or "
            "masks stored with loss, store ids instead; if not, pass id2label.",
            name,
            classes[-1],
            len(classes),
        )
    return {index: f"class_{index}" for index in range(classes[-1] + 1)}


def judge(found: Survey, id2label: Mapping[int, str], name: str, *, whole: bool) -> list[str]:
    """Compares what training masks hold with the class names: likely mistakes as sentences, certain ones as errors.

    Args:
        found: counts over masks.
        id2label: class names.
        name: data set, for error messages.
        whole: whether these are all masks of the split.

    Raises:
        UserError: only one class is there to learn, or the names begin with a class that the rule makes void.
    """
    masks = f"{'the' if whole else 'the first'} {found.masks} masks"
    absent = [name for index, name in id2label.items() if not found.pixels[index]]
    covered = ", ".join(f"{index} ({count / found.pixels.sum():.1%})" for index, count in found.stored.most_common(5))
    certain: list[str] = []
    likely: list[str] = []
    if not found.classes:
        certain.append(f"{masks} are void throughout; they store the ids {covered}")
    elif len(found.classes) == 1:
        only = id2label[found.classes[0]]
        void = f", while stored 255 covers {found.void_share:.1%} and is void" if IGNORE_INDEX in found.stored else ""
        certain.append(
            f"{masks} show one class only, {only!r}, and none shows {', '.join(map(repr, absent[:5]))}{void}. They store the "
            f"ids {covered}. Store the foreground as its class id"
        )
    if found.rule.reduce_zero and id2label[0].casefold() in VOID_NAMES and len(id2label) - 1 not in found.classes:
        certain.append(
            f"{len(id2label)} names are given, but {masks} store no id {len(id2label)}, and the first name, "
            f"{id2label[0]!r}, would be stored as 1: with reduce_labels, 0 is void and has no name. Leave that name out, "
            "or reduce_labels"
        )
    if certain and whole and found.masks >= FEWEST_MASKS:
        raise UserError(f"{name}: {certain[0]}.")
    likely += certain
    if not certain and absent and (whole or len(id2label) <= found.masks // 2):
        likely.append(f"{masks} show no {', '.join(map(repr, absent[:5]))}{', ...' if absent[5:] else ''}")
    if found.classes and found.void_share > 0.95:
        likely.append(f"{found.void_share:.1%} of the pixels in {masks} are void; they store the ids {covered}")
    named_void = [index for index in found.rule.void_ids if index - found.rule.reduce_zero in id2label]
    if named_void:
        names = ", ".join(f"{id2label[index - found.rule.reduce_zero]!r} ({index})" for index in named_void)
        likely.append(f"the names {names} are of ids that ignore_labels makes void, so no pixel can have them")
    if found.looks_lossy:
        likely.append(
            f"{found.isolated / found.border:.1%} of the pixels on borders in {masks} are like none of their neighbours, as "
            "after lossy compression or resizing with interpolation, which change ids"
        )
    return likely


def is_labelled(found: Survey, train: Survey | None) -> bool:
    """Whether the masks of an evaluation split say anything: withheld ones are void, or 0 where training has more."""
    return bool(found.classes) and not (set(found.stored) == {0} and train is not None and len(train.classes) > 1)


def _shown(ids: Iterable[int]) -> str:
    found = sorted(ids)
    return ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")


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
