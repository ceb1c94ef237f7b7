"""Mask2Former (`Mask2FormerForUniversalSegmentation`) as a model of semantic segmentation."""

from typing import Any

import torch
from torch import Tensor

from ..outputs import IGNORE_INDEX, DenseOutput, FeatureSpec, LabelMaps
from ..utils.messages import UserError
from .base import DenseAdapter, stage_features
from .upernet import backbone_feature_specs


class Mask2FormerAdapter(DenseAdapter):
    """Levels are the maps of the backbone; logits are per-pixel log-scores at the stride of the masks, 4.

    With targets, the model's own set-prediction loss stands in `task_losses["loss_task"]`, its auxiliary terms and
    weights included.
    """

    processor_class = "Mask2FormerImageProcessor"
    unused_parameters = ("model.pixel_level_module.encoder.swin.layernorm.",)

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        return backbone_feature_specs(self.model.model.pixel_level_module.encoder)

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        outputs = self.model(pixel_values, output_hidden_states=True, output_auxiliary_logits=True)
        logits = semantic_logits(outputs.class_queries_logits, outputs.masks_queries_logits)
        features = stage_features(self.feature_specs, outputs.encoder_hidden_states)
        task_losses = {} if targets is None else {"loss_task": self.set_prediction_loss(outputs, targets.ids.long())}
        return DenseOutput(features, logits, task_losses=task_losses)

    def set_prediction_loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """The model's matched class, mask and dice losses against label maps `[B, H, W]`, weighted and summed."""
        mask_labels, class_labels = query_labels(labels, self.num_labels)
        # float32: the matcher hands its costs to NumPy, which knows no bfloat16, and dice sums over thousands of points
        with torch.autocast(labels.device.type, enabled=False):
            layers = outputs.auxiliary_logits
            losses = self.model.get_loss_dict(
                masks_queries_logits=outputs.masks_queries_logits.float(),
                class_queries_logits=outputs.class_queries_logits.float(),
                mask_labels=mask_labels,
                class_labels=class_labels,
                auxiliary_predictions=[{name: scores.float() for name, scores in one.items()} for one in layers],
            )
            return self.model.get_loss(losses)

    def processor_options(self, shortest_edge: int | None) -> dict[str, Any]:
        # size_divisor would stretch the image to a multiple of 32, which the model does not need
        own = {"size_divisor": 1, "ignore_index": IGNORE_INDEX, "num_labels": self.num_labels}
        return super().processor_options(shortest_edge) | own


def semantic_logits(class_queries_logits: Tensor, masks_queries_logits: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Logarithm of Mask2Former's semantic scores, whose softmax over classes is the scores' share per pixel.

    A class scores the sum over queries of its probability times the mask's, the "no object" class left out (Cheng et
    al. 2022, Masked-attention Mask Transformer, semantic inference of MaskFormer). `epsilon` keeps the logarithm and
    its gradient finite where no query claims a class; it does not change the order of classes.

    Args:
        class_queries_logits: `[B, Q, num_labels + 1]`, "no object" last.
        masks_queries_logits: `[B, Q, h, w]`.

    Returns:
        `[B, num_labels, h, w]`, float32, from log(epsilon) upwards.
    """
    with torch.autocast(class_queries_logits.device.type, enabled=False):
        classes = class_queries_logits.float().softmax(-1)[..., :-1]
        masks = masks_queries_logits.float().sigmoid()
        return torch.einsum("bqc,bqhw->bchw", classes, masks).add(epsilon).log()


def query_labels(labels: Tensor, num_labels: int) -> tuple[list[Tensor], list[Tensor]]:
    """Splits label maps into one binary mask for each class present, as Mask2Former's loss wants them.

    Ignored pixels (255) lie in no mask: they count as outside of each, as in the reference implementation.

    Args:
        labels: `[B, H, W]` class ids.

    Returns:
        For each image, masks `[N, H, W]` of 0 and 1 in float32, and class ids `[N]`.

    Raises:
        UserError: if a label is neither a class nor 255.
    """
    mask_labels, class_labels = [], []
    for index, label in enumerate(labels):
        classes = label.unique()
        classes = classes[classes != IGNORE_INDEX]
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < num_labels:
            raise UserError(
                f"labels[{index}] holds classes {classes.tolist()}, but the model has {num_labels} labels; "
                f"use 0..{num_labels - 1} and {IGNORE_INDEX} for pixels to ignore"
            )
        mask_labels.append((label == classes[:, None, None]).float())
        class_labels.append(classes)
    return mask_labels, class_labels
