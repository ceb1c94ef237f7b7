import io

import numpy as np
import pytest
from PIL import Image

from hf_bcd.data.images import match_orientation, read_image, to_rgb


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def photograph(orientation=1):
    """12x8 photograph, its left half black and its right half white as stored."""
    pixels = np.zeros((8, 12, 3), dtype=np.uint8)
    pixels[:, 6:] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    return read_image(encoded(Image.fromarray(pixels), format="JPEG", quality=95, exif=exif), "photo")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (4, 3)))
    assert image.mode == "RGB" and image.size == (4, 3)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    for suffix in ("png", "tif"):
        Image.fromarray(np.array([[0, 0x80FF, 0xFFFF]], dtype=np.uint16)).save(tmp_path / f"grey.{suffix}")
        pixels = np.asarray(to_rgb(read_image(tmp_path / f"grey.{suffix}", "grey")))
        assert pixels[0].tolist() == [[0, 0, 0], [128, 128, 128], [255, 255, 255]]


def test_palette_photograph_with_transparency():
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image = read_image(encoded(image, format="PNG", transparency=bytes([0, 128])), "p")
    assert np.asarray(to_rgb(image))[0, 0].tolist() == [10, 20, 30]


def test_truncated_file_is_named(tmp_path):
    path = tmp_path / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format="JPEG")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be decoded.*truncated"):
        read_image(path, str(path))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\nrest"])
def test_other_files_are_named(content):
    with pytest.raises(ValueError, match="row 7: cannot be decoded"):
        read_image(content, "row 7")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.jpg: cannot be decoded"):
        read_image(tmp_path / "gone.jpg", str(tmp_path / "gone.jpg"))


def test_rotated_photograph_follows_its_mask():
    image = photograph(orientation=6)  # shown after a quarter turn clockwise
    assert image.size == (12, 8)
    as_stored = np.asarray(match_orientation(image, (12, 8), "photo"))
    upright = np.asarray(match_orientation(image, (8, 12), "photo"))
    assert as_stored[:, :5].max() < 20 and as_stored[:, 7:].min() > 235
    assert upright[:5].max() < 20 and upright[7:].min() > 235


def test_upside_down_photograph_is_turned_upright():
    pixels = np.asarray(match_orientation(photograph(orientation=3), (12, 8), "photo"))
    assert pixels[:, :5].min() > 235 and pixels[:, 7:].max() < 20


def test_tiff_orientation():
    exif = Image.Exif()
    exif[0x0112] = 8
    image = read_image(encoded(Image.new("RGB", (12, 8)), format="TIFF", exif=exif), "photo")
    assert match_orientation(image, (8, 12), "photo").size == (8, 12)


@pytest.mark.parametrize("orientation", [1, 6])
def test_sizes_that_never_match(orientation):
    with pytest.raises(ValueError, match=r"photo: the image is (12x8|8x12) pixels .* mask is 10x8"):
        match_orientation(photograph(orientation), (10, 8), "photo")
