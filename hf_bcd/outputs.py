"""Models and ground truth as the rest of the package sees them: named feature levels, class scores, targets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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
        logits: per-pixel class scores `[B, num_labels, h, w]` at any stride.
        task_losses: supervised losses by name, weighted as the family's authors do; none without targets.
        head: the model's own head as a function of its levels, `{level: [B, C, h, w]}` -> scores in the classes of
            `logits`, where a frozen teacher offers one: gradients reach only the levels.
    """

    features: dict[str, Tensor]
    logits: Tensor
    task_losses: dict[str, Tensor] = field(default_factory=dict)
    head: Callable[[dict[str, Tensor]], Tensor] | None = None


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

    def valid(self, size: tuple[int, int]) -> Tensor:
        """Which positions of a grid over the images count: boolean `[B, h, w]`, False where void or padded."""
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
        num_valid: number of valid pixels by which task losses divide, a scalar; by default of `ids`. Ranks and
            accumulated batches with unequal void shares give the gradient of one large batch if all divide by the same.

    Raises:
        UserError: on the CPU, if an id is neither a class nor `ignore_index`.
    """

    ids: Tensor
    num_labels: int
    ignore_index: int = IGNORE_INDEX
    num_valid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.device.type == "cpu":  # elsewhere looking would wait for the device
            check_ids(self.ids, self.num_labels, self.ignore_index, "label maps")

    @property
    def size(self) -> tuple[int, int]:
        return self.ids.shape[-2], self.ids.shape[-1]

    def valid(self, size: tuple[int, int]) -> Tensor:
        """Positions that are not void, nearest neighbours: boolean `[B, *size]`."""
        return resize_nearest(self.ids != self.ignore_index, size)

    def class_masks(self, size: tuple[int, int]) -> Tensor:
        """One-hot label maps, nearest neighbours: boolean `[B, K, *size]`; no class where void."""
        classes = torch.arange(self.num_labels, device=self.ids.device)
        ids = resize_nearest(self.ids, size)
        return (ids[:, None] == classes[:, None, None]) & (ids != self.ignore_index)[:, None]


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
    # integer arithmetic: exact for every id and mask, without a float copy
    rows, columns = (
        (2 * torch.arange(new, device=x.device) + 1) * old // (2 * new)
        for old, new in zip(x.shape[-2:], size, strict=True)
    )
    return x[:, rows[:, None], columns]
