"""Wrong pictures, masks, names, folders and tables, each with what a user is told."""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageFilter

from hf_bcd import load_dense_dataset


HEIGHT, WIDTH = 48, 64


def ids(*values: int, seed: int = 0) -> np.ndarray:
    """A map of 0 with discs of the values."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    found = np.zeros((HEIGHT, WIDTH), np.uint8)
    for number, value in enumerate(values or (1, 2)):
        centre = generator.integers(10, 20), 10 + 20 * number
        found[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 81] = value
    return found


def photograph(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


Save = Callable[[np.ndarray, Path], Any]


def png(pixels: np.ndarray, path: Path, **options: Any) -> None:
    Image.fromarray(pixels).save(path, **options)


def folder(
    root: Path,
    *,
    values: tuple[int, ...] = (1, 2),
    splits: tuple[str, ...] = ("train", "val"),
    count: int = 4,
    mask: Save = png,
    image: Save = png,
    suffixes: tuple[str, str] = (".png", ".png"),
    names: object = None,
) -> Path:
    """A data set of pairs of files."""
    for split in splits:
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            image(photograph(index), root / split / "images" / f"{index}{suffixes[0]}")
            mask(ids(*values, seed=index), root / split / "masks" / f"{index}{suffixes[1]}")
    if names is not None:
        (root / "id2label.json").write_text(names if isinstance(names, str) else json.dumps(names))
    return root


def table(images: list, masks: list | None) -> datasets.Dataset:
    def encoded(pixels: Any) -> Any:
        return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels

    columns = {"image": [encoded(one) for one in images]}
    features: dict[str, Any] = {"image": datasets.Image()}
    if masks is not None:
        columns["mask"], features["mask"] = [encoded(one) for one in masks], datasets.Image()
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def load(root: Any, **options: Any) -> Any:
    data = load_dense_dataset(root, **options)
    for split in data.values():
        split[0]
    return data


def first_label(root: Path, **options: Any) -> list[int]:
    return np.unique(load(root, **options)["train"][0]["label"]).tolist()


NAMES = ["background", "disc", "ring"]


# ---- How files store their numbers -----------------------------------------------------------------------------------


def jpeg_tiff(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path, compression="jpeg")


def deep(scale: float, kind: type = np.uint16) -> Save:
    def save(pixels: np.ndarray, path: Path) -> None:
        Image.fromarray((pixels[..., 0] * float(scale)).astype(kind)).save(path)

    return save


def png_of(path: Path, shape: tuple[int, ...], depth: int, colour: int, rows: Iterable[bytes]) -> None:
    """A PNG of a kind that Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", shape[1], shape[0], depth, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b""))


def deep_rgb_png(pixels: np.ndarray, path: Path) -> None:
    """Three 16-bit channels."""
    rows = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
    png_of(path, rows.shape, 16, 2, (row.astype(">u2").tobytes() for row in rows))


def four_bit(pixels: np.ndarray, path: Path) -> None:
    """Grey values of four bits, which Pillow stretches to 0..255."""
    png_of(path, pixels.shape, 4, 0, ((row[::2] << 4 | row[1::2]).astype(np.uint8).tobytes() for row in pixels))


def stretched_pgm(pixels: np.ndarray, path: Path) -> None:
    path.with_suffix(".png").write_bytes(b"P5 64 48 20\n" + pixels.tobytes())


def quantised(pixels: np.ndarray, path: Path) -> None:
    """Palettes that begin with another colour in every other file."""
    colours = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 0, 255)}
    order = [0, 1, 2] if int(path.stem) % 2 else [2, 1, 0]
    image = Image.fromarray(np.array([order.index(i) for i in range(3)], np.uint8)[pixels])
    image.putpalette([part for index in order for part in colours[index]])
    image.save(path)


def with_alpha(value: int, mode: str) -> Save:
    def save(pixels: np.ndarray, path: Path) -> None:
        image = Image.fromarray(pixels).convert(mode)
        image.putalpha(value)
        image.save(path)

    return save


def blurred(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)).save(path)


