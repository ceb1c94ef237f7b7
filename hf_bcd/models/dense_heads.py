"""Feature pyramid and dense heads of RetinaNet and GFL, in mmdetection's layout and under its names.

A head maps the pyramid's levels to class scores and box codes per prior (`DenseHeadOutput`), scores them against truths
and decodes them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from .configuration_timm_detection import TimmDetectionConfig
from .detection_boxes import (
    anchor_boxes,
    assign_atss,
    assign_max_iou,
    box_overlaps,
    decode_deltas,
    decode_distances,
    distribution_focal_loss,
    encode_deltas,
    expected_distances,
    focal_loss,
    quality_focal_loss,
    square_priors,
)


Towers = dict[str, list[Tensor]]
# a class score of 0.01 before training (Lin et al., ICCV 2017, Sec. 4.1)
PRIOR_BIAS = -math.log(99)


@dataclass
class DenseHeadOutput:
    """Raw outputs for the `A` priors of all levels: fine to coarse, in a level row by row, in a cell prior by prior.

    Attributes:
        class_logits: `[B, A, num_labels]`, sigmoid.
        box_outputs: deltas `[B, A, 4]`, or logits of the four sides' distributions `[B, A, 4 * (bins + 1)]`.
        priors: xyxy in pixels of the tensor, `[A, 4]`.
        strides: of the level of each prior, `[A]`.
        level_sizes: number of priors of each level.
        boxes: decodes all boxes when called, `[B, A, 4]` xyxy in pixels of the tensor, with their graph.
        tower: per level the maps `[B, C, h, w]` that the last convolution of the towers `"class"` and `"box"` reads,
            before their activation.
        cross: the head from such maps on: another network's outputs through this head's last layers.
        assigned: index of the truth that each prior is trained for, `[B, A]`, -1 background, -2 ignored; with labels only.
    """

    class_logits: Tensor
    box_outputs: Tensor
    priors: Tensor
    strides: Tensor
    level_sizes: tuple[int, ...]
    boxes: Callable[[], Tensor]
    tower: Towers
    cross: Callable[[Towers], "DenseHeadOutput"]
    assigned: Tensor | None = None


# transformers initialises a model with own code by its leaves, so each leaf must know how
class PyramidConv2d(nn.Conv2d):
    """Convolution that starts Xavier-uniform."""

    def init_weights(self) -> None:
        initialization.xavier_uniform_(self.weight)
        initialization.zeros_(cast(Tensor, self.bias))


class HeadConv2d(nn.Conv2d):
    """Convolution that keeps the size; starts with deviation 0.01 and with `start` as its bias."""

    def __init__(
        self, in_channels: int, out_channels: int, start: float = 0.0, bias: bool = True, kernel_size: int = 3
    ):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.start = start

    def init_weights(self) -> None:
        initialization.normal_(self.weight, std=0.01)
        if self.bias is not None:
            initialization.constant_(self.bias, self.start)


class Scale(nn.Module):
    """A learned factor, 1 at first."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def init_weights(self) -> None:
        initialization.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ConvModule(nn.Module):
    """A convolution, and a group norm where `norm_groups` is not 0; no activation."""

    def __init__(self, conv: nn.Conv2d, norm_groups: int = 0):
        super().__init__()
        self.conv = conv
        self.gn = nn.GroupNorm(norm_groups, conv.out_channels) if norm_groups else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.gn is None else self.gn(x)


class FPN(nn.Module):
    """Feature pyramid (Lin et al., CVPR 2017) with levels beyond the backbone's, each half of the one before.

    Args:
        in_channels: channels of the backbone's maps, fine to coarse.
        channels: channels of each level.
        extra: number of added levels.
        kind: how, see `TimmDetectionConfig.extra_levels`.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, extra: int, kind: str | None):
        super().__init__()
        self.on_input = on_input = kind == "on_input"
        self.pooled = extra if kind == "pooled" else 0
        self.lateral_convs = nn.ModuleList(ConvModule(PyramidConv2d(width, channels, 1)) for width in in_channels)
        self.fpn_convs = nn.ModuleList(
            ConvModule(PyramidConv2d(channels, channels, 3, padding=1)) for _ in in_channels
        )
        for index in range(extra - self.pooled):
            width = in_channels[-1] if on_input and index == 0 else channels
            self.fpn_convs.append(ConvModule(PyramidConv2d(width, channels, 3, stride=2, padding=1)))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The levels `[B, channels, h, w]`, fine to coarse."""
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for index in range(len(levels) - 1, 0, -1):
            finer = levels[index - 1]
            levels[index - 1] = finer + F.interpolate(levels[index], size=finer.shape[-2:], mode="nearest")
        levels = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)]
        for index, conv in enumerate(self.fpn_convs[len(maps) :]):
            levels.append(conv(maps[-1] if self.on_input and index == 0 else levels[-1]))
        for _ in range(self.pooled):
            levels.append(levels[-1][:, :, ::2, ::2])
        return levels


