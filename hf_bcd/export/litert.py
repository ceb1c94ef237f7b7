"""LiteRT (TensorFlow Lite): files for phones and microcontrollers."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def write(path: Path, model: nn.Module, precision: str, calibration: Iterable[Tensor], example: Tensor) -> None:
    """Writes a file for pictures as the example `[1, 3, H, W]`.

    int8 is Google's quantiser: weights with a scale for each channel, activations with static ones; input and output stay
    float32.
    """
    import litert_torch  # type: ignore[import-not-found]

    litert_torch.convert(model, (example,)).export(str(path))
    if precision == "float32":
        return
    from ai_edge_quantizer import qtyping, quantizer, recipe  # type: ignore[import-not-found]

    tool = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        tool.update_quantization_recipe(".*", end, algorithm_key="no_quantize")
    ((signature, ends),) = _interpreter(path, 1).get_signature_list().items()
    (name,) = ends["inputs"]
    scales = tool.calibrate({signature: [{name: picture.numpy()} for picture in calibration]})
    tool.quantize(scales).export_model(str(path), overwrite=True)


def open_file(path: Path, threads: int | None = None) -> Callable[[Tensor], dict[str, Tensor]]:
    """A file under LiteRT's interpreter: from `pixel_values` to `logits`."""
    interpreter = _interpreter(path, threads or torch.get_num_threads())
    runner = interpreter.get_signature_runner()
    (name,) = runner.get_input_details()

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        (found,) = runner(**{name: pixel_values.numpy()}).values()
        return {"logits": torch.from_numpy(found)}

    return run


def _interpreter(path: Path, threads: int):
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

    return Interpreter(model_path=str(path), num_threads=threads)
