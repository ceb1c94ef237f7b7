"""COCO's ids and its json annotations, panoptic and per instance, as maps of class ids."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...utils.files import read_text
from ...utils.masks import decode
from ...utils.messages import UserError
from ...utils.text import shortened
from ..dataset import ReadRows, Row, Rows
from ..images import read_image
from ..labels import IGNORE_INDEX, pack_rgb, read_id2label
from ..masks import to_rle


# The official names, and short ones of subsets in the same layout.
TAGS = {"train": ("train2017", "train"), "validation": ("val2017", "val")}

# Of the 91 things that were planned, COCO annotates 80; COCO-Stuff adds 91 stuff classes after all 91 of them.
_NEVER_ANNOTATED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCO_THINGS = tuple(index for index in range(1, 92) if index not in _NEVER_ANNOTATED)
# panoptic_coco_categories.json of panopticapi: 53 stuff classes, of which 17 are merged ones (183..200).
COCO_PANOPTIC = COCO_THINGS + (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154,
    155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201),
)  # fmt: skip
# 80 things, 53 kinds of stuff
COCO_NAMES = read_id2label(Path(__file__).with_name("coco_id2label.json"))
# labels.txt of COCO-Stuff: 0 is "unlabeled"; the ids of things that were never annotated do not occur.
COCO_STUFF_10K_IDS = (
    (0, IGNORE_INDEX),
    *((stored, index) for index, stored in enumerate((*COCO_THINGS, *range(92, 183)))),
)


def _read_panoptic(image: str, mask: str, segments: np.ndarray, classes: np.ndarray) -> Row:
    label = panoptic_to_classes(read_image(mask, mask), segments, classes, mask)
    return Row(Path(image), label, image, mask)


def _read_instances(image: str, height: int, width: int, annotations: bytes) -> Row:
    """The annotations are json text, which takes less memory than objects."""
    name = f"{image}, instances"
    return Row(Path(image), draw_instances(json.loads(annotations), height, width, name), image, name)


def panoptic_to_classes(mask: Image.Image, segments: np.ndarray, classes: np.ndarray, name: str) -> np.ndarray:
    """Replaces the segment ids R + 256 G + 65536 B of a panoptic mask by classes, uint8 `[H, W]`; 0 becomes void.

    Args:
        mask: RGB image.
        segments: ids of the segments, ascending.
        classes: class of each segment; a crowd has its class.
        name: the file, for error messages.

    Raises:
        UserError: the mask is not RGB or holds a segment that the annotations lack.
    """
    if mask.mode != "RGB":
        raise UserError(f"{name}: a panoptic mask is an RGB image of segment ids, but this one has mode {mask.mode}.")
    segments = np.concatenate([[0], segments])
    classes = np.concatenate([[IGNORE_INDEX], classes]).astype(np.uint8)
    ids = pack_rgb(np.asarray(mask))
    places = np.searchsorted(segments, ids).clip(max=len(segments) - 1)
    unknown = ids[segments[places] != ids]
    if unknown.size:
        raise UserError(
            f"{name}: the mask holds segment {unknown[0]}, which the json annotations do not list for this image. "
            "Masks and annotations must be of the same release."
        )
    return classes[places]


def draw_instances(annotations: list[dict[str, Any]], height: int, width: int, name: str) -> np.ndarray:
    """Draws instances of the 80 classes on a background of class 0: uint8 `[height, width]`.

    Where instances of different classes overlap, and in crowds outside of single instances, pixels are void.

    Args:
        annotations: `category_id` (COCO's, 1..90), `iscrowd` and `segmentation`: polygons, or run lengths, compressed or
            not.
        height: of the image.
        width: of the image.
        name: the image, for error messages.

    Raises:
        UserError: a segmentation cannot be read.
    """
    label = np.zeros((height, width), dtype=np.uint8)
    covered = np.zeros((height, width), dtype=bool)
    for annotation in sorted(annotations, key=lambda annotation: -annotation["iscrowd"]):
        mask = decode(to_rle(annotation["segmentation"], height, width, name))
        if annotation["iscrowd"]:
            label[mask] = IGNORE_INDEX
            continue
        index = COCO_THINGS.index(annotation["category_id"]) + 1
        clash = mask & covered & (label != index)
        label[mask] = index
        label[clash] = IGNORE_INDEX
        covered |= mask
    return label


def open_panoptic(root: Path) -> dict[str, Rows]:
    """Splits with `annotations/panoptic_{tag}.json`, masks in `annotations/panoptic_{tag}` and images in `{tag}`."""
    return _open_splits(root, "panoptic", _panoptic_rows)


def open_instances(root: Path) -> dict[str, Rows]:
    """Splits with `annotations/instances_{tag}.json` and images in `{tag}`."""
    return _open_splits(root, "instances", _instance_rows)


def _open_splits(root: Path, kind: str, read: Callable[[Path, Any, dict[int, str]], Rows]) -> dict[str, Rows]:
    splits = {}
    for split, tags in TAGS.items():
        tag = next((tag for tag in tags if (root / f"annotations/{kind}_{tag}.json").is_file()), None)
        if tag is None:
            continue
        folders = [root / tag, root / "images" / tag, root / tag / "images"]
        splits[split] = read_annotations(root / f"annotations/{kind}_{tag}.json", folders, kind, read)
    return splits


def read_annotations(
    file: Path, folders: Sequence[Path], kind: str, read: Callable[[Path, Any, dict[int, str]], Any]
) -> Any:
    """What `read` makes of a json file, its content and the paths of its images by id.

    Args:
        file: the annotation file.
        folders: where its images may lie, the innermost last: `train/images` lies in `train`.
        kind: `panoptic` or `instances`.
        read: see above.

    Raises:
        UserError: the file is not of this kind, or images are missing.
    """
    images = next((folder for folder in reversed(folders) if folder.is_dir()), None)
    if images is None:
        raise UserError(f"{file} needs a folder with its images; expected {folders[0]}.")
    try:
        content = json.loads(read_text(file))
        return read(file, content, _image_paths(file, content["images"], images))
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else shortened(repr(error))
        raise UserError(f"{file}: not COCO's {kind} annotations ({reason}).") from error


def _image_paths(file: Path, images: list[Any], folder: Path) -> dict[int, str]:
    present = {path.name for path in folder.iterdir()}
    names = [image["file_name"] for image in images]
    # some tools write `train/1.jpg`, seen from the folder above
    inner = {name for name in names if "/" in name and (folder / name).is_file()}
    outer = {name for name in names if "/" in name and (folder.parent / name).is_file()} - inner
    if missing := [name for name in names if name not in present | inner | outer]:
        raise UserError(
            f"{file} lists {len(images)} images, of which {len(missing)} are not in {folder}, such as {missing[0]}. "
            "Complete the folder."
        )
    paths = {
        image["id"]: str((folder.parent if name in outer else folder) / name)
        for image, name in zip(images, names, strict=True)
    }
    if len(paths) < len(images):
        raise UserError(f"{file} lists {len(images)} images, but only {len(paths)} different ids. Correct the file.")
    if len(set(names)) < len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise UserError(f"{file} lists {twice} more than once, under several ids. Keep one of its images.")
    return paths


def _panoptic_rows(file: Path, content: Any, images: dict[int, str]) -> ReadRows:
    classes = {category: index for index, category in enumerate(COCO_PANOPTIC)}
    items = []
    for annotation in content["annotations"]:
        pairs = sorted((segment["id"], segment["category_id"]) for segment in annotation["segments_info"])
        check_categories(file, content, (category for _, category in pairs), COCO_PANOPTIC)
        segments = np.array([segment for segment, _ in pairs], dtype=np.int32)
        ids = np.array([classes[category] for _, category in pairs], dtype=np.uint8)
        mask = str(file.with_suffix("") / annotation["file_name"])
        items.append((images[annotation["image_id"]], mask, segments, ids))
    return ReadRows(items, _read_panoptic)


def _instance_rows(file: Path, content: Any, images: dict[int, str]) -> ReadRows:
    by_image = defaultdict(list)
    check_categories(file, content, (one["category_id"] for one in content["annotations"]), COCO_THINGS)
    for annotation in content["annotations"]:
        kept = {key: annotation[key] for key in ("category_id", "iscrowd", "segmentation")}
        by_image[annotation["image_id"]].append(kept)
    items = []
    for image in content["images"]:
        annotations = json.dumps(by_image[image["id"]]).encode()
        items.append((images[image["id"]], int(image["height"]), int(image["width"]), annotations))
    return ReadRows(items, _read_instances)


def check_categories(file: Path, content: Any, categories: Iterable[int], known: tuple[int, ...]) -> None:
    """Compares the categories that annotations use, and the names that the file gives them, with COCO's."""
    unknown = sorted(set(categories) - set(known))
    if unknown:
        raise UserError(
            f"{file}: categories {unknown} are none of COCO's {len(known)}. These are annotations of another set."
        )
    official = dict(zip(COCO_PANOPTIC, COCO_NAMES.values(), strict=True))
    for category in content.get("categories") or ():
        index, name = category.get("id"), category.get("name")
        if index in known and _letters(name) != _letters(official[index]):
            raise UserError(
                f"{file}: category {index} is {name!r} here, but {official[index]!r} in COCO. These are annotations of "
                "another set in COCO's format: draw its masks as PNG files of class ids, and give their folder."
            )


def _letters(name: object) -> str:
    return re.sub(r"[\W_]+", "", str(name).casefold())
