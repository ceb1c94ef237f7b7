"""A whole distillation step beside what cannot be avoided: the teacher's forward pass and the student's own step."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, SegformerConfig, SegformerForSemanticSegmentation

from hf_bcd.adapters import FrozenTeacher, build_adapter
from hf_bcd.losses.criterion import DistillationCriterion
from hf_bcd.losses.recipe import build_criterion
from hf_bcd.models import TimmSegmentationModel
from hf_bcd.outputs import LabelMaps
from hf_bcd.training.distiller import Distiller
from hf_bcd.training.hardware import lay_out

from .measuring import compare, ratio


NUM_LABELS = 21


def psp(backbone: str, **options: Any) -> PreTrainedModel:
    """PSPNet at output stride 8, from random weights."""
    return TimmSegmentationModel.from_backbone(backbone, head="psp", output_stride=8, num_labels=NUM_LABELS, **options)


def segformer(depths: list[int], widths: list[int], decoder: int) -> PreTrainedModel:
    """SegFormer of one of the published sizes, from random weights."""
    config = {"depths": depths, "hidden_sizes": widths, "decoder_hidden_size": decoder, "num_labels": NUM_LABELS}
    return SegformerForSemanticSegmentation(SegformerConfig(**config))


WIDE = [64, 128, 320, 512]
PAIRS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], PreTrainedModel]]] = {
    "PSPNet-101 -> PSPNet-18": (lambda: psp("resnet101"), lambda: psp("resnet18", head_channels=256)),
    "SegFormer-B4 -> SegFormer-B0": (
        lambda: segformer([3, 8, 27, 3], WIDE, 768),
        lambda: segformer([2, 2, 2, 2], [32, 64, 160, 256], 256),
    ),
}


def step_row(pair: str, device: torch.device, repeats: int, batch: int, side: int) -> dict[str, Any]:
    """Seconds of teacher forward, of the student's step alone, and of the step with BCD, on `side` x `side` crops.

    Images, labels and weights are random; the optimizer's own step, the same in both, is left out.
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
    with_bcd = Distiller(student, build_criterion({"bcd": {}}, *specs, num_labels=NUM_LABELS)).to(device).train()
    pixel_values = torch.randint(0, 256, (batch, 3, side, side), device=device, dtype=torch.uint8)
    targets = LabelMaps(torch.randint(0, NUM_LABELS, (batch, side, side), device=device), NUM_LABELS)

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
        "side": side,
        "time_ratio": ratio(measured["step with BCD"], measured["both"]),
        **{name: measurement.as_dict() for name, measurement in measured.items()},
    }
