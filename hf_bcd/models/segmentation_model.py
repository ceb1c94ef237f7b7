"""Loss and output of a segmentation model in transformers' form, for models that state their maps and class scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple


# Zhao et al., PSPNet, Sec. 5.2
AUXILIARY_LOSS_WEIGHT = 0.4


@dataclass
class SegmentationOutput(SemanticSegmenterOutput):
    """Transformers' output, with `auxiliary_logits` `[B, num_labels, h, w]` of a head that training alone has."""

    auxiliary_logits: Tensor | None = None


class SegmentationModel(PreTrainedModel):
    """A subclass computes its maps and class scores in `score`."""

    main_input_name = "pixel_values"
    input_modalities = "image"
    # `forward` takes further arguments but does not scale its loss by `num_items_in_batch`, as Trainer would assume
    accepts_loss_kwargs = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # lets pipeline("image-segmentation") know the class; here, not in the package, so that remote code does so too
        names: Any = MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
        config_class: Any = cls.config_class
        names.setdefault(config_class.model_type, cls.__name__)

    def score(self, pixel_values: Tensor) -> tuple[Sequence[Tensor], Tensor, Tensor | None]:
        """Feature maps from fine to coarse, logits, and auxiliary logits in training mode where there is such a head."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SegmentationOutput:
        """Class scores per pixel.

        Args:
            pixel_values: normalised images `[B, 3, H, W]`, any size.
            labels: class per pixel `[B, H, W]`. The loss is the mean cross-entropy of the logits brought to that size,
                plus 0.4 times that of auxiliary logits; ignored pixels do not count.
            output_hidden_states: return the feature maps, `[B, C, h, w]` each.
            kwargs: `return_dict=False` for a tuple; others are ignored, as in the models of transformers.

        Returns:
            Logits `[B, num_labels, h, w]` at the stride of the head; the loss and the maps if asked for.

        Raises:
            ValueError: the labels are not of shape `[B, H, W]`.
        """
        maps, logits, auxiliary_logits = self.score(pixel_values)
        loss = None if labels is None else self._cross_entropy(logits, labels)
        if labels is not None and auxiliary_logits is not None:
            loss = loss + AUXILIARY_LOSS_WEIGHT * self._cross_entropy(auxiliary_logits, labels)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states: Any = tuple(maps) if output_hidden_states else None
        return SegmentationOutput(
            loss=loss, logits=logits, hidden_states=hidden_states, auxiliary_logits=auxiliary_logits
        )

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Any:
        if labels.ndim != 3 or len(labels) != len(logits):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, expected ({len(logits)}, height, width); "
                "give one class index per pixel and no channel axis"
            )
        ignore_index = self.config.semantic_loss_ignore_index
        logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
        # a batch without any labelled pixel gives 0, not NaN
        return total / (labels != ignore_index).sum().clamp_min(1)
