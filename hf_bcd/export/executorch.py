"""ExecuTorch: files for PyTorch's own runtime on devices, computed by XNNPACK."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


@torch.no_grad()
def write(path: Path, model: nn.Module, precision: str, calibration: Iterable[Tensor], example: Tensor) -> None:
    """Writes a file for pictures as the example `[1, 3, H, W]`.

    int8 is XNNPACK's quantiser: symmetric weights with a scale for each channel, activations with static ones.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # type: ignore[import-not-found]
    from executorch.exir import to_edge_transform_and_lower  # type: ignore[import-not-found]

    program = torch.export.export(model, (example,), strict=False)
    if precision == "int8":
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (  # type: ignore[import-not-found]
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # type: ignore[import-not-found]

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        observed = prepare_pt2e(program.module(), quantizer)
        for picture in calibration:
            observed(picture)
        program = torch.export.export(convert_pt2e(observed), (example,), strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    with path.open("wb") as file:
        lowered.write_to_file(file)


def open_file(path: Path, threads: int | None = None) -> Callable[[Tensor], dict[str, Tensor]]:
    """A file under ExecuTorch's runtime: from `pixel_values` to `logits`; it has its own number of threads."""
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": method.execute([pixel_values.contiguous()])[0].clone()}

    return run
