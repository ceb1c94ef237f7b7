"""OpenVINO: files for Intel's CPUs, GPUs and NPUs, and for ARM."""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write(path: Path, source: Path, precision: str, calibration: Iterable[Tensor]) -> None:
    """Writes the ONNX file `source` as OpenVINO's IR, a file of the graph and `.bin` with the weights beside it.

    int8 is nncf's static quantisation: symmetric weights with a scale for each channel, and activations with a zero point,
    which those of SegFormer, MobileNetV3 and others without a ReLU need. Weights have 7 bits, as in `onnx.write`. Depthwise
    convolutions stay in floating point: nncf gives each channel at least a hundredth of the largest one's range, and a
    MobileNet's channels differ by more once BatchNorm is folded in.
    """
    openvino: Any = import_module("openvino")

    model = openvino.convert_model(source)
    if precision == "int8":
        import nncf  # type: ignore[import-not-found]

        pictures = [{"pixel_values": picture.numpy()} for picture in calibration]
        attends = any(operation.get_type_name() == "Softmax" for operation in model.get_ops())
        model = nncf.quantize(
            model,
            nncf.Dataset(pictures),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER if attends else None,
            subset_size=len(pictures),
            ignored_scope=nncf.IgnoredScope(types=["GroupConvolution"], validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    openvino.save_model(model, path, compress_to_fp16=precision == "float16")


def open_file(path: Path, threads: int | None = None) -> Callable[[Tensor], dict[str, Tensor]]:
    """A file under OpenVINO on the CPU: from `pixel_values` to all outputs by name, computed in float32 or int8."""
    openvino: Any = import_module("openvino")

    # newer CPUs would compute in bfloat16 otherwise, whatever the file says
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        found = compiled({"pixel_values": pixel_values.numpy()})
        return {output.get_any_name(): torch.from_numpy(value.copy()) for output, value in found.items()}

    return run
