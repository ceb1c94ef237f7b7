"""Export of a finished student to ONNX, compared with PyTorch and timed before anybody relies on it."""

import json
import operator
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.errors import OnnxExporterError
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..adapters import DenseAdapter
from ..adapters.loading import ModelSpec, load_adapter, saved_size
from ..hub.pushing import ONNX_MODEL, ONNX_REPORT, weights_digest
from ..utils.costs import device_name, time_forward
from ..utils.files import write_json
from ..utils.masks import mask_areas, mask_ious
from ..utils.messages import UserError
from ..utils.text import shortened
from .exportable import OPSET, DetectionsModel, LogitsModel, to_onnx, why_fixed


REQUIREMENTS = ("onnx", "onnxscript", "onnxruntime")
# of the logits, where the largest is below 1, else relative to it; part of the pixels with the same class
MAX_DIFFERENCE, MIN_AGREEMENT = 1e-4, 0.999
# of a detection that both have
MAX_PIXELS, MAX_SCORE, MIN_MASK_IOU = 0.5, 1e-3, 0.99
MAX_GAPS = (MAX_PIXELS, MAX_SCORE, 1 - MIN_MASK_IOU)
PICTURES = 3
BLOBS = (9, 33, 65, 129)  # in a row of random pictures; detectors of small things find none in large blobs
DEFAULT_SIZE = 512
SECONDS = 2.0  # for the timed passes of each runtime


