"""Maps of instance ids beside pictures: 0 is background, every other id one object; own folders and Cityscapes."""

import json
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.files import read_text
from ...utils.masks import encode_ids, mask_areas, mask_boxes
from ...utils.messages import UserError
from ...utils.text import shortened
from ..boxes import BoxRow, BoxSource, RawBoxes
from ..dataset import SPLIT_NAMES, ReadRows
from ..images import read_image
from ..labels import NameSource, decode_label, read_id2label
from .layouts import Layout, files_by_key, files_by_stem, folder_of, pair_files, pair_folders


KIND = "maps of instance ids"
FORMS = (("{split}/images", "{split}/{kind}"), ("images/{split}", "{kind}/{split}"), ("images", "{kind}"))
ONE_CLASS = {0: "object"}
PER_CLASS = 1000  # ids of a class, as in Cityscapes
# cityscapesScripts, helpers/labels.py: what has instances and is evaluated
CITYSCAPES_THINGS = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
PROBED_MAPS = 16
FEW_IDS = 20


def open_instance_maps(root: Path, masks: bool = False, id2label: NameSource | None = None) -> BoxSource | None:
    """Splits of `{split}/{images,instances}`, of `{images,instances}/{split}`, or `{images,instances}` for training.

    All objects are of one class, but where `a.json` beside the map `a.png` names the class of each id, or where
    `id2label` has several names: the class is id // 1000 then.

    Args:
        root: folder of the data set.
        masks: whether masks are asked for, so that a folder `masks` may stand for `instances`.
        id2label: class names, if they are given.
    """
    for kind, (images, maps) in product(("instances", "masks") if masks else ("instances",), FORMS):
        names = SPLIT_NAMES if "{split}" in images else ["train"]
        folders = {name: (images.format(split=name), maps.format(split=name, kind=kind)) for name in names}
        pairs = [[folder_of(root, folder) for folder in pair] for pair in folders.values()]
        there = [maps for images, maps in pairs if images.is_dir() and maps.is_dir()]
        if not any(map(files_by_stem, there)):
            if other := next((path for folder in there for path in folder.rglob("*") if path.suffix), None):
                raise UserError(
                    f"{other}: no {KIND} that can be read. Store them as PNG or TIFF files of 8 or 16 bits."
                )
            continue
        listed = any(next(folder.rglob("*.json"), None) for folder in there)
        several = id2label is not None and len(read_id2label(id2label, of_pixels=False)) > 1
        classes = "listed" if listed else "in ids" if several else "one"
        found: dict[str, Any] = pair_folders(root, folders)
        splits = {split: ReadRows(rows.items, partial(_read_map, classes=classes)) for split, rows in found.items()}
        notes = _notes(splits) if classes == "one" else ()
        return BoxSource(splits, ONE_CLASS if classes == "one" else None, "xyxy", KIND, True, notes)
    return None


def read_instance_ids(file: str) -> np.ndarray:
    """The ids `[H, W]` of a map; a `UserError` names one of colours, of floats, below 0, or that cannot be decoded."""
    try:
        ids = decode_label(read_image(Path(file), file, exact=True), file)
        if ids.min() < 0:
            raise UserError(f"{file}: holds the id {ids.min()}. Set what is no object to 0.")
    except UserError as error:
        raise UserError(f"{error} Here, an id stands for one object, and 0 for the background.") from error
    return ids


def _read_map(image: str, file: str, classes: str) -> BoxRow:
    """The row of a picture and its map; `classes` says where the class of an id is, see `open_instance_maps`."""
    map_of_ids = read_instance_ids(file)
    found = encode_ids(map_of_ids)
    ids, categories = np.array(list(found), np.int64), np.zeros(len(found), np.int64).astype(object)
    crowd = np.zeros(len(ids), bool)
    if classes == "listed":
        categories = _listed(Path(file).with_suffix(".json"), ids.tolist(), file)
    elif classes != "one":
        categories = (ids // PER_CLASS).astype(object)
    if classes == "cityscapes":
        crowd = ids < PER_CLASS
        categories[crowd] = ids[crowd]
        things = np.isin(categories.astype(np.int64), list(CITYSCAPES_THINGS))
        ids, categories, crowd = ids[things], categories[things], crowd[things]
    masks = [found[index] for index in ids.tolist()]
    height, width = map_of_ids.shape
    raw = RawBoxes(mask_boxes(masks), categories, mask_areas(masks), crowd, (width, height), masks)
    return BoxRow(Path(image), raw, image, file)


def _listed(file: Path, ids: Sequence[int], name: str) -> np.ndarray:
    try:
        classes = json.loads(read_text(file))
        found = [classes[str(index)] for index in ids]
    except OSError as error:
        raise UserError(
            f"{name}: {file.name} with the class of each id is missing beside it, as others have."
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f'{file}: not a mapping of ids to classes such as {{"1": "cell"}} ({error}).') from error
    except KeyError as error:
        raise UserError(
            f"{file}: no class of id {error.args[0]}, which {name} holds. Add it, or correct the map."
        ) from error
    if wrong := [pair for pair in zip(ids, found, strict=True) if not isinstance(pair[1], str | int)]:
        raise UserError(
            f"{file}: the class of id {wrong[0][0]} is {shortened(repr(wrong[0][1]))}; expected a name, or a number."
        )
    return np.array(found, object)


def _notes(splits: Any) -> tuple[str, ...]:
    """Says if the maps of the first split look like maps of classes."""
    rows = next(iter(splits.values()))
    count = min(len(rows), PROBED_MAPS)
    files = [rows.items[index * len(rows) // count][1] for index in range(count)]
    held = [set(np.unique(read_instance_ids(file)).tolist()) - {0} for file in files]
    together = set().union(*held)
    # objects are counted from 1 in each picture, and rarely are as many everywhere
    counted = all(ids == set(range(1, len(ids) + 1)) for ids in held) and len({len(ids) for ids in held}) > 1
    if (count < 4 and len(together) > 1) or counted or not 0 < len(together) <= min(FEW_IDS, 2 * max(map(len, held))):
        return ()
    shown = ", ".join(map(str, sorted(together)[:8])) + (", ..." if together - set(sorted(together)[:8]) else "")
    return (
        f"the maps of {count} pictures such as {files[0]} hold the ids {shown} only, again and again, as maps of classes do. "
        "Here every id is one object of a picture: number the objects, by scipy.ndimage.label if they do not touch",
    )


def _open_cityscapes(root: Path) -> BoxSource:
    """Splits of `leftImg8bit/{split}/{city}`; what is not counted one by one (ids below 1000) is a crowd."""
    splits = {}
    for split, name in (("train", "train"), ("validation", "val")):
        images, maps = root / "leftImg8bit" / name, root / "gtFine" / name
        if images.is_dir():
            files = files_by_key(images, "_leftImg8bit.png"), files_by_key(maps, "_gtFine_instanceIds.png")
            pairs = pair_files(*files, images, maps)
            splits[split] = ReadRows(pairs, partial(_read_map, classes="cityscapes"))
    return BoxSource(splits, CITYSCAPES_THINGS, "xyxy", KIND, True)


CITYSCAPES_MASKS = Layout(
    "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/{train,val}/<city>/*_gtFine_instanceIds.png",
    _open_cityscapes,
)
