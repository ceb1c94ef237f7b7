"""Joint transforms of image and label map. Both stay uint8 until the device, where models normalise images."""

import math
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import BaseImageProcessor

from ..utils.messages import UserError
from .labels import IGNORE_INDEX


# ImageNet's mean colour: padding is close to zero once a model has normalised it.
PADDING_COLOUR = (124, 116, 104)
LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
CROP_ATTEMPTS = 10


class Transformed(TypedDict):
    """Input of a model: uint8 RGB `pixel_values` `[3, H, W]` and uint8 `labels` `[H, W]`."""

    pixel_values: Tensor
    labels: Tensor


class ColourMatrix:
    """Random brightness, contrast, saturation and hue as one affine map of the RGB values.

    One 3x4 matrix replaces four passes over the image. Each factor is drawn as in torchvision's `ColorJitter`; the hue
    turns in the IQ plane of YIQ, which keeps the luma, instead of HSV. Values are clipped once, at the end.

    Args:
        brightness: the factor is drawn from [1 - brightness, 1 + brightness].
        contrast: likewise.
        saturation: likewise.
        hue: the turn is drawn from [-hue, hue], in turns of the colour circle.
    """

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0):
        for name, value, largest in (
            ("brightness", brightness, 1.0),
            ("contrast", contrast, 1.0),
            ("saturation", saturation, 1.0),
            ("hue", hue, 0.5),
        ):
            if not 0 <= value <= largest:
                raise UserError(f"{name} is {value}; it must lie in 0..{largest}.")
        self.centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
        self.spread = torch.tensor([brightness, contrast, saturation, hue])

    def __call__(self, pixels: Tensor) -> Tensor:
        """Changes the colours of a uint8 image `[3, H, W]`."""
        return adjust_colours(pixels, *(self.centre + self.spread * (2 * torch.rand(4) - 1)).tolist())


