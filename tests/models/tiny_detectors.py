"""Tiny detectors for the tests."""

import torch
from torch import nn

from hf_bcd.models import TimmDetectionConfig, TimmDetectionModel


TINY = {"channels": [8, 16, 24, 32], "stem_width": 8}
HEADS = ["retinanet", "gfl"]


def tiny(head="gfl", **fields):
    torch.manual_seed(0)
    sizes = {
        "backbone": "resnet10t",
        "backbone_kwargs": TINY,
        "neck_channels": 16,
        "head_channels": 16,
        "norm_groups": 4,
    }
    labels = {} if "id2label" in fields else {"num_labels": 5}
    return TimmDetectionModel(TimmDetectionConfig(head=head, **sizes | labels | fields))


def confident(model):
    """The model in evaluation mode, with scores and boxes that differ from prior to prior as a trained one's do."""
    with torch.no_grad():
        for name, module in model.bbox_head.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if name.endswith(("_cls", "_reg")):
                    module.weight.mul_(0.5)
                    nn.init.constant_(module.bias, -2.0 if name.endswith("_cls") else 0.0)
    return model.eval()
