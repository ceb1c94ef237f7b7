"""Detectors on plain vision transformers: RF-DETR, also with masks, and YOLOS."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec, Objects, Queries
from .detection import mask_labels, replaced, tapped
from .detr import DetrAdapter, counted_by_rank


class RfDetrAdapter(DetrAdapter):
    """RF-DETR: levels are the token grids that its projector reads, all of a patch's stride, and `p4` is what it makes of them.

    They are named by depth, as those of `TokenAdapter`. In training the model has several groups of queries; a loss sees
    the first one, which is the only one that predicts.
    """

    processor_class = "RfDetrImageProcessor"
    softmax = False
    squares = True
    within_queries = True

    @property
    def backbone(self) -> Any:
        return self.detector.backbone.backbone

    @property
    def size_multiple(self) -> int:  # type: ignore[override]
        return self.backbone.config.patch_size * self.backbone.config.num_windows

    @property
    def unused_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        last, backbone = max(self.backbone.config.out_indices), "model.backbone.backbone"
        behind = range(last, self.backbone.config.num_hidden_layers)
        return (f"{backbone}.embeddings.mask_token", *(f"{backbone}.encoder.layer.{index}." for index in behind))

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        config = self.backbone.config
        spec = FeatureSpec(config.hidden_size, config.patch_size)
        return {f"stride_{4 * 2**index}": spec for index in range(len(config.out_indices))}

    def stage_modules(self) -> Sequence[nn.Module]:
        return list(self.backbone.encoder.layer)

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        return {"p4": FeatureSpec(self.model.config.d_model, self.backbone.config.patch_size)}

    def run(self, pixel_values: Tensor, targets: Objects | None, pixel_mask: Tensor | None = None) -> DenseOutput:  # type: ignore[override]
        labels = None if targets is None else self.labels(targets)
        with tapped({"backbone": self.backbone}) as found:
            outputs = self.model(pixel_values=pixel_values, labels=labels)
        maps: Any = found["backbone"]
        output = DenseOutput(
            dict(zip(self.feature_specs, maps.feature_maps, strict=True)),
            None,
            pyramid={"p4": outputs.backbone_features},
            queries=self.queries(outputs),
        )
        if targets is not None:  # whose divisor is a mean over ranks already
            output.task_losses["loss_task"] = outputs.loss
        return output

    def queries(self, outputs: Any) -> Queries:
        found, own = super().queries(outputs), self.model.config.num_queries
        return Queries(found.class_logits[:, :, :own], cast(Tensor, found.boxes)[:, :, :own], False)


class RfDetrMaskAdapter(RfDetrAdapter):
    """RF-DETR with masks: as without; queries are compared by their boxes.

    Masks are those of its processor, while `pipeline` wants their logits above 0.5 instead of 0: there they are smaller.
    """

    task = "instance-segmentation"
    finds_masks = True
    exported = ("logits", "pred_boxes", "pred_masks")

    @property
    def detector(self) -> Any:
        return self.model.model.model

    @property
    def unused_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"model.{name}" for name in super().unused_parameters)

    def labels(self, targets: Objects) -> list[dict[str, Tensor]]:
        return mask_labels(targets, self.label_sizes(targets), self.model)

    def run(self, pixel_values: Tensor, targets: Objects | None, pixel_mask: Tensor | None = None) -> DenseOutput:  # type: ignore[override]
        labels = None if targets is None else self.labels(targets)
        modules = {"backbone": self.backbone, "neck": self.detector.backbone}
        plain = self.model.loss_function

        def loss(*given: Any) -> Any:  # outside of autocast: dice sums over thousands of points
            with torch.autocast(pixel_values.device.type, enabled=False):
                return plain(*map(_in_float32, given))

        with tapped(modules) as found, replaced(self.model, "_loss_function", loss):
            outputs = self.model(pixel_values=pixel_values, labels=labels)
        maps: Any = found["backbone"]
        output = DenseOutput(
            dict(zip(self.feature_specs, maps.feature_maps, strict=True)),
            None,
            pyramid={"p4": found["neck"][0]},
            queries=self.queries(outputs),
        )
        if targets is not None:
            output.task_losses["loss_task"] = self.weighted(outputs.loss_dict) + 0 * outputs.pred_masks.sum()
        return output

    def weighted(self, losses: dict[str, Tensor]) -> Tensor:
        """The model's sum of its terms; without any object, terms of masks are no scalars there, and have no graph."""
        config = self.model.config
        weights = {
            "loss_ce": config.class_loss_coefficient,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
            "loss_mask_ce": config.mask_class_loss_coefficient,
            "loss_mask_dice": config.mask_dice_loss_coefficient,
        }
        terms = [
            weight * loss.sum()
            for term, weight in weights.items()
            for name, loss in losses.items()
            if name == term or (config.auxiliary_loss and name.startswith(f"{term}_"))
        ]
        return torch.stack(terms).sum()


def _in_float32(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_float32(one) for one in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class YolosAdapter(DetrAdapter):
    """YOLOS: levels are four token grids at equal distances, named by depth; no neck, and one answer of each token."""

    processor_class = "YolosImageProcessor"
    squares = True

    @property
    def backbone(self) -> Any:
        return self.model.vit

    @property
    def size_multiple(self) -> int:  # type: ignore[override]
        return self.model.config.patch_size

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        spec = FeatureSpec(self.model.config.hidden_size, self.model.config.patch_size)
        return {f"stride_{4 * 2**index}": spec for index in range(4)}

    def stage_modules(self) -> Sequence[nn.Module]:
        return list(self.backbone.encoder.layer)

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        return {}

    @property
    def offers(self) -> frozenset[str]:
        return super().offers - {"pyramid"}

    def run(self, pixel_values: Tensor, targets: Objects | None, pixel_mask: Tensor | None = None) -> DenseOutput:  # type: ignore[override]
        labels = None if targets is None else self.labels(targets)
        layers = self.stage_modules()
        ends = [layers[len(layers) * part // 4 - 1] for part in (1, 2, 3, 4)]
        with counted_by_rank(), tapped(dict(zip(self.feature_specs, ends, strict=True))) as tokens:
            outputs = self.model(pixel_values=pixel_values, labels=labels)
        height, width = (side // self.model.config.patch_size for side in pixel_values.shape[-2:])
        output = DenseOutput(
            {  # the class token comes first, detection tokens last
                name: tokens[name][:, 1 : 1 + height * width].transpose(1, 2).unflatten(2, (height, width))
                for name in self.feature_specs
            },
            None,
            queries=self.queries(outputs),
        )
        if targets is not None:
            output.task_losses["loss_task"] = self.task_loss(outputs, targets)
        return output
