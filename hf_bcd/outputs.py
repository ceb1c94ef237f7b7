"""Models and ground truth as the rest of the package sees them: named feature levels, class scores, targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .utils.messages import UserError


IGNORE_INDEX = 255


class FeatureSpec(NamedTuple):
    """Shape of one feature level, known before the first forward pass.

    Attributes:
        channels: number of channels C of the level.
        stride: input pixels per feature position, along each axis.
    """

    channels: int
    stride: int


@dataclass
class DenseOutput:
    """Output of an adapted model on a batch of B images.

    Attributes:
        features: level name -> `[B, C, h, w]`, from fine to coarse. Level names: `stem` (stride 4, only for backbones
            with a separate stem) and `stride_4`, `stride_8`, `stride_16`, `stride_32` after the nominal stride of the
            stage; the true stride of a dilated stage stands in its `FeatureSpec`.
        logits: per-pixel class scores `[B, num_labels, h, w]` at any stride; None for detectors.
        task_losses: supervised losses by name, weighted as the family's authors do; none without targets.
        head: the model's own head as a function of its levels, `{level: [B, C, h, w]}` -> scores in the classes of
            `logits`, where a frozen teacher offers one: gradients reach only the levels.
        pyramid: levels of a detector's neck, `p3` (stride 8) to `p7`, likewise.
        dense: raw output of a detector that scores a box at every prior.
        queries: raw output of a detector of the DETR kind.
        answers: what a teacher with masks finds in the images, where it was asked to.
        final_boxes: gives what a model in two stages finds, class logits `[B, K, C]` and xyxy pixels `[B, K, 4]`, without a graph.
        digest: of a stored teacher, what losses read of it in their own smallest form, see `DistillationLoss.digest`.
    """

    features: dict[str, Tensor]
    logits: Any
    task_losses: dict[str, Tensor] = field(default_factory=dict)
    head: Callable[[dict[str, Tensor]], Tensor] | None = None
    pyramid: dict[str, Tensor] = field(default_factory=dict)
    dense: "DenseHead | None" = None
    queries: "Queries | None" = None
    answers: "Objects | None" = None
    final_boxes: Callable[[], tuple[Tensor, Tensor]] | None = None
    digest: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class DenseHead:
    """What a dense detector says at its A priors: all levels together, fine to coarse, row-major, prior-minor.

    Attributes:
        class_logits: `[B, A, C]`.
        box_outputs: deltas `[B, A, 4]`, or distributions over `bins + 1` distances to each side, `[B, A, 4 * (bins + 1)]`.
        boxes: gives them decoded, xyxy pixels of the input `[B, A, 4]`, with a graph.
        priors: xyxy pixels `[A, 4]`.
        strides: stride of each prior's level `[A]`.
        level_sizes: number of priors of each level.
        assigned: index of the truth that a prior belongs to, -1 for background, -2 for neither, `[B, A]`; None without truth.
        tower: maps `[B, D, h, w]` of each level before the last convolution, of `class` and of `box`.
        cross: of a frozen teacher, its head from there on: the same output for such maps of a student.
    """

    class_logits: Tensor
    box_outputs: Tensor
    boxes: Callable[[], Tensor]
    priors: Tensor
    strides: Tensor
    level_sizes: tuple[int, ...]
    assigned: Tensor | None = None
    tower: dict[str, list[Tensor]] = field(default_factory=dict)
    cross: "Callable[[dict[str, list[Tensor]]], DenseHead] | None" = None


@dataclass
class Queries:
    """What the Q object queries of a DETR say after each of L decoder layers; denoising and extra groups are cut off.

    Attributes:
        class_logits: `[L, B, Q, C]`, or with a last class for no object where `softmax`.
        boxes: centre, width and height relative to the picture, `[L, B, Q, 4]`; None of models that find masks instead.
        softmax: whether classes exclude each other.
        corners: D-FINE's distributions over the distances to each side, `[L, B, Q, 4 * bins]`.
        corner_scale: what makes corners of two models comparable: number of bins, reg_scale and up.
        masks: logits of the masks of such models, `[L, B, Q, h, w]`.
    """

    class_logits: Tensor
    boxes: Tensor | None
    softmax: bool
    corners: Tensor | None = None
    corner_scale: tuple[float, ...] = ()
    masks: Tensor | None = None


class Targets(Protocol):
    """Ground truth of a batch of B images, as far as a loss may look at it: no loss asks what kind it is."""

    @property
    def num_labels(self) -> int:
        """Number of classes K."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        ...

    @property
    def pixel_mask(self) -> Tensor | None:
        """Which pixels belong to a picture, boolean `[B, H, W]`; None where nothing was padded for the batch's sake."""
        ...

    def valid(self, size: tuple[int, int]) -> Tensor:
        """Which positions of a grid over the images count: boolean `[B, h, w]`, False where void or padded."""
        ...

    def weights(self, size: tuple[int, int]) -> Tensor:
        """How much each position of a grid counts beside others: `[B, h, w]`, float32 >= 0, 0 where void or padded."""
        ...

    def class_masks(self, size: tuple[int, int]) -> Tensor:
        """Where each class is on a grid over the images: `[B, K, h, w]`, boolean or in 0..1, 0 where void or padded."""
        ...


