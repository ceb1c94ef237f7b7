"""Mask2Former (`Mask2FormerForUniversalSegmentation`) as a model of semantic segmentation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..losses.ops.boxes import mean_over_ranks
from ..outputs import IGNORE_INDEX, DenseOutput, FeatureSpec, LabelMaps
from ..utils.messages import UserError
from .base import DenseAdapter, stage_features
from .detection import replaced
from .detr import share_of_mean
from .upernet import backbone_feature_specs


Layer = tuple[Tensor, Tensor]  # class logits `[B, Q, C + 1]` and mask logits `[B, Q, h, w]`


class Mask2FormerAdapter(DenseAdapter):
    """Levels are the maps of the backbone; logits are per-pixel log-scores at the stride of the masks, 4.

    With targets, the model's own set-prediction loss stands in `task_losses["loss_task"]`, its auxiliary terms and
    weights included.
    """

    processor_class = "Mask2FormerImageProcessor"
    weighs_classes = False
    unused_parameters = ("model.pixel_level_module.encoder.swin.layernorm.",)

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        return backbone_feature_specs(self.model.model.pixel_level_module.encoder)

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        outputs = self.model(pixel_values, output_hidden_states=True, output_auxiliary_logits=True)
        logits = semantic_logits(outputs.class_queries_logits, outputs.masks_queries_logits)
        features = stage_features(self.feature_specs, outputs.encoder_hidden_states)
        task_losses = {}
        if targets is not None:
            chosen = labelled_pictures(targets)
            task_losses["loss_task"] = self.set_prediction_loss(outputs, targets.ids.long(), chosen)
        return DenseOutput(features, logits, task_losses=task_losses)

    def set_prediction_loss(self, outputs: Any, labels: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The model's matched class, mask and dice losses against label maps `[B, H, W]`, weighted and summed.

        Of the pictures `chosen`, boolean `[B]`; a connected 0 of none.
        """
        layers = layers_of(outputs)
        if chosen is not None:
            if not chosen.any():
                return torch.stack([0 * part.float().sum() for layer in layers for part in layer]).sum()
            layers, labels = [(classes[chosen], masks[chosen]) for classes, masks in layers], labels[chosen]
        *earlier, last = layers
        return matched_loss(self.model, [last, *earlier], *query_labels(labels, self.num_labels))

    def processor_options(self, shortest_edge: int | None) -> dict[str, Any]:
        # size_divisor would stretch the image to a multiple of 32, which the model does not need
        own = {"size_divisor": 1, "ignore_index": IGNORE_INDEX, "num_labels": self.num_labels}
        return super().processor_options(shortest_edge) | own


def labelled_pictures(targets: LabelMaps) -> Tensor | None:
    """Which pictures have labels, boolean `[B]`; None where all have. The others would be learned to hold no object."""
    if targets.seen is None:
        return None
    return ~(targets.seen & (targets.ids == targets.ignore_index)).flatten(1).any(dim=1)


def layers_of(outputs: Any) -> list[Layer]:
    """What each layer of a MaskFormer answers, the last one last."""
    earlier = [(one["class_queries_logits"], one["masks_queries_logits"]) for one in outputs.auxiliary_logits or ()]
    return [*earlier, (outputs.class_queries_logits, outputs.masks_queries_logits)]


def matched_loss(model: Any, layers: Sequence[Layer], masks: list[Tensor], classes: list[Tensor]) -> Tensor:
    """The matched class, mask and dice losses of a Mask2Former, or a model of its kind, weighted and summed over layers.

    Their divisors become means over ranks: the number of masks, by which the families' code divides once too often, and the
    weights of all queries.

    Args:
        model: has the criterion and its weights.
        layers: what each answers, in the order in which the family's loss visits them, which decides about its random points.
        masks: true ones of each picture, float `[N, H, W]`.
        classes: their classes, `[N]`.
    """
    logits, nothing = layers[0][0], model.config.no_object_weight
    found = sum(min(len(one), logits.shape[1]) for one in classes)
    share = share_of_mean(nothing * logits[..., 0].numel() + (1 - nothing) * found, 0, logits)
    number = mean_over_ranks(torch.tensor(float(sum(map(len, classes))), device=logits.device))
    terms = []
    # float32: the matcher hands its costs to NumPy, which knows no bfloat16, and dice sums over thousands of points
    with (
        torch.autocast(logits.device.type, enabled=False),
        replaced(model.criterion, "get_num_masks", lambda *_, **__: number),
    ):
        for class_logits, mask_logits in layers:
            losses = model.get_loss_dict(mask_logits.float(), class_logits.float(), masks, classes, None)
            terms += [(share if "cross_entropy" in name else 1) * loss for name, loss in losses.items()]
    return torch.stack(terms).sum()


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
