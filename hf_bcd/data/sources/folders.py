"""Images and masks as files in sibling folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...utils.messages import UserError
from ..dataset import Row


EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class FolderRows:
    """Rows of pairs of paths, (image, mask)."""

    def __init__(self, pairs: list[tuple[str, str]]):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Row:
        image, mask = self.pairs[index]
        return Row(Path(image), Path(mask), image, mask)


def pair_folders(root: Path, folders: Mapping[str, tuple[str, str]]) -> dict[str, FolderRows]:
    """Pairs the files of every split whose folder of images exists below `root`.

    Raises:
        UserError: `root` does not exist, a split is empty, or an image or mask has no partner.
    """
    if not root.is_dir():
        raise UserError(f"{root}: this folder does not exist.")
    return {
        split: FolderRows(
            pair_files(files_by_stem(root / images), files_by_stem(root / masks), root / images, root / masks)
        )
        for split, (images, masks) in folders.items()
        if (root / images).is_dir()
    }


def pair_files(
    images: Mapping[str, Path], masks: Mapping[str, Path], image_folder: Path, mask_folder: Path
) -> list[tuple[str, str]]:
    """Pairs images and masks of the same key, in the order of the keys.

    Raises:
        UserError: there are none, or an image or mask has no partner.
    """
    if not images and not masks:
        raise UserError(f"{image_folder} and {mask_folder} hold no images ({', '.join(EXTENSIONS)}).")
    no_mask, no_image = sorted(images.keys() - masks.keys()), sorted(masks.keys() - images.keys())
    if no_mask or no_image:
        example = images[no_mask[0]] if no_mask else masks[no_image[0]]
        raise UserError(
            f"{len(no_mask)} of {len(images)} images in {image_folder} have no mask and {len(no_image)} of {len(masks)} "
            f"masks in {mask_folder} have no image of the same stem, such as {example.name}. Complete or remove them."
        )
    return [(str(images[key]), str(masks[key])) for key in sorted(images)]


def pair_listed(list_file: Path, images: Mapping[str, Path], masks: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Pairs the images and masks that a text file lists, one stem or path of an image per line.

    Raises:
        UserError: the list is empty, or an image or mask that it names does not exist.
    """
    stems = [Path(line.split()[0]).stem for line in list_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    missing = [stem for stem in stems if stem not in images or stem not in masks]
    if missing or not stems:
        example = f", such as {missing[0]}" if missing else ""
        raise UserError(
            f"{list_file}: lists {len(stems)} images, of which {len(missing)} have no image or no mask{example}. "
            "Complete the folders, or mend the list."
        )
    return [(str(images[stem]), str(masks[stem])) for stem in stems]


def files_by_stem(folder: Path, suffixes: Sequence[str] = EXTENSIONS) -> dict[str, Path]:
    """The files of a folder that have one of the `suffixes`, by stem.

    Raises:
        UserError: the folder does not exist, or two of its files have the same stem.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: this folder does not exist; images and masks are stored in sibling folders.")
    files: dict[str, Path] = {}
    for path in folder.iterdir():
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in files:
                raise UserError(f"{folder}: {files[path.stem].name} and {path.name} have the same stem; keep one.")
            files[path.stem] = path
    return files
