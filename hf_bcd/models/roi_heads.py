"""Region proposals, box heads and mask heads of Mask R-CNN and Cascade Mask R-CNN, in mmdetection's layout and names.

What random samples of regions hold depends on the device's results, so training waits for an accelerator once an image in
the suppression of proposals, and once in each stage, to learn which regions are objects and at which level each is pooled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align
from transformers import initialization

from .configuration_timm_detection import TimmDetectionConfig
from .dense_heads import ConvModule, HeadConv2d, mean_over_ranks
from .detection_boxes import anchor_boxes, assign_max_iou, decode_deltas, draw, keep_best
from .regions import (
    clipped,
    delta_errors,
    image_numbers,
    mask_targets,
    random_keys,
    region_levels,
    sample_regions,
    solid,
)


# least overlap of an object, deviations of its box deltas, and weight in the loss (Cai and Vasconcelos, CVPR 2018)
STAGES = (
    (0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    (0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    (0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)
BOX_SIZE, MASK_SIZE = 7, 14
ANCHORS_PER_IMAGE, PROPOSAL_OVERLAP = 256, 0.7
# (region, class) pairs before suppression
PAIRS = 2000
NOTHING = -1e4


@dataclass
class RegionScores:
    """What the region proposal network says at the `A` anchors of all levels, ordered as `DenseHeadOutput`.

    Attributes:
        logits: whether an object is there, `[B, A]`.
        deltas: `[B, A, 4]`.
        anchors: xyxy in pixels of the tensor, `[A, 4]`.
        level_sizes: number of anchors of each level.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    level_sizes: tuple[int, ...]


class RegionLinear(nn.Linear):
    """Starts Xavier-uniform, or with the deviation `std`."""

    def __init__(self, in_features: int, out_features: int, std: float | None = None):
        super().__init__(in_features, out_features)
        self.std = std

    def init_weights(self) -> None:
        if self.std is None:
            initialization.xavier_uniform_(self.weight)
        else:
            initialization.normal_(self.weight, std=self.std)
        initialization.zeros_(self.bias)


class MaskConv2d(nn.Conv2d):
    """Starts as Kaiming He's, by the number of outputs."""

    def init_weights(self) -> None:
        initialization.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        initialization.zeros_(cast(Tensor, self.bias))


class MaskUpsample2d(nn.ConvTranspose2d):
    """Likewise."""

    init_weights = MaskConv2d.init_weights


