"""Detectors: what the adapters of all families have in common."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseOutput, Objects
from ..utils.masks import RLE, encode, unpack
from ..utils.messages import UserError
from .base import DenseAdapter


MAX_DETECTIONS = 100  # of a picture, as COCO's metric counts, where the model's configuration allows no more


class DetectionAdapter(DenseAdapter):
    """Turns one family of detectors into `DenseOutput`: levels of backbone and neck, raw outputs, the family's own loss.

    Attributes:
        squares: whether pictures must be resized to squares, because the family heeds no padding or not all of it.
        softmax: whether its classes exclude each other, with a last one for no object.
        within_queries: whether its processor gives no more detections than the model has queries.
    """

    task = "object-detection"
    processor_class = "DeformableDetrImageProcessor"
    min_labels = 1
    exported = ("logits", "pred_boxes")
    squares: ClassVar[bool] = False
    softmax: ClassVar[bool] = False
    within_queries: ClassVar[bool] = False

    @property
    def limit(self) -> int:
        """Number of detections of a picture that count."""
        return max(MAX_DETECTIONS, getattr(self.model.config, "max_detections", 0))

    @abstractmethod
    def run(  # type: ignore[override] # the targets of another task
        self, pixel_values: Tensor, targets: Objects | None, pixel_mask: Tensor | None = None
    ) -> DenseOutput:
        """Runs the model on normalised images `[B, 3, H, W]`; with targets, the output has the family's loss."""

    def forward(
        self, pixel_values: Tensor, targets: Objects | None = None, pixel_mask: Tensor | None = None
    ) -> DenseOutput:
        """Runs the model on RGB images `[B, 3, H, W]`, uint8 or float, values 0..255, not normalised.

        Padding is exactly 0 for the model. Without targets, the output has no task losses.

        Raises:
            UserError: if `pixel_values` is not a batch of RGB images, or is padded for a family of `squares`.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise UserError(f"pixel_values has shape {list(pixel_values.shape)}; expected RGB images [B, 3, H, W]")
        pixel_mask = pixel_mask if targets is None else targets.pixel_mask
        if pixel_mask is not None:
            self.check_shape(None)
        return self.run(self.shown(pixel_values, pixel_mask), targets, pixel_mask)

    def check_shape(self, size: tuple[int, int] | None) -> None:
        if self.squares and (size is None or size[0] != size[1] or size[0] % self.size_multiple):
            side = max(1, round(640 / self.size_multiple)) * self.size_multiple
            found = "padded" if size is None else f"{size[0]} x {size[1]} pixels, or padded to that"
            raise UserError(
                f"{type(self.model).__name__} takes only squares with a side of a multiple of {self.size_multiple}, without "
                f"padding; these images are {found}. Resize them to such squares: square_size: {side} (`--square_size`)."
            )

    def shown(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """Images as the model gets them."""
        shown = self.normalize(pixel_values)
        return (shown if pixel_mask is None else shown * pixel_mask[:, None]).to(self.model.dtype)

    @torch.no_grad()
    def predict(  # type: ignore[override] # of another task
        self, pixel_values: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """Detections as `pipeline("object-detection")` computes them, without a threshold.

        Args:
            pixel_values: `[B, 3, H, W]`, values 0..255, without padding.
            sizes: height and width of each picture, in whose pixels the boxes are.

        Returns:
            Of each picture at most 100 `boxes` (or `max_detections` of the model's configuration, if that is more) xyxy float32 `[K, 4]`, `scores` `[K]` and `labels` int64 `[K]`, best
            first; of a model with masks also `masks`, a list of encodings at the picture's size.

        Raises:
            UserError: if the pictures are no squares, and the family takes no others.
        """
        self.check_shape((pixel_values.shape[-2], pixel_values.shape[-1]))
        with torch.autocast(pixel_values.device.type, enabled=False):
            outputs = self.model(pixel_values=self.shown(pixel_values))
        return self.detections(outputs, sizes)

    def detections(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """What `predict` gives, from the model's `logits` `[B, Q, C]`, `pred_boxes` `[B, Q, 4]` and `pred_masks`, if any."""
        logits, boxes = self.map_classes(outputs.logits.float()), corners(outputs.pred_boxes.float())
        if self.softmax:
            probabilities, classes = logits.softmax(-1)[..., :-1].max(-1, keepdim=True)
        else:
            probabilities, classes = logits.sigmoid(), torch.arange(logits.shape[-1], device=logits.device)
            classes = classes.expand_as(logits)
        most = len(probabilities[0]) if self.within_queries else probabilities[0].numel()
        scores, index = probabilities.flatten(1).topk(min(self.limit, most))
        masks = getattr(outputs, "pred_masks", None)
        found = []
        for picture, (one, where, ids, relative, (height, width)) in enumerate(
            zip(scores, index, classes, boxes, sizes, strict=True)
        ):
            kept = one > 0  # no empty rows
            where = where[kept]
            row = where // probabilities.shape[-1]
            scale = relative.new_tensor([width, height, width, height])
            detections: dict[str, Any] = {"boxes": relative[row] * scale, "scores": one[kept]}
            detections["labels"] = ids.flatten()[where]
            if masks is not None:
                detections["masks"] = [encoded(masks[picture, query], (height, width)) for query in row.tolist()]
            found.append(detections)
        return found

    def map_classes(self, class_logits: Tensor) -> Tensor:
        """Logits `[..., C]` in the classes that the model was matched to, if it was.

        Of several classes that stand for one, the largest counts; where classes exclude each other, their probabilities
        add, and classes that stand for none are no object, which stays the last.
        """
        label_map = self.label_map
        if label_map is None or label_map.is_identity:
            return class_logits
        own = class_logits[..., : len(label_map.teacher)]
        mapped = label_map.apply(own.flatten(0, -2), exclusive=self.softmax).unflatten(0, own.shape[:-1])
        if not self.softmax:
            return mapped
        used = {source for sources in label_map.sources.values() for source in sources}
        others = [column for index, column in enumerate(class_logits.unbind(-1)) if index not in used]
        return torch.cat([mapped, torch.stack(others, -1).logsumexp(-1, keepdim=True)], dim=-1)

    def processor_options(
        self, shortest_edge: int | None, longest_edge: int = 1333, square_size: int | None = None
    ) -> dict[str, Any]:
        mean, std = self.image_mean.flatten().tolist(), self.image_std.flatten().tolist()
        sized: dict[str, Any] = {"do_resize": shortest_edge is not None or square_size is not None}
        if square_size is not None:
            sized["size"] = {"height": square_size, "width": square_size}
        elif shortest_edge is not None:
            sized["size"] = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
        normal = {"do_normalize": any(mean) or set(std) != {1.0}, "image_mean": mean, "image_std": std}
        return {**sized, "resample": 2, **normal, "do_convert_annotations": True}


def encoded(logits: Tensor, size: tuple[int, int]) -> RLE:
    """The mask of logits `[h, w]` at a picture's size, as `RfDetrImageProcessor` computes it."""
    resized = F.interpolate(logits[None, None].float(), size=size, mode="bilinear", align_corners=False)
    return encode((resized[0, 0] > 0).cpu())


def corners(boxes: Tensor) -> Tensor:
    """Boxes `[..., 4]` given by centre, width and height, as xyxy."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def picture_sizes(targets: Objects) -> Tensor:
    """Width and height of each picture inside the batch's images, float32 `[B, 2]`."""
    height, width = targets.size
    if targets.pixel_mask is None:
        return targets.boxes[0].new_tensor([width, height]).expand(len(targets.boxes), 2)
    mask = targets.pixel_mask
    return torch.stack([mask.any(1).sum(1), mask.any(2).sum(1)], dim=1).float()


def detr_labels(targets: Objects, sizes: Tensor) -> list[dict[str, Tensor]]:
    """Targets in the form of transformers: `class_labels`, `boxes` as centre, width and height over `sizes` `[B, 2]`, `masks`."""
    labels = []
    for boxes, classes, size in zip(targets.boxes, targets.classes, sizes, strict=True):
        relative = boxes / size.repeat(2)
        centre = (relative[:, :2] + relative[:, 2:]) / 2
        labels.append(
            {"class_labels": classes, "boxes": torch.cat([centre, relative[:, 2:] - relative[:, :2]], dim=1)}
        )
    for label, masks in zip(labels, targets.masks or (), strict=targets.masks is not None):
        label["masks"] = masks
    return labels


def unpacked_masks(targets: Objects, model: nn.Module) -> list[Tensor]:
    """The true masks of each picture, boolean `[N, H, W]`.

    Raises:
        UserError: there are none.
    """
    if targets.masks is None:
        raise UserError(
            f"{type(model).__name__} learns masks, but the data set has boxes only; train on one with masks "
            "(`--task instance-segmentation`), or choose a detector without masks."
        )
    return [unpack(masks, targets.size[1]) for masks in targets.masks]


def mask_labels(targets: Objects, sizes: Tensor, model: nn.Module) -> list[dict[str, Tensor]]:
    """`detr_labels` with whole masks; a `UserError` where there are none."""
    labels, masks = detr_labels(targets, sizes), unpacked_masks(targets, model)
    return [{**label, "masks": whole} for label, whole in zip(labels, masks, strict=True)]


@contextmanager
def tapped(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects what modules give inside the block, by name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, arguments, output: found.__setitem__(name, output)

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives an object another method inside the block."""
    vars(owner)[name] = value
    try:
        yield
    finally:
        del vars(owner)[name]
