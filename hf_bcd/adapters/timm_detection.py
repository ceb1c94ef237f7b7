"""Our own detectors on timm backbones: RetinaNet and GFL, Mask R-CNN and Cascade Mask R-CNN."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..outputs import DenseHead, DenseOutput, FeatureSpec, Objects
from ..utils.distributed import rank_index
from ..utils.messages import UserError
from .base import DenseAdapter, stage_features, stage_specs, timm_stages
from .detection import DetectionAdapter, corners, detr_labels, picture_sizes


class TimmDetectionAdapter(DetectionAdapter):
    """Levels of the backbone, and `p3` to `p7` of the pyramid; raw outputs at every prior.

    The loss divides by counts of the positives of a batch, as a mean over ranks; accumulated batches each have their own.
    """

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        return stage_specs(self.model.feature_channels, self.model.feature_strides)

    def stage_modules(self) -> list[nn.Module]:
        return timm_stages(self.model.backbone)

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        config = self.model.config
        return {f"p{stride.bit_length() - 1}": FeatureSpec(config.neck_channels, stride) for stride in config.strides}

    @property
    def offers(self) -> frozenset[str]:
        distributions = {"distributions"} if self.model.config.head == "gfl" else set()
        return frozenset({"features", "pyramid", "boxes", "classes", "dense", "tower", *distributions})

    def offers_with(self, teacher: DenseAdapter) -> frozenset[str]:
        offers = super().offers_with(teacher)
        if not isinstance(teacher, TimmDetectionAdapter):
            return offers
        ours, theirs = self.model.config, teacher.model.config
        if (ours.head, ours.strides) != (theirs.head, theirs.strides):
            return offers - {"dense", "tower", "distributions"}
        if ours.reg_max != theirs.reg_max:
            offers -= {"distributions"}
        if (ours.head_convs, ours.head_channels) != (theirs.head_convs, theirs.head_channels):
            offers -= {"tower"}
        return offers

    def run(self, pixel_values: Tensor, targets: Objects | None, pixel_mask: Tensor | None = None) -> DenseOutput:  # type: ignore[override]
        labels = None if targets is None else detr_labels(targets, picture_sizes(targets))
        outputs = self.model(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            labels=labels,
            output_hidden_states=True,
            output_dense=True,
            output_detections=False,
        )
        return DenseOutput(
            stage_features(self.feature_specs, outputs.hidden_states),
            None,
            task_losses={} if targets is None else {"loss_task": outputs.loss},
            pyramid=dict(zip(self.pyramid_specs, outputs.pyramid, strict=True)),
            dense=None if outputs.dense is None else self._dense(outputs.dense),
        )

    def _dense(self, dense: Any) -> DenseHead:
        """The model's raw output in the form that losses read, in the classes that it was matched to."""
        found = DenseHead(
            self.map_classes(dense.class_logits),
            dense.box_outputs,
            dense.boxes,
            dense.priors,
            dense.strides,
            dense.level_sizes,
            dense.assigned,
            dense.tower,
        )
        return replace(found, cross=lambda tower: self._dense(dense.cross(tower)))


class TimmMaskAdapter(TimmDetectionAdapter):
    """Those with masks: levels of the backbone, and `p2` to `p6` of the pyramid; no outputs at priors.

    Which regions the loss is computed for is drawn at random, see `TimmDetectionModel.seed_sampling`.
    """

    task = "instance-segmentation"
    finds_masks = True
    processor_class = "RfDetrImageProcessor"
    exported = ("logits", "pred_boxes", "pred_masks")

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"features", "pyramid", "boxes", "classes", "final_boxes"})

    def begin_step(self, seed: int, step: int) -> None:
        self.model.seed_sampling(seed, step, rank_index())

    def run(self, pixel_values: Tensor, targets: Objects | None, pixel_mask: Tensor | None = None) -> DenseOutput:  # type: ignore[override]
        if targets is not None and targets.masks is None:
            raise UserError(
                f"{self.model.config.head} learns masks, but the data set has boxes only; train on one with masks, or "
                "choose the head retinanet or gfl."
            )
        output = super().run(pixel_values, targets, pixel_mask)
        size, pyramid = (pixel_values.shape[-2], pixel_values.shape[-1]), list(output.pyramid.values())
        empty = pixel_values.new_zeros(len(pixel_values), 0, 4, dtype=torch.float32)
        sizes = picture_sizes(Objects(list(empty), [], size, self.num_labels, pixel_mask)).repeat(1, 2)

        def final_boxes() -> tuple[Tensor, Tensor]:
            logits, boxes = self.model.detect_boxes(pyramid, None, sizes)
            return self.map_classes(logits), corners(boxes) * sizes[:, None]

        output.final_boxes = final_boxes
        return output
