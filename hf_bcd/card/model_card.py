"""The card of a student: what it is, how it was made, what it scored; nothing that the run did not measure."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..tasks import TASKS
from ..utils.files import write_text
from ..utils.text import one_line, redacted
from .escaping import escape_markdown, render
from .licences import licence_of, student_licence
from .record import RANDOM, RunRecord
from .usage import export_sections


STUDENTS = {"baseline": "student, not distilled", "student": "student, distilled"}
PEOPLE = {"person", "people", "pedestrian", "rider", "bicyclist", "cyclist"}
COSTS = {
    "parameters": ("parameters (M)", 1e6), "macs": ("GMACs", 1e9), "latency_ms": ("latency (ms)", 1),
    "weight_bytes": ("weights (MB)", 1e6),
}  # fmt: skip
NUM_WORST = 5


def write_card(folder: Path, record: RunRecord) -> None:
    """Writes README.md beside the student that is saved in `folder`."""
    student, teachers = record.models["student"], list(record.teachers.values())
    bases = [student, *teachers]
    licences = {model.start: licence_of(model.start) for model in bases if model.start}
    unknown = [None for model in bases if not model.start and model.start_words not in ("", RANDOM)]
    metadata = card_metadata(record, student_licence([*licences.values(), *unknown]))
    scored = {name: finite(record.results[name]) for name in titles(record) if name in record.results}
    context = {
        "metadata": metadata.to_yaml(),
        "record": record,
        "task": TASKS[record.task],
        "student": student,
        "teachers": teachers,
        "several": len(teachers) > 1,
        "best": best_teacher(record, scored),
        "protocol": record.results.get("protocol", {}),
        "scored": scored,
        "rows": headline_rows(record, scored),
        "classes": class_rows(record),
        "worst": worst_classes(record),
        "exports": export_sections(folder, record.repository),
        "licences": licences,
        "restricted": [name for name, terms in licences.items() if terms is not None and not terms.commercial],
        "chosen_licence": metadata.get("license_name") or metadata.get("license"),
        "people": PEOPLE & {name.casefold() for name in record.id2label.values()},
        "titles": titles(record),
    }
    text = render("model_card.md", **context)
    write_text(folder / "README.md", redacted(text, token=record.token))


def titles(record: RunRecord) -> dict[str, str]:
    """What the columns of the card's tables are called, in their order, by role."""
    several = len(record.teachers) > 1
    numbered = {role: f"teacher {number}" if several else "teacher" for number, role in enumerate(record.teachers, 1)}
    return numbered | STUDENTS


def best_teacher(record: RunRecord, scored: Mapping[str, Mapping[str, float]]) -> str | None:
    """The role of the teacher with the best first score; None if no teacher has one."""
    key = TASKS[record.task].scores[0].key
    found = [role for role in record.teachers if key in scored.get(role, {})]
    return max(found, key=lambda role: scored[role][key], default=None)


def headline_rows(record: RunRecord, scored: Mapping[str, Mapping[str, float]]) -> list[tuple[str, list[str]]]:
    """Rows of the table of models: a title, then a cell for each model, empty where nothing was measured."""
    costs = record.results.get("protocol", {}).get("cost", {})
    one_size = len({tuple(cost["size"]) for cost in costs.values()}) == 1

    def cost_cell(name: str, key: str, unit: float) -> str:
        if name not in costs:
            return ""
        height, width = costs[name]["size"]
        sized = not one_size and key in ("macs", "latency_ms")
        return three_digits(costs[name][key] / unit) + (f" ({height} x {width})" if sized else "")

    models = [record.models[name] for name in scored]
    rows = [("model", [escape_markdown(model.repository or model.architecture) for model in models])]
    rows += [(title, [cost_cell(name, key, unit) for name in scored]) for key, (title, unit) in COSTS.items()]
    rows += [
        (score.label, [score.text(found[score.key]) if score.key in found else "" for found in scored.values()])
        for score in TASKS[record.task].headline
    ]
    return [(title, cells) for title, cells in rows if any(cells)]


def class_rows(record: RunRecord) -> list[tuple[str, list[str]]]:
    """Name and score of each class, a cell for each model; classes without any score are left out."""
    score = TASKS[record.task].per_class
    columns = [record.results[name][score.key] for name in titles(record) if name in record.results]
    rows = [
        (label, [score.text(column[index]) if math.isfinite(column[index]) else "" for column in columns])
        for index, label in record.id2label.items()
    ]
    return [(label, cells) for label, cells in rows if any(cells)]


def worst_classes(record: RunRecord) -> list[tuple[str, str]]:
    """The classes with the lowest scores of the student, worst first; none where the table of all is hardly longer."""
    score = TASKS[record.task].per_class
    values = enumerate(record.results.get("student", {}).get(score.key, []))
    present = sorted((value, record.id2label[index]) for index, value in values if math.isfinite(value))
    return [(label, score.text(value)) for value, label in present[:NUM_WORST]] if len(present) > NUM_WORST else []


def card_metadata(record: RunRecord, licence: Mapping[str, str]) -> ModelCardData:
    """The card's YAML, in which no value has a second line that could end it; fractions are in percent, as in the tables."""
    task, data, protocol = TASKS[record.task], record.data, record.results.get("protocol", {})
    student, teachers = record.models["student"], record.teachers.values()
    scores, name = finite(record.results.get("student", {})), one_line(protocol.get("dataset", ""))
    repository = data.repository if data is not None else None
    measured = [
        EvalResult(
            task_type=task.pipeline_tag,
            task_name=task.title.capitalize(),
            dataset_type=repository or name,
            dataset_name=name,
            dataset_split=one_line(protocol["split"]),
            dataset_revision=data.revision if data is not None else None,
            dataset_args={
                key: protocol[key] for key in ("num_images", "num_labels", "classes_averaged") if key in protocol
            },
            metric_type=score.key,
            metric_name=score.label,
            metric_value=round(score.scale * scores[score.key], 3),
        )
        for score in task.scores
        if score.key in scores
    ]
    tags = [task.pipeline_tag, task.name, *(name.rpartition("/")[2] for name in record.methods)]
    if teachers:
        tags += ["knowledge-distillation", *(f"teacher:{one.repository}" for one in teachers if one.repository)]
    evaluation = {"eval_results": measured, "model_name": one_line(record.repository.rpartition("/")[2])}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task.pipeline_tag,
        **{key: one_line(value) for key, value in licence.items()},
        **({"base_model": student.start, "base_model_relation": "finetune"} if student.start else {}),
        tags=list(dict.fromkeys(one_line(tag) for tag in [*tags, "hf_bcd"])),
        datasets=[repository] if repository else None,
        metrics=list(task.metrics) if measured else None,
        **(evaluation if measured else {}),
    )


def finite(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores that are numbers; a data set without large regions, for one, has no connectivity."""
    return {key: value for key, value in scores.items() if isinstance(value, int | float) and math.isfinite(value)}


def three_digits(value: float) -> str:
    """A positive number with three significant digits, more if it needs them before the point, and no exponent."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, digits)}f}"
