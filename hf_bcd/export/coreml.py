"""Core ML: packages for Apple's devices, which nothing else can run."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..utils.messages import UserError


@torch.no_grad()
def write(path: Path, model: nn.Module, precision: str, calibration: Iterable[Tensor], example: Tensor) -> None:
    """Writes a package for pictures as the example `[1, 3, H, W]`."""
    import coremltools  # type: ignore[import-not-found]

    program = torch.export.export(model, (example,), strict=False).run_decompositions({})
    kinds = coremltools.precision
    package = coremltools.convert(
        program,
        inputs=[coremltools.TensorType(name="pixel_values", shape=example.shape)],
        outputs=[coremltools.TensorType(name="logits")],
        compute_precision=kinds.FLOAT16 if precision == "float16" else kinds.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS16,
    )
    package.save(str(path))


def open_file(path: Path, threads: int | None = None) -> Callable[[Tensor], dict[str, Tensor]]:
    """Refuses: only Apple's systems run such packages, and nobody has tried them with this one."""
    raise UserError(f"{path}: Core ML packages run on Apple's systems only; evaluate another format here.")
