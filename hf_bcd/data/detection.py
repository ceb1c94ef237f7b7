"""Data sets of pictures with boxes in canonical form, and their batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, TypedDict, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset
from torchvision import tv_tensors

from ..utils.masks import RLE, mask_areas
from ..utils.messages import UserError
from .boxes import BoxRow, BoxRule
from .dataset import DenseDataset, check_pixels
from .images import match_orientation, read_image, to_rgb
from .masks import canonical_masks
from .transforms import PADDING


DETECTION = "object-detection"
INSTANCES = "instance-segmentation"
SIZE_DIVISOR = 32


class BoxSample(TypedDict):
    """A picture and the things in it, N of them or none.

    Attributes:
        image: RGB.
        boxes: float32 `[N, 4]`, left, top, right and bottom in pixels, clipped to the picture.
        classes: int64 `[N]`, 0..num_labels-1; there is no background class.
        areas: float64 `[N]` in pixels: the annotation's own, else that of the mask or the box; 0 if the mask is empty.
        crowd: bool `[N]`: groups of things that are not separated, on which nothing is trained.
        masks: `[N]` run lengths (see `utils.masks`) at the size of the picture; None in a data set of boxes.
    """

    image: Image.Image
    boxes: np.ndarray
    classes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    masks: list[RLE] | None


def read_boxes(row: BoxRow, rule: BoxRule, num_labels: int, masks: bool = False) -> BoxSample:
    """Decodes a row to its canonical form, with its masks if these are wanted.

    Raises:
        UserError: the picture cannot be decoded, has not the size that its annotations state, or is turned by its EXIF
            entry while they state none, a box is wrong, see `BoxRule.apply`, or a mask, see `canonical_masks`.
    """
    image = oriented(read_image(row.image, row.image_name), row.label.size, row.image_name)
    truth: dict[str, Any] = rule.apply(row.label, image.size, num_labels, row.label_name)
    truth["masks"] = None
    if masks:
        truth["masks"] = canonical_masks(row.label, image.size, row.label_name)
        pixels = mask_areas(truth["masks"])
        truth["areas"] = np.where(np.isnan(row.label.areas) | (pixels == 0), pixels, row.label.areas)
    return cast(BoxSample, {"image": to_rgb(image, row.image_name), **truth})


def oriented(image: Image.Image, size: tuple[int, int] | None, name: str) -> Image.Image:
    """A photograph the way its boxes were drawn, which the stated size (width, height) tells if it has an EXIF turn."""
    if size is not None:
        return match_orientation(image, size, name, truth="annotation")
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turn != 1 and ImageOps.exif_transpose(image) is not image:
        raise UserError(
            f"{name}: EXIF turns this photograph (orientation {turn}), and its annotations state no width and height, so "
            "that nobody can tell which way its boxes were drawn. Store it upright and without that entry, or state the size."
        )
    return image


@dataclass(frozen=True, eq=False)
class BoxDataset(DenseDataset):
    """A split of pictures with boxes, with random access; see `BoxSample`.

    Attributes:
        rule: how stored boxes become canonical ones.
        masks: whether samples have masks, for instance segmentation.
    """

    rule: BoxRule = field(default_factory=BoxRule)  # type: ignore[assignment]
    masks: bool = False
    ignore_index: ClassVar[None] = None  # type: ignore[misc] # no box is void

    @property
    def task(self) -> str:  # type: ignore[override]
        return INSTANCES if self.masks else DETECTION

    def stated_sizes(self) -> list[tuple[int, int] | None]:
        """Width and height of each picture as its annotations state them, if they do; no picture is read."""
        rows, places = self._unwrapped()
        truth = getattr(rows, "truth", None) or rows.__getitem__
        return [truth(place).label.size for place in places]

    def with_masks(self) -> "BoxDataset | None":
        """Those pictures whose files have masks although only boxes were asked for; None if there is none.

        Of COCO's JSON some are kept. What has a mask that cannot be read is left out.
        """
        rows, places = self._unwrapped()
        find = getattr(rows, "with_masks", lambda place: None)
        found = []
        for row in filter(None, map(find, places)):
            try:
                canonical_masks(row.label, row.label.size, row.label_name)
            except (UserError, TypeError):  # a size that nobody states
                continue
            found.append(row)
        return replace(self, rows=found, masks=True, cache=None) if found else None

    def _unwrapped(self) -> tuple[Any, list[int]]:
        """The rows as they were opened, and the place of each sample there."""
        rows: Any = self.rows
        places = list(range(len(self)))
        while isinstance(rows, Subset):
            rows, places = rows.dataset, [rows.indices[place] for place in places]
        return rows, places

    def decode(self, row: Any) -> Any:
        """Decodes a row; see `read_boxes`."""
        return read_boxes(row, self.rule, self.num_labels, self.masks)

    def packed(self, sample: Mapping[str, Any]) -> np.ndarray:
        columns = [sample[name][:, None] for name in ("classes", "areas", "crowd")]
        numbers = np.concatenate([sample["boxes"], *columns], axis=1, dtype=np.float64).reshape(-1).view(np.uint8)
        if not self.masks:
            return numbers
        counts = [mask["counts"] for mask in sample["masks"]]
        lengths = np.array([len(counts), *map(len, counts)], np.int64)
        return np.concatenate([lengths.view(np.uint8), numbers, np.frombuffer(b"".join(counts), np.uint8)])

    def unpacked(self, image: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
        content, masks = truth.tobytes(), None
        if self.masks:
            count = int(np.frombuffer(content, np.int64, 1)[0])
            first, end = 8 + 8 * count, 8 + 64 * count  # seven numbers a box
            places = np.cumsum([end, *np.frombuffer(content, np.int64, count, 8)]).tolist()
            size = list(image.shape[:2])
            masks = [{"size": size, "counts": content[start:stop]} for start, stop in pairwise(places)]
            content = content[first:end]
        numbers = np.frombuffer(content, np.float64).reshape(-1, 7)
        boxes, (classes, areas, crowd) = numbers[:, :4].astype(np.float32), numbers[:, 4:].T.copy()
        return {
            "image": image, "boxes": boxes, "classes": classes.astype(np.int64), "areas": areas, "crowd": crowd > 0,
            "masks": masks,
        }  # fmt: skip


def collate_boxes(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Makes a batch of transformed samples of pictures with boxes.

    Training pictures, and their packed masks, are padded at the right and at the bottom to the largest of the batch, rounded
    up to a multiple of 32.
    Evaluation pictures (which have `orig_size`) are never padded: those of different sizes stay a list.

    Returns:
        `index` `[B]`; `pixel_values` uint8 `[B, 3, H, W]`, or a list of B tensors; `pixel_mask` bool `[B, H, W]`, true on
        the pictures, if anything is padded; every other key of the samples as a list of B (run lengths in evaluation:
        lists of them).
    """
    pictures = [sample["pixel_values"] for sample in samples]
    batch: dict[str, Any] = {"index": torch.tensor([sample["index"] for sample in samples])}
    if "orig_size" in samples[0]:
        alike = len({picture.shape for picture in pictures}) == 1
        batch["pixel_values"] = torch.stack(pictures) if alike else pictures
    else:
        batch |= pad_pictures(pictures)
        height, width = batch["pixel_values"].shape[2:]
    others = [name for name in samples[0] if name not in ("index", "pixel_values")]
    batch |= {name: [sample[name] for sample in samples] for name in others}
    for name in ("masks", "crowd_masks"):
        if name in batch and "orig_size" not in batch:
            batch[name] = [
                F.pad(mask, (0, width // 8 - mask.shape[2], 0, height - mask.shape[1])) for mask in batch[name]
            ]
    return batch


def pad_pictures(pictures: Sequence[Tensor], divisor: int = SIZE_DIVISOR) -> dict[str, Tensor]:
    """`pixel_values` and, if any of the uint8 pictures `[3, h, w]` is padded, `pixel_mask` of a batch."""
    height, width = (-(-max(picture.shape[axis] for picture in pictures) // divisor) * divisor for axis in (1, 2))
    if all(picture.shape[1:] == (height, width) for picture in pictures):
        return {"pixel_values": torch.stack(list(pictures))}
    colour = torch.tensor(PADDING[tv_tensors.Image], dtype=torch.uint8)[:, None, None]
    pixels = colour.expand(3, height, width).repeat(len(pictures), 1, 1, 1)
    mask = torch.zeros(len(pictures), height, width, dtype=torch.bool)
    for place, picture in enumerate(pictures):
        pixels[place, :, : picture.shape[1], : picture.shape[2]] = picture
        mask[place, : picture.shape[1], : picture.shape[2]] = True
    return {"pixel_values": pixels, "pixel_mask": mask}


def check_box_sample(sample: Any, num_labels: int, name: str, evaluated: bool = False, masks: bool = False) -> None:
    """Refuses a transformed sample that no detector here could use.

    Args:
        sample: of a transform.
        num_labels: number of classes.
        name: the data set that it comes from.
        evaluated: whether it is one to evaluate on.
        masks: whether it must have masks.

    Raises:
        UserError: a key is missing, or boxes, classes or masks are not what a detector takes.
    """
    truth = (
        "'areas': [N], 'crowd': bool [N], 'orig_size': height and width of the picture, in whose pixels the boxes are"
        if evaluated
        else "'crowd_boxes': [M, 4]"
    )
    if masks:
        kind = "packed bits uint8 [{}, H, ceil(W / 8)]"
        more = f", 'crowd_masks': {kind.format('M')}"
        truth += f", 'masks': {'N run lengths of the picture' if evaluated else kind.format('N') + more}"
    form = (
        "{'index': int, 'pixel_values': raw RGB 0..255 [3, H, W], 'boxes': left, top, right, bottom in pixels [N, 4], "
        f"'classes': class ids [N], {truth}}}"
    )
    advice = f"a sample must be {form}; load_dense_dataset makes such samples of pictures and boxes"
    others = ("areas", "crowd", "orig_size") if evaluated else ("crowd_boxes",)
    others += ("masks",) if masks and evaluated else ("masks", "crowd_masks") if masks else ()
    keys = ("index", "pixel_values", "boxes", "classes", *others)
    if missing := [key for key in keys if not isinstance(sample, Mapping) or key not in sample]:
        held = list(sample) if isinstance(sample, Mapping) else type(sample).__name__
        raise UserError(f"{name}[0] holds {held} and lacks {', '.join(missing)}: {advice}.")
    check_pixels(sample["pixel_values"], name, advice)
    boxes, classes = sample["boxes"], sample["classes"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or classes.shape != boxes.shape[:1]:
        raise UserError(f"{name}[0] has boxes {list(boxes.shape)} and classes {list(classes.shape)}: {advice}.")
    if len(boxes) and not (boxes[:, 2:] > boxes[:, :2]).all():
        raise UserError(f"boxes of {name}[0] are no corners, such as {boxes[0].tolist()}: {advice}.")
    if len(boxes) and boxes.max() <= 1:
        raise UserError(f"boxes of {name}[0] lie in 0..1, as if relative to the picture: {advice}.")
    height, width = (int(side) for side in (sample["orig_size"] if evaluated else sample["pixel_values"].shape[-2:]))
    if len(boxes) and (boxes.min() < -1 or (boxes[:, 2:].amax(0) > boxes.new_tensor([width, height]) + 1).any()):
        raise UserError(
            f"boxes of {name}[0] end outside of its picture, {width}x{height} (width x height), such as "
            f"{boxes[boxes.amax(1).argmax()].tolist()}: {advice}."
        )
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_labels:
        raise UserError(
            f"{name}[0] has the classes {sorted(set(classes.tolist()))}; class ids are 0 to {num_labels - 1}, and no box has "
            "a class for the background."
        )
    if masks:
        _check_masks(sample, name, height, width, evaluated, advice)


def _check_masks(sample: Any, name: str, height: int, width: int, evaluated: bool, advice: str) -> None:
    if evaluated:
        sizes = [list(mask["size"]) for mask in sample["masks"]]
        if sizes != [[height, width]] * len(sample["boxes"]):
            found = f"{len(sizes)} masks of {sizes[0] if sizes else 'no size'} for {len(sample['boxes'])} boxes"
            raise UserError(f"{name}[0] has {found} of a picture {[height, width]} (height, width): {advice}.")
        return
    for key, boxes in (("masks", "boxes"), ("crowd_masks", "crowd_boxes")):
        mask, expected = sample[key], [len(sample[boxes]), height, -(-width // 8)]
        if not isinstance(mask, Tensor) or mask.dtype != torch.uint8 or list(mask.shape) != expected:
            held = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise UserError(f"{key} of {name}[0] is {held}, not torch.uint8 {expected}: {advice}.")
