"""Pictures read some rows at a time: both readers give the pixels that a picture has, and refuse the same files."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from hf_bcd.data import rows
from hf_bcd.data.images import read_image, to_rgb, upright
from hf_bcd.data.rows import DecodedRows, VipsRows, open_rows
from hf_bcd.utils.messages import UserError


needs_vips = pytest.mark.skipif(importlib.util.find_spec("pyvips") is None, reason="pyvips is not installed")
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6


def scene() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((131, 97))


def with_opacity() -> Image.Image:
    picture = scene().convert("RGBA")
    picture.putalpha(picture.getchannel("R"))
    return picture


def of_16_bits(high: int = 255) -> Image.Image:
    grey = np.asarray(scene().convert("L")).astype(np.uint16)
    grey[0, 0] = high
    return Image.fromarray(grey)


WRITTEN: dict[str, Any] = {
    "a.jpg": lambda path: scene().save(path),
    "grey.jpg": lambda path: scene().convert("L").save(path),
    "progressive.jpg": lambda path: scene().save(path, progressive=True),
    "turned.jpg": lambda path: scene().save(path, exif=TURNED),
    "turned.png": lambda path: scene().save(path, exif=TURNED),
    "turned.tif": lambda path: scene().save(path, exif=TURNED),
    "palette.png": lambda path: scene().quantize(37).save(path),
    "palette_of_2_bits.png": lambda path: scene().quantize(4).save(path),
    "palette_with_a_hole.png": lambda path: scene().quantize(37).save(path, transparency=3),
    "palette.tif": lambda path: scene().quantize(37).save(path),
    "bits.png": lambda path: scene().convert("1").save(path),
    "grey_with_opacity.png": lambda path: scene().convert("LA").save(path),
    "opacity.png": lambda path: with_opacity().save(path),
    "16_bits.png": lambda path: of_16_bits().save(path),
    "16_bits.tif": lambda path: of_16_bits().save(path),
    "lzw.tif": lambda path: scene().save(path, compression="tiff_lzw"),
    "jpeg.tif": lambda path: scene().save(path, compression="jpeg"),
}
BY_PILLOW: dict[str, Any] = {
    "a.bmp": lambda path: scene().save(path),
    "hole.gif": lambda path: scene().quantize(37).save(path, transparency=3),
    "a.webp": lambda path: scene().save(path),
    "cmyk.jpg": lambda path: scene().convert("CMYK").save(path),
}


def as_viewers_show(path: Path) -> np.ndarray:
    return np.asarray(to_rgb(upright(read_image(path, str(path))), str(path)))


@needs_vips
@pytest.mark.parametrize("name", WRITTEN)
def test_libvips_gives_the_pixels_of_pillow(name: str, tmp_path: Path) -> None:
    WRITTEN[name](path := tmp_path / name)
    picture, expected = open_rows(path), as_viewers_show(path)
    assert isinstance(picture, VipsRows) and (picture.height, picture.width) == expected.shape[:2]
    ends = [0, 1, 40, 64, picture.height]
    found = [picture.read(top, bottom) for top, bottom in zip(ends, ends[1:], strict=False)]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    ours, theirs = picture.reduced(4), DecodedRows(path).reduced(4)
    blocks = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert ours.size == theirs.size and blocks[:-1, :-1].max() <= 2  # the last blocks are parts of one


@pytest.mark.parametrize("name", BY_PILLOW)
def test_pillow_reads_what_libvips_would_read_otherwise(name: str, tmp_path: Path) -> None:
    BY_PILLOW[name](path := tmp_path / name)
    picture = open_rows(path)
    assert isinstance(picture, DecodedRows)
    np.testing.assert_array_equal(picture.read(10, 30), as_viewers_show(path)[10:30])


def truncated(path: Path) -> None:
    scene().save(path)
    path.write_bytes(path.read_bytes()[:-1000])


BAD: dict[str, tuple[Any, str]] = {
    "deep.png": (lambda path: of_16_bits(300).save(path), "uint16 values from .* to 300, but models take 8 bits"),
    "pages.tif": (lambda path: scene().save(path, save_all=True, append_images=[scene()]), "a stack of 2 pages"),
    "half.jpg": (truncated, "half.jpg: cannot be decoded as an image"),
    "half.png": (truncated, "half.png: cannot be decoded as an image"),
    "text.png": (lambda path: path.write_text("no picture"), "in no format that Pillow knows"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("reader", ["libvips", "Pillow"])
def test_both_readers_refuse_the_same_files(
    reader: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "Pillow":
        monkeypatch.setattr(rows.importlib.util, "find_spec", lambda _: None)
    write, message = BAD[name]
    write(path := tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        picture = open_rows(path)
        picture.read(0, picture.height)
    assert "\n" not in str(error.value)


def test_a_picture_beyond_the_limit_of_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    scene().save(path := tmp_path / "a.png")
    scene().save(bitmap := tmp_path / "a.bmp")
    with pytest.raises(UserError, match=r"a.bmp: more pixels than Pillow decodes \(2000\).*'hf_bcd\[large\]'"):
        open_rows(bitmap)
    if importlib.util.find_spec("pyvips") is not None:
        assert open_rows(path).read(0, 97).shape == (97, 131, 3) and Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"a.png: more pixels .* pip install 'hf_bcd\[large\]'"):
        open_rows(path)