class OnnxModel(nn.Module):
    """An ONNX file under onnxruntime on the CPU, called like the model it was made from."""

    def __init__(self, path: Path):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what fails is raised as well
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, H, W]` -> the first output, `[B, num_labels, h, w]` of label maps."""
        return self.outputs(pixel_values)["logits"]

    def outputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """All outputs by name."""
        found = self.session.run(None, {"pixel_values": pixel_values.numpy()})
        names = [output.name for output in self.session.get_outputs()]
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def export_student(
    source: str,
    output_dir: str | Path | None = None,
    *,
    size: Sequence[int] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Exports a student to `onnx/model.onnx`, checks and times it, and writes `onnx/export.json` beside it.

    Of label maps, the batch is dynamic; height and width are where the file then computes the model's function at every
    size that is tried, and fixed otherwise. Detectors are exported for one picture of one size.

    Args:
        source: the student's folder or Hub id.
        output_dir: folder to write to; that of the student, or `runs/<name>` for a Hub id.
        size: height and width to export, check and time with; by default those that the student was measured with.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run model code that lies in the repository.

    Returns:
        The folder written to, and contents of `export.json`.

    Raises:
        UserError: if a package is missing, the model cannot be exported, or the file computes something else; then it
            is kept without a report.
    """
    if missing := [name for name in REQUIREMENTS if find_spec(name) is None]:
        raise UserError(f"export needs {', '.join(missing)}: pip install {' '.join(REQUIREMENTS)}")
    adapter = load_adapter(ModelSpec(source, revision), trust_remote_code=trust_remote_code).float().eval()
    height, width = size or student_size(source, adapter)
    local = Path(source) if Path(source).is_dir() else None
    folder = Path(output_dir or local or Path("runs", source.rpartition("/")[2]))
    path, image = folder / ONNX_MODEL, images(adapter, 1, height, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / ONNX_REPORT).unlink(missing_ok=True)  # a report stands for a file that was checked
    check_runs(adapter, image)
    write = write_model if adapter.exported == ("logits",) else write_detector
    fixed_because, parity = write(path, adapter, (height, width))
    timed = {"onnxruntime": (OnnxModel(path), image), "pytorch": (adapter.model, image)}
    seconds = time_forward(timed, 2 * SECONDS)
    report = {
        "size": [height, width],
        "fixed_because": fixed_because,
        "opset": OPSET,
        "bytes": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
        "outputs": list(adapter.exported),
        "parity": parity,
        "latency_ms": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "repeats": len(seconds["onnxruntime"]),
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("hf_bcd", "torch", "transformers", *REQUIREMENTS)},
        "weights_sha256": None if local is None else weights_digest(local),
    }
    write_json(folder / ONNX_REPORT, report)
    return folder, report


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


def images(adapter: DenseAdapter, number: int, height: int, width: int, blobs: int = BLOBS[0]) -> Tensor:
    """Random blobs of colour as the student's image processor gives them, `[number, 3, height, width]`."""
    generator = torch.Generator().manual_seed(height * width)
    colours = 255 * torch.rand(number, 3, blobs, blobs, generator=generator)
    return adapter.normalize(F.interpolate(colours, (height, width), mode="bicubic").clamp(0, 255)).contiguous()


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
            parity = compare(path, model, [images(adapter, *shape) for shape in ((2, height, width), *others)])
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
    parity = compare(path, model, [images(adapter, number, height, width) for number in (1, 2)])
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
    onnx_model, parity = OnnxModel(path), dict[str, Any]()
    for blobs in BLOBS:
        pictures = images(adapter, PICTURES, height, width, blobs).split(1)
        parity = compare_detections(onnx_model, adapter, pictures)
        if parity["detections"] or parity["onnx_detections"]:
            break
    if not parity["matched"] == parity["detections"] == parity["onnx_detections"]:
        raise UserError(
            f"{path} does not find what the model finds: {parity}; every detection must be there in both, within "
            f"{MAX_PIXELS} pixels and {MAX_SCORE:g} of its score, masks with an IoU of {MIN_MASK_IOU:g}. The file is kept for you to look at; do not use it."
        )
    return fixed_because, parity


@torch.no_grad()
def compare_detections(onnx_model: OnnxModel, adapter: Any, pictures: Sequence[Tensor]) -> dict[str, Any]:
    """Runs file and model on the same pictures `[1, 3, H, W]`, and matches their detections of a score of at least 0.3.

    Of a model that is so sure of nothing, the ten best of a picture.

    Returns:
        `sizes`; numbers of `detections` of the model and `onnx_detections` of the file; how many are `matched`: same class,
        box, score and mask close; of these, the largest differences `max_pixels` and `max_score`, and where there are masks
        the smallest IoU `min_mask_iou`.
    """
    counts, differences = {"detections": 0, "onnx_detections": 0, "matched": 0}, [(0.0, 0.0, 0.0)]
    for pixel_values in pictures:
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        (expected,) = adapter.detections(adapter.model(pixel_values=pixel_values), [size])
        (found,) = adapter.detections(SimpleNamespace(**onnx_model.outputs(pixel_values)), [size])
        best = expected["scores"][: min(10, len(expected["scores"]))].tolist()
        sure = min([0.3, *best[-1:]]) if sum(score >= 0.3 for score in best) == 0 else 0.3
        left = list(range(len(found["scores"])))
        same = None
        if "masks" in expected:
            empty = [mask_areas(answer["masks"]) == 0 for answer in (expected, found)]
            same = mask_ious(expected["masks"], found["masks"]) + np.outer(
                *empty
            )  # COCO's IoU of two empty masks is 0
        for row in range(int((expected["scores"] >= sure).sum())):
            gaps = {
                place: (
                    float((found["boxes"][place] - expected["boxes"][row]).abs().max()),
                    float((found["scores"][place] - expected["scores"][row]).abs()),
                    0.0 if same is None else 1 - float(same[row, place]),
                )
                for place in left
                if found["labels"][place] == expected["labels"][row]
            }
            near = {place: gap for place, gap in gaps.items() if all(map(operator.le, gap, MAX_GAPS))}
            counts["detections"] += 1
            if near:
                place = min(near, key=lambda place: near[place])
                left.remove(place)
                counts["matched"] += 1
                counts["onnx_detections"] += 1
                differences.append(near[place])
        # what only the file is sure of, scores at the threshold apart
        counts["onnx_detections"] += sum(float(found["scores"][place]) >= sure + MAX_SCORE for place in left)
    pixels, scores, apart = (max(values) for values in zip(*differences, strict=True))
    sizes = sorted({tuple(picture.shape[2:]) for picture in pictures})
    masks = {"min_mask_iou": 1 - apart} if adapter.finds_masks else {}
    return {"sizes": sizes, **counts, "max_pixels": pixels, "max_score": scores, **masks}


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


@torch.no_grad()
def compare(path: Path, model: PreTrainedModel, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Runs file and model on the same images.

    Returns:
        `sizes` of the images, the largest difference of a logit `max_difference`, the largest logit `max_logit`, and
        the part of the positions with the same class `argmax_agreement`; where the file cannot be run, or gives another
        shape, the difference is infinite.
    """
    differences, largest, same = [], [], []
    onnx_model = OnnxModel(path)
    for pixel_values in batches:
        expected = model(pixel_values=pixel_values).logits
        try:
            found = onnx_model(pixel_values)
        except Exception:  # onnxruntime's have no common class of their own
            found = expected.new_empty(0)
        if found.shape != expected.shape:
            found = torch.full_like(expected, float("inf"))
        differences.append((found - expected).abs().max())
        largest.append(expected.abs().max())
        same.append((found.argmax(1) == expected.argmax(1)).flatten())
    return {
        "sizes": sorted({tuple(batch.shape[2:]) for batch in batches}),
        "max_difference": torch.stack(differences).max().item(),
        "max_logit": torch.stack(largest).max().item(),
        "argmax_agreement": torch.cat(same).double().mean().item(),
    }


def agrees(parity: dict[str, Any]) -> bool:
    """Whether a file computes its model's function, as far as `compare` has seen."""
    close = parity["max_difference"] <= MAX_DIFFERENCE * max(1.0, parity["max_logit"])
    return close and parity["argmax_agreement"] >= MIN_AGREEMENT
