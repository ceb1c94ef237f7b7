"""Detectors of the DETR kind: DETR, Conditional, DAB and Deformable DETR, RT-DETR, D-FINE, DEIMv2."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec, Objects, Queries
from ..utils.distributed import is_distributed
from ..utils.messages import UserError
from .base import DenseAdapter, stage_specs, timm_stages
from .detection import DetectionAdapter, detr_labels, picture_sizes, tapped


class DetrAdapter(DetectionAdapter):
    """DETR: levels of the backbone's stages, the encoder's map as `p5`, queries of the last layer, or of all in training.

    Boxes are relative to the picture without its padding, as the model's are.
    """

    processor_class = "DetrImageProcessor"
    softmax = True
    pyramid_levels: ClassVar[Mapping[str, int]] = {"p5": 32}

    @property
    def backbone(self) -> Any:
        """The model of the backbone."""
        encoder = getattr(self.model.model, "backbone", None) or self.model.model.conv_encoder
        return getattr(encoder, "conv_encoder", encoder).model

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        config = self.backbone.config
        if config.model_type == "timm_backbone":
            info = self.backbone._backbone.feature_info
            specs = stage_specs(info.channels(), info.reduction())
        else:
            widths = getattr(config, "stage_out_channels", None) or config.hidden_sizes
            specs = stage_specs(widths, [4 * 2**level for level in range(len(widths))])
        return specs

    def stage_modules(self) -> Sequence[nn.Module]:
        if self.backbone.config.model_type == "timm_backbone":
            return timm_stages(self.backbone._backbone)
        return list(self.backbone.encoder.stages)

    def depths(self) -> dict[nn.Parameter, int]:
        inside = set(self.backbone.parameters())  # Deformable DETR's level embeddings come before it
        return {parameter: depth for parameter, depth in super().depths().items() if parameter in inside}

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        return {name: FeatureSpec(self.model.config.d_model, stride) for name, stride in self.pyramid_levels.items()}

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"features", "pyramid", "boxes", "classes", "queries"})

    def offers_with(self, teacher: DenseAdapter) -> frozenset[str]:
        offers = super().offers_with(teacher)
        alike = isinstance(teacher, DetrAdapter) and self.softmax == teacher.softmax
        return offers if alike else offers - {"queries", "corners"}

    def run(self, pixel_values: Tensor, targets: Objects | None, pixel_mask: Tensor | None = None) -> DenseOutput:  # type: ignore[override]
        labels = None if targets is None else detr_labels(targets, self.label_sizes(targets))
        mask = None if pixel_mask is None else pixel_mask.long()
        levels = (
            dict(zip(self.feature_specs, self.backbone.encoder.stages, strict=True))
            if hasattr(self.backbone, "encoder")
            else {}
        )
        with tapped(levels or {"all": self.backbone._backbone}) as stages:
            outputs = self.model(pixel_values=pixel_values, pixel_mask=mask, labels=labels, output_hidden_states=True)
        maps = dict(zip(self.feature_specs, stages["all"], strict=True)) if "all" in stages else stages
        output = DenseOutput(
            {name: maps[name] for name in self.feature_specs},
            None,
            pyramid=self.pyramid(outputs, (pixel_values.shape[-2], pixel_values.shape[-1])),
            queries=self.queries(outputs),
        )
        if targets is not None:
            output.task_losses["loss_task"] = self.task_loss(outputs, targets)
        return output

    def label_sizes(self, targets: Objects) -> Tensor:
        """What boxes in labels are relative to."""
        return picture_sizes(targets)

    def task_loss(self, outputs: Any, targets: Objects) -> Tensor:
        """The family's loss, which divides by the number of boxes, as a mean over ranks."""
        return outputs.loss

    def pyramid(self, outputs: Any, size: tuple[int, int]) -> dict[str, Tensor]:
        """Maps of the encoder."""
        tokens, grids, start = outputs.encoder_last_hidden_state, {}, 0
        for name, stride in self.pyramid_levels.items():
            height, width = -(-size[0] // stride), -(-size[1] // stride)
            part = tokens[:, start : start + height * width]
            grids[name], start = part.transpose(1, 2).unflatten(2, (height, width)), start + height * width
        return grids

    def queries(self, outputs: Any) -> Queries:
        """Each layer's answers; the last one's where the model gives no others."""
        layers = [*(outputs.auxiliary_outputs or []), {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
        logits = torch.stack([layer["logits"] for layer in layers])
        return Queries(self.map_classes(logits), torch.stack([layer["pred_boxes"] for layer in layers]), self.softmax)


class ConditionalDetrAdapter(DetrAdapter):
    """Conditional and DAB-DETR: as DETR, but classes do not exclude each other."""

    processor_class = "ConditionalDetrImageProcessor"
    softmax = False

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        width = getattr(self.model.config, "hidden_size", None) or self.model.config.d_model
        return {"p5": FeatureSpec(width, 32)}


class DeformableDetrAdapter(ConditionalDetrAdapter):
    """Deformable DETR: four levels of the encoder, strides 8 to 64."""

    processor_class = "DeformableDetrImageProcessor"
    pyramid_levels = {"p3": 8, "p4": 16, "p5": 32, "p6": 64}

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        if self.model.config.two_stage or self.model.config.num_feature_levels != 4:
            raise UserError(
                "this Deformable DETR has two stages, or not four levels; choose one as SenseTime/deformable-detr is."
            )
        return super().find_feature_specs()

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        return {name: FeatureSpec(self.model.config.d_model, stride) for name, stride in self.pyramid_levels.items()}


class RTDetrAdapter(DetrAdapter):
    """RT-DETR: squares without padding, denoising queries cut off.

    The model's loss divides by the boxes of its own rank; here it is brought to their mean over ranks. Two ranks equal one
    only without denoising queries, whose number follows from the batch and whose noise is random, and with norms that keep
    their statistics.
    """

    processor_class = "RTDetrImageProcessor"
    default_statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    softmax = False
    squares = True
    within_queries = True
    pyramid_levels = {"p3": 8, "p4": 16, "p5": 32}

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        width = self.model.config.encoder_hidden_dim
        strides = self.model.config.feat_strides
        return {f"p{stride.bit_length() - 1}": FeatureSpec(width, stride) for stride in strides}

    def label_sizes(self, targets: Objects) -> Tensor:
        height, width = targets.size
        return targets.boxes[0].new_tensor([width, height]).expand(len(targets.boxes), 2)

    def task_loss(self, outputs: Any, targets: Objects) -> Tensor:
        loss, count = outputs.loss, max(1, sum(map(len, targets.boxes)))
        if is_distributed():
            total = torch.tensor(float(count), device=loss.device)
            dist.all_reduce(total)
            loss = loss * count / (total / dist.get_world_size())
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
        layers = len(found.corners)  # in training, one more comes before the decoder's own
        found.class_logits, found.boxes = found.class_logits[-layers:], found.boxes[-layers:]
        found.corner_scale = self.corner_scale
        return found
