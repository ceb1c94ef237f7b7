"""What a step of every distillation method costs, for the reference pair at the paper's crop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hf_bcd.losses import LOSSES, DistillationCriterion
from hf_bcd.models import TimmSegmentationConfig
from hf_bcd.models.heads import PSPHead
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps
from hf_bcd.runs.methods import HEAD_LEVELS, NUM_LABELS, STUDENT, TEACHER, reference_criterion
from hf_bcd.utils.messages import unknown_key_message

from .measuring import compare


LOGITS_STRIDE = 8


def reference_output(
    specs: Mapping[str, FeatureSpec], batch: int, side: int, device: torch.device, dtype: torch.dtype, seed: int
) -> DenseOutput:
    """Random features and scores of a model on images of `side` x `side`, leaves that a gradient can reach."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(channels: int, stride: int) -> torch.Tensor:
        shape = (batch, channels, side // stride, side // stride)
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    return DenseOutput({level: leaf(*spec) for level, spec in specs.items()}, leaf(NUM_LABELS, LOGITS_STRIDE))


def reference_head(device: torch.device, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """The frozen head of the reference teacher, as a function of its levels."""
    fields: dict[str, Any] = {"backbone": "resnet101", "head": "psp", "num_labels": NUM_LABELS}
    (level,) = HEAD_LEVELS
    head = PSPHead({32: TEACHER[level].channels}, TimmSegmentationConfig(**fields))
    head.requires_grad_(False).eval().to(device, dtype)
    return lambda levels: head({32: levels[level].to(dtype)}).float()


def label_maps(batch: int, side: int, device: torch.device) -> LabelMaps:
    """Regions of 32 x 32 pixels, 5 % of them void, as many as VOC's borders."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, NUM_LABELS, (batch, -(-side // 32), -(-side // 32)), generator=generator)
    cells[torch.rand(cells.shape, generator=generator) < 0.05] = 255
    return LabelMaps(cells.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :side, :side].to(device), NUM_LABELS)


def step_of(
    criterion: DistillationCriterion, student: DenseOutput, teacher: DenseOutput, targets: LabelMaps
) -> Callable[[], None]:
    """A call that does what a training step does for a criterion, and nothing for the models."""
    leaves = [student.logits, *student.features.values()]

    def call() -> None:
        for tensor in (*leaves, *criterion.parameters()):
            tensor.grad = None
        task = {"loss_task": student.logits.float().square().mean()}  # nearly free, and has a gradient
        criterion(task, student, teacher, targets)[0].backward()
        criterion.after_step()

    return call


def method_row(
    names: Sequence[str], device: torch.device, dtype: torch.dtype, repeats: int, batch: int, side: int
) -> dict[str, Any]:
    """Time and memory of each method at its defaults.

    Args:
        names: keys of `LOSSES`.
        device: where to measure.
        dtype: of the models' outputs; losses compute in float32 all the same.
        repeats: timed calls of each.
        batch: images.
        side: their height and width in pixels.

    Raises:
        ValueError: for an unknown method.
    """
    for name in names:
        if name not in LOSSES:
            raise ValueError(unknown_key_message("method", name, LOSSES))
    student, teacher = (
        reference_output(specs, batch, side, device, dtype, i) for i, specs in enumerate((STUDENT, TEACHER))
    )
    for tensor in (teacher.logits, *teacher.features.values()):
        tensor.requires_grad_(False)
    teacher.head = reference_head(device, dtype)
    targets = label_maps(batch, side, device)
    row: dict[str, Any] = {"batch": batch, "side": side}
    for name in names:  # one after the other: the memory of one must not crowd another's
        criterion = reference_criterion({name: {}}).to(device)
        call = step_of(criterion, student, teacher, targets)
        row[name] = compare({name: call}, device, repeats)[name].as_dict()
    return row


def costs_of(row: Mapping[str, Any], machine: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What the table of methods shows: median milliseconds and peak MiB of each.

    Args:
        row: that of `method_row`.
        machine: what was measured on.
        device: where it was measured.
    """
    threads = {"threads": machine["threads"]} if device.type == "cpu" else {}
    methods = {
        name: {
            "ms": round(1e3 * values["median"], 2),
            "mib": None if values["peak_bytes"] is None else round(values["peak_bytes"] / 2**20, 1),
        }
        for name, values in row.items()
        if isinstance(values, dict)
    }
    facts = {key: machine[key] for key in ("device", "torch", "dtype")}
    return {**facts, **threads, "batch": row["batch"], "side": row["side"], "methods": methods}