class DenseHead(nn.Module):
    """Two towers of convolutions that all levels share, and what reads them; a subclass says what the outputs mean."""

    priors_per_cell: int

    def __init__(self, config: TimmDetectionConfig, norm_groups: int):
        super().__init__()
        self.strides = tuple(config.strides)
        self.num_labels = cast(int, config.num_labels)
        widths = [config.neck_channels] + [config.head_channels] * config.head_convs
        pairs = list(zip(widths, widths[1:], strict=False))
        bias = not norm_groups
        self.cls_convs = nn.ModuleList(ConvModule(HeadConv2d(*pair, bias=bias), norm_groups) for pair in pairs)
        self.reg_convs = nn.ModuleList(ConvModule(HeadConv2d(*pair, bias=bias), norm_groups) for pair in pairs)

    def predict(self, level: int, class_map: Tensor, box_map: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores and box codes `[B, priors * outputs, h, w]` of a level from the last maps of the towers."""
        raise NotImplementedError

    def priors(self, height: int, width: int, stride: int, device: torch.device) -> Tensor:
        """The priors of a level, `[A, 4]`."""
        raise NotImplementedError

    def decode(self, box_outputs: Tensor, priors: Tensor, strides: Tensor) -> Tensor:
        """Boxes `[..., 4]` of priors `[..., 4]` with the strides `[...]`."""
        raise NotImplementedError

    def assign(self, priors: Tensor, level_sizes: Sequence[int], truths: Tensor) -> Tensor:
        """Index of a truth `[N, 4]`, background or ignored per prior, `[A]`."""
        raise NotImplementedError

    def losses(self, dense: DenseHeadOutput, classes: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Weighted terms of the loss, given the class `[B, A]` and box `[B, A, 4]` of the truth of each positive prior."""
        raise NotImplementedError

    def forward(self, levels: Sequence[Tensor]) -> DenseHeadOutput:
        """Outputs for the levels of the pyramid."""
        tower: Towers = {}
        for name, convs in (("class", self.cls_convs), ("box", self.reg_convs)):
            tower[name] = [self._before_last(convs, x) for x in levels]
        return self.from_tower(tower)

    @staticmethod
    def _before_last(convs: nn.ModuleList, x: Tensor) -> Tensor:
        for index, conv in enumerate(convs[:-1]):
            x = conv(x if index == 0 else F.relu(x))
        return x

    def from_tower(self, tower: Towers) -> DenseHeadOutput:
        """Outputs from the maps before the last convolution of the towers, see `DenseHeadOutput.tower`."""
        scores, codes, priors = [], [], []
        for level, (x, y) in enumerate(zip(tower["class"], tower["box"], strict=True)):
            last = (convs[-1](F.relu(z)) for convs, z in ((self.cls_convs, x), (self.reg_convs, y)))
            class_map, box_map = self.predict(level, *(F.relu(z) for z in last))
            count = x.shape[-2] * x.shape[-1] * self.priors_per_cell
            for outputs, maps in ((scores, class_map), (codes, box_map)):
                outputs.append(maps.permute(0, 2, 3, 1).reshape(len(maps), count, -1))
            priors.append(self.priors(x.shape[-2], x.shape[-1], self.strides[level], x.device))
        sizes = tuple(x.shape[1] for x in scores)
        strides = torch.cat([p.new_full((len(p),), s) for p, s in zip(priors, self.strides, strict=True)])
        box_outputs, all_priors = torch.cat(codes, dim=1), torch.cat(priors)
        return DenseHeadOutput(
            class_logits=torch.cat(scores, dim=1),
            box_outputs=box_outputs,
            priors=all_priors,
            strides=strides,
            level_sizes=sizes,
            boxes=lambda: self.decode(box_outputs.float(), all_priors, strides),
            tower=tower,
            cross=self.from_tower,
        )

    def loss(
        self, dense: DenseHeadOutput, truths: Sequence[Tensor], classes: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], DenseHeadOutput]:
        """Terms of the loss, and the outputs with `assigned`.

        Args:
            dense: outputs for `B` images.
            truths: boxes of each image, `[N, 4]` xyxy in pixels of the tensor.
            classes: their classes, `[N]`.
        """
        own_class, own_box, assigned = [], [], []
        for boxes, labels in zip(truths, classes, strict=True):
            index = self.assign(dense.priors, dense.level_sizes, boxes)
            assigned.append(index)
            # a stand-in for priors without truth keeps the arithmetic finite; its terms are masked
            boxes, labels = (boxes, labels) if len(boxes) else (dense.priors[:1], torch.zeros_like(index[:1]))
            own_class.append(labels[index.clamp_min(0)])
            own_box.append(boxes[index.clamp_min(0)])
        dense = replace(dense, assigned=torch.stack(assigned))
        return self.losses(dense, torch.stack(own_class), torch.stack(own_box)), dense