def resized(pixels: np.ndarray, path: Path) -> None:
    big = Image.fromarray(np.kron(pixels, np.ones((4, 4), np.uint8)).astype(np.uint8))
    big.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR).rotate(7, Image.Resampling.BILINEAR).save(path)


def through_jpeg(pixels: np.ndarray, path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels * 20).save(file, "JPEG", quality=60)
    Image.fromarray(np.asarray(Image.open(file)) // 2).save(path)


def two_pages(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path, save_all=True, append_images=[Image.fromarray(pixels[::-1])])


def cut(pixels: np.ndarray, path: Path) -> None:
    png(pixels, path)
    path.write_bytes(path.read_bytes()[:-400])


def written(content: bytes) -> Save:
    return lambda pixels, path: path.write_bytes(content)


def large(pixels: np.ndarray, path: Path) -> None:
    Image.new("1", (16000, 12000)).save(path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
STORAGE = {
    "mask JPEG": ("error", r"0\.jpg: a mask stored as JPEG", {"mask": png, "suffixes": (".png", ".jpg")}),
    "mask lossy WebP": ("error", "a mask stored as WEBP", {"mask": png, "suffixes": (".png", ".webp")}),
    "mask JPEG in TIFF": ("error", "a mask stored as TIFF", {"mask": jpeg_tiff, "suffixes": (".png", ".tif")}),
    "mask 16-bit RGB": ("error", "RGB with 16 bits a channel", {"mask": deep_rgb_png}),
    "mask 4-bit grey": ("result", r"\[0, 1, 2\]", {"mask": four_bit}),
    "mask PGM of 20 shades": ("error", "stored values stand for shades", {"mask": stretched_pgm}),
    "mask floats": ("error", "not a label map .mode F", {"mask": lambda p, f: Image.fromarray(p.astype(np.float32)).save(f), "suffixes": (".png", ".tif")}),
    "masks with palettes of their own": ("error", "index 0 of the palette is the colour", {"mask": quantised}),
    "mask with shades as palette": ("warning", "palette has the shades 0, 1, 5 for the indices 0, 1, 2", {"values": (1, 5), "mask": lambda p, f: Image.fromarray(p).save(f), "suffixes": (".png", ".gif")}),
    "mask opaque RGBA": ("result", r"\[0, 1, 2\]", {"mask": with_alpha(255, "RGB")}),
    "mask opaque LA": ("result", r"\[0, 1, 2\]", {"mask": with_alpha(255, "L")}),
    "mask translucent": ("error", "not a label map .mode RGBA", {"mask": with_alpha(9, "RGB")}),
    "mask colours": ("error", "a colour-coded mask", {"mask": lambda p, f: png(np.stack([p * 80, p, p], -1), f)}),
    "mask blurred without names": ("error", "these are shades", {"mask": blurred, "values": (250, 252)}),
    "mask through JPEG": ("warning", "like none of their neighbours", {"mask": through_jpeg, "values": (3, 9), "count": 12, "names": [f"c{i}" for i in range(200)]}),
    "mask resized": ("warning", "like none of their neighbours", {"mask": resized, "values": (90, 200), "count": 12, "names": [f"c{i}" for i in range(254)]}),
    "mask cut": ("error", r"masks/0\.png: cannot be decoded", {"mask": cut}),
    "mask LFS pointer": ("error", r"masks/0\.png: cannot be decoded", {"mask": written(LFS)}),
    "mask empty file": ("error", r"masks/0\.png: cannot be decoded", {"mask": written(b"")}),
    "mask of another size": ("error", "the image is 64x48 pixels .* mask is 32x24", {"mask": lambda p, f: png(p[::2, ::2], f)}),
    "mask transposed": ("error", "mask is 48x64", {"mask": lambda p, f: png(p.T, f)}),
    "mask of 192 megapixels": ("error", "limit is Pillow's.*MAX_IMAGE_PIXELS", {"mask": large, "count": 1}),
    "image float 0..1": ("error", r"float32 values from 0 to 1", {"image": lambda p, f: Image.fromarray(p[..., 0].astype(np.float32) / 255).save(f), "suffixes": (".tif", ".png")}),
    "image 12 bits in 16": ("error", "uint16 values from 0 to 4080, but models take 8", {"image": deep(16)}),
    "image 16 bits": ("error", "uint16 values from 0 to 65535", {"image": deep(257)}),
    "image 32 bits": ("error", "int32 values from 0 to 255000", {"image": deep(1000, np.int32), "suffixes": (".tif", ".png")}),
    "image 8 bits in 16": ("result", r"\[0, 1, 2\]", {"image": deep(1)}),
    "image 16-bit RGB": ("error", "RGB with 16 bits a channel", {"image": deep_rgb_png}),
    "image two pages": ("error", "a stack of 2 pages of 64x48", {"image": two_pages, "suffixes": (".tif", ".png")}),
    "image cut": ("error", r"images/0\.png: cannot be decoded", {"image": cut}),
    "image HTML page": ("error", r"images/0\.png: cannot be decoded", {"image": written(b"<html>not found</html>")}),
    "image LFS pointer": ("error", r"images/0\.png: cannot be decoded", {"image": written(LFS)}),
}  # fmt: skip

# ---- What the ids mean -----------------------------------------------------------------------------------------------

LABELS = {
    "foreground 255 with names": ("error", "show one class only, 'background'.*255 covers", {"values": (255,), "names": NAMES[:2]}, {}),
    "foreground 255 without names": ("error", "255 marks void pixels", {"values": (255,)}, {}),
    "one class and no names": ("error", "no class beside 0 occurs", {"values": (0,)}, {}),
    "one name": ("error", "one class, 'disc', which every pixel would get", {"names": ["disc"]}, {}),
    "all void": ("error", "void throughout", {"values": (7, 7), "names": NAMES}, {"ignore_labels": [0, 7]}),
    "reduce_labels with a name for void": ("error", "3 names are given.*'background'.*reduce_labels", {"names": NAMES}, {"reduce_labels": True}),
    "reduce_labels": ("result", r"\[0, 1, 255\]", {"names": NAMES[1:]}, {"reduce_labels": True}),
    "a named class that no mask shows": ("warning", "show no 'ring'", {"values": (1,), "names": NAMES}, {}),
    "a name of a void id": ("warning", r"'background' \(0\) are of ids that ignore_labels", {"names": NAMES}, {"ignore_labels": [0]}),
    "nearly all void": ("warning", "of the pixels in the 4 masks are void", {"values": (1, 2), "mask": lambda p, f: png(np.where((p > 0) & (np.indices(p.shape)[0] == 15), p, 255).astype(np.uint8), f), "names": [*NAMES]}, {}),
    "ids beyond the names": ("error", r"holds ids \[2\].*num_labels=2", {"names": NAMES[:2]}, {}),
    "ids beyond 253": ("error", "ids up to 700.*at most 254", {"mask": lambda p, f: png(p.astype(np.uint16) * 350, f)}, {}),
    "grey levels far apart": ("warning", "Of the ids|of the ids 0..240 only 3", {"values": (120, 240)}, {}),
    "names as objects": ("result", r"\[0, 1, 2\]", {"names": [{"id": 1, "name": "disc"}, {"id": 2, "name": "ring"}, {"id": 0, "name": "background"}]}, {}),
    "names as objects by id": ("result", r"\[0, 1, 2\]", {"names": {str(i): {"name": n} for i, n in enumerate(NAMES)}}, {}),
    "objects without names": ("error", "A class is an id and a name", {"names": [{"id": 0, "title": "x"}]}, {}),
    "names that are numbers": ("error", "'0' has 5. A class", {"names": {"0": 5, "1": 6}}, {}),
    "null as a name": ("error", "has None. A class", {"names": {"0": "a", "1": None}}, {}),
    "an empty name": ("error", "has ' '. A class", {"names": ["a", " "]}, {}),
    "names turned round": ("error", "'background' has 0. A class", {"names": {"background": 0, "disc": 1}}, {}),
    "names with a hole": ("error", "got 2 ids from 0 to 2; 1 has no name", {"names": {"0": "a", "2": "b"}}, {}),
    "names from 1": ("error", "got 2 ids from 1 to 2; 0 has no name", {"names": {"1": "a", "2": "b"}}, {}),
    "a name for 255": ("result", r"\[0, 1, 2\]", {"names": {"0": "a", "1": "b", "2": "c", "255": "void"}}, {}),
    "one name twice": ("error", r"\['a'\] occur more than once", {"names": ["a", "a"]}, {}),
    "one id twice": ("error", "id 1 has two names", {"names": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, {}),
    "256 names": ("error", "at most 254", {"names": [f"c{i}" for i in range(256)]}, {}),
    "no names at all": ("error", "must be 0..n-1", {"names": []}, {}),
    "names that are no JSON": ("error", "not a readable JSON file", {"names": "{a: b"}, {}),
    "names that are a number": ("error", "a int; expected a list", {"names": 3}, {}),
    "negative ignore_labels": ("error", r"\[-1\] cannot be stored", {"names": NAMES}, {"ignore_labels": [-1]}),
}  # fmt: skip

# ---- Folders and tables ----------------------------------------------------------------------------------------------


def without(path: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        found = root / path
        shutil.rmtree(found) if found.is_dir() else found.unlink()

    return change


def renamed(path: str, name: str) -> Callable[[Path], None]:
    return lambda root: (root / path).rename(root / name)


def copied(path: str, name: str) -> Callable[[Path], None]:
    return lambda root: shutil.copy(root / path, root / name)


def with_text(name: str, content: str | bytes) -> Callable[[Path], None]:
    content = content.encode() if isinstance(content, str) else content
    return lambda root: (root / name).write_bytes(content)


def masks_of(split: str, value: int) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in (root / split / "masks").iterdir():
            png(np.full((HEIGHT, WIDTH), value, np.uint8), path)

    return change


def rotated(root: Path) -> None:
    """A photograph whose EXIF orientation turns it away from its mask's size."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "train/images/0.png"
    image = Image.open(path)
    path.unlink()
    image.rotate(90, expand=True).resize((WIDTH, HEIGHT)).save(root / "train/images/0.jpg", exif=exif)


THREE = {"splits": ("train", "val", "test"), "names": NAMES}
FOLDERS = {
    "image without mask": ("error", "1 of 4 images in .* have no mask", {}, without("train/masks/1.png")),
    "mask without image": ("error", "1 of 4 masks in .* have no image", {}, without("train/images/1.png")),
    "train without masks": ("error", "train/masks: this folder does not exist", {}, without("train/masks")),
    "test without masks": ("warning", "split 'test' is left out", THREE, without("test/masks")),
    "test void throughout": ("warning", "split 'test' is left out: .* store only 255", THREE, masks_of("test", 255)),
    "test 0 throughout": ("warning", "split 'test' is left out: .* store only 0", THREE, masks_of("test", 0)),
    "validation void throughout": ("warning", "split 'validation' is left out", {"names": NAMES}, masks_of("val", 255)),
    "one split under two names": ("error", "stand for the same one; keep one", {"splits": ("train", "val", "dev"), "names": NAMES}, None),
    "splits training and dev": ("result", r"\[0, 1, 2\]", {"splits": ("training", "dev")}, None),
    "two images of one stem": ("error", "have the same stem; keep one", {}, copied("train/images/0.png", "train/images/0.bmp")),
    "masks in other letters": ("error", "have no mask", {}, renamed("train/masks/0.png", "train/masks/0_mask.png")),
    "no split to train on": ("error", "inferred from a split 'train', but the splits are val", {}, without("train")),
    "an empty split": ("error", "hold no images", {"count": 0}, None),
    "a folder of nothing": ("error", "no data found. Expected folders", {}, lambda root: [without(one)(root) for one in ("train", "val")]),
    "metadata of something else": ("result", r"\[0, 1, 2\]", {}, with_text("metadata.csv", "patient,age\nx,5\n")),
    "metadata of something else in JSON": ("result", r"\[0, 1, 2\]", {}, with_text("train/metadata.jsonl", '{"a": 1}\n')),
    "metadata that is no JSON": ("error", r"metadata\.jsonl: its first line is no JSON", {}, with_text("metadata.jsonl", "a\n")),
    "metadata in another encoding": ("error", r"metadata\.csv: no UTF-8 text .*save it with that encoding", {}, with_text("metadata.csv", "größe\n".encode("cp1252"))),
    "names with a byte order mark": ("result", r"\[0, 1, 2\]", {}, with_text("id2label.json", b"\xef\xbb\xbf" + json.dumps(NAMES).encode())),
    "names in another encoding": ("error", r"id2label\.json: no UTF-8 text", {}, with_text("id2label.json", '["größe", "b", "c"]'.encode("cp1252"))),
    "files of the system": ("result", r"\[0, 1, 2\]", {}, with_text("train/masks/._0.png", b"x")),
    "photograph turned by EXIF": ("error", "the image is 48x64 pixels|the image is 64x48 pixels", {"mask": lambda p, f: png(p[:40], f)}, rotated),
}  # fmt: skip

IMAGES, MASKS = [photograph(i) for i in range(4)], [ids(1, 2, seed=i) for i in range(4)]
TABLES = {
    "test without a mask column": ("warning", "split 'test' is left out, since it has no labels", lambda: {"train": table(IMAGES, MASKS), "test": table(IMAGES, None)}),
    "test with empty masks": ("warning", "split 'test' is left out, since it has no labels", lambda: {"train": table(IMAGES, MASKS), "test": table(IMAGES, [None] * 4)}),
    "test with one empty mask": ("error", "test, row 1, column 'mask': empty", lambda: {"train": table(IMAGES, MASKS), "test": table(IMAGES, [MASKS[0], None, *MASKS[2:]])}),
    "train with an empty mask": ("error", "train, row 1, column 'mask': empty", lambda: {"train": table(IMAGES, [MASKS[0], None, *MASKS[2:]])}),
    "train with an empty image": ("error", "row 0, column 'image': empty", lambda: {"train": table([None, *IMAGES[1:]], MASKS)}),
    "no mask column": ("error", "needs one label column, but none found by name", lambda: {"train": table(IMAGES, None)}),
    "splits of another name": ("error", "the splits are part_a, part_b; rename", lambda: {"part_a": table(IMAGES, MASKS), "part_b": table(IMAGES, MASKS)}),
    "splits Train and VAL": ("result", r"\[0, 1, 2\]", lambda: {"Train": table(IMAGES, MASKS), "VAL": table(IMAGES, MASKS)}),
    "a broken image": ("error", "row 1, column 'image'.*cannot be decoded", lambda: {"train": table([IMAGES[0], {"bytes": b"x", "path": None}, *IMAGES[2:]], MASKS)}),
    "a stream": ("error", "got IterableDataset; give its Hub id with streaming", lambda: table(IMAGES, MASKS).to_iterable_dataset()),
    "a list": ("error", "got list", lambda: [1, 2]),
    "decoded arrays": ("result", r"\[0, 1, 2\]", lambda: {"train": datasets.Dataset.from_dict({"image": [Image.fromarray(one) for one in IMAGES], "mask": [one.tolist() for one in MASKS]})}),
    "mask of another size": ("error", "row 0.*mask is 32x24", lambda: {"train": table(IMAGES, [one[::2, ::2] for one in MASKS])}),
}  # fmt: skip

NAMED = {
    "no such folder": ("error", "absent: this folder does not exist", "./absent", {}),
    "no such name": ("error", "did you mean 'cityscapes'", "cityscape", {}),
    "a Hub id of three parts": ("error", "neither a known data set", "a/b/c", {}),
    "an option of another data set": ("error", "num_classes are for the data sets synthetic|Arguments num_classes", "./absent", {"num_classes": 3}),
    "an unknown option": ("error", "synthetic has no option colour", "synthetic", {"colour": 3}),
    "fixed rules": ("error", "reduce_labels cannot be set for 'ade20k'", "ade20k", {"reduce_labels": True}),
    "a stream of scenes": ("error", "Leave streaming out", "synthetic", {"streaming": True}),
    "an empty buffer": ("error", "shuffle_buffer is 0", "me/data", {"streaming": True, "shuffle_buffer": 0}),
}  # fmt: skip
