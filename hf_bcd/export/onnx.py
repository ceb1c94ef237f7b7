"""ONNX: files for onnxruntime and whatever else reads the format, in three precisions."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.onnx.errors import OnnxExporterError

from ..adapters import DenseAdapter
from ..utils.messages import UserError
from ..utils.text import shortened
from .exportable import DetectionsModel, LogitsModel, to_onnx, why_fixed
from .opened import OpenedFile
from .parity import (
    MAX_DIFFERENCE,
    MAX_PIXELS,
    MAX_SCORE,
    MIN_AGREEMENT,
    MIN_MASK_IOU,
    agrees,
    compare,
    compare_pictures,
    images,
)


def open_file(path: Path, threads: int | None = None) -> Callable[[Tensor], dict[str, Tensor]]:
    """An ONNX file under onnxruntime on the CPU: from `pixel_values` to all outputs by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised as well
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        found = session.run(None, {"pixel_values": pixel_values.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run


def write_model(path: Path, adapter: DenseAdapter, size: tuple[int, int]) -> tuple[str | None, dict[str, Any]]:
    """Writes the file with free height and width, or with fixed ones if that does not do.

    Returns:
        Why height and width are fixed, if they are, and the result of `compare`.

    Raises:
        UserError: if the model cannot be exported, or the file computes something else.
    """
    model, exportable, (height, width) = adapter.model, LogitsModel(adapter.model), size
    fixed_because = "its position embeddings belong to one size" if adapter.fixed_size else why_fixed(model)
    if fixed_because is None:
        others = [(1, 5 * height // 4 | 1, 3 * width // 2 | 1), (1, max(64, 3 * height // 4), 2 * width)]
        try:
            save(path, exportable, adapter, size, None)
            parity = compare(
                OpenedFile(open_file(path)),
                model,
                [images(adapter, *shape) for shape in ((2, height, width), *others)],
            )
            if agrees(parity):
                return None, parity
            fixed_because = "exported with free sizes, this architecture computes something else at other sizes"
        except OnnxExporterError:
            fixed_because = "the exporter cannot leave the sizes of this architecture open"
    try:
        save(path, exportable, adapter, size, fixed_because)
    except OnnxExporterError as error:
        cause = shortened(error.__cause__ or error)
        raise UserError(f"{type(model).__name__} cannot be exported at {height} x {width} pixels: {cause}") from error
    parity = compare(OpenedFile(open_file(path)), model, [images(adapter, number, height, width) for number in (1, 2)])
    if not agrees(parity):
        raise UserError(
            f"{path} does not compute what the model computes: {parity}; allowed are a difference of {MAX_DIFFERENCE:g} "
            f"(times the largest logit, if that is above 1) and {MIN_AGREEMENT:.1%} equal classes. The file is kept for "
            "you to look at; do not use it."
        )
    return fixed_because, parity


def write_detector(path: Path, adapter: Any, size: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """Writes the file of a detector, for one picture of one size.

    Returns:
        Why height and width are fixed, and the result of `compare_detections`.

    Raises:
        UserError: as `write_model`.
    """
    model, (height, width) = adapter.model, size
    fixed_because = "detectors are exported for one picture of one size"
    try:
        save(path, DetectionsModel(model, adapter.exported), adapter, size, fixed_because)
    except OnnxExporterError as error:
        cause = shortened(error.__cause__ or error)
        raise UserError(f"{type(model).__name__} cannot be exported at {height} x {width} pixels: {cause}") from error
    parity = compare_pictures(OpenedFile(open_file(path)), adapter, size)
    if not parity["matched"] == parity["detections"] == parity["file_detections"]:
        raise UserError(
            f"{path} does not find what the model finds: {parity}; every detection must be there in both, within "
            f"{MAX_PIXELS} pixels and {MAX_SCORE:g} of its score, masks with an IoU of {MIN_MASK_IOU:g}. The file is kept for you to look at; do not use it."
        )
    return fixed_because, parity


def save(
    path: Path, exportable: LogitsModel, adapter: DenseAdapter, size: tuple[int, int], fixed_because: str | None
) -> None:
    """Exports the model and writes the file, with all that its users must know in its metadata."""
    number = 2 if exportable.free_batch else 1
    program = to_onnx(exportable, images(adapter, number, *size), dynamic_size=fixed_because is None)
    normalisation = {"image_mean": adapter.image_mean, "image_std": adapter.image_std}
    program.model.metadata_props.update(
        input=f"pixel_values [{'batch' if exportable.free_batch else 1}, 3, height, width], float32, {adapter.channel_order}, normalised",
        **{key: json.dumps([round(x, 6) for x in values.flatten().tolist()]) for key, values in normalisation.items()},
        size="any" if fixed_because is None else f"{size[0]} x {size[1]}, because {fixed_because}",
        id2label=json.dumps(adapter.id2label),
        hf_bcd=version("hf_bcd"),
    )
    program.save(path)


@contextmanager
def _without_axis_warnings() -> Iterator[None]:
    """Inside the block, the root logger does not say of each bias and norm that it has no output channels to quantise by."""

    def said(record: logging.LogRecord) -> bool:
        return "is out-of-range for weight" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(said)
    try:
        yield
    finally:
        root.removeFilter(said)


def depthwise_weights(path: Path) -> list[str]:
    """Names of the weights of convolutions with a filter for each channel, in a file."""
    import onnx

    graph = onnx.load(path).graph
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    convolutions = ((node, shapes.get(node.input[1])) for node in graph.node if node.op_type == "Conv")
    return [
        node.input[1]
        for node, shape in convolutions
        if shape
        and any(field.name == "group" and field.i == shape[0] > 1 for field in node.attribute)
        and shape[1] == 1
    ]


def write(path: Path, source: Path, precision: str, calibration: Iterable[Tensor]) -> None:
    """Writes the float32 file `source` in half precision, or in int8 with static scales.

    The logits stay float32. int8 is QDQ with a scale for each output channel of a weight, and 8-bit activations without a
    sign: half of what follows a ReLU would stay unused otherwise. Weights have 7 bits: x86 CPUs without VNNI add two products
    in 16 bits, and 8 bits would overflow in silence. Depthwise convolutions have kernels of their own, which do not, and keep 8.
    """
    if precision == "float16":
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)
        return
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(calibration)

        def get_next(self) -> Any:
            found = next(self.rest, None)
            return None if found is None else {"pixel_values": found.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "model.onnx"  # with BatchNorm inside of the convolutions
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        depthwise = depthwise_weights(prepared)
        with _without_axis_warnings():
            quantize_static(
                prepared,
                path,
                Pictures(),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                extra_options={
                    "TensorQuantOverrides": {name: [{"axis": 0, "reduce_range": False}] for name in depthwise}
                },
            )
