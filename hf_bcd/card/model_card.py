"""The card of a student: what it is, how it was made, what it scored; nothing that the run did not measure."""

import math
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from ..data import DenseDatasets
from ..data.labels import IGNORE_INDEX
from ..export.onnx_folder import onnx_section
from ..utils.text import one_line, redacted
from .escaping import code_block, escape_markdown, hub_link
from .licences import licence_of, student_licence
from .provenance import (
    Origin,
    catalog_row,
    citations_of,
    commit_of_package,
    describe_architecture,
    describe_arguments,
    describe_baseline,
    describe_checkpoint,
    describe_command,
    describe_dataset,
    describe_hardware,
    describe_recipe,
    describe_schedule,
    describe_start,
    hub_dataset,
    hub_id,
    licence_link,
    methods_of,
    spec_of,
    starting_checkpoint,
    starts_at_random,
)
from .usage import usage_snippets


TITLES = {"teacher": "teacher", "baseline": "student, not distilled", "student": "student, distilled"}
METRICS = {
    "mean_iou": "mIoU",
    "overall_accuracy": "pixel accuracy",
    "mean_accuracy": "mean class accuracy",
    "boundary_f@1": "boundary F @ 1 px",
    "boundary_f@3": "boundary F @ 3 px",
    "boundary_f@5": "boundary F @ 5 px",
    "boundary_iou": "boundary IoU",
    "completeness": "completeness",
    "connectivity": "connectivity",
    "missed": "missed regions",
}
HEADLINE = ("mean_iou", "overall_accuracy", "boundary_f@3", "boundary_iou", "completeness", "connectivity")
VERSIONS = ("hf_bcd", "transformers", "torch", "timm", "datasets", "accelerate", "huggingface_hub")
PEOPLE = {"person", "people", "pedestrian", "rider", "bicyclist", "cyclist"}
NUM_WORST = 5


def write_card(
    folder: Path,
    trainer: Any,
    models: Mapping[str, PreTrainedModel],
    results: Mapping[str, Any],
    data: DenseDatasets,
    figures: list[str],
    origin: Origin | None = None,
) -> None:
    """Writes README.md beside the saved student.

    Args:
        folder: the run's folder.
        trainer: the trainer of the student.
        models: `teacher`, `baseline`, `student`, those that exist.
        results: contents of results.json.
        data: the data set.
        figures: paths of pictures, relative to the folder.
        origin: the command line, where there was one.
    """
    train, terms = data["train"], catalog_row(data["train"], origin)
    repository = str(trainer.hub.repo_id)
    start, teacher = starting_checkpoint(trainer.student, origin, "student"), trainer.teacher and models.get("teacher")
    teacher_id = None if teacher is None else hub_id(teacher)
    teacher_start = None if teacher is None else starting_checkpoint(teacher, origin, "teacher")
    licences = {name: licence_of(name) for name in (start, teacher_start) if name is not None}
    elsewhere = [
        spec_of(origin, role) for role, found in (("student", start), ("teacher", teacher_start)) if not found
    ]
    unknown = [None for spec in elsewhere if spec is not None and not starts_at_random(spec)]  # terms of local weights
    dataset_id, revision = hub_dataset(train)
    scores = {name: finite(results[name]) for name in TITLES if name in results}
    protocol = results.get("protocol", {})
    metadata = card_metadata(
        repository,
        start,
        tags=[*methods_of(trainer), *([] if teacher is None else ["knowledge-distillation"])]
        + ([f"teacher:{teacher_id}"] if teacher_id else []),
        dataset=(dataset_id, revision),
        licence=student_licence([*licences.values(), *unknown]),
        scores=scores.get("student", {}),
        protocol=protocol,
    )
    context = {
        "metadata": metadata.to_yaml(),
        "title": repository.rpartition("/")[2],
        "architecture": describe_architecture(trainer.student),
        "teacher": None if teacher is None else describe_checkpoint(teacher, origin),
        "start": describe_start(start, origin),
        "train": train,
        "ignore_index": IGNORE_INDEX,
        "has_scores": bool(scores),
        "columns": [TITLES[name] if teacher is not None else "model" for name in TITLES if name in scores],
        "rows": headline_rows(scores, models, protocol.get("cost", {})),
        "cost": protocol.get("cost", {}).get("student"),
        "device": protocol.get("device"),
        "verdict": verdict(scores) if teacher is not None else "",
        "baseline": describe_baseline(models, origin) if "baseline" in scores else None,
        "protocol": protocol,
        "figures": figures,
        "classes": class_rows(train.id2label, results),
        "class_columns": [TITLES[name] if teacher is not None else "IoU" for name in TITLES if name in results],
        "worst": worst_classes(train.id2label, results.get("student", {})),
        "snippets": usage_snippets(folder, repository, data[protocol.get("split", "train")]),
        "onnx": onnx_section(folder, repository),
        "recipe": describe_recipe(trainer),
        "schedule": describe_schedule(trainer),
        "dataset": describe_dataset(data, dataset_id, revision, terms),
        "licences": licences,
        "restricted": [name for name, licence in licences.items() if licence is not None and not licence.commercial],
        "chosen_licence": metadata.get("license"),
        "shows_people": train.name != "synthetic" and bool(PEOPLE & {n.casefold() for n in train.id2label.values()}),
        "command": describe_command(trainer, origin),
        "arguments": describe_arguments(origin),
        "commit": commit_of_package(),
        "versions": {name: version(name) for name in VERSIONS},
        "hardware": describe_hardware(trainer),
        "citations": citations_of(trainer),
    }
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files(__package__) / "templates" / name).read_text()),
        autoescape=False,  # Markdown; values that are not ours pass through `md`, `code` or a link
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"md": escape_markdown, "code": code_block, "hub": hub_link, "page": licence_link}
    text = environment.get_template("model_card.md").render(context)
    (folder / "README.md").write_text(redacted(text, token=trainer.args.hub_token))


