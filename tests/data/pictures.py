"""Small pictures and masks for the tests of this folder."""

import io

import numpy as np
import pytest
from PIL import Image

from hf_bcd.data import load_dense_dataset
from hf_bcd.utils.messages import UserError


def grid(*ids, shape=(2, 6)):
    return np.resize(np.array(ids, dtype=np.uint8), shape)


def palette(ids):
    """A palette mask, whose colours are no ids."""
    mask = Image.fromarray(ids).convert("P")
    mask.putdata(ids.ravel().tolist())
    mask.putpalette([value for index in range(256) for value in (255 - index, index // 2, 7)])
    return mask


def encoded(image, **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, **{"format": "PNG"} | options)
    return buffer.getvalue()


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def save(path, picture):
    """Saves an image, ids `[H, W]`, or a grey photograph of a size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, tuple):
        picture = Image.new("RGB", picture, (10, 20, 30))
    (Image.fromarray(np.asarray(picture, np.uint8)) if not isinstance(picture, Image.Image) else picture).save(path)


def refused(message, source, **options):
    with pytest.raises(UserError, match=message):
        load_dense_dataset(source, **options)
