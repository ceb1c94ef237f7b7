"""COCO's json annotations, panoptic and per instance, as maps of class ids."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...utils.messages import UserError
from ..dataset import Row, Rows
from ..images import read_image
from ..labels import IGNORE_INDEX, pack_rgb
from .encodings import COCO_PANOPTIC, COCO_THINGS


# The official names, and short ones of subsets in the same layout.
TAGS = {"train": ("train2017", "train"), "validation": ("val2017", "val")}


class PanopticRows:
    """Rows of COCO's panoptic masks, read as maps of the 133 classes; crowds are labelled as their class.

    Args:
        items: image, mask, and the ids and classes of the mask's segments, by ascending id.
    """

    def __init__(self, items: list[tuple[str, str, np.ndarray, np.ndarray]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Row:
        image, mask, segments, classes = self.items[index]
        label = panoptic_to_classes(read_image(mask, mask), segments, classes, mask)
        return Row(Path(image), label, image, mask)


class InstanceRows:
    """Rows of COCO's instance annotations, drawn as maps of 0 for the background and 1..80 for the things.

    Args:
        items: image, height, width, and the annotations of the image as json text, which takes less memory than objects.
    """

    def __init__(self, items: list[tuple[str, int, int, bytes]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Row:
        image, height, width, annotations = self.items[index]
        name = f"{image}, instances"
        return Row(Path(image), draw_instances(json.loads(annotations), height, width, name), image, name)


def panoptic_to_classes(mask: Image.Image, segments: np.ndarray, classes: np.ndarray, name: str) -> np.ndarray:
    """Replaces the segment ids R + 256 G + 65536 B of a panoptic mask by classes; 0 becomes void.

    Args:
        mask: RGB image.
        segments: ids of the segments, ascending.
        classes: class of each segment.
        name: the file, for error messages.

    Returns:
        uint8 array `[H, W]`.

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
    """Draws instances of the 80 classes on a background of class 0.

    Where instances of different classes overlap, and in crowds outside of single instances, pixels are void.

    Args:
        annotations: `category_id` (COCO's, 1..90), `iscrowd` and `segmentation`: polygons, or run lengths, compressed or
            not.
        height: of the image.
        width: of the image.
        name: the image, for error messages.

    Returns:
        uint8 array `[H, W]`.

    Raises:
        UserError: pycocotools is not installed, or a segmentation cannot be read.
    """
    label = np.zeros((height, width), dtype=np.uint8)
    covered = np.zeros((height, width), dtype=bool)
    for annotation in sorted(annotations, key=lambda annotation: -annotation["iscrowd"]):
        try:
            mask = _decode_segmentation(annotation["segmentation"], height, width, name)
        except (TypeError, KeyError) as error:
            raise UserError(f"{name}: neither polygons nor run lengths ({error!r}).") from error
        if annotation["iscrowd"]:
            label[mask] = IGNORE_INDEX
            continue
        index = COCO_THINGS.index(annotation["category_id"]) + 1
        clash = mask & covered & (label != index)
        label[mask] = index
        label[clash] = IGNORE_INDEX
        covered |= mask
    return label


def _decode_segmentation(segmentation: Any, height: int, width: int, name: str) -> np.ndarray:
    masks = import_extra("pycocotools.mask")
    if isinstance(segmentation, list):
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]  # pycocotools takes 4 for a box
        if not segmentation:
            return np.zeros((height, width), dtype=bool)
        runs = masks.merge(masks.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = masks.frPyObjects(segmentation, height, width)
    else:
        runs = segmentation
    if list(runs["size"]) != [height, width]:
        raise UserError(
            f"{name}: run lengths of size {runs['size']} (height, width), but the image is {[height, width]}."
        )
    return masks.decode(runs).astype(bool)


def import_extra(module: str) -> Any:
    """Imports a module that only some data sets need.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(f"this data set needs {package}: pip install 'hf_bcd[coco]'") from error


def open_panoptic(root: Path) -> dict[str, Rows]:
    """Splits with `annotations/panoptic_{tag}.json`, masks in `annotations/panoptic_{tag}` and images in `{tag}`."""
    return _open_splits(root, "panoptic", _panoptic_rows)


def open_instances(root: Path) -> dict[str, Rows]:
    """Splits with `annotations/instances_{tag}.json` and images in `{tag}`."""
    return _open_splits(root, "instances", _instance_rows)


def _open_splits(root: Path, kind: str, read: Callable[[Path, dict[str, Any], Path], Rows]) -> dict[str, Rows]:
    splits = {}
    for split, tags in TAGS.items():
        tag = next((tag for tag in tags if (root / f"annotations/{kind}_{tag}.json").is_file()), None)
        if tag is None:
            continue
        file = root / f"annotations/{kind}_{tag}.json"
        folders = [root / tag, root / "images" / tag, root / tag / "images"]
        # The innermost: `train/images` lies in `train`.
        images = next((folder for folder in reversed(folders) if folder.is_dir()), None)
        if images is None:
            raise UserError(f"{file} needs a folder with its images; expected {folders[0]}.")
        try:
            splits[split] = read(file, json.loads(file.read_bytes()), images)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{file}: not COCO's {kind} annotations ({error!r}).") from error
    return splits


def _image_paths(file: Path, content: Mapping[str, Any], folder: Path) -> dict[int, str]:
    present = {path.name for path in folder.iterdir()}
    missing = [image["file_name"] for image in content["images"] if image["file_name"] not in present]
    if missing:
        raise UserError(
            f"{file} lists {len(content['images'])} images, of which {len(missing)} are not in {folder}, such as "
            f"{missing[0]}. Complete the folder."
        )
    return {image["id"]: str(folder / image["file_name"]) for image in content["images"]}


def _panoptic_rows(file: Path, content: dict[str, Any], folder: Path) -> PanopticRows:
    classes = {category: index for index, category in enumerate(COCO_PANOPTIC)}
    images, masks = _image_paths(file, content, folder), file.with_suffix("")
    items = []
    for annotation in content["annotations"]:
        pairs = sorted((segment["id"], segment["category_id"]) for segment in annotation["segments_info"])
        _check_categories(file, (category for _, category in pairs), COCO_PANOPTIC)
        items.append(
            (
                images[annotation["image_id"]],
                str(masks / annotation["file_name"]),
                np.array([segment for segment, _ in pairs], dtype=np.int32),
                np.array([classes[category] for _, category in pairs], dtype=np.uint8),
            )
        )
    return PanopticRows(items)


def _instance_rows(file: Path, content: dict[str, Any], folder: Path) -> InstanceRows:
    images, by_image = _image_paths(file, content, folder), defaultdict(list)
    _check_categories(file, (annotation["category_id"] for annotation in content["annotations"]), COCO_THINGS)
    kept = ("category_id", "iscrowd", "segmentation")
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append({key: annotation[key] for key in kept})
    return InstanceRows(
        [
            (images[image["id"]], image["height"], image["width"], json.dumps(by_image[image["id"]]).encode())
            for image in content["images"]
        ]
    )


def _check_categories(file: Path, categories: Any, known: tuple[int, ...]) -> None:
    unknown = sorted(set(categories) - set(known))
    if unknown:
        raise UserError(
            f"{file}: categories {unknown} are none of COCO's {len(known)}. These are annotations of another set."
        )
