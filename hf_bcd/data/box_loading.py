"""From raw rows with boxes to data sets: classes, format of the boxes, and what training leaves out."""

import logging
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Subset

from ..utils.messages import UserError
from ..utils.text import shortened
from .box_probing import PROBED_PICTURES, Scan, scan, survey_boxes
from .boxes import BoxRow, BoxRule, BoxSource, Looked, recognise
from .dataset import DenseDatasets, named_splits
from .detection import BoxDataset, oriented
from .images import read_image
from .labels import NameSource, read_id2label


logger = logging.getLogger(__name__)


def assemble_boxes(
    name: str,
    found: BoxSource,
    source: str,
    id2label: NameSource | None = None,
    box_format: str | None = None,
    revision: str | None = None,
) -> DenseDatasets:
    """Makes data sets of raw splits: reads all annotations, and some of the pictures.

    Pictures without boxes are left out of `train`, and evaluation splits without annotations altogether, with a warning.

    Args:
        name: name of the data set.
        found: the raw splits.
        source: folder or Hub id, for messages.
        id2label: class names, see `load_dense_dataset`.
        box_format: key of `FORMATS`; None if the kind of file or the boxes tell.
        revision: of a Hub id.

    Raises:
        UserError: there is nothing to train on, classes or format cannot be found, or a row that is looked at is wrong.
    """
    splits, scans = named_splits(found.splits, source), dict[str, Scan]()
    for split, rows in list(splits.items()):
        scans[split] = scan(rows, found.masks)
        if split == "train" and scans[split].lacking:
            raise scans[split].lacking[0]
        if not scans[split].categories:
            if split == "train":
                raise UserError(
                    f"{source}: none of the {len(rows)} pictures of 'train' has a box: nothing can be learnt."
                )
            reason = f"none of its {len(rows)} pictures has a box, as where annotations are withheld"
            logger.warning("%s: split %r is left out: %s.", source, split, reason)
            del splits[split]
    if not splits:
        raise UserError(f"{source}: no split has annotations.")
    names, categories = _classes(found, scans.get("train") or scans[next(iter(splits))], source, id2label)
    for found_there in scans.values():
        known = range(len(names)) if categories is None else set(categories)
        if unknown := [category for category in found_there.categories if category not in known]:
            raise UserError(
                f"{found_there.where[unknown[0]]}: a box has the category {unknown[0]!r}, which is none of the {len(names)} "
                f"classes ({', '.join(list(names.values())[:8])}{', ...' if len(names) > 8 else ''}). Correct the "
                "annotation, or name all classes (`--id2label`)."
            )
    # spread over a split, since neighbours are alike
    shares = PROBED_PICTURES // len(splits)
    probed = {}
    for split, rows in splits.items():
        places = scans[split].useful or range(len(rows))
        count = min(shares, len(places))
        probed[split] = [rows[places[index * len(places) // count]] for index in range(count)]
    looked = [
        Looked(row.label, row.label.size or _size(row), row.label_name) for some in probed.values() for row in some
    ]
    stated, by = box_format or found.box_format, "as box_format says" if box_format else f"as in {found.kind}"
    if not box_format and stated == "voc" and min(one.lowest for one in scans.values()) < 1:
        stated, by = "xyxy", f"{by}, where some start at 0, so that corners do not count from 1"
    try:
        rule = BoxRule(*recognise(looked, stated, by), categories)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    built: dict[str, Any] = {}
    for split, rows in splits.items():
        survey = survey_boxes(probed[split], rule, len(names), found.masks)
        notes = survey.notes()
        if split == "train":
            notes += found.notes
            if survey.degenerate + survey.hollow == survey.boxes.sum() > 0:
                raise UserError(f"{source}: {notes[0]} (they are read as {rule.box_format}).")
            known = enumerate(range(len(names)) if categories is None else categories)
            if absent := [names[index] for index, category in known if category not in scans[split].categories]:
                shown = ", ".join(map(repr, absent[:5])) + (", ..." if absent[5:] else "")
                notes.append(f"no box of 'train' shows {shown}")
            useful = scans[split].useful
            if not useful:
                raise UserError(f"{source}: all boxes of 'train' mark crowds, or lie in tiny pictures.")
            if len(useful) < len(rows):
                count = len(rows) - len(useful)
                notes.append(
                    f"{count} of the {len(rows)} pictures of 'train' have no box to learn from and are left out"
                )
                rows = Subset(rows, useful)
        for note in notes:
            logger.warning("%s: %s: %s.", source, split, note)
        commit = getattr(splits[split], "commit", None) or revision
        built[split] = BoxDataset(rows, name, split, source, names, rule, commit, tuple(notes), masks=found.masks)
    return DenseDatasets(built)


def _size(row: BoxRow) -> tuple[int, int]:
    return oriented(read_image(row.image, row.image_name), None, row.image_name).size


def _classes(
    found: BoxSource, train: Scan, source: str, id2label: NameSource | None
) -> tuple[dict[int, str], tuple[Any, ...] | None]:
    """Class names, and the stored category of each class; None if these are 0..n-1."""
    given = None if id2label is None else read_id2label(id2label, of_pixels=False)
    if found.names is not None:
        own = read_id2label([str(label) for label in found.names.values()], of_pixels=False)
        if given is not None and len(given) != len(own):
            raise UserError(f"{source}: id2label has {len(given)} names, but its files have {len(own)} categories.")
        if given is not None and given != own and sorted(given.values()) == sorted(own.values()):
            raise UserError(
                f"{source}: id2label has the names of its files in another order, {shortened(given)} and not {shortened(own)}, "
                "so that classes would change their names. Leave id2label out, or give the order of the files."
            )
        return given or own, tuple(found.names)
    stored: Mapping[Any, int] = train.categories
    texts = {isinstance(category, str) for category in stored}
    if len(texts) > 1:
        raise UserError(f"{source}: some categories are names and some are numbers; store one kind.")
    if texts == {True}:
        names = given or dict(enumerate(sorted(stored)))
        if len({name.casefold() for name in names.values()}) < len(names):
            logger.warning(
                "%s: some of its classes differ in upper and lower case only: %s.", source, shortened(names)
            )
        return names, tuple(names.values())
    if given is not None:
        return given, None
    ids = sorted(stored)
    logger.warning(
        "%s: no class names; its %d categories are the classes. Give id2label to name them.", source, len(ids)
    )
    return {index: f"class_{category}" for index, category in enumerate(ids)}, tuple(ids)
