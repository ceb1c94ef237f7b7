"""The kinds of files that a student is exported to: a row each, of what it needs and how it is written and opened."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..utils.messages import UserError
from . import coreml, executorch, litert, onnx, openvino


class Target(NamedTuple):
    """A kind of file.

    Attributes:
        title: its name in sentences.
        runtime: what runs it here, a name of `latency_ms` in the report; None where this machine cannot run it.
        packages: what writing and opening needs, by the precision that needs it; "" for all of them.
        from_onnx: whether it is made of the float32 ONNX file; else of the model in PyTorch, for one picture of one size.
        write: writes a file `(path, what it is made of, precision, calibration pictures)`; raises whatever its packages raise.
            A model in PyTorch comes with an example of its pictures.
        open: `(path, threads)` to a function from `pixel_values` to the outputs by name.
        detectors: whether it takes detectors too.
    """

    title: str
    runtime: str | None
    packages: Mapping[str, Sequence[str]]
    write: Callable[..., None]
    open: Callable[[Path, int | None], Callable[[Tensor], dict[str, Tensor]]]
    from_onnx: bool = False
    detectors: bool = False
    precisions: Sequence[str] = ("float32", "float16", "int8")


TARGETS = {
    "onnx": Target(
        "ONNX", "onnxruntime", {"": ("onnx", "onnxscript", "onnxruntime")}, onnx.write, onnx.open_file, True, True
    ),
    "openvino": Target(
        "OpenVINO",
        "openvino",
        {"": ("onnx", "onnxscript", "onnxruntime", "openvino"), "int8": ("nncf",)},
        openvino.write,
        openvino.open_file,
        True,
        True,
    ),
    "litert": Target(
        "LiteRT",
        "litert",
        {"": ("litert_torch", "ai_edge_litert"), "int8": ("ai_edge_quantizer",)},
        litert.write,
        litert.open_file,
        precisions=("float32", "int8"),
    ),
    "executorch": Target(
        "ExecuTorch",
        "executorch",
        {"": ("executorch",), "int8": ("torchao",)},
        executorch.write,
        executorch.open_file,
        precisions=("float32", "int8"),
    ),
    "coreml": Target(
        "Core ML", None, {"": ("coremltools",)}, coreml.write, coreml.open_file, precisions=("float32", "float16")
    ),
}


def target_of(form: str, precision: str) -> Target:
    """The row of a format, if all that it needs is installed.

    Raises:
        UserError: the format is unknown or lacks the precision, or a package is missing; names the command that installs it.
    """
    if form not in TARGETS:
        raise UserError(f"no format {form!r}; choose one of {', '.join(TARGETS)}.")
    target = TARGETS[form]
    if precision not in target.precisions:
        raise UserError(f"{target.title} files come in {', '.join(target.precisions)} here, not in {precision!r}.")
    needed = [*target.packages[""], *target.packages.get(precision, ())]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"{target.title} needs {', '.join(missing)}: pip install 'hf_bcd[{form}]'")
    return target


def parse_target(text: str) -> tuple[str, str]:
    """Format and precision of `onnx-int8` and the like, checked as `target_of` does; the precision is float32 by default."""
    form, _, precision = text.partition("-")
    target_of(form, precision or "float32")
    return form, precision or "float32"
