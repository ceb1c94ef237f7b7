"""Boxes in files: COCO's JSON, YOLO's text files and Pascal VOC's XML, found by how their folders look."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml

from ...utils.files import read_text
from ...utils.messages import UserError
from ..boxes import BoxRow, BoxSource, RawBoxes
from ..dataset import SPLIT_NAMES, ReadRows, usual_name
from ..labels import NameSource
from .coco import COCO_NAMES, COCO_THINGS, check_categories, read_annotations
from .instance_maps import open_instance_maps
from .layouts import EXTENSIONS, Layout, files_by_stem, folder_of, listed_stems


logger = logging.getLogger(__name__)

SOME = 512  # images of a file of boxes whose masks are kept, from which BCD learns where boundaries are


COCO_LAYOUT = (
    "COCO's JSON is annotations/instances_train.json with the images in train/, or train/_annotations.coco.json"
)
VOC_LAYOUT = "Pascal VOC's XML files are in Annotations with JPEGImages beside it, or beside the images in train/"
YOLO_LAYOUT = (
    "YOLO's text files are in labels/train with the images in images/train, or data.yaml names the folders of images"
)
# where annotations often are as well, and what they contain
MISPLACED = (
    ("*.json", '"categories"', COCO_LAYOUT),
    ("*/*.json", '"categories"', COCO_LAYOUT),
    ("*.json", '"images"', COCO_LAYOUT),
    ("*/*.json", '"images"', COCO_LAYOUT),
    ("*.xml", "<annotation", VOC_LAYOUT),
    ("*/*.xml", "<annotation", VOC_LAYOUT),
    ("labels/**/*.txt", "", YOLO_LAYOUT),
)


def open_boxes(root: Path, masks: bool = False, id2label: NameSource | None = None) -> BoxSource | None:
    """The pictures with boxes below a folder, with their masks if these are wanted; None without annotations of a known kind."""
    readers: list[Callable[[Path], BoxSource | None]] = [
        partial(open_coco, masks=masks), partial(open_yolo, masks=masks), open_voc,
    ]  # fmt: skip
    # a folder of instances is meant for masks, and is read for boxes if there is nothing else
    readers.insert(0 if masks else 3, partial(open_instance_maps, masks=masks, id2label=id2label))
    found = [source for read in readers if (source := read(root)) is not None]
    if len(found) > 1:
        logger.warning("%s: boxes are read from %s, not from %s.", root, *(source.kind for source in found[:2]))
    return found[0] if found else None


def misplaced_boxes(root: Path) -> str | None:
    """What to do about a file that looks as if it held boxes, in a folder where `open_boxes` finds none; None without one."""
    for pattern, mark, layout in MISPLACED:
        for path in sorted(root.glob(pattern))[:20]:
            with path.open(encoding="utf-8", errors="replace") as file:
                if not mark or mark in file.read(2**16):
                    return f"{path} looks like boxes, but is not where they are looked for: {layout}."
    return None


@dataclass(frozen=True, eq=False)
class CocoRows:
    """The images of an annotation file, whose annotations lie in flat arrays: there may be a million.

    Attributes:
        file: the annotation file.
        images: path and, if stated, (width, height) of each image.
        first: the annotations of image i are those from `first[i]` to `first[i + 1]`.
        annotations: `[M]` or `[M, 4]` arrays in the order of `RawBoxes`.
        masks: the segmentations of all of them as JSON one after another, and where each begins, `[M + 1]`.
        some_masks: of images spread over the file, whose masks nobody asked for: those of image i, as JSON.
    """

    file: str
    images: list[tuple[str, tuple[int, int] | None]]
    first: np.ndarray
    annotations: Sequence[np.ndarray]
    masks: tuple[bytes, np.ndarray] | None = None
    some_masks: Mapping[int, list[bytes]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def with_masks(self, index: int) -> BoxRow | None:
        """The row with its masks, if it is one of those whose masks are kept."""
        row, masks = self[index], self.some_masks.get(index)
        return None if masks is None else row._replace(label=row.label._replace(masks=masks))

    def __getitem__(self, index: int) -> BoxRow:
        path, size = self.images[index]
        mine = slice(self.first[index], self.first[index + 1])
        boxes, categories, areas, crowd = (column[mine] for column in self.annotations)
        masks = None
        if self.masks is not None:
            text, places = self.masks
            masks = [text[start:end] for start, end in pairwise(places[mine.start : mine.stop + 1].tolist())]
        raw = RawBoxes(boxes, categories, areas, crowd, size, masks)
        return BoxRow(Path(path), raw, path, f"{self.file}, image {Path(path).name}")


def open_coco(root: Path, official: bool = False, masks: bool = False) -> BoxSource | None:
    """Splits with `annotations/instances_{split}*.json`, or `{split}/_annotations.coco.json` beside the images.

    Args:
        root: folder of the data set.
        official: whether the categories must be COCO's 80 things, which are the classes then.
        masks: whether masks are wanted.
    """
    files: dict[str, Path] = {}
    for split in SPLIT_NAMES:
        found = [*sorted(root.glob(f"annotations/instances_{split}[0-9]*.json"))]
        named = (f"annotations/instances_{split}.json", f"{split}/_annotations.coco.json")
        found += [root / name for name in named if (root / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{root}: {found[0].name} and {found[1].name} are both for {split}; keep one.")
        if found:
            files[split] = found[0]
    if not files:
        return None
    names: dict[Any, str] | None = dict(zip(COCO_THINGS, COCO_NAMES.values(), strict=False)) if official else None
    splits = {}
    for split, file in sorted(files.items(), key=lambda entry: entry[0] not in ("train", "training")):
        tag = file.stem.removeprefix("instances_")
        folders = [file.parent] if tag == file.stem else [root / tag, root / "images" / tag, root / tag / "images"]

        def read(file: Path, content: Any, paths: dict[int, str]) -> CocoRows | None:
            nonlocal names
            if "annotations" not in content:
                logger.warning("%s: left out, since it has no annotations.", file)
                return None
            if official:
                check_categories(file, content, (one["category_id"] for one in content["annotations"]), COCO_THINGS)
            here = _category_names(file, content)
            names = here if names is None else names
            if not official and {category: names.get(category) for category in here} != here:
                raise UserError(
                    f"{file}: its categories {_some(here)} are not those of the other split, {_some(names)}."
                )
            return _coco_rows(file, content, paths, masks)

        rows = read_annotations(file, folders, "instances", read)
        splits |= {} if rows is None else {split: rows}
    return BoxSource(splits, names, "xywh", "COCO's JSON", masks)


def _category_names(file: Path, content: Any) -> dict[int, str]:
    """Names by category id, ascending; without what is only the name of a group, as Roboflow adds it."""
    first: dict[int, str] = {}
    if not content["categories"]:
        raise ValueError("categories is empty")
    for category in content["categories"]:
        if (name := first.setdefault(category["id"], category["name"])) != category["name"]:
            raise UserError(
                f"{file}: the category {category['id']} has two names, {name!r} and {category['name']!r}; keep one."
            )
    used = {annotation["category_id"] for annotation in content["annotations"]}
    groups = {category.get("supercategory") for category in content["categories"]}
    return {
        category["id"]: category["name"]
        for category in sorted(content["categories"], key=lambda category: category["id"])
        if category["id"] in used
        or category["name"] not in groups
        or category.get("supercategory") not in (None, "none")
    }


def _some(names: Mapping[Any, str]) -> str:
    shown = [f"{category}: {name}" for category, name in list(names.items())[:6]]
    return ", ".join(shown) + (", ..." if len(names) > 6 else "")


def _coco_rows(file: Path, content: Any, paths: dict[int, str], masks: bool) -> CocoRows:
    places = {image: place for place, image in enumerate(paths)}
    annotations = content["annotations"]
    for annotation in annotations:
        box = annotation["bbox"]
        if annotation["image_id"] not in places or not (isinstance(box, list) and len(box) == 4):
            raise UserError(
                f"{file}: annotation {annotation.get('id')} of image {annotation['image_id']} has the box {box}. A box is "
                "[left, top, width, height], and its image is one of the file's. Correct or remove the annotation."
            )
        if masks and not annotation.get("segmentation"):
            raise UserError(
                f"{file}: annotation {annotation.get('id')} of image {annotation['image_id']} has the box {box}, and the "
                f"segmentation {annotation.get('segmentation')!r}. Instance segmentation needs polygons or run lengths of "
                "every object: add or remove it, or train on boxes (`--task object-detection`)."
            )
    of_image = np.array([places[annotation["image_id"]] for annotation in annotations], np.int64)
    order = np.argsort(of_image, kind="stable")
    first = np.searchsorted(of_image[order], np.arange(len(paths) + 1))
    columns = (
        np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4),
        np.array([annotation["category_id"] for annotation in annotations], np.int64),
        np.array([_number(annotation.get("area")) for annotation in annotations], np.float64),
        np.array([bool(int(annotation.get("iscrowd") or 0)) for annotation in annotations], bool),
    )
    sizes = [
        (int(image["width"]), int(image["height"])) if image.get("width") else None for image in content["images"]
    ]
    images = list(zip(paths.values(), sizes, strict=True))

    def stored(place: int) -> bytes:
        return json.dumps(annotations[place].get("segmentation"), separators=(",", ":")).encode()

    rows = CocoRows(str(file), images, first, tuple(column[order] for column in columns))
    if masks:
        texts = [stored(place) for place in order]
        return replace(rows, masks=(b"".join(texts), np.cumsum([0, *map(len, texts)])))
    some = {}
    for index in dict.fromkeys(number * len(images) // SOME for number in range(SOME)):
        mine = order[first[index] : first[index + 1]].tolist()
        if mine and all(annotations[place].get("segmentation") for place in mine):
            some[index] = [stored(place) for place in mine]
    return replace(rows, some_masks=some)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def plain_boxes(
    boxes: Sequence[Any],
    categories: Sequence[Any],
    size: tuple[int, int] | None = None,
    masks: Sequence[Any] | None = None,
) -> RawBoxes:
    """Boxes that state neither areas nor crowds."""
    count = len(categories)
    array = np.array(boxes, np.float64).reshape(-1, 4)
    return RawBoxes(array, np.array(categories, None), np.full(count, np.nan), np.zeros(count, bool), size, masks)


def open_yolo(root: Path, masks: bool = False) -> BoxSource | None:
    """Splits of pictures in a folder `images` with text files of the same stem in `labels`, and `data.yaml`.

    The file may have another name if it is the only one, and may name lists of pictures instead of folders.
    """
    files = sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    usual_files = [path for path in files if path.name in ("data.yaml", "data.yml", "dataset.yaml")]
    file = next(iter(usual_files or (files if len(files) == 1 else [])), None)
    try:
        content: Any = {} if file is None else yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not readable as YAML ({error}).") from error
    usual = {split: [f"{split}/images", f"images/{split}"] for split in SPLIT_NAMES}
    given = {split: content[split] for split in SPLIT_NAMES if isinstance(content, dict) and content.get(split)}
    if file is not None and (not isinstance(content, dict) or "names" not in content):
        if not given or not usual_files:
            return None  # a file of something else
        raise UserError(f"{file}: it lacks names, a list of the class names.")
    if "kpt_shape" in content:  # as many numbers as an outline may have
        raise UserError(f"{file}: its kpt_shape says that the text files hold key points, neither boxes nor outlines.")
    splits: dict[str, ReadRows] = {}
    stated_already = {usual_name(split) for split in given}
    for split in SPLIT_NAMES:
        if split not in given and usual_name(split) in stated_already:
            continue  # `val: ../valid/images`, as Roboflow writes
        if split in given and not isinstance(given[split], str):
            raise UserError(f"{file}: {split} is {given[split]!r}; expected one folder, or one list, of images.")
        # exported files often say ../train/images, seen from a folder that is not there
        stated = str(given.get(split, "")).removeprefix("./")
        candidates = (
            [Path(str(content.get("path") or "")) / stated, Path(stated.removeprefix("../"))] if stated else []
        )
        folders = [folder_of(root, str(folder)) for folder in (*candidates, *usual[split])]
        images = next((place for place in folders if place.is_dir() or place.is_file()), None)
        if images is None:
            if split in given:
                raise UserError(f"{file}: the folder {given[split]} of {split} is not there. Correct the path.")
            continue
        if images.is_file():
            labels, pictures = images, _listed(images, root)
            texts = {name: text for name, path in pictures.items() if (text := _labels_of(path)).is_file()}
        else:
            labels, pictures = _labels_of(images / "a.jpg").parent, files_by_stem(images)
            texts = files_by_stem(labels, (".txt",)) if labels.is_dir() else {}
        if not pictures.keys() & texts.keys():
            if file is None and not texts:
                continue  # pictures of something else
            if split not in ("train", "training"):
                logger.warning("%s: split %r is left out, since %s holds no labels.", root, split, labels)
                continue
            raise UserError(
                f"{labels}: no text file with the boxes of a picture in {images} ({', '.join(EXTENSIONS)})."
            )
        if lonely := sorted(texts.keys() - pictures.keys() - {"classes"}):
            logger.warning("%s: %d files have no picture in %s, such as %s.", labels, len(lonely), images, lonely[0])
        items = [(str(pictures[name]), str(_labels_of(pictures[name]))) for name in sorted(pictures)]
        splits[split] = ReadRows(items, partial(_read_yolo, masks=masks))
    if not splits:
        return None
    names = content.get("names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if names is not None and not isinstance(names, dict):
        raise UserError(f"{file}: names is {names!r}; expected a list of the class names, such as [cat, dog].")
    names = names and {int(key) if str(key).isdecimal() else key: name for key, name in names.items()}
    if names and content.get("nc", len(names)) != len(names):
        raise UserError(f"{file}: nc is {content['nc']}, but names has {len(names)} classes. Correct one of them.")
    return BoxSource(splits, names, "cxcywh_normalised", "YOLO's text files", masks)


def _labels_of(picture: Path) -> Path:
    """The text file of a picture: in `labels`, where the picture is in `images`, else beside it."""
    parts = picture.parent.parts
    place = max((index for index, part in enumerate(parts) if part.lower() == "images"), default=None)
    folder = (
        picture.parent if place is None else folder_of(Path(*parts[:place]), "labels").joinpath(*parts[place + 1 :])
    )
    return folder / f"{picture.stem}.txt"


def _listed(file: Path, root: Path) -> dict[str, Path]:
    """The pictures that a text file lists, one a line, seen from its folder or from the root."""
    pictures = {}
    for line in filter(None, map(str.strip, read_text(file).splitlines())):
        found = next((path for path in (file.parent / line, root / line) if path.is_file()), None)
        if found is None:
            raise UserError(f"{file}: the picture {line} is not there. Correct the path.")
        pictures[line] = found
    return pictures


def _read_yolo(image: str, file: str, masks: bool = False) -> BoxRow:
    """A line is a class and a box, or a class and the points of an outline; without a file, nothing is there."""
    lines = read_text(Path(file)).splitlines() if Path(file).is_file() else []
    boxes, classes, outlines = [], [], list[Any]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            index, *values = map(float, line.split())
            if not index.is_integer() or not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
                raise ValueError(f"{len(values)} numbers behind the class")
        except ValueError as error:
            raise UserError(
                f"{file}, line {number}: {line[:60]!r} is neither `class cx cy w h` nor `class x y x y x y ...` ({error})."
            ) from error
        if masks and len(values) == 4:
            raise UserError(
                f"{file}, line {number}: {line[:60]!r} is a box without an outline, but instance segmentation needs one of "
                "every object, `class x y x y x y ...`. Add it, or train on boxes (`--task object-detection`)."
            )
        outlines.append({"fractions": [values]})
        if len(values) > 4:
            low, high = np.reshape(values, (-1, 2)).min(axis=0), np.reshape(values, (-1, 2)).max(axis=0)
            values = [*(low + high) / 2, *(high - low)]
        boxes.append(values)
        classes.append(int(index))
    return BoxRow(Path(image), plain_boxes(boxes, classes, masks=outlines if masks else None), image, file)


def open_voc(root: Path) -> BoxSource | None:
    """Splits of XML files in `Annotations` with `JPEGImages` and `ImageSets/Main`, or beside the pictures of a split."""
    inner = [root, *sorted(root.glob("VOC20*")), *sorted(root.glob("VOCdevkit/VOC20*"))]
    base = next((folder for folder in inner if (folder / "Annotations").is_dir()), None)
    splits: dict[str, ReadRows] = {}
    if base is not None:
        files, images = files_by_stem(base / "Annotations", (".xml",)), files_by_stem(base / "JPEGImages")
        lists = {split: base / f"ImageSets/Main/{split}.txt" for split in SPLIT_NAMES}
        lists = {split: file for split, file in lists.items() if file.is_file()}
        for split, file in lists.items():
            stems = listed_stems(file)
            if split not in ("train", "training") and not files.keys() & set(stems):
                logger.warning("%s: split %r is left out, since no picture of it has an XML file.", root, split)
                continue
            splits[split] = _voc_rows(stems, files, images, file)
        if not lists:
            splits["train"] = _voc_rows(sorted(files), files, images, base / "Annotations")
    for split in SPLIT_NAMES if base is None else ():
        folder = root / split
        if folder.is_dir() and any(folder.glob("*.xml")):
            files, images = files_by_stem(folder, (".xml",)), files_by_stem(folder)
            splits[split] = _voc_rows(sorted(images), files, images, folder)
    return BoxSource(splits, None, "voc", "Pascal VOC's XML") if splits else None


def _voc_rows(stems: Iterable[str], files: Mapping[str, Path], images: Mapping[str, Path], where: Path) -> ReadRows:
    stems = list(stems)
    if missing := [stem for stem in stems if stem not in files or stem not in images]:
        raise UserError(
            f"{where}: {len(missing)} of {len(stems)} pictures have no XML file or no image, such as {missing[0]}. "
            "Complete or remove them."
        )
    return ReadRows([(str(images[stem]), str(files[stem])) for stem in stems], _read_voc)


def _read_voc(image: str, file: str) -> BoxRow:
    """What is marked as difficult counts as a crowd: VOC neither trains nor scores it."""
    try:
        tree = ElementTree.parse(file).getroot()
        things = tree.findall("object")
        corners = [
            [float(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")] for thing in things
        ]
        names = [_text(thing, "name") for thing in things]
        width, height = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise UserError(f"{file}: not an annotation of Pascal VOC ({error}).") from error
    raw = plain_boxes(corners, names, (width, height) if width and height else None)
    difficult = np.array([(thing.findtext("difficult") or "0").strip() == "1" for thing in things], bool)
    return BoxRow(Path(image), raw._replace(crowd=difficult), image, file)


def _text(element: Any, path: str) -> str:
    text = element.findtext(path)
    if not text or not text.strip():
        raise ValueError(f"an object without {path}")
    return text.strip()


COCO_FILES = "{train,val}2017/*.jpg and annotations/instances_{train,val}2017.json"
COCO_DETECTION = Layout(COCO_FILES, partial(open_coco, official=True))
COCO_MASKS = Layout(COCO_FILES, partial(open_coco, official=True, masks=True))