class RPNHead(nn.Module):
    """Region proposal network (Ren et al., NeurIPS 2015): is there an object at each of three anchors a cell."""

    def __init__(self, config: TimmDetectionConfig):
        super().__init__()
        self.strides, self.scale = config.strides, config.anchor_scale
        self.rpn_conv = HeadConv2d(config.neck_channels, config.head_channels)
        self.rpn_cls = HeadConv2d(config.head_channels, 3, kernel_size=1)
        self.rpn_reg = HeadConv2d(config.head_channels, 3 * 4, kernel_size=1)

    def forward(self, levels: Sequence[Tensor]) -> RegionScores:
        """Scores for the levels of the pyramid."""
        logits, deltas, anchors = [], [], []
        for x, stride in zip(levels, self.strides, strict=True):
            anchors.append(anchor_boxes(x.shape[-2], x.shape[-1], stride, x.device, scale=self.scale, octave=1))
            x = F.relu(self.rpn_conv(x))
            logits.append(self.rpn_cls(x).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.rpn_reg(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
        sizes = tuple(len(of_level) for of_level in anchors)
        return RegionScores(
            torch.cat(logits, dim=1).float(), torch.cat(deltas, dim=1).float(), torch.cat(anchors), sizes
        )

    def loss(
        self, found: RegionScores, truths: Sequence[Tensor], sizes: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Cross-entropy and smooth L1 of a random sample of anchors inside the images, over their number.

        Args:
            found: scores for `B` images.
            truths: boxes of each image, `[N, 4]`.
            sizes: valid width, height, width, height of each image, `[B, 4]`.
            generator: what the sample is drawn by, on the CPU.
        """
        anchors, samples, targets = found.anchors, [], []
        for boxes, size in zip(truths, sizes, strict=True):
            inside = ((anchors[:, :2] >= 0) & (anchors[:, 2:] < size[2:])).all(dim=1)
            assigned = assign_max_iou(anchors, boxes, 0.7, 0.3, least=0.3, usable=inside)
            keys = random_keys(len(anchors), generator, anchors.device)
            sample = draw(assigned, keys, ANCHORS_PER_IMAGE, ANCHORS_PER_IMAGE // 2)
            samples.append(torch.stack([sample[0], *(x.long() for x in sample[1:])]))
            targets.append((boxes if len(boxes) else anchors[:1])[assigned[sample[0]].clamp_min(0)])
        index, positive, drawn = torch.stack(samples, dim=1)
        positive, drawn = positive.bool(), drawn.bool()
        number = mean_over_ranks(drawn.sum().float()).clamp_min(1)
        error = F.binary_cross_entropy_with_logits(
            found.logits.gather(1, index), positive.float(), reduction="none"
        ).masked_fill(~drawn, 0)
        deltas = found.deltas.gather(1, index[..., None].expand(-1, -1, 4))
        box_error = delta_errors(deltas, anchors[index], torch.stack(targets), positive, beta=1 / 9)
        return {"loss_rpn_cls": error.sum() / number, "loss_rpn_bbox": box_error / number}

    @torch.no_grad()
    def propose(self, found: RegionScores, sizes: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The best regions, `number` of each level and after suppression of all levels.

        Returns:
            Boxes `[B, P, 4]` inside the images, and which of them are regions, `[B, P]`: P is fixed by the shapes.
        """
        logits, rows, levels, start = [], [], [], 0
        for level, scores in enumerate(found.logits.split(list(found.level_sizes), dim=1)):
            best, index = scores.topk(min(number, scores.shape[1]), dim=1)
            logits.append(best)
            rows.append(index + start)
            levels.append(torch.full_like(index, level))
            start += scores.shape[1]
        row = torch.cat(rows, dim=1)
        deltas = found.deltas.gather(1, row[..., None].expand(-1, -1, 4))
        boxes = clipped(decode_deltas(found.anchors[row], deltas), sizes)
        scores = torch.cat(logits, dim=1).sigmoid().masked_fill(~solid(boxes), 0)
        scores = keep_best(boxes, scores, torch.cat(levels, dim=1), PROPOSAL_OVERLAP)
        scores, best = scores.topk(min(number, scores.shape[1]), dim=1)
        return boxes.gather(1, best[..., None].expand(-1, -1, 4)), scores > 0


class BoxHead(nn.Module):
    """Two fully connected layers that classify a region and say where its object is."""

    def __init__(self, config: TimmDetectionConfig, stds: Sequence[float], agnostic: bool):
        super().__init__()
        num_labels, width = cast(int, config.num_labels), config.fc_channels
        self.stds, self.agnostic = stds, agnostic
        inputs = config.neck_channels * BOX_SIZE**2
        self.shared_fcs = nn.ModuleList([RegionLinear(inputs, width), RegionLinear(width, width)])
        self.fc_cls = RegionLinear(width, num_labels + 1, std=0.01)
        self.fc_reg = RegionLinear(width, 4 * (1 if agnostic else num_labels), std=0.001)

    def forward(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores `[R, num_labels + 1]`, the last one of background, and deltas `[R, 1 or num_labels, 4]`.

        Args:
            x: pooled features `[R, C, 7, 7]`.
            order: row of `x` of each region, `[R]`.
        """
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        logits, deltas = (layer(x).float().index_select(0, order) for layer in (self.fc_cls, self.fc_reg))
        return logits, deltas.unflatten(1, (-1, 4))

    def of_class(self, deltas: Tensor, classes: Tensor) -> Tensor:
        """The deltas `[..., 4]` of a class `[...]`, of `[..., 1 or num_labels, 4]`."""
        if self.agnostic:
            return deltas.squeeze(-2)
        return deltas.gather(-2, classes[..., None, None].expand(*classes.shape, 1, 4)).squeeze(-2)

    def decode(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        """Where the objects of the regions `[..., 4]` are, `[..., 4]`."""
        return decode_deltas(boxes, deltas * self.deviations(boxes))

    def deviations(self, boxes: Tensor) -> Tensor:
        """Deviations of deltas, `[4]`; computed where the boxes are, since copying them there would wait."""
        return torch.where(torch.arange(4, device=boxes.device) < 2, self.stds[0], self.stds[2])


class MaskHead(nn.Module):
    """Convolutions and an upsampling by two: a mask of the region for each class (He et al., Mask R-CNN, ICCV 2017)."""

    def __init__(self, config: TimmDetectionConfig):
        super().__init__()
        width = config.head_channels
        widths = [config.neck_channels] + [width] * config.head_convs
        self.convs = nn.ModuleList(
            ConvModule(MaskConv2d(*pair, 3, padding=1)) for pair in zip(widths, widths[1:], strict=False)
        )
        self.upsample = MaskUpsample2d(width, width, 2, stride=2)
        self.conv_logits = MaskConv2d(width, cast(int, config.num_labels), 1)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Logits of the masks of one class each, `[R]`: `[R, 28, 28]` from pooled features `[R, C, 14, 14]`."""
        for conv in self.convs:
            x = F.relu(conv(x))
        x = F.relu(self.upsample(x))
        # a layer for all classes would compute 80 masks to look at one
        weight, bias = self.conv_logits.weight[classes].flatten(1), cast(Tensor, self.conv_logits.bias)[classes]
        mask = torch.bmm(weight[:, None], x.flatten(2)).view(len(x), *x.shape[-2:])
        return mask.float() + bias[:, None, None].float()


class RoIHead(nn.Module):
    """The box and mask heads of one stage, or of the three of a cascade, each of which starts from the boxes of the last.

    Args:
        config: the configuration.
        strides: of the levels that regions are pooled from.
    """

    def __init__(self, config: TimmDetectionConfig, strides: Sequence[int]):
        super().__init__()
        self.strides, self.number = list(strides), config.rois_per_image
        self.cascade = config.head == "cascade_mask_rcnn"
        # mmdetection's Mask R-CNN takes the absolute error
        self.beta = 1.0 if self.cascade else 0.0
        boxes = [BoxHead(config, stds, self.cascade) for _, stds, _ in (STAGES if self.cascade else STAGES[:1])]
        masks = [MaskHead(config) for _ in boxes]
        self.bbox_head: Any = nn.ModuleList(boxes) if self.cascade else boxes[0]
        self.mask_head: Any = nn.ModuleList(masks) if self.cascade else masks[0]

    def stages(self) -> Iterator[tuple[str, BoxHead, MaskHead, float, float]]:
        """Prefix of the loss's names, heads, least overlap of an object, and weight, of each stage."""
        heads = (self.bbox_head, self.mask_head) if self.cascade else ([self.bbox_head], [self.mask_head])
        for index, (box, mask, (overlap, _, weight)) in enumerate(zip(*heads, STAGES, strict=False)):
            yield (f"s{index}." if self.cascade else ""), box, mask, overlap, weight

    def loss(
        self,
        levels: Sequence[Tensor],
        boxes: Tensor,
        usable: Tensor,
        truths: Sequence[Tensor],
        classes: Sequence[Tensor],
        masks: Sequence[Tensor],
        sizes: Tensor,
        width: int,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Weighted terms of each stage: cross-entropy and box error over the regions, mask error over objects and pixels.

        Args:
            levels: of the pyramid, `[B, C, h, w]`.
            boxes: proposals `[B, P, 4]`.
            usable: which of them are any, `[B, P]`.
            truths: boxes of each image, `[N, 4]`.
            classes: their classes, `[N]`.
            masks: their masks, boolean or uint8 `[N, h, w]`, or packed `[N, h, ceil(width / 8)]`.
            sizes: valid width, height, width, height of each image, `[B, 4]`.
            width: of the batch's images.
            generator: what the samples are drawn by, on the CPU.
        """
        terms = {}
        for prefix, box_head, mask_head, overlap, weight in self.stages():
            regions = sample_regions(boxes, usable, truths, overlap, self.number, generator)
            boxes, flat = regions.boxes, regions.boxes.flatten(0, 1)
            image = image_numbers(boxes)
            # the only wait of a stage
            level, truth = torch.stack(
                [region_levels(flat, self.strides), regions.truth.masked_fill(~regions.positive, -1).flatten()]
            ).cpu()
            logits, deltas = box_head(*self.pool(levels, flat, image, level, BOX_SIZE))
            logits, deltas = logits.unflatten(0, boxes.shape[:2]), deltas.unflatten(0, boxes.shape[:2])

            own_class, own_box = [], []
            for labels, objects, index in zip(classes, truths, regions.truth, strict=True):
                # a stand-in keeps the arithmetic going where there is no truth; its terms are masked
                own_class.append(labels[index] if len(labels) else torch.zeros_like(index))
                own_box.append(objects[index] if len(labels) else boxes.new_zeros(len(index), 4))
            target = torch.stack(own_class)
            counts = torch.stack([regions.drawn.sum(), regions.positive.sum()]).float()
            number, objects = mean_over_ranks(counts).clamp_min(1)
            wanted = target.masked_fill(~regions.positive, logits.shape[-1] - 1)
            error = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
            own_deltas = box_head.of_class(deltas, target)
            box_error = delta_errors(
                own_deltas, boxes, torch.stack(own_box), regions.positive, self.beta, box_head.deviations(boxes)
            )

            rows = (truth >= 0).nonzero().flatten()
            chosen = rows.to(flat.device, non_blocking=True)
            pooled, order = self.pool(levels, flat[chosen], image[chosen], level[rows], MASK_SIZE)
            own = target.flatten()[chosen]
            # in the order of the features, which is by level
            shapes = mask_head(pooled, own[order.argsort()]).index_select(0, order)
            shape_targets = torch.cat(
                [
                    mask_targets(of_image, own_boxes, index, width, shapes.shape[-1])
                    for of_image, own_boxes, index in zip(masks, boxes, truth.view(boxes.shape[:2]), strict=True)
                ]
            )
            mask_error = F.binary_cross_entropy_with_logits(shapes, shape_targets, reduction="sum")
            terms[f"{prefix}loss_cls"] = weight * error.masked_fill(~regions.drawn, 0).sum() / number
            terms[f"{prefix}loss_bbox"] = weight * box_error / number
            terms[f"{prefix}loss_mask"] = weight * mask_error / (objects * shapes.shape[-1] ** 2)

            if self.cascade:
                boxes = clipped(box_head.decode(boxes, deltas.detach().squeeze(-2)), sizes)
                usable = regions.drawn & ~regions.added & solid(boxes)
        return terms

    def pool(
        self, levels: Sequence[Tensor], boxes: Tensor, image: Tensor, level: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """Features of regions, each from the level that suits its size.

        Args:
            levels: of the pyramid, `[B, C, h, w]`.
            boxes: `[R, 4]`.
            image: index of the image of each, `[R]`.
            level: index of the level of each, `[R]`, on the CPU.
            size: positions along each side.

        Returns:
            Features `[R, C, size, size]`, and the row of each region in them, `[R]`.
        """
        rois = torch.cat([image[:, None].float(), boxes], dim=1)
        if torch.compiler.is_exporting():  # shapes must not depend on values
            pooled: Any = 0
            for index, (x, stride) in enumerate(zip(levels, self.strides, strict=False)):
                of_level = roi_align(x, rois, size, 1 / stride, 0, aligned=True)
                pooled = pooled + of_level * (level == index)[:, None, None, None]
            return pooled, torch.arange(len(rois), device=rois.device)
        pooled, places = [], []
        for index, (x, stride) in enumerate(zip(levels, self.strides, strict=False)):
            rows = (level == index).nonzero().flatten()
            places.append(rows)
            # in float32, since half of it does not tell pixels apart
            one = roi_align(
                x.float(), rois[rows.to(rois.device, non_blocking=True)], size, 1 / stride, 0, aligned=True
            )
            pooled.append(one.to(x.dtype))
        return torch.cat(pooled), torch.cat(places).argsort().to(rois.device, non_blocking=True)

    def candidates(
        self, levels: Sequence[Tensor], boxes: Tensor, usable: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best (region, class) pairs: logits of their scores `[B, n]`, clipped boxes `[B, n, 4]` and classes `[B, n]`.

        Scores are the softmax of the mean of the stages' logits; each stage moves the boxes of the one before.
        """
        image, total, stages = image_numbers(boxes), None, list(self.stages())
        for index, (_, head, _, _, _) in enumerate(stages):
            flat = boxes.flatten(0, 1)
            level = on_host(region_levels(flat, self.strides))
            logits, deltas = (x.unflatten(0, boxes.shape[:2]) for x in head(*self.pool(levels, flat, image, level, 7)))
            total = logits if total is None else total + logits
            if index + 1 < len(stages):
                boxes = clipped(head.decode(boxes, deltas.squeeze(-2)), sizes)
        scores = (cast(Tensor, total) / len(stages)).softmax(dim=-1)[..., :-1].masked_fill(~usable[..., None], 0)
        num_labels = scores.shape[-1]
        best, index = scores.flatten(1).topk(min(PAIRS, scores[0].numel()), dim=1)
        row, classes = index.div(num_labels, rounding_mode="floor"), index % num_labels
        deltas = deltas.gather(1, row[..., None, None].expand(-1, -1, *deltas.shape[2:]))
        boxes = boxes.gather(1, row[..., None].expand(-1, -1, 4))
        boxes = clipped(head.decode(boxes, head.of_class(deltas, classes)), sizes)
        return best.logit().clamp(NOTHING, -NOTHING), boxes, classes

    def masks(self, levels: Sequence[Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Probabilities of the masks inside boxes `[B, K, 4]` of classes `[B, K]`, mean of the stages: `[B, K, 28, 28]`."""
        flat = boxes.flatten(0, 1)
        level = on_host(region_levels(flat, self.strides))
        pooled, order = self.pool(levels, flat, image_numbers(boxes), level, MASK_SIZE)
        own = classes.flatten()[order.argsort()]
        probabilities = [head(pooled, own).sigmoid() for _, _, head, _, _ in self.stages()]
        return torch.stack(probabilities).mean(dim=0)[order].unflatten(0, boxes.shape[:2])


def on_host(x: Tensor) -> Tensor:
    """On the CPU, unless the model is being exported."""
    return x if torch.compiler.is_exporting() else x.cpu()
