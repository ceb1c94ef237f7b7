"""The frozen teacher: a model as a source of constants, in the student's classes where it has them."""

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseHead, DenseOutput, FeatureSpec, Objects, resize_nearest
from ..utils.masks import decode, pack
from .base import DenseAdapter


logger = logging.getLogger(__name__)

SURE = 0.5  # score from which an object counts that a teacher finds


class FrozenTeacher(nn.Module):
    """An adapted model as a source of constants: never trained, never in training mode, in its own precision.

    Images are resized bilinearly to a size that suits the teacher (its `fixed_size`, else the next multiple of its
    `size_multiple`), so its maps may lie on another grid than the student's; both span the whole image. Outputs are
    float32 and outside of autograd. Keep the teacher outside of any module that is wrapped, trained or saved.

    Args:
        adapter: adapted teacher; its parameters are frozen in place, and its logits get the student's classes if it has
            all of them.
        student_id2label: label names of the student, by class id.
        dtype: precision of the teacher's autocast, such as `torch.bfloat16`; `None` computes in the precision of its
            parameters. The parameters themselves are not converted, and an outer autocast does not reach the teacher.
        image_size: height and width to which images are resized, instead of the family's rule.
        label_synonyms: the teacher's names for the student's classes, see `match_labels`.

    Attributes:
        label_map: which of the teacher's classes stand for each class of the student; None of a teacher of features only.
    """

    def __init__(
        self,
        adapter: DenseAdapter,
        student_id2label: dict[int, str],
        dtype: torch.dtype | None = None,
        image_size: tuple[int, int] | None = None,
        label_synonyms: Mapping[str, Sequence[str]] | None = None,
    ):
        super().__init__()
        self.adapter = adapter.requires_grad_(False).eval()
        self.dtype = dtype
        self.image_size = image_size
        self.label_map = adapter.match(student_id2label, label_synonyms) if adapter.predicts else None
        if self.label_map is None:
            logger.info("the teacher has no classes: it teaches features only")
            return
        if "number" in self.label_map.rules.values():
            logger.warning(
                "The labels of teacher or student have no names (LABEL_0, ...). Class i of the teacher is taken for class "
                "i of the student; set id2label of both models to match them by name."
            )
        logger.info(self.label_map.report())

    @property
    def shares_labels(self) -> bool:
        """Whether logits have the student's classes in the student's order; else they have the teacher's own."""
        return self.label_map is not None and self.label_map.is_complete

    @property
    def feature_specs(self) -> dict[str, FeatureSpec]:
        """Levels of the teacher; strides count pixels of the resized image."""
        return self.adapter.feature_specs

    @property
    def num_labels(self) -> int:
        return self.adapter.num_labels

    @property
    def fingerprint(self) -> int:
        """A checksum of its last weights; tells this teacher from others."""
        weights = next(weight for weight in reversed(list(self.parameters())) if weight.ndim > 1)
        return zlib.crc32(weights.detach().float().cpu().numpy().tobytes())

    def train(self, mode: bool = True) -> "FrozenTeacher":  # it stays in evaluation mode, whatever is asked
        return super().train(False)

    def resize(self, pixel_values: Tensor) -> Tensor:
        """Resizes RGB images `[B, 3, H, W]` to the teacher's size; float32 with values 0..255 where it differs."""
        given = (pixel_values.shape[-2], pixel_values.shape[-1])
        size = self.image_size or self.adapter.size_as_teacher(given)
        if size == given:
            return pixel_values
        return F.interpolate(pixel_values.float(), size, mode="bilinear", align_corners=False, antialias=True)

    def _precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None)

    # not inference_mode: its tensors could not be saved for the student's backward pass without a copy
    @torch.no_grad()
    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> DenseOutput:
        """What the teacher makes of RGB images `[B, 3, H, W]`, uint8 or float, values 0..255.

        `pixel_mask` tells which pixels belong to a picture, see `Targets`.
        """
        resized = self.resize(pixel_values)
        size = (resized.shape[-2], resized.shape[-1])
        mask = None if pixel_mask is None else resize_nearest(pixel_mask, size)
        with self._precision(pixel_values.device):
            output = self.adapter(resized, pixel_mask=mask)
        return replace(
            output,
            features={name: level.float() for name, level in output.features.items()},
            pyramid={name: level.float() for name, level in output.pyramid.items()},
            logits=None if output.logits is None else output.logits.float(),
            dense=None if output.dense is None else in_float32(output.dense),
            queries=None if output.queries is None else in_float32(output.queries),
            head=self.head if self.adapter.head_levels else None,
        )

    def for_batch(self, batch: Mapping[str, Any], pixel_mask: Tensor | None = None) -> DenseOutput:
        """The output for a training batch."""
        return self(batch["pixel_values"], pixel_mask)

    def answers(self, pixel_values: Tensor) -> Objects | None:
        """The objects with a score of at least a half that a teacher finds in images `[B, 3, H, W]`, as targets.

        None if it finds no masks of objects.
        """
        if not self.adapter.finds_masks:
            return None
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        with self._precision(pixel_values.device):
            found: Any = self.adapter.predict(self.resize(pixel_values), [size] * len(pixel_values))
        boxes, classes, masks = [], [], []
        for one in found:
            sure = (one["scores"] >= SURE).nonzero()[:, 0]
            boxes.append(one["boxes"][sure])
            classes.append(one["labels"][sure])
            packed = [pack(torch.from_numpy(decode(one["masks"][place]))) for place in sure.tolist()]
            none = torch.zeros(0, size[0], -(-size[1] // 8), dtype=torch.uint8)
            masks.append((torch.stack(packed) if packed else none).to(pixel_values.device))
        return Objects(boxes, classes, size, self.adapter.num_labels, masks=masks)

    def head(self, features: dict[str, Tensor]) -> Tensor:
        """Class scores of the head on maps `{level: [B, C, h, w]}`, as `logits` are; gradients reach only these maps."""
        with self._precision(next(iter(features.values())).device):
            return self.adapter.head(features).float()


def in_float32(part: Any) -> Any:
    """Raw output of a detector (`DenseHead` or `Queries`), whatever its precision."""
    tensors = {name: x.float() for name, x in vars(part).items() if isinstance(x, Tensor) and x.is_floating_point()}
    if isinstance(part, DenseHead):
        tensors |= {"tower": {name: [x.float() for x in maps] for name, maps in part.tower.items()}}
    return replace(part, **tensors)