def adjust_colours(
    pixels: Tensor, brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> Tensor:
    """Applies brightness, contrast, saturation and hue, in this order, to a uint8 image `[3, H, W]`.

    Contrast pivots on the image's mean luma, saturation blends with the pixel's luma; a hue of 1/3 turns red to green.
    """
    values = pixels.reshape(3, -1).float()
    mean_luma = brightness * float(LUMA @ values.mean(dim=1).numpy())
    angle = -2 * math.pi * hue
    turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    # Both matrices keep grey values, so the contrast's offset passes through them unchanged.
    saturate = saturation * np.eye(3) + (1 - saturation) * LUMA
    matrix = brightness * contrast * np.linalg.inv(RGB_TO_YIQ) @ turn @ RGB_TO_YIQ @ saturate
    half = 0.5  # uint8 conversion truncates
    offset = torch.full((3, 1), (1 - contrast) * mean_luma + half)
    values = torch.addmm(offset, torch.from_numpy(matrix).float(), values)
    return values.clamp_(0, 255).to(torch.uint8).view_as(pixels)


class TrainTransform:
    """Random scale, crop, horizontal flip and colours.

    An image smaller than the crop is padded with the mean colour and void labels. As in mmsegmentation, a crop is drawn
    again (at most ten times) if one class covers `max_class_share` of its labelled pixels, or all of it is void. The crop
    is cut out before it is scaled, so that no pixel is scaled in vain.

    Args:
        crop_size: side, or (height, width), of the result in pixels.
        image_size: length to which the short side is resized before the random scale; None keeps the image's own.
        scale: smallest and largest random scale.
        flip: probability of a horizontal flip.
        jitter: strengths of `ColourMatrix`; None leaves colours alone.
        max_class_share: see above; 1 takes the first crop.
    """

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        image_size: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        jitter: tuple[float, float, float, float] | None = (0.4, 0.4, 0.4, 0.1),
        max_class_share: float = 0.75,
    ):
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        if min(self.crop_size) < 1 or (image_size is not None and image_size < 1):
            raise UserError(f"crop_size {crop_size} and image_size {image_size} must be positive.")
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"scale is {scale}; it must be (smallest, largest), both positive.")
        self.image_size = image_size
        self.scale = scale
        self.flip = flip
        self.colours = None if jitter is None else ColourMatrix(*jitter)
        self.max_class_share = max_class_share

    def __call__(self, image: Image.Image | np.ndarray, label: np.ndarray) -> Transformed:
        """Transforms an RGB image (or its pixels, uint8 `[H, W, 3]`) and its label map `[H, W]` to the crop size."""
        label = label.astype(np.uint8, copy=False)
        scale = _uniform(*self.scale) * (self.image_size / min(label.shape) if self.image_size else 1.0)
        scaled = tuple(max(1, round(side * scale)) for side in label.shape)
        (rows, to_rows), (columns, to_columns) = self._draw_crop(label, scaled)

        if isinstance(image, Image.Image):
            image = np.array(image.crop((columns.start, rows.start, columns.stop, rows.stop)))
        else:
            image = np.array(image[rows, columns])
        size = [to_rows.stop - to_rows.start, to_columns.stop - to_columns.start]
        pixels = F.resize(_channels_first(image), size, antialias=True).contiguous()
        # Plain nearest would shift labels by up to half a pixel against the image.
        labels = torch.from_numpy(np.array(label[rows, columns]))[None]
        labels = F.resize(labels, size, interpolation=InterpolationMode.NEAREST_EXACT)[0]
        if self.colours is not None:
            pixels = self.colours(pixels)
        if labels.shape != self.crop_size:
            shown, visible = (pixels, labels), (..., to_rows, to_columns)
            pixels = torch.tensor(PADDING_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, *self.crop_size)
            labels = torch.full(self.crop_size, IGNORE_INDEX, dtype=torch.uint8)
            pixels[visible], labels[visible] = shown
        if _uniform(0, 1) < self.flip:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return {"pixel_values": pixels, "labels": labels}

    def _draw_crop(self, label: np.ndarray, scaled: tuple[int, ...]) -> tuple[tuple[slice, slice], ...]:
        for _ in range(CROP_ATTEMPTS - 1):
            (rows, _), (columns, _) = crop = self._draw_overlaps(label.shape, scaled)
            shown = label[rows, columns]
            if self.max_class_share >= 1 or shown.shape == label.shape:
                return crop
            counts = torch.bincount(torch.from_numpy(shown.flatten()), minlength=IGNORE_INDEX)[:IGNORE_INDEX]
            if counts.max() < self.max_class_share * counts.sum():
                return crop
        return self._draw_overlaps(label.shape, scaled)

    def _draw_overlaps(self, size: tuple[int, ...], scaled: tuple[int, ...]) -> tuple[tuple[slice, slice], ...]:
        return tuple(_overlap(*axis) for axis in zip(size, scaled, self.crop_size, strict=True))


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _overlap(length: int, scaled: int, crop: int) -> tuple[slice, slice]:
    """Places a crop at random along an axis: the part of the image that it shows, and where in the crop that lies.

    Args:
        length: side of the image.
        scaled: what the whole side becomes in the crop.
        crop: side of the crop.
    """
    if scaled <= crop:
        start = int(torch.randint(crop - scaled + 1, ()))
        return slice(0, length), slice(start, start + scaled)
    window = max(1, round(crop * length / scaled))
    start = int(torch.randint(length - window + 1, ()))
    return slice(start, start + window), slice(0, crop)


class EvalTransform:
    """Shows a model a picture as its image processor does, but for what the model's adapter does on the device.

    An adapter takes raw RGB values and normalises them itself, so scaling, normalisation and the order of channels are
    left out; size, aspect ratio and crop are the processor's own. The label map keeps its size.

    Args:
        processor: image processor that is saved beside the model.
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor
        steps = ("do_rescale", "do_normalize", "do_flip_channel_order")
        self.left_out = {step: False for step in steps if getattr(processor, step, None) is not None}

    def __call__(self, image: Image.Image | np.ndarray, label: np.ndarray) -> Transformed:
        """Transforms an RGB image (or its pixels, uint8 `[H, W, 3]`); its label map `[H, W]` is passed on."""
        pixels = F.pil_to_tensor(image) if isinstance(image, Image.Image) else _channels_first(image)
        shown = self.processor(pixels, return_tensors="pt", input_data_format="channels_first", **self.left_out)
        return {"pixel_values": shown["pixel_values"][0].contiguous(), "labels": torch.from_numpy(label)}
