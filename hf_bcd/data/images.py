"""Decoding of photographs: any mode to RGB, in the orientation of their mask, with errors that name the file."""

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..utils.messages import UserError


def read_image(file: str | Path | bytes | Image.Image, name: str) -> Image.Image:
    """Decodes a path or encoded bytes completely; an image stays as it is.

    Raises:
        UserError: the file is missing, truncated or not an image; `name` says which file or row.
    """
    if isinstance(file, Image.Image):
        return file
    try:
        image = Image.open(io.BytesIO(file if isinstance(file, bytes) else Path(file).read_bytes()))
        image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: cannot be decoded as an image ({error}). Replace or remove the file.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB version of an image of any mode; 16-bit grey values keep their high byte."""
    if image.mode.startswith("I"):
        # PIL clips 16-bit values at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def match_orientation(image: Image.Image, size: tuple[int, int], name: str) -> Image.Image:
    """Turns a photograph with an EXIF orientation the way its mask was drawn.

    Viewers, annotation tools and pipelines show the upright photograph, but some masks were drawn on the stored pixels.
    The upright one is taken unless only the stored one has the mask's size, (width, height).

    Raises:
        UserError: neither orientation has the mask's size; `name` says which file or row.
    """
    stored = image
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        upright = ImageOps.exif_transpose(image)
        image = upright if upright.size == size or stored.size != size else stored
    if image.size != size:
        raise UserError(
            f"{name}: the image is {image.size[0]}x{image.size[1]} pixels (width x height) but its mask is "
            f"{size[0]}x{size[1]}. Image and mask must have the same size; check that they belong together."
        )
    return image
