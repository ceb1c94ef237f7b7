"""A whole distillation step beside what cannot be avoided: the teacher's forward pass and the student's own step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn
from transformers import PreTrainedModel, SegformerConfig, SegformerForSemanticSegmentation

from hf_bcd.adapters import FrozenTeacher, build_adapter
from hf_bcd.losses.criterion import DistillationCriterion
from hf_bcd.losses.recipe import build_criterion
from hf_bcd.models import TimmDetectionModel, TimmSegmentationModel
from hf_bcd.outputs import LabelMaps, Objects, Targets
from hf_bcd.training.distiller import Distiller
from hf_bcd.training.hardware import lay_out
from hf_bcd.utils.masks import pack, unpack

from .measuring import compare, ratio


NUM_LABELS = 21


def psp(backbone: str, **options: Any) -> PreTrainedModel:
    """PSPNet at output stride 8, from random weights."""
    return TimmSegmentationModel.from_backbone(backbone, head="psp", output_stride=8, num_labels=NUM_LABELS, **options)


def segformer(depths: list[int], widths: list[int], decoder: int) -> PreTrainedModel:
    """SegFormer of one of the published sizes, from random weights."""
    config = {"depths": depths, "hidden_sizes": widths, "decoder_hidden_size": decoder, "num_labels": NUM_LABELS}
    return SegformerForSemanticSegmentation(SegformerConfig(**config))


def detector(head: str, backbone: str) -> PreTrainedModel:
    """A detector of 80 classes, from random weights."""
    return TimmDetectionModel.from_backbone(backbone, head=head, num_labels=80)


def some_targets(model: PreTrainedModel, batch: int, size: tuple[int, int], device: torch.device) -> Targets:
    """Random label maps, or six boxes a picture, filled, for a detector."""
    if not isinstance(model, TimmDetectionModel):
        return LabelMaps(torch.randint(0, NUM_LABELS, (batch, *size), device=device), NUM_LABELS)
    corners = torch.rand(batch, 6, 2, 2, device=device) * torch.tensor([size[1], size[0]], device=device)
    boxes = torch.cat([corners.amin(2), corners.amax(2) + 1], dim=2)
    targets = Objects(list(boxes), list(torch.randint(0, 80, (batch, 6), device=device)), size, 80)
    return replace(targets, masks=[pack(inside) for inside in targets.inside(targets.boxes, size)])


WIDE = [64, 128, 320, 512]
PAIRS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], PreTrainedModel]]] = {
    "PSPNet-101 -> PSPNet-18": (lambda: psp("resnet101"), lambda: psp("resnet18", head_channels=256)),
    "SegFormer-B4 -> SegFormer-B0": (
        lambda: segformer([3, 8, 27, 3], WIDE, 768),
        lambda: segformer([2, 2, 2, 2], [32, 64, 160, 256], 256),
    ),
    "RetinaNet-101 -> RetinaNet-50": (
        lambda: detector("retinanet", "resnet101"),
        lambda: detector("retinanet", "resnet50"),
    ),
    "Mask R-CNN-101 -> Mask R-CNN-50": (
        lambda: detector("mask_rcnn", "resnet101"),
        lambda: detector("mask_rcnn", "resnet50"),
    ),
}


def mask_rcnn_row(device: torch.device, repeats: int, batch: int, side: int) -> dict[str, Any]:
    """Seconds of a training step of Mask R-CNN-50 and of torchvision's, of the same pictures, classes and number of regions.

    Forward and backward passes in float32; weights are random, nothing is frozen.
    """
    torch.manual_seed(0)
    size = (5 * side // 2, 13 * side // 4)
    ours = build_adapter(detector("mask_rcnn", "resnet50")).to(device).train()
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 81}
    theirs = maskrcnn_resnet50_fpn(**options, min_size=size[0], max_size=size[1]).to(device).train()
    pixel_values = torch.randint(0, 256, (batch, 3, *size), device=device, dtype=torch.uint8)
    targets: Any = some_targets(ours.model, batch, size, device)
    labels = [
        {"boxes": boxes, "labels": classes + 1, "masks": unpack(masks, size[1]).byte()}
        for boxes, classes, masks in zip(targets.boxes, targets.classes, targets.masks, strict=True)
    ]

    def our_step() -> None:
        ours.zero_grad()
        ours(pixel_values, targets).task_losses["loss_task"].backward()

    def their_step() -> None:
        theirs.zero_grad()
        torch.stack(list(theirs(list(pixel_values / 255), labels).values())).sum().backward()

    measured = compare({"Mask R-CNN-50": our_step, "torchvision's": their_step}, device, repeats)
    return {
        "pair": "a training step of Mask R-CNN-50 beside torchvision's",
        "batch": batch,
        "size": size,
        "time_ratio": ratio(measured["Mask R-CNN-50"], measured["torchvision's"]),
        **{name: measurement.as_dict() for name, measurement in measured.items()},
    }


def step_row(pair: str, device: torch.device, repeats: int, batch: int, side: int) -> dict[str, Any]:
    """Seconds of teacher forward, of the student's step alone, and of the step with BCD, on `side` x `side` crops.

    Detectors see 2.5 x 3.25 times that, 320 x 416 pixels for a side of 128. Images, labels and weights are random; the optimizer's own step, the same in both, is left out.
    """
    torch.manual_seed(0)
    make_teacher, make_student = PAIRS[pair]
    student_model = make_student()
    student = build_adapter(student_model)
    student.freeze_unused()
    dtype = torch.bfloat16 if device.type == "cuda" else None
    teacher = FrozenTeacher(build_adapter(make_teacher()), student.id2label, dtype=dtype).to(device)
    plain = Distiller(student, DistillationCriterion({}, {}, [])).to(device).train()
    specs = student.feature_specs, teacher.feature_specs
    if device.type in ("cpu", "cuda"):  # as the trainer does
        lay_out(student)
        lay_out(teacher)
    criterion = build_criterion({"bcd": {}}, *specs, num_labels=student.num_labels)
    with_bcd = Distiller(student, criterion).to(device).train()
    size = (5 * side // 2, 13 * side // 4) if isinstance(student_model, TimmDetectionModel) else (side, side)
    pixel_values = torch.randint(0, 256, (batch, 3, *size), device=device, dtype=torch.uint8)
    targets = some_targets(student_model, batch, size, device)

    def student_step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is not None):
            loss = plain(pixel_values, targets)["loss"]
        loss.backward()

    def bcd_step() -> None:
        output = teacher(pixel_values)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is not None):
            loss = with_bcd(pixel_values, targets, output)["loss"]
        loss.backward()

    def floor() -> None:
        teacher(pixel_values)
        student_step()

    calls = {"teacher forward": lambda: teacher(pixel_values), "student's step": student_step}
    measured = compare({**calls, "both": floor, "step with BCD": bcd_step}, device, repeats)
    return {
        "pair": pair,
        "batch": batch,
        "size": size,
        "time_ratio": ratio(measured["step with BCD"], measured["both"]),
        **{name: measurement.as_dict() for name, measurement in measured.items()},
    }
