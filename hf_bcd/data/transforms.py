"""Joint transforms of a picture and its truth, by torchvision's v2: every tv_tensor of a sample comes along.

Pictures stay uint8 until the device, where models normalise them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import BaseImageProcessor

from ..utils.messages import UserError
from .boxes import MIN_SIDE, to_train_on
from .labels import IGNORE_INDEX, UNLABELLED
from .masks import transform_masks


# ImageNet's mean colour: padding is close to zero once a model has normalised it
PADDING = {tv_tensors.Image: [124, 116, 104], tv_tensors.Mask: IGNORE_INDEX}
LUMA = np.array([0.299, 0.587, 0.114])
CROP_ATTEMPTS = 10
VIEWS_VERSION = 1
"""What a seed, a view and an index give; raised with every change of it, since stores hold no pictures of their views."""

Overlap = tuple[int, int, int, int]


class Transformed(TypedDict):
    """Input of a model: uint8 RGB `pixel_values` `[3, H, W]` and uint8 `labels` `[H, W]`."""

    pixel_values: Tensor
    labels: Tensor


class Augmentation:
    """Random scale, crop, colours and horizontal flip of all tv_tensors of a sample together.

    The crop is cut out before it is scaled, so that no pixel is scaled in vain. What is smaller than the crop is padded,
    with the mean colour and void labels. As in mmsegmentation, a crop is drawn again (at most ten times) if one class
    covers `max_class_share` of its labelled pixels, or all of it is void; not of a picture without labels. Random numbers come from torch's CPU generator.

    Args:
        crop_size: side, or (height, width), of the result in pixels.
        image_size: length to which the short side is resized before the random scale; None keeps the picture's own.
        scale: smallest and largest random scale.
        flip: probability of a horizontal flip.
        jitter: strength of brightness, contrast and saturation; each factor is drawn from [1 - strength, 1 + strength].
        max_class_share: see above; 1 takes the first crop.
        class_crops: share of the crops, in 0..1, that hold a pixel of a class drawn from the picture's, all alike: rare classes are
            seen more often.
    """

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        image_size: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        jitter: float = 0.5,
        max_class_share: float = 0.75,
        class_crops: float = 0.0,
    ) -> None:
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else (crop_size[0], crop_size[1])
        if min(self.crop_size) < 1 or (image_size is not None and image_size < 1):
            raise UserError(f"crop_size {crop_size} and image_size {image_size} must be positive.")
        _check_factors(scale, jitter)
        self.image_size, self.scale, self.flip, self.jitter = image_size, scale, flip, jitter
        self.max_class_share, self.class_crops = max_class_share, class_crops

    def __call__(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """Transforms pictures (PIL or tv_tensors), masks and boxes of one size; returns tv_tensors by the same names."""
        size = F.get_size(next(iter(items.values())))
        scale = _uniform(*self.scale) * (self.image_size / min(size) if self.image_size else 1.0)
        scaled = [max(1, round(side * scale)) for side in size]
        mask = next((item for item in items.values() if isinstance(item, tv_tensors.Mask)), None)
        (top, height, above, rows), (left, width, before, columns) = self._draw_crop(size, scaled, mask)
        shown = {
            name: _scaled(F.crop(item, top, left, height, width), [rows, columns]) for name, item in items.items()
        }
        if self.jitter:
            factors = (1 + self.jitter * (2 * torch.rand(3) - 1)).tolist()
            shown = {name: _coloured(item, factors) for name, item in shown.items()}
        padding = [before, above, self.crop_size[1] - columns - before, self.crop_size[0] - rows - above]
        if any(padding):
            shown = {name: F.pad(item, padding, fill=PADDING.get(type(item))) for name, item in shown.items()}
        if _uniform(0, 1) < self.flip:
            shown = {name: F.horizontal_flip(item) for name, item in shown.items()}
        return shown

    def _draw_crop(self, size: Sequence[int], scaled: Sequence[int], mask: Tensor | None) -> list[Overlap]:
        """Draws where the crop lies along both axes."""
        if mask is not None and int(mask.flatten()[0]) == UNLABELLED:  # of the whole picture
            mask = None
        wanted: Sequence[int | None] = (None, None)
        if mask is not None and self.class_crops and _uniform(0, 1) < self.class_crops:
            wanted = _pixel_of_a_class(mask.as_subclass(Tensor)) or wanted
        for attempt in range(CROP_ATTEMPTS):
            axes = [_overlap(*axis) for axis in zip(size, scaled, self.crop_size, wanted, strict=True)]
            (top, height, *_), (left, width, *_) = axes
            last = attempt == CROP_ATTEMPTS - 1 or (height, width) == tuple(size)
            if mask is None or self.max_class_share >= 1 or last:
                break
            ids = mask.as_subclass(Tensor)[top : top + height, left : left + width]
            counts = torch.bincount(ids.flatten(), minlength=IGNORE_INDEX)[:IGNORE_INDEX]
            if counts.max() < self.max_class_share * counts.sum():
                break
        return axes


def adjust_colours(pixels: Tensor, brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0) -> Tensor:
    """Applies brightness, contrast and saturation, in this order, to a uint8 picture `[3, H, W]` by one affine map.

    Contrast pivots on the picture's mean luma, saturation blends with the pixel's luma. Values are clipped at the end.
    """
    values = pixels.reshape(3, -1).float()
    mean_luma = brightness * float(LUMA @ values.mean(dim=1).numpy())
    # it keeps grey values, so the contrast's offset passes through it unchanged
    saturate = saturation * np.eye(3) + (1 - saturation) * LUMA
    matrix = torch.from_numpy(brightness * contrast * saturate).float()
    half = 0.5  # uint8 conversion truncates
    offset = torch.full((3, 1), (1 - contrast) * mean_luma + half)
    return torch.addmm(offset, matrix, values).clamp_(0, 255).to(torch.uint8).view_as(pixels)


class TrainTransform(Augmentation):
    """The augmentation of a sample `{"image", "label"}`; see `Augmentation`."""

    def __call__(self, sample: Mapping[str, Any]) -> Transformed:
        """Transforms an RGB picture (or its pixels, uint8 `[H, W, 3]`) and its label map `[H, W]` to the crop size."""
        image = sample["image"]
        if not isinstance(image, Image.Image):
            image = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(np.array(sample["label"], np.uint8)))
        shown = super().__call__({"image": image, "label": mask})
        return {"pixel_values": shown["image"].as_subclass(Tensor), "labels": shown["label"].as_subclass(Tensor)}


class EvalTransform:
    """Shows a model a picture as its image processor does, but for what the model's adapter does on the device.

    An adapter takes raw RGB values, normalises them and pads them itself, so scaling, normalisation, the order of channels
    and padding are left out; size, aspect ratio and crop are the processor's own. The label map keeps its size.

    Args:
        processor: image processor that is saved beside the model.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor: Any = processor
        steps = ("do_rescale", "do_normalize", "do_flip_channel_order", "do_pad")
        self.left_out = {step: False for step in steps if getattr(processor, step, None) is not None}
        # which rescales before it resizes, so that nothing is rounded to whole grey levels
        self.in_floats = type(processor).__name__.startswith("RfDetr")

    def __call__(self, sample: Mapping[str, Any]) -> Transformed:
        """Transforms an RGB picture (or its pixels, uint8 `[H, W, 3]`); its label map `[H, W]` is passed on."""
        pixels = F.to_image(sample["image"]).as_subclass(Tensor)
        return {"pixel_values": self.show(pixels), "labels": torch.from_numpy(np.asarray(sample["label"]))}

    def show(self, pixels: Tensor) -> Tensor:
        """A picture `[3, H, W]` as the model takes it `[3, h, w]`."""
        pixels = pixels.float() if self.in_floats else pixels
        shown = self.processor(pixels, return_tensors="pt", input_data_format="channels_first", **self.left_out)
        return shown["pixel_values"][0].contiguous()