def card_metadata(
    repository: str,
    start: str | None,
    *,
    tags: list[str],
    dataset: tuple[str | None, str | None],
    licence: Mapping[str, str],
    scores: Mapping[str, float],
    protocol: Mapping[str, Any],
) -> ModelCardData:
    """The card's YAML. Shares are in percent, as in the tables.

    Args:
        repository: name of the model.
        start: checkpoint that the student started from, on the Hub.
        tags: those that are peculiar to this model.
        dataset: id and revision on the Hub, where the data came from there.
        licence: of `student_licence`.
        scores: the student's finite scores.
        protocol: how they were measured.
    """
    name = one_line(protocol.get("dataset", ""))
    arguments = {key: value for key, value in protocol.items() if key not in ("cost", "device")}
    measured = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            dataset_type=dataset[0] or name,
            dataset_name=name,
            dataset_split=one_line(protocol["split"]),
            dataset_revision=dataset[1],
            dataset_args=clean(arguments),
            metric_type=key,
            metric_name=title,
            metric_value=value,
        )
        for key, title, value in [
            *((key, f"{title} (%)", round(100 * scores[key], 3)) for key, title in METRICS.items() if key in scores),
            *((key, "fragments of a region", round(scores[key], 3)) for key in ("fragments",) if key in scores),
        ]
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        **clean(licence),
        **({"base_model": start, "base_model_relation": "finetune"} if start else {}),
        tags=clean(["image-segmentation", "semantic-segmentation", *tags, "hf_bcd"]),
        datasets=[dataset[0]] if dataset[0] else None,
        metrics=["mean_iou", "accuracy"] if measured else None,
        **({"eval_results": measured, "model_name": one_line(repository.rpartition("/")[2])} if measured else {}),
    )


