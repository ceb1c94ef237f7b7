"""Configuration of `TimmDetectionModel`."""

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from .timm_backbone import complete_backbone_fields


DENSE_HEADS = ("retinanet", "gfl")
ROI_HEADS = ("mask_rcnn", "cascade_mask_rcnn")
HEAD_NAMES = (*DENSE_HEADS, *ROI_HEADS)
EXTRA_LEVELS = ("on_input", "on_output", "pooled")
# of `ROI_HEADS` only, all of them numbers from 1 on
MASK_FIELDS = ("fc_channels", "anchor_scale", "proposals", "rois_per_image", "mask_stride")


class TimmDetectionConfig(PreTrainedConfig):
    """Configuration of an object detector on a timm backbone, with a mask of each object for the heads of `ROI_HEADS`.

    Creating a configuration reads timm's registry only: it builds nothing and makes no network call.

    Args:
        backbone: architecture name in timm, with or without a tag (`"resnet50"`, `"convnext_tiny.fb_in22k"`).
        backbone_kwargs: further arguments of `timm.create_model`, as JSON values: `{"drop_path_rate": 0.4}`.
        head: `"retinanet"` or `"gfl"`; `"mask_rcnn"` or `"cascade_mask_rcnn"` for masks too.
        neck_channels: channels of the feature pyramid.
        head_channels: channels of the towers of the head, or of the convolutions of region proposals and masks.
        head_convs: convolutions in each tower, at least 2, or those before a mask.
        norm_groups: groups of the group norms in GFL's towers.
        strides: input pixels per position of each pyramid level, each twice the one before. Those of the backbone's maps
            are taken from there (32 is its last), coarser ones are added. By default 4 to 64 with masks, else 8 to 128.
        extra_levels: how levels are added: by convolutions of stride 2, the first of them `"on_input"`, the backbone's last
            map, as mmdetection's RetinaNet, or `"on_output"`, the pyramid's, as its GFL; or `"pooled"`, every second
            position of the level before, as its Mask R-CNN. By default that of the head.
        reg_max: largest distance from a centre to a side of its box that GFL can express, in strides.
        fc_channels: width of the two fully connected layers that classify a region.
        anchor_scale: side of the anchors of region proposals, in strides.
        proposals: region proposals of an image; twice as many in training.
        rois_per_image: regions of an image that the box heads are trained on, a quarter of them objects at most.
        mask_stride: image pixels per position of `pred_masks`.
        frozen_stages: stages of the backbone that are not trained; 1 is the stem and the stage of stride 4, as
            mmdetection freezes a ResNet with ImageNet weights.
        norm_eval: batch norms of the backbone keep their running statistics in training.
        score_threshold: detections with at most this score are dropped.
        nms_threshold: overlap (IoU) above which the lower of two boxes of a class is dropped; by default 0.6 for
            `gfl` and 0.5 for others.
        max_detections: number of boxes per image in the output.
        image_mean: mean per RGB channel of images in [0, 1] that the backbone expects; by default timm's value.
        image_std: standard deviation, likewise.
        kwargs: the common fields, `num_labels` or `id2label` and `label2id` among them.

    Raises:
        ValueError: a value is not among the possible ones.
    """

    model_type = "timm_detection"

    backbone: str = "resnet50"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    head: str = "gfl"
    neck_channels: int = 256
    head_channels: int = 256
    head_convs: int = 4
    norm_groups: int = 32
    strides: list[int] = field(default_factory=list)
    extra_levels: str | None = None
    reg_max: int = 16
    fc_channels: int = 1024
    anchor_scale: int = 8
    proposals: int = 1000
    rois_per_image: int = 512
    mask_stride: int = 4
    frozen_stages: int = 0
    norm_eval: bool = False
    score_threshold: float = 0.05
    nms_threshold: float | None = None
    max_detections: int = 100
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    def __post_init__(self, **kwargs):
        if self.head not in HEAD_NAMES:
            raise ValueError(f"head {self.head!r} is unknown; choose one of {HEAD_NAMES}")
        if self.extra_levels is None:
            own = {"retinanet": "on_input", "gfl": "on_output"}
            self.extra_levels = own.get(self.head, "pooled")
        if self.extra_levels not in EXTRA_LEVELS:
            raise ValueError(f"extra_levels {self.extra_levels!r} is unknown; choose one of {EXTRA_LEVELS}")
        if self.nms_threshold is None:
            self.nms_threshold = 0.6 if self.head == "gfl" else 0.5
        self.strides = list(self.strides) or [(4 if self.has_masks else 8) * 2**level for level in range(5)]
        if len(self.strides) < 2 or any(b != 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False)):
            raise ValueError(f"strides are {self.strides}; give at least two, each twice the one before")
        if self.head_convs < (least := 1 if self.has_masks else 2):
            raise ValueError(f"head_convs is {self.head_convs}; it must be at least {least}")
        for name in MASK_FIELDS if self.has_masks else ():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head == "gfl" and self.head_channels % self.norm_groups:
            raise ValueError(
                f"head_channels {self.head_channels} is not divisible by norm_groups {self.norm_groups}; change one"
            )
        complete_backbone_fields(self)
        super().__post_init__(**kwargs)

    @property
    def has_masks(self) -> bool:
        """Whether the head finds masks: one of `ROI_HEADS`."""
        return self.head in ROI_HEADS

    def to_dict(self) -> dict[str, Any]:
        """All fields, without those that the head does not read."""
        return {key: value for key, value in super().to_dict().items() if self.has_masks or key not in MASK_FIELDS}