class BoxTrainTransform:
    """Random size, flip and colours of a picture with its boxes, which are never cropped.

    Args:
        shortest: length of the short side; of a list, one is drawn.
        longest: bound of the long side, which wins over the short one.
        square: side of a square to which pictures are resized instead, whatever their proportions.
        flip: probability of a horizontal flip.
        scale: smallest and largest random factor on these lengths.
        jitter: strength of brightness, contrast and saturation, as in `Augmentation`.

    Raises:
        UserError: an option is outside its range.
    """

    def __init__(
        self,
        shortest: int | Sequence[int] = 800,
        longest: int = 1333,
        square: int | None = None,
        flip: float = 0.5,
        scale: tuple[float, float] = (1.0, 1.0),
        jitter: float = 0.0,
    ) -> None:
        self.shortest = [shortest] if isinstance(shortest, int) else list(shortest)
        if min([*self.shortest, longest, square or 1], default=0) < 1 or not self.shortest:
            raise UserError(f"shortest {shortest}, longest {longest} and square {square} must be positive.")
        if square is None and max(self.shortest) > longest:
            raise UserError(f"shortest is {max(self.shortest)}, more than longest, {longest}.")
        _check_factors(scale, jitter)
        if not 0 <= flip <= 1:
            raise UserError(f"flip is {flip}; it is a probability, 0..1.")
        self.longest, self.square, self.flip, self.scale, self.jitter = longest, square, flip, scale, jitter

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """Transforms a canonical sample of pictures with boxes.

        Returns:
            `pixel_values` uint8 `[3, h, w]`; `boxes` float32 `[N, 4]` (corners in its pixels) and `classes` int64 `[N]` of
            the boxes to train on (see `to_train_on`); `crowd_boxes` float32 `[M, 4]`. Of a sample with masks also
            `masks` and `crowd_masks` of these boxes, packed bits uint8 `[N, h, ceil(w/8)]`, see `transform_masks`.
        """
        pixels = F.to_image(sample["image"])
        size = F.get_size(pixels)
        scaled = self._draw_size(*size)
        teaches = to_train_on(sample)
        groups = {
            name: tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
                torch.from_numpy(sample["boxes"][chosen]), format="XYXY", canvas_size=(size[0], size[1])
            )
            for name, chosen in (("boxes", teaches), ("crowd_boxes", sample["crowd"]))
        }
        shown = {name: _scaled(item, scaled) for name, item in {"pixel_values": pixels, **groups}.items()}
        if self.jitter:
            factors = (1 + self.jitter * (2 * torch.rand(3) - 1)).tolist()
            shown = {name: _coloured(item, factors) for name, item in shown.items()}
        if flipped := _uniform(0, 1) < self.flip:
            shown = {name: F.horizontal_flip(item) for name, item in shown.items()}
        found = {name: item.as_subclass(Tensor) for name, item in shown.items()}
        visible = (found["boxes"][:, 2:] - found["boxes"][:, :2] >= MIN_SIDE).all(dim=1)
        masks = {}
        if sample.get("masks") is not None:
            for name, chosen in (("masks", teaches), ("crowd_masks", sample["crowd"])):
                mine = [sample["masks"][place] for place in chosen.nonzero()[0]]
                masks[name] = transform_masks(mine, scaled[0], scaled[1], flipped)
            visible &= masks["masks"].flatten(1).any(dim=1).bool()  # thin ones may vanish in a small picture
            masks["masks"] = masks["masks"] if visible.all() else masks["masks"][visible]
        classes = torch.from_numpy(sample["classes"][teaches])
        return found | masks | {"boxes": found["boxes"][visible], "classes": classes[visible]}

    def _draw_size(self, height: int, width: int) -> list[int]:
        factor = _uniform(*self.scale)
        if self.square:
            return [max(1, round(self.square * factor))] * 2
        shortest = self.shortest[int(torch.randint(len(self.shortest), ()))]
        ratio = factor * min(shortest / min(height, width), self.longest / max(height, width))
        return [max(1, round(side * ratio)) for side in (height, width)]