@dataclass(frozen=True, eq=False)
class LabelMaps:
    """Targets of semantic segmentation.

    Attributes:
        ids: class ids `[B, H, W]` of any integer type.
        num_labels: number of classes K.
        ignore_index: id of void pixels.
        num_valid: number of valid pixels by which task losses divide, a scalar, see `class_weights`; by default of `ids`. Ranks
            and accumulated batches with unequal void shares give the gradient of one large batch if all divide by the same.
        seen: pixels that distillation looks at, boolean `[B, H, W]`, where some pictures have no labels: all of theirs but for
            padding, and of the others those that are not void. By default those that are not void.
        class_weights: weight of each class's pixels in task losses `[K]`, and in losses that ask for `weights`; None for 1.

    Raises:
        UserError: on the CPU, if an id is neither a class nor `ignore_index`.
    """

    ids: Tensor
    num_labels: int
    ignore_index: int = IGNORE_INDEX
    num_valid: Tensor | None = None
    seen: Tensor | None = None
    class_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.device.type == "cpu":  # elsewhere looking would wait for the device
            check_ids(self.ids, self.num_labels, self.ignore_index, "label maps")

    @property
    def size(self) -> tuple[int, int]:
        return self.ids.shape[-2], self.ids.shape[-1]

    @property
    def pixel_mask(self) -> Tensor | None:
        return None

    def valid(self, size: tuple[int, int]) -> Tensor:
        """Positions that are not void, or `seen`, nearest neighbours: boolean `[B, *size]`."""
        return resize_nearest(self.ids != self.ignore_index if self.seen is None else self.seen, size)

    def weights(self, size: tuple[int, int]) -> Tensor:
        """Weights of the classes, nearest neighbours, 1 where there is no label: float32 `[B, *size]`, 0 where not `valid`."""
        valid = self.valid(size)
        if self.class_weights is None:
            return valid.float()
        ids = resize_nearest(self.ids, size).long()
        void = ids == self.ignore_index
        weights = self.class_weights.float()[ids.masked_fill(void, 0)].masked_fill(void, 1)
        return weights.masked_fill(~valid, 0)

    def labelled(self) -> "LabelMaps":
        """The same for losses that compare with labels: pictures without any are void."""
        return self if self.seen is None else replace(self, seen=None)

    def class_masks(self, size: tuple[int, int]) -> Tensor:
        """One-hot label maps, nearest neighbours: boolean `[B, K, *size]`; no class where void."""
        classes = torch.arange(self.num_labels, device=self.ids.device)
        ids = resize_nearest(self.ids, size)
        return (ids[:, None] == classes[:, None, None]) & (ids != self.ignore_index)[:, None]


