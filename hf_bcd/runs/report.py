"""A finished run's results.json, pictures and model card, all from numbers that it measured."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters import DenseAdapter, FrozenTeacher, image_processor
from ..card.model_card import write_card
from ..data import DenseDataset, DenseDatasets
from ..figures.bcd import boundary_figure, relation_figure
from ..losses.bcd import BCDLoss
from ..losses.context import relation_features
from ..tasks import Task, task_of
from ..training.config import BCDConfig
from ..training.evaluation import on_cpu, predict_batch, with_transform
from ..training.recording import hub_dataset, record_run
from ..training.teachers import by_role, parts_of
from ..training.trainer import BCDTrainer
from ..utils.costs import device_name, measure_costs
from ..utils.files import write_json
from ..utils.text import shortened


logger = logging.getLogger(__name__)

NUM_PICTURES = 4


def metrics_table(scores: Mapping[str, Mapping[str, Any]], task: Task) -> str:
    """A plain-text table of the task's main scores, one row a model; without those that no model has."""
    shown = [score for score in task.headline if any(score.text(values[score.key]) for values in scores.values())]
    rows = [["", *(score.title for score in shown)]]
    for name, values in scores.items():
        rows.append([name, *(score.text(values[score.key]) for score in shown)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def protocol(
    data: DenseDataset, student: DenseAdapter, config: BCDConfig, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """How the numbers were measured, in words that fix them."""
    options = student.processor_options(**task_of(data).processor_size(config))
    task = task_of(data)
    return {
        "dataset": data.name,
        "split": data.split,
        "num_images": len(data),
        "num_labels": data.num_labels,
        "classes_averaged": scores["classes_averaged"],
        "input": task.sized(options["size"]) if options["do_resize"] else "original size",
        **({"ignore_index": data.ignore_index} if data.ignore_index is not None else {}),
        "label_rule": data.rule.in_words(),
        **task.protocol,
    }


def write_report(
    trainer: BCDTrainer,
    models: Mapping[str, DenseAdapter],
    scores: Mapping[str, Mapping[str, Any]],
    data: DenseDatasets,
    split: str | None,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Writes results.json, figures/*.png and README.md into the run's folder; label_map.json if a teacher needed
    one, of several by their names.

    Args:
        trainer: the trainer of the student.
        models: `teacher` (`teacher_2`, ...), `baseline` and `student`, as far as they exist.
        scores: of the models that were evaluated.
        split: the split of the scores; None when there is none to evaluate on.
        recipe: content of the command line and the recipes that it names, where there was one.
    """
    folder = Path(trainer.args.output_dir or ".")
    results: dict[str, Any] = dict(scores)
    figures: list[str] = []
    write_json(folder / "results.json", results)  # nothing that follows may lose the scores
    if split is not None:
        if "student" in scores:
            results["protocol"] = protocol(data[split], trainer.distiller.student, trainer.args, scores["student"])
            if hub_dataset(data[split]) and data[split].revision:
                results["protocol"]["dataset_revision"] = data[split].revision
            results["protocol"] |= measured_costs(
                trainer, {name: models[name] for name in scores if name in models}, data[split]
            )
        write_json(folder / "results.json", results)
        try:
            figures = write_figures(trainer, models, data[split], folder / "figures")
        except Exception as error:  # whatever a picture's shape does to a figure, the run stands
            logger.warning("no figures, because one failed: %s", shortened(f"{type(error).__name__}: {error}"))
    label_maps = {name: part.label_map for name, part in parts_of(trainer.teacher).items()}
    needed = {name: one.to_dict() for name, one in label_maps.items() if one is not None and not one.is_identity}
    if needed:
        write_json(folder / "label_map.json", needed.get("", needed))
    paths = [f"figures/{name}" for name in figures]
    write_card(folder, record_run(trainer, models, results, data, paths, recipe))
    trainer.has_card = True


def shown_to(model: DenseAdapter, data: DenseDataset, config: BCDConfig) -> Any:
    """The split as evaluation shows it to a model."""
    task = task_of(data)
    processor = image_processor(model, **task.processor_size(config))
    return with_transform(data, task.eval_transform(processor), config.seed)


def measured_costs(trainer: BCDTrainer, models: Mapping[str, DenseAdapter], data: DenseDataset) -> dict[str, Any]:
    """The cost of each model on an image of the split as evaluation shows it, and the device that it was measured on."""
    device, shown = trainer.args.device, {}
    for name, model in models.items():
        pixel_values = shown_to(model, data, trainer.args)[0]["pixel_values"][None]
        model = model.to(device)
        with torch.no_grad():
            shown[name] = (model.model, model.normalize(pixel_values.to(device)).to(model.model.dtype))
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"cost": measure_costs(shown), "device": {"name": device_name(device), **threads}}


def write_figures(
    trainer: BCDTrainer, models: Mapping[str, DenseAdapter], data: DenseDataset, folder: Path
) -> list[str]:
    """Pictures of images spread over a split (neighbours are often frames of one video); returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    task, config = task_of(data), trainer.args
    teachers = by_role(parts_of(trainer.teacher))
    roles = {role: f"teacher {number}" if len(teachers) > 1 else "teacher" for number, role in enumerate(teachers, 1)}
    roles |= {"baseline": "baseline", "student": "distilled" if teachers else "student"}
    scored = {title: models[name] for name, title in roles.items() if name in models and models[name].label_map}
    indices = [index * len(data) // NUM_PICTURES for index in range(NUM_PICTURES)][: len(data)]
    samples = [{**data[index], "predictions": {}} for index in dict.fromkeys(indices)]
    for title, model in scored.items():
        shown = shown_to(model.to(config.device).eval(), data, config)
        for sample, index in zip(samples, dict.fromkeys(indices), strict=True):
            batch = task.collate([shown[index]])
            batch["pixel_values"] = batch["pixel_values"].to(config.device)
            sample["predictions"][title] = on_cpu(predict_batch(model, task, batch)[0])
    task.comparison(samples, data.id2label, folder / "comparison.png", errors=[roles["student"]])
    return ["comparison.png", *_write_bcd_figures(trainer, data, folder)]


def _write_bcd_figures(trainer: BCDTrainer, data: DenseDataset, folder: Path) -> list[str]:
    """Boundary maps and a relation map of teacher (of several the first that has such) and student, as the BCD loss sees them."""
    criterion = trainer.distiller.criterion
    named = {f"{name}/bcd" if name else "bcd": part for name, part in parts_of(trainer.teacher).items()}
    running = {
        name: part for name, part in named.items() if isinstance(part, FrozenTeacher) and name in criterion.losses
    }
    if not running:
        return []
    name, teacher = next(iter(running.items()))
    loss = criterion.losses[name]
    assert isinstance(loss, BCDLoss)
    student, image = trainer.distiller.finished.eval(), data[0]["image"]
    pixel_values = shown_to(student, data, trainer.args)[0]["pixel_values"][None].to(trainer.args.device)
    with torch.no_grad():
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        ours, theirs = (criterion.seen_by(name, model(pixel_values)) for model in (student, teacher))
        maps = loss.inspect(ours, theirs, size)
    titles = {"teacher": name.rpartition("/")[0] or "teacher", "student": "student"}
    boundaries = {title: maps[f"{role}_boundary"][0].cpu() for role, title in titles.items()}
    boundary_figure(image, boundaries, folder / "boundaries.png")

    height, width = maps["teacher_features"].shape[-2:]
    point = (height * 2 // 3, width // 2)
    relations = {}
    for role, title in titles.items():
        positions = relation_features(maps[f"{role}_features"])[0]
        row = point[0] * width + point[1]
        gram = positions[row] @ positions.T
        gram[row] = float("-inf")  # the diagonal is left out of the loss too
        relations[title] = gram.softmax(dim=0).view(height, width).cpu()
    pixel = (int((point[0] + 0.5) * image.size[1] / height), int((point[1] + 0.5) * image.size[0] / width))
    relation_figure(image, relations, pixel, folder / "relations.png")
    return ["boundaries.png", "relations.png"]
