"""The context loss over the number of positions, and the boundary loss beside the student's own step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_bcd.losses.boundary import boundary_distillation_loss
from hf_bcd.losses.ops import relation
from hf_bcd.losses.ops.functional import standardize
from hf_bcd.losses.ops.relation import relation_divergence, relation_divergence_reference
from hf_bcd.models import TimmSegmentationModel

from .measuring import compare, machine_rates, ratio


CHANNELS = 256
SIZES = (256, 1024, 4096, 16384, 32768)
# per image: two softmaxes and their logits are kept, four bytes a number
REFERENCE_MATRICES = 6


def relation_features(batch: int, positions: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student and teacher features as the context loss sees them: unit variance over channels, scaled by C^(-1/4)."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, positions, CHANNELS)
    student, teacher = (torch.randn(shape, generator=generator).to(device, dtype) / CHANNELS**0.25 for _ in range(2))
    return student.requires_grad_(), teacher


def backward_of(loss: Callable[[], Tensor], leaf: Tensor) -> Callable[[], None]:
    """A call that computes a loss and its gradient."""

    def call() -> None:
        leaf.grad = None
        loss().backward()

    return call


def relation_variants(student: Tensor, teacher: Tensor) -> dict[str, Callable[[], None]]:
    """Forward and backward of the same value in each implementation."""

    def reference() -> Tensor:
        return relation_divergence_reference(student, teacher).divergence.mean()

    def checkpointed() -> Tensor:
        value = checkpoint(
            lambda x: relation_divergence_reference(x, teacher).divergence, student, use_reentrant=False
        )
        return value.mean()

    def fastest() -> Tensor:
        return relation_divergence(student, teacher).divergence.mean()

    def streamed() -> Tensor:
        with patch.object(relation, "_has_kernel", return_value=False):
            return fastest()

    variants = {"autograd": reference, "autograd + checkpoint": checkpointed, "streamed": streamed}
    if relation._has_kernel(student):
        variants["Triton"] = fastest
    return {name: backward_of(loss, student) for name, loss in variants.items()}


def relation_rows(device: torch.device, dtype: torch.dtype, repeats: int, sizes: tuple[int, ...]) -> list[dict]:
    """Time and memory for one image of each size, and for the paper's crop with a batch of 8.

    Matrices that would not fit into half the memory are left out.
    """
    rates = machine_rates(device, dtype)
    rows = []
    for batch, positions in [*((1, n) for n in sizes), *([(8, 4096)] if 4096 in sizes else [])]:
        student, teacher = relation_features(batch, positions, device, dtype)
        variants = relation_variants(student, teacher)
        if 4 * REFERENCE_MATRICES * batch * positions**2 > free_bytes(device) / 2:
            variants = {name: call for name, call in variants.items() if "autograd" not in name}
        measured = compare(variants, device, repeats if positions < 16384 else 1)
        # two Gram matrices, and the student's features once as rows and once as columns
        flops = 4 * 2 * batch * positions**2 * CHANNELS
        moved = 3 * student.numel() * student.element_size()  # both features in, a gradient out
        floor = max(flops / rates["matmul_flops_per_second"], moved / rates["copy_bytes_per_second"])
        row: dict[str, Any] = {"batch": batch, "positions": positions, "floor_seconds": floor}
        for name, measurement in measured.items():
            row[name] = {
                **measurement.as_dict(),
                "share_of_matmul_rate": flops / rates["matmul_flops_per_second"] / measurement.median,
            }
            if "autograd" in measured:
                whole = measured["autograd"]
                row[name]["time_ratio"] = ratio(measurement, whole)
                if measurement.peak_bytes is not None and whole.peak_bytes:
                    row[name]["memory_ratio"] = measurement.peak_bytes / whole.peak_bytes
        rows.append(row)
    return rows


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def boundary_row(device: torch.device, repeats: int, batch: int, side: int) -> dict[str, Any]:
    """L_BD at stride 8, radius 3, beside a training step of PSPNet-18 on images of `side` x `side`."""
    grid = side // 8
    torch.manual_seed(0)
    student = torch.randn(batch, grid, grid, device=device).requires_grad_()
    teacher = standardize(torch.randn(batch, grid, grid, device=device), (0, 1, 2))
    model = TimmSegmentationModel.from_backbone(
        "resnet18", head="psp", output_stride=8, head_channels=256, num_labels=21
    )
    model.to(device).train()  # type: ignore[arg-type]
    pixel_values = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(0, 21, (batch, side, side), device=device)

    def step() -> None:
        model.zero_grad()
        model(pixel_values, labels=labels).loss.backward()

    loss = backward_of(lambda: boundary_distillation_loss(standardize(student, (0, 1, 2)), teacher, radius=3), student)
    measured = compare({"L_BD": loss, "student's step": step}, device, repeats)
    return {
        "batch": batch,
        "side": side,
        "share_of_step": ratio(measured["L_BD"], measured["student's step"]),
        **{name: measurement.as_dict() for name, measurement in measured.items()},
    }