@dataclass(frozen=True, eq=False)
class Objects:
    """Targets of object detection and of instance segmentation.

    Attributes:
        boxes: of each of B pictures, xyxy pixels of the batch's images, `[N, 4]`.
        classes: class ids of these boxes, int64 `[N]`.
        size: height and width of the images.
        num_labels: number of classes K.
        pixel_mask: as in `Targets`.
        crowds: of each picture, boxes of groups that nobody has told apart, `[M, 4]`; void where no object is.
        masks: of each picture, the masks of its boxes, bits packed along the width, uint8 `[N, H, ceil(W / 8)]`.
        crowd_masks: those of its crowds, likewise.
    """

    boxes: Sequence[Tensor]
    classes: Sequence[Tensor]
    size: tuple[int, int]
    num_labels: int
    pixel_mask: Tensor | None = None
    crowds: Sequence[Tensor] = ()
    masks: Sequence[Tensor] | None = None
    crowd_masks: Sequence[Tensor] = ()

    def valid(self, size: tuple[int, int]) -> Tensor:
        """Positions inside a picture and outside of crowds: boolean `[B, *size]`."""
        ones = torch.ones(len(self.boxes), *size, dtype=torch.bool, device=self.boxes[0].device)
        valid = ones if self.pixel_mask is None else resize_nearest(self.pixel_mask, size)
        if not self.crowds:
            return valid
        crowds = self.inside(self.crowds, size) if self.masks is None else self.covered(self.crowd_masks, size)
        void, seen = (torch.stack([one.any(0) for one in some]) for some in (crowds, self.objects(size)))
        return valid & (seen | ~void)

    def weights(self, size: tuple[int, int]) -> Tensor:
        """1 where `valid`, else 0: float32 `[B, *size]`."""
        return self.valid(size).float()

    def class_masks(self, size: tuple[int, int]) -> Tensor:
        """Masks, or filled boxes, of each class: boolean `[B, K, *size]`; none where void."""
        masks = [
            torch.einsum("nhw,nk->khw", inside.float(), one_hot(classes, self.num_labels)) > 0
            for inside, classes in zip(self.objects(size), self.classes, strict=True)
        ]
        return torch.stack(masks) & self.valid(size)[:, None]

    def regions(self, size: tuple[int, int]) -> Tensor:
        """Which object is where: int64 `[B, *size]`, 1 + its index, the smallest on top; 0 where none is."""
        regions = []
        for boxes, inside in zip(self.boxes, self.objects(size), strict=True):
            areas = box_areas(boxes) if self.masks is None else inside.sum((1, 2))
            order = areas.argsort(descending=True, stable=True)
            rank = torch.arange(1, len(boxes) + 1, device=boxes.device)[:, None, None] * inside[order]
            top = rank.amax(0) if len(boxes) else rank.new_zeros(size)
            regions.append(torch.cat([order.new_zeros(1), order + 1])[top])
        return torch.stack(regions)

    def objects(self, size: tuple[int, int]) -> list[Tensor]:
        """Positions of a grid over the images that lie in each object's mask, or box: of each picture boolean `[N, *size]`."""
        return self.inside(self.boxes, size) if self.masks is None else self.covered(self.masks, size)

    def covered(self, masks: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Packed masks at a grid, nearest neighbours: of each picture boolean `[N, *size]`; no mask is unpacked whole."""
        (height, width), device = self.size, self.boxes[0].device
        rows, columns = nearest(height, size[0], device), nearest(width, size[1], device)
        return [((one[:, rows[:, None], columns // 8] >> (columns % 8).to(torch.uint8)) & 1).bool() for one in masks]

    def inside(self, boxes: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Positions of a grid over the images whose centres lie in a box: of each picture boolean `[N, *size]`."""
        grid = [
            (torch.arange(new, device=self.boxes[0].device) + 0.5) * (old / new)
            for old, new in zip(self.size, size, strict=True)
        ]
        masks = []
        for one in boxes:
            left, top, right, bottom = (side[:, None] for side in one.unbind(1))
            rows, columns = (grid[0] >= top) & (grid[0] < bottom), (grid[1] >= left) & (grid[1] < right)
            masks.append(rows[:, :, None] & columns[:, None, :])
        return masks


def one_hot(classes: Tensor, num_labels: int) -> Tensor:
    """Class ids `[N]` as rows of one 1, `[N, K]`; torch's own waits for the device."""
    return (classes[:, None] == torch.arange(num_labels, device=classes.device)).float()


def box_areas(boxes: Tensor) -> Tensor:
    """Areas `[...]` of xyxy boxes `[..., 4]`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def check_ids(ids: Tensor, num_labels: int, ignore_index: int, name: str) -> None:
    """Refuses class ids that are neither classes nor void; waits for the device.

    Raises:
        UserError: naming the ids, and `ignore_index` inside the classes.
    """
    check_ignore_index(ignore_index, num_labels)
    low, high = (int(value) for value in ids.aminmax()) if ids.numel() else (0, 0)
    if 0 <= low and high < num_labels:
        return
    found = ids.unique().tolist()
    wrong = [index for index in found if index != ignore_index and not 0 <= index < num_labels]
    if wrong:
        shown = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise UserError(
            f"{name} hold the ids [{shown}], which are neither one of the {num_labels} classes nor ignore_index="
            f"{ignore_index}. Give void pixels the id {ignore_index}."
        )


def check_ignore_index(ignore_index: int, num_labels: int) -> None:
    """Raises a `UserError` for an id of void pixels that is a class too."""
    if 0 <= ignore_index < num_labels:
        raise UserError(
            f"ignore_index {ignore_index} is one of the {num_labels} classes; choose a number beyond them."
        )


def resize_nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of an integer or boolean map `[B, H, W]` to `size`, its dtype kept."""
    if x.shape[-2:] == size:
        return x
    rows, columns = (nearest(old, new, x.device) for old, new in zip(x.shape[-2:], size, strict=True))
    return x[:, rows[:, None], columns]


def nearest(old: int, new: int, device: torch.device) -> Tensor:
    """Which of `old` positions along an axis is nearest to each of `new` ones: int64 `[new]`."""
    # integer arithmetic: exact for every id and mask, without a float copy
    return (2 * torch.arange(new, device=device) + 1) * old // (2 * new)