def clean(value: Any) -> Any:
    """The value with every text in one line, so that none can end the block of YAML."""
    if isinstance(value, Mapping):
        return {one_line(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return one_line(value) if isinstance(value, str) else value


def finite(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores that are numbers; a data set without large regions, for one, has no connectivity."""
    return {key: value for key, value in scores.items() if isinstance(value, int | float) and math.isfinite(value)}


# ---- What was measured -----------------------------------------------------------------------------------------------


def headline_rows(
    scores: Mapping[str, Mapping[str, float]],
    models: Mapping[str, PreTrainedModel],
    costs: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, list[str]]]:
    """Rows of the table of models: a title, then a cell a model, empty where nothing was measured."""
    names = [name for name in TITLES if name in scores]
    sizes = {tuple(cost["size"]) for cost in costs.values()}

    def cells(values: Mapping[str, str]) -> list[str]:
        return [values.get(name, "") for name in names]

    def at(cost: Mapping[str, Any]) -> str:
        return f" ({cost['size'][0]} x {cost['size'][1]})" if len(sizes) > 1 else ""

    rows = [
        (
            "",
            cells(
                {
                    name: escape_markdown(hub_id(model) or describe_architecture(model))
                    for name, model in models.items()
                }
            ),
        )
    ]
    rows += [
        ("parameters (M)", cells({name: three_digits(cost["parameters"] / 1e6) for name, cost in costs.items()})),
        ("GMACs", cells({name: three_digits(cost["macs"] / 1e9) + at(cost) for name, cost in costs.items()})),
        ("latency (ms)", cells({name: three_digits(cost["latency_ms"]) + at(cost) for name, cost in costs.items()})),
        ("weights (MB)", cells({name: three_digits(cost["weight_bytes"] / 1e6) for name, cost in costs.items()})),
    ]
    rows += [
        (
            f"{METRICS[key]} (%)",
            cells({name: f"{100 * scores[name][key]:.2f}" for name in names if key in scores[name]}),
        )
        for key in HEADLINE
    ]
    return [(title, row) for title, row in rows if any(row)]


def three_digits(value: float) -> str:
    """A positive number with three significant digits, more if it needs them before the point, and no exponent."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, digits)}f}"


def verdict(scores: Mapping[str, Mapping[str, float]]) -> str:
    """What distillation did to the mIoU, in plain words."""
    value = {name: 100 * metrics["mean_iou"] for name, metrics in scores.items() if "mean_iou" in metrics}
    if "student" not in value or "baseline" not in value:
        return "The student was not trained without its teacher, so this run does not tell what distillation added."
    gain = value["student"] - value["baseline"]
    numbers = f"{value['baseline']:.2f} to {value['student']:.2f}"
    if round(gain, 2) <= 0:
        change = f"lowered mIoU by {-gain:.2f} points" if round(gain, 2) < 0 else "left mIoU unchanged"
        text = f"**Distillation {change} in this run** ({numbers})."
    else:
        text = f"**Distillation raised mIoU by {gain:.2f} points** ({numbers})."
    if "teacher" in value:
        gap = value["teacher"] - value["baseline"]
        if round(gap, 2) <= 0:
            text += " The teacher itself is no better than the undistilled student here."
        elif round(gain, 2) > 0:
            text += f" That closes {100 * gain / gap:.0f} % of the gap of {gap:.2f} points to the teacher."
    return f"{text} One run, one seed: the spread between seeds was not measured."


def class_rows(id2label: Mapping[int, str], results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Name and IoU of each class in percent, a cell a model; classes absent from truth and predictions are left out."""
    columns = [results[name]["per_class_iou"] for name in TITLES if name in results]
    rows = []
    for index, label in id2label.items():
        values = [column[index] for column in columns]
        if any(math.isfinite(value) for value in values):
            rows.append((label, [f"{100 * value:.2f}" if math.isfinite(value) else "" for value in values]))
    return rows


def worst_classes(id2label: Mapping[int, str], scores: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The classes with the lowest IoU (percent), worst first; none where the table of all is hardly longer."""
    iou = enumerate(scores.get("per_class_iou", []))
    present = sorted((100 * value, id2label[index]) for index, value in iou if math.isfinite(value))
    return [(label, value) for value, label in present[:NUM_WORST]] if len(present) > NUM_WORST else []
