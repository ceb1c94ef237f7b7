"""Our detectors with the weights of a checkpoint of mmdetection, whose names they have."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..models import TimmDetectionConfig, TimmDetectionModel
from ..models.configuration_timm_detection import ROI_HEADS
from ..utils.messages import UserError


# bottlenecks or not, and blocks of the third stage
RESNETS = {
    (False, 2): "resnet18",
    (False, 6): "resnet34",
    (True, 6): "resnet50",
    (True, 23): "resnet101",
    (True, 36): "resnet152",
}
# the weight that tells a head from the others, with an output for each class
HEADS = {
    "retinanet": "bbox_head.retina_cls.weight",
    "gfl": "bbox_head.gfl_cls.weight",
    "mask_rcnn": "roi_head.mask_head.conv_logits.weight",
    "cascade_mask_rcnn": "roi_head.mask_head.0.conv_logits.weight",
}
# of mmdetection's ResNets, RGB in 0 ... 255
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# computed, not learned
DROPPED = ("bbox_head.integral.project",)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description (`state_dict`, `meta`) in a file of mmdetection 2 or 3; runs no code from it.

    Raises:
        UserError: the file does not exist, holds other objects than tensors and plain values, or has no `state_dict`.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; give the .pth file of mmdetection's model zoo.")
    try:
        # the only form in which these weights are published; `weights_only` runs no code from it
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # the last two: bytes that are no checkpoint at all, such as a page of a failed download
    except (UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read without running code from it ({type(error).__name__}: {error}); keep only its 'state_dict' with the "
            "environment that wrote it, or download it again."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise UserError(f"{path} has no 'state_dict', so it is no checkpoint of mmdetection.")
    return dict(checkpoint["state_dict"]), checkpoint.get("meta") or {}


def convert_mmdetection(weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> TimmDetectionModel:
    """The detector that has these weights; its configuration follows from their names and shapes.

    Stem and first stage are frozen and the backbone's batch norms keep their statistics, as in mmdetection's training.

    Args:
        weights: `state_dict` of the checkpoint.
        meta: its description, whose class names are taken over.

    Raises:
        UserError: the weights are not those of one of our heads on a plain ResNet of mmdetection.
    """
    # as DistributedDataParallel writes them
    state = {name.removeprefix("module."): value for name, value in weights.items()}
    state = {name: value for name, value in state.items() if name not in DROPPED}
    model = TimmDetectionModel(config_of_weights(state, class_names(meta)))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # absent from files of old versions, and without effect on frozen statistics
    state |= {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked") and name not in state}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise UserError(
            f"the checkpoint is no {model.config.head} on a plain {model.config.backbone}: {len(wrong)} of its weights "
            f"differ, such as {name!r} with shape {found.get(name, 'none')}, expected {expected.get(name, 'none')}."
        )
    model.load_state_dict(state)
    return model.eval()


def config_of_weights(state: Mapping[str, Tensor], names: list[str]) -> TimmDetectionConfig:
    """The configuration under which a detector has weights of these names and shapes.

    Args:
        state: weights.
        names: class names, or none.

    Raises:
        UserError: there is no such configuration, or another number of classes.
    """

    def count(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    head = next((head for head, name in HEADS.items() if name in state), None)
    has_masks = head in ROI_HEADS
    blocks = "backbone.layer1.0.conv3.weight" in state, count("backbone.layer3.")
    laterals, levels = count("neck.lateral_convs."), count("neck.fpn_convs.")
    extra = 0 if has_masks else 1
    stage = ".0" if head == "cascade_mask_rcnn" else ""
    first_layer = f"roi_head.bbox_head{stage}.shared_fcs.0.bias"
    if has_masks and not {first_layer, "rpn_head.rpn_conv.bias"} <= state.keys():
        head = None
    if head is None or blocks not in RESNETS or laterals != 4 - extra or levels < laterals + extra:
        raise UserError(
            "the checkpoint is no RetinaNet, GFL, Mask R-CNN or Cascade Mask R-CNN on a ResNet of depth 18 to 152: it has "
            f"{len(state)} weights such as {sorted(state)[:3]}, {blocks[1]} blocks in the third stage and {laterals} lateral "
            "convolutions."
        )
    outputs = len(state[HEADS[head].removesuffix("weight") + "bias"])
    num_labels = outputs // 9 if head == "retinanet" else outputs
    if names and len(names) != num_labels:
        raise UserError(f"the checkpoint names {len(names)} classes but has outputs for {num_labels}.")
    names = names or [f"LABEL_{index}" for index in range(num_labels)]
    neck_channels, last_channels = state[f"neck.lateral_convs.{laterals - 1}.conv.weight"].shape[:2]
    options: dict[str, Any] = {}
    if has_masks:
        options["head_convs"] = count(f"roi_head.mask_head{stage}.convs.")
        options["head_channels"] = len(state["rpn_head.rpn_conv.bias"])
        options["fc_channels"] = len(state[first_layer])
    else:
        extra_input = state["neck.fpn_convs.3.conv.weight"].shape[1]
        options["extra_levels"] = "on_input" if extra_input == last_channels != neck_channels else "on_output"
        options["head_channels"] = state[HEADS[head]].shape[1]
        options["head_convs"] = count("bbox_head.cls_convs.")
        options["strides"] = [8 * 2**level for level in range(levels)]
    if head == "gfl":
        options["reg_max"] = len(state["bbox_head.gfl_reg.bias"]) // 4 - 1
    return TimmDetectionConfig(
        backbone=RESNETS[blocks],
        head=head,
        neck_channels=neck_channels,
        frozen_stages=1,
        norm_eval=True,
        image_mean=[value / 255 for value in MEAN],
        image_std=[value / 255 for value in STD],
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        **options,
    )


def class_names(meta: Mapping[str, Any]) -> list[str]:
    """Class names in a checkpoint's description, of version 2 or 3, or none.

    Raises:
        UserError: the ResNet is in Caffe's style, whose strides and statistics are others.
    """
    if "style='caffe'" in str(meta.get("config", meta.get("cfg", ""))).replace('"', "'").replace(" ", ""):
        raise UserError(
            "the checkpoint's ResNet is in Caffe's style, which timm lacks; take one with style='pytorch'."
        )
    described = {
        key.lower(): value for source in (meta, meta.get("dataset_meta") or {}) for key, value in source.items()
    }
    return list(described.get("classes") or [])