class BoxEvalTransform(EvalTransform):
    """Shows a model a picture as its image processor does, see `EvalTransform`; boxes stay in the picture's own pixels."""

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Transforms the picture of a canonical sample; its truth is passed on, with `orig_size` (height, width)."""
        pixels = F.to_image(sample["image"]).as_subclass(Tensor)
        truth = {name: torch.from_numpy(sample[name]) for name in ("boxes", "classes", "areas", "crowd")}
        masks = {} if sample.get("masks") is None else {"masks": sample["masks"]}
        return {"pixel_values": self.show(pixels), **truth, **masks, "orig_size": torch.tensor(pixels.shape[1:])}


def _check_factors(scale: tuple[float, float], jitter: float) -> None:
    if not 0 < scale[0] <= scale[1]:
        raise UserError(f"scale is {scale}; it must be (smallest, largest), both positive.")
    if not 0 <= jitter <= 1:
        raise UserError(f"jitter is {jitter}; it must lie in 0..1.")


def _scaled(item: Any, size: list[int]) -> Any:
    if isinstance(item, Image.Image):
        item = F.to_image(item)
    if isinstance(item, tv_tensors.Mask):
        # plain nearest, as v2 resizes masks, would shift labels by up to half a pixel against the picture
        plain = F.resize(item.as_subclass(Tensor)[None], size, interpolation=InterpolationMode.NEAREST_EXACT)
        return tv_tensors.Mask(plain[0])
    return F.resize(item, size, antialias=True)


def _coloured(item: Any, factors: list[float]) -> Any:
    if not isinstance(item, tv_tensors.Image):
        return item
    return tv_tensors.Image(adjust_colours(item.as_subclass(Tensor), *factors))


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _pixel_of_a_class(ids: Tensor) -> list[int] | None:
    """Row and column of a random pixel of a class drawn from those of a label map `[H, W]`, all alike; None if all is void."""
    classes = torch.bincount(ids.flatten(), minlength=UNLABELLED)[:UNLABELLED].nonzero()
    if not len(classes):
        return None
    pixels = (ids == classes[torch.randint(len(classes), ())]).nonzero()
    return pixels[torch.randint(len(pixels), ())].tolist()


def _overlap(length: int, scaled: int, crop: int, wanted: int | None = None) -> Overlap:
    """Places a crop at random along an axis.

    Args:
        length: side of the picture.
        scaled: length of the whole side at the crop's scale.
        crop: side of the crop.
        wanted: position that the crop must hold.

    Returns:
        Start and length of the part of the picture that the crop shows; start and length of that part in the crop.
    """
    if scaled <= crop:
        return 0, length, int(torch.randint(crop - scaled + 1, ())), scaled
    window = max(1, round(crop * length / scaled))
    first, last = 0, length - window
    if wanted is not None:
        first, last = max(first, wanted - window + 1), min(last, wanted)
    return int(torch.randint(first, last + 1, ())), window, 0, crop
