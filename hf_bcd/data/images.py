"""Decoding of photographs: any mode to RGB, in the orientation of their mask, with errors that name the file."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..utils.messages import UserError


# formats that give back the numbers they were given; WebP, TIFF and PPM have forms that do not
EXACT_FORMATS = ("BMP", "GIF", "PNG", "PPM", "TGA", "TIFF", "WEBP")
LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")
# Pillow stretches grey values of 2 and 4 bits over 0..255
STRETCHED = {"L;2": 85, "L;4": 17}


def read_image(file: str | Path | bytes | Image.Image, name: str, *, exact: bool = False) -> Image.Image:
    """Decodes a path or encoded bytes completely; an image stays as it is.

    Args:
        file: path, encoded bytes or image.
        name: file or row, for error messages.
        exact: whether the stored numbers matter, as in masks.

    Raises:
        UserError: the file is missing, truncated, not an image, too large for Pillow's limit, a stack of several images, or has
            16 bits a colour, of which Pillow keeps the high ones only; if `exact`, also if its format does not keep numbers.
    """
    if isinstance(file, Image.Image):
        return file
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        image = Image.open(io.BytesIO(content))
        codec, form = packing(image)
        pages = pages_of(image)
        image.load()
        if exact and image.format == "PNG":
            Image.open(io.BytesIO(content)).verify()  # checksums, which decoding does not look at
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{name}: {error} The limit is Pillow's, against files that fill the memory. Cut the image and its mask into "
            "tiles; or, where you trust your files, set PIL.Image.MAX_IMAGE_PIXELS to more than its pixels in a script."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        said = "in no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"{name}: cannot be decoded as an image ({said}). Replace or remove the file.") from error
    check_packing(image, form, pages, name)
    return _exact(image, codec, form, content, name) if exact else image


def packing(image: Any) -> tuple[str, str]:
    """Codec of a file, and how it packs its values; to be asked before the values are loaded."""
    tile: Any = image.tile[0] if getattr(image, "tile", None) else ("", "")
    codec, form = tile[0], tile[-1]
    return codec, str(form[0] if isinstance(form, tuple) and form else form)


def pages_of(image: Any) -> int:
    """Pages of a TIFF file that are as large as its first; smaller ones are previews of it."""
    if image.format != "TIFF":
        return 1
    sizes = [image.size]
    for page in range(1, image.n_frames):
        image.seek(page)
        sizes.append(image.size)
    image.seek(0)
    return sizes.count(sizes[0])


def check_packing(image: Image.Image, form: str, pages: int, name: str) -> None:
    """Refuses a stack of pages, and colours of 16 bits."""
    if pages > 1:
        raise UserError(
            f"{name}: a stack of {pages} pages of {image.width}x{image.height} (width x height), of which pipelines would read "
            "the first. Store each page as a file of its own."
        )
    if ";16" in form and not image.mode.startswith("I"):
        raise UserError(
            f"{name}: {image.mode} with 16 bits a channel, of which decoding here loses the low ones. Store photographs "
            "with 8 bits a channel, scaled by the range that their values really have, and masks as one channel of ids."
        )


def _exact(image: Image.Image, codec: str, form: str, content: bytes, name: str) -> Image.Image:
    lossy = image.format not in EXACT_FORMATS or image.info.get("compression") in LOSSY_COMPRESSIONS
    if lossy or (image.format == "WEBP" and content[12:16] != b"VP8L"):
        raise UserError(
            f"{name}: a mask stored as {image.format}, whose compression changes ids. Store masks as PNG, from the "
            "annotations themselves: converting this file would keep the wrong ids."
        )
    if codec.startswith("ppm") or form.endswith(";I"):
        raise UserError(
            f"{name}: a mask whose stored values stand for shades ({image.format}, {codec} {form}), which decoding "
            "stretches or inverts. Store masks as PNG of class ids."
        )
    return image.point([value // STRETCHED[form] for value in range(256)]) if form in STRETCHED else image


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB version of an image of any mode.

    Raises:
        UserError: the values are not whole numbers in 0..255. Pipelines of transformers clip such values, and a model
            would see another picture there than in training; `name` says which file or row.
    """
    if image.mode[0] in "IF":  # 16 or 32 bits, or floats
        values = np.asarray(image)
        pixels = values.clip(0, 255).astype(np.uint8)
        if not np.array_equal(values, pixels):
            raise no_bytes(name, values.dtype, values.min(), values.max())
        image = Image.fromarray(pixels)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def no_bytes(name: str, dtype: Any, low: float, high: float) -> UserError:
    """The error of values that are not whole numbers in 0..255."""
    return UserError(
        f"{name}: {dtype} values from {low:g} to {high:g}, but models take 8 bits, 0 to 255. "
        "Store the images so, all scaled by the one range that they are measured in; pipelines would clip them."
    )


def upright(image: Image.Image) -> Image.Image:
    """A photograph as viewers show it, turned by its EXIF orientation."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def match_orientation(image: Image.Image, size: tuple[int, int], name: str, truth: str = "mask") -> Image.Image:
    """Turns a photograph with an EXIF orientation the way its mask was drawn.

    Viewers, annotation tools and pipelines show the upright photograph, but some masks were drawn on the stored pixels.
    The upright one is taken unless only the stored one has the mask's size, (width, height).

    Raises:
        UserError: neither orientation has the mask's size; `name` says which file or row, `truth` what has that size.
    """
    stored = image
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        upright = ImageOps.exif_transpose(image)
        image = upright if upright.size == size or stored.size != size else stored
    if image.size != size:
        raise UserError(
            f"{name}: the image is {image.size[0]}x{image.size[1]} pixels (width x height) but its {truth} is "
            f"{size[0]}x{size[1]}. Image and {truth} must have the same size; check that they belong together."
        )
    return image
