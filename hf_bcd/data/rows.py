"""Pictures that are read some rows at a time: by libvips where it is installed, else decoded as a whole by Pillow."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.messages import UserError
from .images import check_packing, no_bytes, packing, pages_of, read_image, to_rgb, upright


# what both readers decode to the same bytes; others are decoded by Pillow
VIPS_FORMATS = ("JPEG", "MPO", "PNG", "TIFF")
VIPS_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")


class DecodedRows:
    """A picture that lies in memory as a whole, 3 bytes a pixel.

    Raises:
        UserError: the file cannot be read, or has more pixels than Pillow's limit.
    """

    def __init__(self, path: Path) -> None:
        try:
            with warnings.catch_warnings():  # the user has named the file
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                self.image = to_rgb(upright(read_image(path, str(path))), str(path))
        except UserError as error:
            if not isinstance(error.__cause__, Image.DecompressionBombError):
                raise
            raise UserError(
                f"{path}: more pixels than Pillow decodes ({2 * (Image.MAX_IMAGE_PIXELS or 0)}). With --tile 512, and after "
                "pip install 'hf_bcd[large]', JPEG, PNG and TIFF files of any size are read some rows at a time."
            ) from error
        self.width, self.height = self.image.size

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows in RGB, uint8 `[bottom - top, width, 3]`; `top` is at least the last `bottom`."""
        return np.asarray(self.image.crop((0, top, self.width, bottom)))

    def reduced(self, factor: int) -> Image.Image:
        """The picture in RGB, with one pixel for each block of `factor * factor`, also at its right and lower ends."""
        return self.image if factor == 1 else self.image.reduce(factor)


class VipsRows:
    """The same of a file that libvips decodes as its rows are asked for.

    Rows of a turned photograph and of interlaced files are not stored in order: libvips decodes these once, into a temporary file
    if they take more than 100 MB.

    Raises:
        UserError: the file cannot be read, or its values are no bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (image := self.opened()).format != "uchar":
            with self.errors():
                low, high = image.min(), self.opened().max()
            if low < 0 or high > 255:
                raise no_bytes(str(path), "uint16", low, high)
        import pyvips

        image = self.opened()
        self.width, self.height, self.shape = image.width, image.height, (-1, image.width, image.bands)
        self.type = np.dtype(np.uint8 if image.format == "uchar" else np.uint16)
        self.region = pyvips.Region.new(
            image
        )  # which asks for the rows in order, as threads of a whole picture do not

    def opened(self) -> Any:
        """The picture in RGB, upright, from its first row on."""
        import pyvips

        with self.errors():
            image = pyvips.Image.new_from_file(str(self.path), access="sequential", fail_on="error")
            if image.get_typeof("orientation") and image.get("orientation") != 1:
                image = pyvips.Image.new_from_file(str(self.path), access="random", fail_on="error").autorot()
        return image

    def read(self, top: int, bottom: int) -> np.ndarray:
        """As above."""
        with self.errors():
            fetched = self.region.fetch(0, top, self.width, bottom - top)
        return in_rgb(np.frombuffer(fetched, self.type).reshape(self.shape))

    def reduced(self, factor: int) -> Image.Image:
        """As above."""
        with self.errors():
            return Image.fromarray(in_rgb(self.opened().shrink(factor, factor, ceil=True).cast("uchar").numpy()))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns an error of libvips into one line."""
        import pyvips

        try:
            yield
        except pyvips.Error as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{self.path}: cannot be decoded as an image ({said}). Replace or remove the file."
            ) from error


def in_rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 `[H, W, 3]` of grey or coloured ones, `[H, W]` or `[H, W, 1..4]`, without their opacity."""
    pixels = pixels.astype(np.uint8, copy=False).reshape(*pixels.shape[:2], -1)
    return pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1].repeat(3, axis=2)


def open_rows(path: Path) -> DecodedRows | VipsRows:
    """Opens a picture, as viewers show it, to read its rows from the first to the last.

    Raises:
        UserError: the file is no image, has 16 bits a channel or several pages, or only Pillow could read it, and it is too large.
    """
    return VipsRows(path) if vips_reads(path) else DecodedRows(path)


def vips_reads(path: Path) -> bool:
    """Whether libvips is installed and decodes a file as Pillow does."""
    if importlib.util.find_spec("pyvips") is None:
        return False
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # only the header is read
    try:
        with Image.open(path) as image:
            fits = image.format in VIPS_FORMATS and image.mode in VIPS_MODES
            if fits:
                check_packing(image, packing(image)[1], pages_of(image), str(path))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError):
        return False  # Pillow's reader has the message
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return fits
