"""Object detection and instance segmentation on a timm backbone, as a model of transformers."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
)
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_timm_detection import TimmDetectionConfig
from .dense_heads import FPN, HEADS, DenseHeadOutput, HeadConv2d, PyramidConv2d, Scale
from .detection_boxes import keep_best
from .regions import clipped, paste_masks, solid
from .roi_heads import MaskConv2d, MaskUpsample2d, RegionLinear, RegionScores, RoIHead, RPNHead
from .timm_backbone import TimmBackboneModel


# candidates of a level before suppression, as mmdetection
CANDIDATES = 1000
# sigmoid is exactly 0 in float32
NOTHING = -1e4
# of the logits of masks: pipeline("image-segmentation") compares them with 0.5, its image processor with 0. A factor of 20
# would let one pixel in a hundred on an outline lie between the two, which small masks cannot afford
MASK_SCALE = 1_000_000
# keeps what lies between two positions near the mean of their probabilities
LEAST_PROBABILITY = 0.02
OWN_LAYERS = (PyramidConv2d, HeadConv2d, Scale, RegionLinear, MaskConv2d, MaskUpsample2d)
# whose `from_pretrained` finds a model with masks; pipeline("image-segmentation") tries the last two
MASK_AUTO_CLASSES = (
    "AutoModelForObjectDetection",
    "AutoModelForInstanceSegmentation",
    "AutoModelForImageSegmentation",
    "AutoModelForSemanticSegmentation",
)


@dataclass
class TimmDetectionOutput(ModelOutput):
    """Output in DETR's form, so that the image processors of transformers post-process it.

    Attributes:
        loss: sum of `loss_dict`, with labels.
        loss_dict: weighted terms `loss_cls`, `loss_bbox` and, for GFL, `loss_dfl`; with masks `loss_mask`, `loss_rpn_cls` and
            `loss_rpn_bbox`, and in a cascade `s0.loss_cls` and so on.
        logits: `[B, max_detections, num_labels]` after suppression: the score's logit at the class of
            the box, -1e4 elsewhere and in rows without detection; best first.
        pred_boxes: `[B, max_detections, 4]` cxcywh relative to each image's own size, without padding.
        pred_masks: `[B, max_detections, ceil(H / mask_stride), ceil(W / mask_stride)]` over each image's own size, without
            padding: a million times the logits, so that thresholds of 0 and 0.5 are the same.
        hidden_states: maps of the backbone, fine to coarse, if asked for.
        pyramid: levels of the feature pyramid, likewise.
        dense: outputs of a head without masks per prior, if asked for.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    pyramid: tuple[Tensor, ...] | None = None
    dense: DenseHeadOutput | None = None


