"""Detectors of the DETR kind: DETR, Conditional, DAB and Deformable DETR, RT-DETR, D-FINE, DEIMv2."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.loss import loss_for_object_detection

from ..outputs import DenseOutput, FeatureSpec, Objects, Queries
from ..utils.distributed import is_distributed
from ..utils.messages import UserError
from .base import DenseAdapter, stage_specs, timm_stages
from .detection import DetectionAdapter, detr_labels, mask_labels, picture_sizes, tapped


logger = logging.getLogger(__name__)


class DetrAdapter(DetectionAdapter):
    """DETR: levels of the backbone's stages, the encoder's map as `p5`, queries of the last layer, or of all in training.

    Boxes are relative to the picture without its padding, as the model's are.
    """

    processor_class = "DetrImageProcessor"
    softmax = True

    @property
    def detector(self) -> Any:
        """The model without its heads."""
        return self.model.model

    @property
    def backbone(self) -> Any:
        """The model of the backbone, which may be a feature extractor of timm."""
        encoder = getattr(self.detector, "backbone", None) or self.detector.conv_encoder
        backbone = getattr(encoder, "conv_encoder", encoder).model
        return getattr(backbone, "_backbone", backbone)

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        if info := getattr(self.backbone, "feature_info", None):  # of all stages, whichever the detector reads
            stages = [stage for stage in info.info if stage["reduction"] > 2]
            return stage_specs([stage["num_chs"] for stage in stages], [stage["reduction"] for stage in stages])
        config = self.backbone.config
        widths = getattr(config, "stage_out_channels", None) or config.hidden_sizes
        return stage_specs(widths, [4 * 2**level for level in range(len(widths))])

    def stage_modules(self) -> Sequence[nn.Module]:
        if hasattr(self.backbone, "feature_info"):
            return timm_stages(self.backbone, self.backbone.feature_info.info)
        return list(self.backbone.encoder.stages)

    def freeze_unused(self) -> None:
        super().freeze_unused()
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            logger.warning(
                "The backbone of this %s is frozen, as transformers leaves a ResNet of its own in models of the DETR kind: losses "
                "of its features teach nothing. unfreeze_backbone() of its %s makes it learn.",
                type(self.model).__name__,
                type(self.detector).__name__,
            )

    def depths(self) -> dict[nn.Parameter, int]:
        inside = set(self.backbone.parameters())  # Deformable DETR's level embeddings come before it
        return {parameter: depth for parameter, depth in super().depths().items() if parameter in inside}

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        config = self.model.config
        width = getattr(config, "hidden_size", None) or config.d_model
        return {"p5": FeatureSpec(width, list(self.feature_specs.values())[-1].stride)}

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"features", "pyramid", "boxes", "classes", "queries"})

    def offers_with(self, teacher: DenseAdapter) -> frozenset[str]:
        offers = super().offers_with(teacher)
        alike = isinstance(teacher, DetrAdapter) and self.softmax == teacher.softmax
        return offers if alike else offers - {"queries", "corners"}

    def run(self, pixel_values: Tensor, targets: Objects | None, pixel_mask: Tensor | None = None) -> DenseOutput:  # type: ignore[override]
        labels = None if targets is None else self.labels(targets)
        mask = None if pixel_mask is None else pixel_mask.long()
        with counted_by_rank(), tapped(dict(zip(self.feature_specs, self.stage_modules(), strict=True))) as maps:
            outputs = self.model(pixel_values=pixel_values, pixel_mask=mask, labels=labels, output_hidden_states=True)
        output = DenseOutput(
            {name: maps[name] for name in self.feature_specs},
            None,
            pyramid=self.pyramid(outputs, (pixel_values.shape[-2], pixel_values.shape[-1])),
            queries=self.queries(outputs),
        )
        if targets is not None:
            output.task_losses["loss_task"] = self.task_loss(outputs, targets)
        return output

    def labels(self, targets: Objects) -> list[dict[str, Tensor]]:
        """Targets in the form of the model."""
        return detr_labels(targets, self.label_sizes(targets))

    def label_sizes(self, targets: Objects) -> Tensor:
        """What boxes in labels are relative to."""
        return picture_sizes(targets)

    def task_loss(self, outputs: Any, targets: Objects) -> Tensor:
        """The family's loss, whose divisors become means over ranks: the number of boxes, and weights of DETR's queries."""
        boxes = sum(map(len, targets.boxes))
        share = share_of_mean(boxes, 1, outputs.loss)
        if not self.softmax:
            return share * outputs.loss
        classes = torch.stack([loss for name, loss in outputs.loss_dict.items() if name.startswith("loss_ce")]).sum()
        nothing = self.model.config.eos_coefficient
        weights = nothing * outputs.logits[..., 0].numel() + (1 - nothing) * boxes
        return share_of_mean(weights, 0, outputs.loss) * classes + share * (outputs.loss - classes)

    def pyramid(self, outputs: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        """Maps of the encoder."""
        tokens, grids, start = outputs.encoder_last_hidden_state, {}, 0
        for name, (_, stride) in self.pyramid_specs.items():
            height, width = -(-size[0] // stride), -(-size[1] // stride)
            part = tokens[:, start : start + height * width]
            grids[name], start = part.transpose(1, 2).unflatten(2, (height, width)), start + height * width
        return grids

    def queries(self, outputs: Any) -> Queries:
        """Each layer's answers; the last one's where the model gives no others."""
        layers = [*(outputs.auxiliary_outputs or []), {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
        logits = torch.stack([layer["logits"] for layer in layers])
        return Queries(self.map_classes(logits), torch.stack([layer["pred_boxes"] for layer in layers]), self.softmax)


class DetrMaskAdapter(DetrAdapter):
    """DETR with masks (`DetrForSegmentation`), which overlap here; queries are compared by their boxes."""

    task = "instance-segmentation"
    finds_masks = True
    exported = ("logits", "pred_boxes", "pred_masks")

    @property
    def detector(self) -> Any:
        return self.model.detr.model

    def labels(self, targets: Objects) -> list[dict[str, Tensor]]:
        return mask_labels(targets, self.label_sizes(targets), self.model)


class ConditionalDetrAdapter(DetrAdapter):
    """Conditional and DAB-DETR: as DETR, but classes do not exclude each other."""

    processor_class = "ConditionalDetrImageProcessor"
    softmax = False


class DeformableDetrAdapter(ConditionalDetrAdapter):
    """Deformable DETR: four levels of the encoder, strides 8 to 64."""

    processor_class = "DeformableDetrImageProcessor"

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        if self.model.config.two_stage or self.model.config.num_feature_levels != 4:
            raise UserError(
                "this Deformable DETR has two stages, or not four levels; choose one as SenseTime/deformable-detr is."
            )
        return super().find_feature_specs()

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        return {f"p{level}": FeatureSpec(self.model.config.d_model, 2**level) for level in (3, 4, 5, 6)}


class RTDetrAdapter(DetrAdapter):
    """RT-DETR: squares without padding, denoising queries cut off.

    Two ranks equal one only without denoising queries, whose number follows from the batch and whose noise is random, and with norms that keep
    their statistics.
    """

    processor_class = "RTDetrImageProcessor"
    default_statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    softmax = False
    squares = True
    within_queries = True

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        width = self.model.config.encoder_hidden_dim
        strides = self.model.config.feat_strides
        return {f"p{stride.bit_length() - 1}": FeatureSpec(width, stride) for stride in strides}

    def label_sizes(self, targets: Objects) -> Tensor:
        height, width = targets.size
        return targets.boxes[0].new_tensor([width, height]).expand(len(targets.boxes), 2)

    def task_loss(self, outputs: Any, targets: Objects) -> Tensor:
        loss = super().task_loss(outputs, targets)
        # a batch without objects has no denoising queries, yet every rank must give each parameter a gradient
        embedding = getattr(self.model.model, "denoising_class_embed", None)
        return loss if embedding is None else loss + 0 * embedding.weight.sum()

    def pyramid(self, outputs: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        return dict(zip(self.pyramid_specs, outputs.encoder_last_hidden_state, strict=True))

    def queries(self, outputs: Any) -> Queries:
        start = outputs.denoising_meta_values["dn_num_split"][0] if outputs.denoising_meta_values else 0
        logits = outputs.intermediate_logits[:, :, start:].transpose(0, 1)
        boxes = outputs.intermediate_reference_points[:, :, start:].transpose(0, 1)
        return Queries(self.map_classes(logits), boxes, False)


class DFineAdapter(RTDetrAdapter):
    """D-FINE and DEIMv2: as RT-DETR, with distributions over the distances to each side."""

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {"corners"}

    @property
    def corner_scale(self) -> tuple[float, ...]:
        """What corners of two models must have in common to be compared."""
        config = self.model.config
        return float(config.max_num_bins), float(config.reg_scale), float(config.up)

    def offers_with(self, teacher: DenseAdapter) -> frozenset[str]:
        offers = super().offers_with(teacher)
        alike = isinstance(teacher, DFineAdapter) and teacher.corner_scale == self.corner_scale
        return offers if alike else offers - {"corners"}

    def queries(self, outputs: Any) -> Queries:
        start = outputs.denoising_meta_values["dn_num_split"][0] if outputs.denoising_meta_values else 0
        found = super().queries(outputs)
        found.corners = outputs.intermediate_predicted_corners[:, :, start:].transpose(0, 1)
        layers = outputs.intermediate_predicted_corners.shape[
            1
        ]  # in training, one more comes before the decoder's own
        found.class_logits, found.boxes = found.class_logits[-layers:], cast(Tensor, found.boxes)[-layers:]
        found.corner_scale = self.corner_scale
        return found


def share_of_mean(count: float, least: float, like: Tensor) -> Tensor | float:
    """A rank's count over the mean of all ranks' counts, where a loss has divided by the former; each at least `least`."""
    if not is_distributed():
        return 1.0
    mean = torch.tensor(float(count), device=like.device)
    dist.all_reduce(mean)
    return max(count, least) / (mean / dist.get_world_size()).clamp_min(least)


class _Alone:
    _shared_state: ClassVar[dict[str, Any]] = {}


@contextmanager
def counted_by_rank() -> Iterator[None]:
    """Lets losses of transformers divide by the boxes of their rank: they take a mean over ranks, and divide that by the ranks."""
    module: Any = loss_for_object_detection
    known = module.PartialState
    module.PartialState = _Alone
    try:
        yield
    finally:
        module.PartialState = known
