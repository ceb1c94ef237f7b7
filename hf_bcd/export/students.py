"""Export of a finished student, compared with PyTorch and timed before anybody relies on it."""

import json
import math
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from ..adapters import DenseAdapter
from ..adapters.loading import load_adapter, saved_size
from ..adapters.specs import ModelSpec
from ..hub.exports import model_file, read_export, report_file, weights_digest
from ..utils.costs import device_name, time_forward, weight_bytes
from ..utils.files import write_json
from ..utils.messages import UserError
from ..utils.text import shortened
from . import onnx
from .calibration import Calibration
from .exportable import OPSET, LogitsModel
from .opened import OpenedFile
from .parity import agrees, compare, compare_pictures, images
from .targets import TARGETS, Target, target_of


DEFAULT_SIZE = 512
SECONDS = 2.0  # for the timed passes of each runtime
THREADS = 1  # with which file and model are timed


def export_student(
    source: str,
    output_dir: str | Path | None = None,
    *,
    form: str = "onnx",
    precision: str = "float32",
    calibration: Calibration | None = None,
    size: Sequence[int] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Exports a student to `onnx/model.onnx` or the like, checks and times it, and writes `onnx/export.json` beside it.

    Of label maps, an ONNX or OpenVINO file has a free batch; height and width are free where the file then computes the model's
    function at every size that is tried, and fixed otherwise. The other formats hold one picture of one size, and so do
    detectors in all.

    Args:
        source: the student's folder or Hub id.
        output_dir: folder to write to; that of the student, or `runs/<name>` for a Hub id.
        form: a key of `TARGETS`.
        precision: of the weights; int8 also of what is computed.
        calibration: pictures that find the scales of int8; nothing else needs them.
        size: height and width to export, check and time with; by default those that the student was measured with.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run model code that lies in the repository.

    Returns:
        The folder written to, and contents of the report.

    Raises:
        UserError: if a package is missing, the model cannot be exported, or the file computes something else; then it
            is kept without a report.
    """
    target = target_of(form, precision)
    if precision == "int8" and not calibration:
        raise UserError(
            "int8 needs pictures of the kind that the student will see: name them with --data_dir or --dataset_name."
        )
    adapter = load_adapter(ModelSpec(source, revision), trust_remote_code=trust_remote_code).float().eval()
    maps = adapter.exported == ("logits",)
    check_target(adapter, form, precision)
    height, width = size or student_size(source, adapter)
    local = Path(source) if Path(source).is_dir() else None
    folder = Path(output_dir or local or Path("runs", source.rpartition("/")[2]))
    digest = None if local is None else weights_digest(local)
    path, image = folder / model_file(form, precision), images(adapter, 1, height, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / report_file(form, precision)).unlink(missing_ok=True)  # a report stands for a file that was checked
    check_runs(adapter, image)

    parity: dict[str, Any] = {}
    fixed_because: str | None = f"{target.title} files are written for one picture of one size"
    if form == "onnx" and precision == "float32":
        fixed_because, parity = (onnx.write_model if maps else onnx.write_detector)(path, adapter, (height, width))
    elif target.from_onnx:
        found = read_export(folder, "onnx") if digest is not None else None
        if (
            found is None
            or found["weights_sha256"] != digest
            or (found["fixed_because"] and found["size"] != [height, width])
        ):
            options: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
            _, found = export_student(source, output_dir, size=(height, width), **options)
        fixed_because = found["fixed_because"]
        pictures = calibration and calibration.at((height, width) if fixed_because else None)
        written(target, path, folder / model_file("onnx"), precision, pictures)
    else:
        exportable = LogitsModel(adapter.model, free_size=False)
        written(target, path, exportable, precision, calibration and calibration.at((height, width)), image)

    measured: dict[str, Any] = {"parity": parity or None}
    if target.runtime is not None:
        file = opened(target, path, (height, width) if fixed_because else None, THREADS)
        measured = measure(target.runtime, file, adapter, image, parity)
        check_parity(path, measured["parity"], precision)
    files = files_of(path)
    report = {
        "format": form,
        "precision": precision,
        "title": target.title,
        "runtime": target.runtime,
        "file": model_file(form, precision),
        "files": [*(name.relative_to(folder).as_posix() for name in files), report_file(form, precision)],
        "size": [height, width],
        "fixed_because": fixed_because,
        **({"opset": OPSET} if form == "onnx" else {}),
        "bytes": sum(file.stat().st_size for file in files),
        "pytorch_bytes": weight_bytes(adapter.model),
        "input": {
            "order": adapter.channel_order,
            "image_mean": [round(value, 6) for value in adapter.image_mean.flatten().tolist()],
            "image_std": [round(value, 6) for value in adapter.image_std.flatten().tolist()],
        },
        "outputs": list(adapter.exported),
        **measured,
        "calibration": {"images": len(calibration), "source": calibration.source} if calibration else None,
        "device": device_name(torch.device("cpu")),
        "threads": THREADS,
        "versions": versions(target, precision),
        "weights_sha256": digest,
    }
    write_json(folder / report_file(form, precision), report)
    return folder, report


def measure(
    runtime: str, file: OpenedFile, adapter: DenseAdapter, image: Tensor, parity: dict[str, Any]
) -> dict[str, Any]:
    """How a file answers beside its model, where `parity` does not say so yet, and how long both take, for the report."""
    if not parity and adapter.exported == ("logits",):
        parity = compare(file, adapter.model, [image])
    elif not parity:
        parity = compare_pictures(file, adapter, (image.shape[-2], image.shape[-1]))
    seconds = timed_alone({runtime: (file, image), "pytorch": (adapter.model, image)})
    latency = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    return {"parity": parity, "latency_ms": latency, "repeats": len(seconds["pytorch"])}


def open_export(folder: Path, form: str, precision: str) -> tuple[OpenedFile, dict[str, Any]]:
    """Opens an exported file of a student's folder, with the number of threads that PyTorch has; gives its report too.

    Raises:
        UserError: there is none, it is of another student, nothing can run it here, or a package is missing.
    """
    target, path = target_of(form, precision), folder / model_file(form, precision)
    command = f"hf-bcd export {folder} --format {form} --precision {precision}"
    if not (folder / report_file(form, precision)).is_file() or not path.exists():
        raise UserError(f"{path}: no such file, or it has no report and was not checked. Write it with: {command}")
    report = read_export(folder, form, precision)
    if report is None:
        raise UserError(
            f"{path} belongs to another student: the weights in {folder} have changed. Write it anew with: {command}"
        )
    return opened(target, path, tuple(report["size"]) if report["fixed_because"] else None, None), report


def opened(target: Target, path: Path, size: tuple[int, int] | None, threads: int | None) -> OpenedFile:
    """A file behind the row's runtime."""
    return OpenedFile(target.open(path, threads), size, one_by_one=not target.from_onnx)


def written(target: Target, path: Path, made_of: Any, precision: str, *inputs: Any) -> None:
    """Writes a file by its row.

    Raises:
        UserError: the target cannot hold the model.
    """
    try:
        target.write(path, made_of, precision, *inputs)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the converters' have no common class of their own
        cause = shortened(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: {target.title} cannot hold this model in {precision}: {cause}") from error


def check_parity(path: Path, parity: dict[str, Any], precision: str) -> None:
    """Refuses a float32 file that computes something else, and one of less precision that computes no numbers."""
    if "matched" in parity:
        right = parity["matched"] == parity["detections"] == parity["file_detections"]
    else:
        right = agrees(parity) if precision == "float32" else math.isfinite(parity["max_difference"])
    if not right:
        raise UserError(
            f"{path} does not compute what the model computes: {parity}. The file is kept for you to look at; do not use it."
        )


def timed_alone(models: dict[str, tuple[nn.Module, Tensor]]) -> dict[str, list[float]]:
    """Seconds of forward passes, see `time_forward`, with `THREADS` threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return time_forward(models, len(models) * SECONDS)
    finally:
        torch.set_num_threads(threads)


def files_of(path: Path) -> list[Path]:
    """The file of a model and those with its weights, such as `model.bin` of `model.xml`; those in it, if it is a folder."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    names = {path.name, f"{path.name}.data", f"{path.stem}.bin"}
    return sorted(file for file in path.parent.iterdir() if file.name in names)


def versions(target: Target, precision: str) -> dict[str, str]:
    """Versions of what a file was made with."""
    names = ["hf_bcd", "torch", "transformers", *target.packages[""], *target.packages.get(precision, ())]
    return {name: version(name) for name in names}


def student_size(source: str, adapter: DenseAdapter) -> tuple[int, int]:
    """Height and width that a student was made for, was measured with, or is shown by its image processor."""
    if adapter.fixed_size:
        return adapter.fixed_size
    try:
        path = cached_file(source, "results.json", revision=adapter.revision)
        return tuple(json.loads(Path(str(path)).read_text(encoding="utf-8"))["protocol"]["cost"]["student"]["size"])
    except (OSError, KeyError):  # nobody has measured it
        shown = saved_size(source, revision=adapter.revision)
        edge = shown.get("shortest_edge", DEFAULT_SIZE)
        return shown.get("height", edge), shown.get("width", edge)


@torch.no_grad()
def check_runs(adapter: DenseAdapter, pixel_values: Tensor) -> None:
    """Refuses a model that lacks what is exported, or does not run at this size."""
    size, model = " x ".join(map(str, pixel_values.shape[2:])), adapter.model
    try:
        outputs = model(pixel_values=pixel_values)
    except (RuntimeError, ValueError) as error:
        cause = shortened(error)
        raise UserError(f"the model takes no images of {size} pixels; choose another --size: {cause}") from error
    if any(outputs.get(name) is None for name in adapter.exported):
        raise UserError(
            f"{type(model).__name__} gives no logits for each pixel but {', '.join(outputs)}, which cannot be exported; "
            "distil it into a student that does, such as SegFormer."
        )


def check_target(adapter: DenseAdapter, form: str, precision: str) -> None:
    """Refuses formats and precisions in which this kind of model is not exported.

    Raises:
        UserError: names the ones that are.
    """
    if adapter.exported != ("logits",) and (not TARGETS[form].detectors or precision != "float32"):
        rows = ", ".join(name for name, row in TARGETS.items() if row.detectors)
        raise UserError(f"detectors are exported in float32 to {rows} only, not to {form}-{precision}.")
