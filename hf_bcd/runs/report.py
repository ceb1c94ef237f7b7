"""What a finished run leaves behind: results.json, figures and a model card, all from numbers it measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters import DenseAdapter, build_adapter
from ..card.model_card import write_card
from ..card.provenance import Origin, describe_rule, hub_dataset
from ..card.usage import fill
from ..data import DenseDataset, DenseDatasets
from ..data.dataset import Sample
from ..figures.panels import boundary_figure, comparison_figure, relation_figure
from ..losses.bcd import BCDLoss
from ..losses.context import relation_features
from ..losses.ops.functional import resize, spatial_size
from ..training.config import BCDConfig
from ..training.preparation import adapt_to_score, eval_transform
from ..training.trainer import BCDTrainer
from ..utils.costs import device_name, measure_costs
from ..utils.files import write_json


COLUMNS = {
    "mean_iou": "mIoU",
    "overall_accuracy": "pixel acc.",
    "boundary_f@3": "boundary F@3",
    "boundary_iou": "boundary IoU",
    "completeness": "completeness",
    "connectivity": "connectivity",
    "fragments": "fragments",
}
NUM_PICTURES = 4
LOADING = """\
import hf_bcd
from transformers import pipeline
pipeline("image-segmentation", {model})({picture}{subtask})"""


def metrics_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A plain-text table of the main metrics, one row a model; percentages but for the number of fragments."""
    rows = [["", *COLUMNS.values()]]
    for name, values in scores.items():
        rows.append([name, *(format_metric(key, values[key]) for key in COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def format_metric(key: str, value: float) -> str:
    """Two decimals: percent for shares, a plain number for the number of fragments."""
    return f"{value:.2f}" if key == "fragments" else f"{100 * value:.2f}"


def protocol(
    data: DenseDataset, student: DenseAdapter, config: BCDConfig, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """How the numbers were measured, in words that fix them."""
    options = student.processor_options(config.image_size)
    size = options.get("size", {})
    resized = f"short side resized to {config.image_size}, aspect ratio kept"
    if "height" in size:
        resized = f"resized to {size['width']} x {size['height']} (width x height), whatever its aspect ratio"
    return {
        "dataset": data.name,
        "split": data.split,
        "num_images": len(data),
        "num_labels": data.num_labels,
        "classes_averaged": scores["classes_averaged"],
        "input": resized if options["do_resize"] else "original size",
        "inference": "whole image, single scale, no flip",
        "logits": "up-sampled bilinearly to the label's own size, then arg-max",
        "ignore_index": data.ignore_index,
        "label_rule": describe_rule(data),
        "boundary_f@d": "contours matched within d pixels (Euclidean)",
        "boundary_iou": "bands of 2 % of the image diagonal",
        "connectivity": "8-connected true regions of at least 64 pixels",
    }


def loading_lines(folder: str) -> str:
    """The three lines that run a saved student."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return fill(LOADING, folder, "picture.jpg", config)


def write_report(
    trainer: BCDTrainer,
    models: Mapping[str, PreTrainedModel],
    scores: Mapping[str, Mapping[str, Any]],
    data: DenseDatasets,
    split: str | None,
    origin: Origin | None = None,
) -> None:
    """Writes results.json, figures/*.png and README.md into the run's folder; label_map.json if the teacher needed one.

    Args:
        trainer: the trainer of the student.
        models: `teacher`, `baseline` and `student`, those that exist.
        scores: metrics of those that were evaluated.
        data: the data set.
        split: the split of the scores; None when there is none to evaluate on.
        origin: the command line, where there was one.
    """
    folder = Path(trainer.args.output_dir or ".")
    results: dict[str, Any] = dict(scores)
    figures: list[str] = []
    if split is not None:
        if "student" in scores:
            results["protocol"] = protocol(data[split], trainer.distiller.student, trainer.args, scores["student"])
            revision = hub_dataset(data[split])[1]
            results["protocol"] |= {"dataset_revision": revision} if revision else {}
            results["protocol"] |= measured_costs(trainer, {name: models[name] for name in scores}, data[split])
        figures = write_figures(trainer, models, data[split], folder / "figures")
    write_json(folder / "results.json", results)
    if trainer.teacher is not None and not trainer.teacher.label_map.is_identity:
        write_json(folder / "label_map.json", trainer.teacher.label_map.to_dict())
    write_card(folder, trainer, models, results, data, [f"figures/{name}" for name in figures], origin)
    trainer.has_card = True


def measured_costs(trainer: BCDTrainer, models: Mapping[str, PreTrainedModel], data: DenseDataset) -> dict[str, Any]:
    """What each model costs on an image of the split as evaluation shows it, and the device that this was measured on."""
    device, sample = trainer.args.device, data[0]
    shown = {}
    for name, model in models.items():
        adapter = build_adapter(model).to(device)
        pixel_values = eval_transform(adapter, trainer.args.image_size)(**sample)["pixel_values"][None]
        with torch.no_grad():
            pixel_values = adapter.normalize(pixel_values.to(device)).to(model.dtype)
        shown[name] = (model, pixel_values)
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"cost": measure_costs(shown), "device": {"name": device_name(device), **threads}}


def write_figures(
    trainer: BCDTrainer, models: Mapping[str, PreTrainedModel], data: DenseDataset, folder: Path
) -> list[str]:
    """Pictures of images spread over a split (neighbours are often frames of one video); returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    device = trainer.args.device
    adapters = {
        name: adapt_to_score(model, data.id2label, trainer.label_synonyms if name == "teacher" else None)
        for name, model in models.items()
    }
    adapters = {name: adapter.to(device).eval() for name, adapter in adapters.items() if adapter.label_map is not None}
    samples = []
    count = min(NUM_PICTURES, len(data))
    for index in range(count):
        sample = data[index * len(data) // count]
        predictions = {name: predict_sample(adapter, sample, trainer.args) for name, adapter in adapters.items()}
        named = {
            "distilled" if name == "student" and "teacher" in models else name: p for name, p in predictions.items()
        }
        order = [name for name in ("teacher", "baseline", "distilled", "student") if name in named]
        samples.append({**sample, "predictions": {name: named[name] for name in order}})
    errors = [name for name in ("distilled", "student") if name in samples[0]["predictions"]]
    comparison_figure(samples, data.id2label, folder / "comparison.png", errors=errors)
    return ["comparison.png", *_write_bcd_figures(trainer, data, folder)]


@torch.no_grad()
def predict_sample(adapter: DenseAdapter, sample: Sample, config: BCDConfig) -> Tensor:
    """Classes `[H, W]` of one canonical sample, at the label's size, on the CPU."""
    pixel_values = eval_transform(adapter, config.image_size)(**sample)["pixel_values"]
    logits = adapter(pixel_values[None].to(config.device)).logits.float()
    height, width = sample["label"].shape
    return resize(logits, (height, width)).argmax(dim=1)[0].cpu()


def _write_bcd_figures(trainer: BCDTrainer, data: DenseDataset, folder: Path) -> list[str]:
    """Boundary maps and a relation map of teacher and student, as the BCD loss sees them."""
    losses = trainer.distiller.criterion.losses
    if trainer.teacher is None or "bcd" not in losses or trainer.is_fsdp_enabled:  # sharded weights cannot run here
        return []
    loss = losses["bcd"]
    assert isinstance(loss, BCDLoss)
    sample = data[0]
    student = trainer.distiller.student
    pixel_values = eval_transform(student, trainer.args.image_size)(**sample)["pixel_values"]
    pixel_values = pixel_values[None].to(trainer.args.device)
    trainer.distiller.eval()
    with torch.no_grad():
        maps = loss.inspect(student(pixel_values), trainer.teacher(pixel_values), spatial_size(pixel_values))
    boundaries = {"teacher": maps["teacher_boundary"][0].cpu(), "student": maps["student_boundary"][0].cpu()}
    boundary_figure(sample["image"], boundaries, folder / "boundaries.png")

    height, width = maps["teacher_features"].shape[-2:]
    point = (height * 2 // 3, width // 2)
    relations = {}
    for name in ("teacher", "student"):
        positions = relation_features(maps[f"{name}_features"])[0]
        row = point[0] * width + point[1]
        gram = positions[row] @ positions.T
        gram[row] = float("-inf")  # the diagonal is left out of the loss too
        relations[name] = gram.softmax(dim=0).view(height, width).cpu()
    original = sample["image"].size
    pixel = (int((point[0] + 0.5) * original[1] / height), int((point[1] + 0.5) * original[0] / width))
    relation_figure(sample["image"], relations, pixel, folder / "relations.png")
    return ["boundaries.png", "relations.png"]
