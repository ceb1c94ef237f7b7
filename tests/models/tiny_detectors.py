"""Tiny detectors for the tests."""

import torch
from torch import nn

from hf_bcd.models import TimmDetectionConfig, TimmDetectionModel


TINY = {"channels": [8, 16, 24, 32], "stem_width": 8}
HEADS = ["retinanet", "gfl"]
MASK_HEADS = ["mask_rcnn", "cascade_mask_rcnn"]


def tiny(head="gfl", **fields):
    torch.manual_seed(0)
    sizes = {
        "backbone": "resnet10t",
        "backbone_kwargs": TINY,
        "neck_channels": 16,
        "head_channels": 16,
        "norm_groups": 4,
    }
    if head in MASK_HEADS:
        sizes |= {"head_convs": 1, "fc_channels": 32, "proposals": 200, "rois_per_image": 64, "anchor_scale": 4}
    labels = {} if "id2label" in fields else {"num_labels": 5}
    return TimmDetectionModel(TimmDetectionConfig(head=head, **sizes | labels | fields))


def confident(model):
    """The model in evaluation mode, with scores, boxes and masks that differ from place to place as a trained one's do."""
    with torch.no_grad():
        heads = [model.rpn_head, model.roi_head] if model.config.has_masks else [model.bbox_head]
        for name, module in (pair for head in heads for pair in head.named_modules()):
            if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight)
                if name.endswith("fc_cls"):  # or what all regions have in common decides
                    module.weight.sub_(module.weight.mean(dim=1, keepdim=True)).mul_(3)
                if name.endswith("conv_logits"):
                    module.weight.mul_(10)
                if name.endswith(("_cls", "_reg")):
                    module.weight.mul_(0.5)
                    background = isinstance(module, nn.Linear) or name == "rpn_cls"
                    nn.init.constant_(module.bias, -2.0 if name.endswith("_cls") and not background else 0.0)
    return model.eval()


def square_masks(boxes, height, width):
    """Filled boxes cxcywh relative to the image as masks, boolean `[N, height, width]`; each covers a pixel at least."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (cx, cy, w, h) in zip(masks, boxes.tolist(), strict=True):
        x, y = int((cx - w / 2) * width), int((cy - h / 2) * height)
        mask[y : max(round((cy + h / 2) * height), y + 1), x : max(round((cx + w / 2) * width), x + 1)] = True
    return masks
