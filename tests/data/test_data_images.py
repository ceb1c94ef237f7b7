import numpy as np
import pytest
from pictures import encoded, orientation
from PIL import Image

from hf_bcd.data.images import match_orientation, read_image, to_rgb
from hf_bcd.utils.messages import UserError


def photograph(turn=1):
    """12x8 photograph, its left half black and its right half white as stored."""
    pixels = np.repeat(np.array([[[0], [255]]], np.uint8), 6, axis=1).repeat(8, axis=0).repeat(3, axis=2)
    return read_image(encoded(pixels, format="JPEG", quality=95, exif=orientation(turn)), "photo")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = to_rgb(Image.new(mode, (4, 3)), "x")
    assert image.mode == "RGB" and image.size == (4, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_read_where_a_pipeline_would_read_the_same(kind):
    shallow = read_image(encoded(np.array([[0, 128, 255]], dtype=np.uint16), format=kind), "grey")
    assert np.asarray(to_rgb(shallow, "grey"))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    for values in ([0, 4095], [0, 65535]):
        deep = read_image(encoded(np.array([values], dtype=np.uint16), format=kind), "grey")
        with pytest.raises(UserError, match=rf"grey: uint16 values from 0 to {values[1]}, but models take 8 bits"):
            to_rgb(deep, "grey")


def test_palette_photograph_with_transparency():
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image = read_image(encoded(image, transparency=bytes([0, 128])), "p")
    assert np.asarray(to_rgb(image, "p"))[0, 0].tolist() == [10, 20, 30]


def test_damaged_and_missing_files_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "cut.jpg").write_bytes(encoded(noise, format="JPEG")[:1500])
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be decoded.*truncated"):
        read_image(tmp_path / "cut.jpg", str(tmp_path / "cut.jpg"))
    for content in (b"", b"no image", b"\x89PNG\r\n\x1a\nrest", tmp_path / "gone.jpg"):
        with pytest.raises(ValueError, match="row 7: cannot be decoded"):
            read_image(content, "row 7")


def test_stacks_are_refused_and_previews_are_not(tmp_path):
    first, second, preview = (Image.new("L", size, 7) for size in ((6, 4), (6, 4), (3, 2)))
    file = tmp_path / "x.tif"
    first.save(file, save_all=True, append_images=[preview])
    assert read_image(file, "x").size == (6, 4) and np.asarray(read_image(file, "x", exact=True)).max() == 7
    first.save(file, save_all=True, append_images=[second, preview])
    with pytest.raises(UserError, match=r"x: a stack of 2 pages of 6x4 \(width x height\).*a file of its own"):
        read_image(file, "x")


def test_rotated_photograph_follows_its_mask():
    image = photograph(6)  # shown after a quarter turn clockwise
    assert image.size == (12, 8)
    as_stored = np.asarray(match_orientation(image, (12, 8), "photo"))
    upright = np.asarray(match_orientation(image, (8, 12), "photo"))
    assert as_stored[:, :5].max() < 20 and as_stored[:, 7:].min() > 235
    assert upright[:5].max() < 20 and upright[7:].min() > 235
    upside_down = np.asarray(match_orientation(photograph(3), (12, 8), "photo"))
    assert upside_down[:, :5].min() > 235 and upside_down[:, 7:].max() < 20


def test_tiff_orientation():
    image = read_image(encoded(Image.new("RGB", (12, 8)), format="TIFF", exif=orientation(8)), "photo")
    assert match_orientation(image, (8, 12), "photo").size == (8, 12)


@pytest.mark.parametrize("turn", [1, 6])
def test_sizes_that_never_match(turn):
    with pytest.raises(ValueError, match=r"photo: the image is (12x8|8x12) pixels .* mask is 10x8"):
        match_orientation(photograph(turn), (10, 8), "photo")