class RetinaHead(DenseHead):
    """RetinaNet (Lin et al., Focal Loss for Dense Object Detection, ICCV 2017): nine anchors a cell, box deltas."""

    priors_per_cell = 9

    def __init__(self, config: TimmDetectionConfig):
        super().__init__(config, norm_groups=0)
        self.retina_cls = HeadConv2d(config.head_channels, 9 * self.num_labels, start=PRIOR_BIAS)
        self.retina_reg = HeadConv2d(config.head_channels, 9 * 4)

    def predict(self, level: int, class_map: Tensor, box_map: Tensor) -> tuple[Tensor, Tensor]:
        return self.retina_cls(class_map), self.retina_reg(box_map)

    def priors(self, height: int, width: int, stride: int, device: torch.device) -> Tensor:
        return anchor_boxes(height, width, stride, device)

    def decode(self, box_outputs: Tensor, priors: Tensor, strides: Tensor) -> Tensor:
        return decode_deltas(priors, box_outputs)

    def assign(self, priors: Tensor, level_sizes: Sequence[int], truths: Tensor) -> Tensor:
        return assign_max_iou(priors, truths)

    def losses(self, dense: DenseHeadOutput, classes: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Focal loss of the classes and L1 of the deltas, over the number of positives."""
        assigned = cast(Tensor, dense.assigned)
        positive = assigned >= 0
        number = mean_over_ranks(positive.sum().float()).clamp_min(1)
        error = (dense.box_outputs.float() - encode_deltas(dense.priors, targets)).abs().sum(dim=-1)
        # -2 is the only other value that is neither positive nor background
        focal = focal_loss(dense.class_logits.float(), classes, positive, counted=assigned >= -1)
        return {"loss_cls": focal / number, "loss_bbox": error.masked_fill(~positive, 0).sum() / number}


class GFLHead(DenseHead):
    """Generalized focal loss (Li et al., NeurIPS 2020): one prior a cell, distributions of the distances to the sides."""

    priors_per_cell = 1

    def __init__(self, config: TimmDetectionConfig):
        super().__init__(config, norm_groups=config.norm_groups)
        self.bins = config.reg_max
        self.gfl_cls = HeadConv2d(config.head_channels, self.num_labels, start=PRIOR_BIAS)
        self.gfl_reg = HeadConv2d(config.head_channels, 4 * (self.bins + 1))
        self.scales = nn.ModuleList(Scale() for _ in config.strides)

    def predict(self, level: int, class_map: Tensor, box_map: Tensor) -> tuple[Tensor, Tensor]:
        return self.gfl_cls(class_map), self.scales[level](self.gfl_reg(box_map))

    def priors(self, height: int, width: int, stride: int, device: torch.device) -> Tensor:
        return square_priors(height, width, stride, device)

    def decode(self, box_outputs: Tensor, priors: Tensor, strides: Tensor) -> Tensor:
        distances = expected_distances(self.distributions(box_outputs)) * strides[..., None]
        return decode_distances((priors[..., :2] + priors[..., 2:]) / 2, distances)

    def distributions(self, box_outputs: Tensor) -> Tensor:
        """Log-probabilities of the distances to the four sides, `[..., 4, bins + 1]`."""
        return box_outputs.unflatten(-1, (4, self.bins + 1)).log_softmax(dim=-1)

    def assign(self, priors: Tensor, level_sizes: Sequence[int], truths: Tensor) -> Tensor:
        return assign_atss(priors, level_sizes, truths)

    def losses(self, dense: DenseHeadOutput, classes: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Quality focal loss over the number of positives; GIoU x 2 and distribution focal loss x 0.25 over their confidence."""
        positive = cast(Tensor, dense.assigned) >= 0
        logits = dense.class_logits.float()
        # in units of strides
        centres = (dense.priors[:, :2] + dense.priors[:, 2:]) / 2 / dense.strides[:, None]
        targets = targets / dense.strides[:, None]
        distributions = self.distributions(dense.box_outputs.float())
        iou, giou = box_overlaps(decode_distances(centres, expected_distances(distributions)), targets)
        weight = logits.detach().amax(dim=-1).sigmoid().masked_fill(~positive, 0)
        number, total = mean_over_ranks(torch.stack([positive.sum().float(), weight.sum()])).clamp_min(1)

        distances = torch.cat([centres - targets[..., :2], targets[..., 2:] - centres], dim=-1)
        dfl = distribution_focal_loss(distributions, distances.clamp(0, self.bins - 0.1)).mean(dim=-1)
        qfl = quality_focal_loss(logits, classes, iou.detach(), positive)
        return {
            "loss_cls": qfl / number,
            "loss_bbox": 2 * (weight * (1 - giou)).sum() / total,
            "loss_dfl": 0.25 * (weight * dfl).sum() / total,
        }


HEADS: dict[str, Any] = {"retinanet": RetinaHead, "gfl": GFLHead}


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of `x` over the processes that train together; no gradient."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x