class TimmDetectionModel(TimmBackboneModel):
    """Any timm backbone that gives feature maps, a feature pyramid, and a head: that of RetinaNet or GFL, or those
    of Mask R-CNN or Cascade Mask R-CNN.

    Building the model from a configuration, and `from_pretrained` on a folder, never touch the network;
    `from_backbone` starts from ImageNet weights. Several processes divide their losses by the mean of their counts.

    Args:
        config: the configuration.

    Raises:
        ValueError: the backbone cannot be built so, lacks a map that the pyramid needs, or cannot be frozen so.
    """

    config_class = TimmDetectionConfig
    config: TimmDetectionConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    # the loss is not scaled by `num_items_in_batch`, as Trainer would assume from the further arguments of `forward`
    accepts_loss_kwargs = False

    def __init__(self, config: TimmDetectionConfig):
        super().__init__(config)
        self.add_backbone(output_stride=32)
        channels = dict(zip(self.nominal_strides, self.feature_channels, strict=True))
        self.backbone_levels = [stride for stride in config.strides if stride <= 32]
        if not self.backbone_levels or any(stride not in channels for stride in self.backbone_levels):
            raise ValueError(
                f"strides {config.strides} need feature maps of the strides {self.backbone_levels or 'up to 32'}, but "
                f"backbone {config.backbone!r} has the strides {self.nominal_strides}; choose others, or another backbone"
            )
        self.neck = FPN(
            [channels[stride] for stride in self.backbone_levels],
            config.neck_channels,
            extra=len(config.strides) - len(self.backbone_levels),
            kind=config.extra_levels,
        )
        if config.has_masks:
            self.rpn_head = RPNHead(config)
            self.roi_head = RoIHead(config, self.backbone_levels)
        else:
            self.bbox_head = HEADS[config.head](config)
        self.seed_sampling(0)
        self.frozen = self._frozen_modules()
        self.post_init()
        self.train(self.training)

    def _frozen_modules(self) -> list[str]:
        """Names of the backbone's modules up to the last frozen stage."""
        stages = self.config.frozen_stages
        if not stages:
            return []
        stride, names = 2 * 2**stages, [name for name, _ in self.backbone.named_modules() if name]
        if stride in self.nominal_strides:
            last = self.backbone.feature_info.module_name()[self.nominal_strides.index(stride)]
            # feature extractors of timm flatten `stages.0` to `stages_0`
            for stage in (last, last.replace(".", "_")):
                inside = [i for i, name in enumerate(names) if name == stage or name.startswith(f"{stage}.")]
                if inside:
                    return [name for name in names[: inside[-1] + 1] if not stage.startswith(f"{name}.")]
        raise ValueError(
            f"frozen_stages={stages} is not possible: backbone {self.config.backbone!r} with the strides "
            f"{self.nominal_strides} names no stage of stride {stride}; use 0"
        )

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; frozen stages, and with `norm_eval` all batch norms of the backbone, stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            module = self.backbone.get_submodule(name)
            module.training = False
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        if self.config.norm_eval:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False
        return self

    def seed_sampling(self, seed: int, step: int = 0, rank: int = 0) -> None:
        """Sets what the random regions of the losses from now on are drawn by, and by how many there were since.

        Called before each step, equal arguments give equal regions in every forward pass of the step, so that a resumed
        run draws what an uninterrupted one does.
        """
        self.sampling, self.draws = (seed, step, rank), 0

    def _generator(self) -> torch.Generator:
        key = hashlib.sha256(repr((*self.sampling, self.draws)).encode()).digest()
        self.draws += 1
        return torch.Generator().manual_seed(int.from_bytes(key[:7]))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_dense: bool | None = None,
        output_detections: bool | None = None,
        **kwargs: Any,
    ) -> TimmDetectionOutput:
        """Detections in evaluation mode, the loss with labels, and what distillation reads if asked for.

        Args:
            pixel_values: normalised images `[B, 3, H, W]`, any size; multiples of 32 waste nothing.
            pixel_mask: nonzero on the pixels of the image, `[B, H, W]`, 0 on padding, which lies right and below.
            labels: per image `class_labels` `[N]` and `boxes` `[N, 4]` cxcywh relative to its own size, without padding;
                for a head with masks also `masks`, boolean or uint8 `[N, H, W]`, or their bits packed along the width, uint8
                `[N, H, ceil(W / 8)]`.
            output_hidden_states: return the backbone's maps and the pyramid.
            output_dense: return the head's outputs per prior, if it has no masks.
            output_detections: return `logits`, `pred_boxes` and `pred_masks`; by default in evaluation mode. A teacher does without,
                for suppression waits for the device.
            kwargs: `return_dict=False` for a tuple; others are ignored, as in the models of transformers.

        Raises:
            ValueError: there are not as many labels as images, or masks as boxes.
        """
        if labels is not None and len(labels) != len(pixel_values):
            raise ValueError(f"{len(labels)} labels for {len(pixel_values)} images; give one dict of boxes per image")
        if pixel_mask is not None:
            # exactly 0 after normalisation, as mmdetection pads
            pixel_values = pixel_values * pixel_mask[:, None].to(pixel_values.dtype)
        sizes = valid_sizes(pixel_values, pixel_mask)
        maps = self.feature_maps(pixel_values)
        chosen = [maps[self.nominal_strides.index(stride)] for stride in self.backbone_levels]
        pyramid = self.neck(chosen)
        has_masks = self.config.has_masks
        if output_detections is None:
            output_detections = not self.training
        dense: Any = None if has_masks else self.bbox_head(pyramid)
        regions: Any = self.rpn_head(pyramid) if has_masks and (output_detections or labels is not None) else None

        loss_dict = loss = logits = pred_boxes = pred_masks = None
        if labels is not None:
            truths = [corners(label["boxes"].float()) * size for label, size in zip(labels, sizes, strict=True)]
            classes = [label["class_labels"].long() for label in labels]
            if has_masks:
                masks = masks_of(labels)
                loss_dict = self._region_loss(pyramid, regions, truths, classes, masks, sizes, pixel_values.shape[-1])
            else:
                loss_dict, dense = self.bbox_head.loss(dense, truths, classes)
            loss = torch.stack(list(loss_dict.values())).sum()
        if output_detections and has_masks:
            height, width = (-(-side // self.config.mask_stride) for side in pixel_values.shape[-2:])
            logits, pred_boxes, pred_masks = self.detect_masks(pyramid, regions, sizes, (height, width))
        elif output_detections:
            logits, pred_boxes = self.detect(dense, sizes)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return TimmDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_boxes=pred_boxes,
            pred_masks=pred_masks,
            hidden_states=tuple(maps) if output_hidden_states else None,
            pyramid=tuple(pyramid) if output_hidden_states else None,
            dense=dense if output_dense else None,
        )

    def _region_loss(
        self,
        pyramid: Sequence[Tensor],
        regions: Any,
        truths: Sequence[Tensor],
        classes: Sequence[Tensor],
        masks: Sequence[Tensor],
        sizes: Tensor,
        width: int,
    ) -> dict[str, Tensor]:
        generator = self._generator()
        terms = self.rpn_head.loss(regions, truths, sizes, generator)
        boxes, usable = self.rpn_head.propose(regions, sizes, 2 * self.config.proposals)
        return terms | self.roi_head.loss(pyramid, boxes, usable, truths, classes, masks, sizes, width, generator)

    @torch.no_grad()
    def detect(self, dense: DenseHeadOutput, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` and `pred_boxes` of the output. Every shape but that of the suppression is fixed, for export.

        Args:
            dense: outputs for `B` images.
            sizes: valid width, height, width, height of each image, `[B, 4]`.
        """
        return self._best(*self._candidates(dense, sizes), sizes)

    @torch.no_grad()
    def detect_boxes(
        self, pyramid: Sequence[Tensor], regions: RegionScores | None, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`logits` and `pred_boxes` of a model with masks, which are not computed; by default from its own `regions`."""
        scored: Any = self.rpn_head(pyramid) if regions is None else regions
        boxes, usable = self.rpn_head.propose(scored, sizes, self.config.proposals)
        return self._best(*self.roi_head.candidates(pyramid, boxes, usable, sizes), sizes)

    @torch.no_grad()
    def detect_masks(
        self, pyramid: Sequence[Tensor], regions: RegionScores, sizes: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`logits`, `pred_boxes` and `pred_masks` of the output, the masks in `size`; see `detect`."""
        logits, pred_boxes = self.detect_boxes(pyramid, regions, sizes)
        relative = corners(pred_boxes)
        masks = self.roi_head.masks(pyramid, relative * sizes[:, None], logits.argmax(dim=-1))
        masks = paste_masks(masks, relative, size).clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        return logits, pred_boxes, MASK_SCALE * masks.logit()

    def _best(self, logits: Tensor, boxes: Tensor, classes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` and `pred_boxes` of the output, from candidates `[B, n]`, `[B, n, 4]` and `[B, n]`."""
        scores = logits.sigmoid()
        scores = scores.masked_fill(~((scores > self.config.score_threshold) & solid(boxes)), 0)
        missing = self.config.max_detections - scores.shape[1]
        if missing > 0:
            scores, logits, classes = (F.pad(x, (0, missing)) for x in (scores, logits, classes))
            boxes = F.pad(boxes, (0, 0, 0, missing))
        scores = keep_best(boxes, scores, classes, cast(float, self.config.nms_threshold))
        scores, best = scores.topk(self.config.max_detections, dim=1)

        found = scores > 0
        rows = logits.gather(1, best).masked_fill(~found, NOTHING)
        out = rows.new_full((*rows.shape, cast(int, self.config.num_labels)), NOTHING)
        out = out.scatter(2, classes.gather(1, best)[..., None], rows[..., None])
        x0, y0, x1, y1 = (boxes.gather(1, best[..., None].expand(-1, -1, 4)) / sizes[:, None]).unbind(-1)
        centred = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
        return out, centred.masked_fill(~found[..., None], 0)

    def _candidates(self, dense: DenseHeadOutput, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best (prior, class) pairs of each level: logits `[B, n]`, clipped boxes `[B, n, 4]` and classes `[B, n]`."""
        num_labels = dense.class_logits.shape[-1]
        logits, priors, classes, start = [], [], [], 0
        for level in dense.class_logits.float().split(list(dense.level_sizes), dim=1):
            # the best pairs lie in as many priors at most: two small searches are faster than one of millions
            rows = level.amax(dim=-1).topk(min(CANDIDATES, level.shape[1]), dim=1).indices
            pairs = level.gather(1, rows[..., None].expand(-1, -1, num_labels)).flatten(1)
            best, index = pairs.topk(min(CANDIDATES, pairs.shape[1]), dim=1)
            logits.append(best)
            priors.append(rows.gather(1, index.div(num_labels, rounding_mode="floor")) + start)
            classes.append(index % num_labels)
            start += level.shape[1]
        prior = torch.cat(priors, dim=1)
        width = dense.box_outputs.shape[-1]
        codes = dense.box_outputs.float().gather(1, prior[..., None].expand(-1, -1, width))
        boxes = self.bbox_head.decode(codes, dense.priors[prior], dense.strides[prior])
        return torch.cat(logits, dim=1), clipped(boxes, sizes), torch.cat(classes, dim=1)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' initialisers do not touch what was loaded from a checkpoint
        if isinstance(module, OWN_LAYERS):
            module.init_weights()
        elif not isinstance(module, nn.Conv2d):
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Saves as transformers does; a model with masks for the Auto classes of instance segmentation too."""
        if self.config.has_masks:
            own = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            config: Any = self.config
            config.auto_map = (getattr(config, "auto_map", None) or {}) | dict.fromkeys(MASK_AUTO_CLASSES, own)
        super().save_pretrained(save_directory, **kwargs)


def masks_of(labels: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The masks of labels.

    Raises:
        ValueError: an image has none, or not as many as boxes.
    """
    for index, label in enumerate(labels):
        masks = label.get("masks")
        if masks is None or len(masks) != len(label["boxes"]):
            found = "no masks" if masks is None else f"{len(masks)} masks"
            raise ValueError(
                f"labels of image {index} have {found} for {len(label['boxes'])} boxes; give one for each"
            )
    return [label["masks"] for label in labels]


def valid_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Width, height, width, height of each image without its padding, `[B, 4]`."""
    if pixel_mask is None:
        height, width = (
            pixel_values.new_full((len(pixel_values),), n, dtype=torch.float32) for n in pixel_values.shape[-2:]
        )
    else:
        height, width = (pixel_mask.bool().any(dim=axis).sum(dim=1) for axis in (2, 1))
    return torch.stack([width, height, width, height], dim=1).float()


def corners(boxes: Tensor) -> Tensor:
    """Boxes cxcywh as xyxy."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


# lets the pipelines know the class; here, not in the package, so that remote code does so too
names: Any
for names in (MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES):
    names.setdefault(TimmDetectionConfig.model_type, TimmDetectionModel.__name__)
