"""The card of a student: what it is, how it was made, what it scored; nothing that the run did not measure."""

from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from transformers import PreTrainedModel

from .data import DenseDatasets
from .trainer import BCDTrainer


TITLES = {"teacher": "teacher", "baseline": "student, not distilled", "student": "student, distilled"}
METRICS = ("mean_iou", "boundary_f@3", "boundary_iou", "completeness", "connectivity")
VERSIONS = ("hf_bcd", "transformers", "torch", "timm", "datasets", "accelerate")


def write_card(
    folder: Path,
    trainer: BCDTrainer,
    models: Mapping[str, PreTrainedModel],
    results: Mapping[str, Any],
    data: DenseDatasets,
    figures: list[str],
) -> None:
    """Writes README.md.

    Args:
        folder: the run's folder.
        trainer: the trainer of the student.
        models: `teacher`, `baseline`, `student`, those that exist.
        results: contents of results.json.
        data: the data set.
        figures: paths of pictures, relative to the folder.
    """
    args, split = trainer.args, data["train"]
    tags = ["image-segmentation", "semantic-segmentation", "hf_bcd"]
    criterion = trainer.distiller.criterion
    if trainer.teacher is not None:
        tags.append("knowledge-distillation")
    metadata = {"library_name": "transformers", "pipeline_tag": "image-segmentation", "tags": tags}
    rows = [
        {
            "name": TITLES[name] if trainer.teacher is not None else "model",
            "architecture": describe_architecture(models[name]),
            "parameters": sum(p.numel() for p in models[name].parameters()) / 1e6,
            "scores": [results[name][metric] for metric in METRICS],
        }
        for name in TITLES
        if name in results and name in models
    ]
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files("hf_bcd") / "templates" / name).read_text()),
        autoescape=False,  # Markdown; values that are not ours pass through `escape_markdown`
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = escape_markdown
    text = environment.get_template("model_card.md").render(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        title=folder.resolve().name,
        architecture=describe_architecture(trainer.student),
        teacher=describe_architecture(models["teacher"]) if "teacher" in models else None,
        dataset=split.name,
        num_train=len(split),
        rows=rows,
        metrics=METRICS,
        protocol=results.get("protocol"),
        figures=figures,
        losses=criterion.weights,
        decays=sorted(criterion.decays),
        citations=[loss.citation for loss in criterion.losses.values()],
        schedule={
            "steps": trainer.state.global_step,
            "images a step": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "crop": f"{args.crop_size} x {args.crop_size}",
            "optimizer": f"{getattr(args.optim, 'value', args.optim)} ({args.optim_args or 'default options'})",
            "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
            "weight decay": args.weight_decay,
            "seed": args.seed,
            "processes": args.world_size,
        },
        per_class=list(zip(split.id2label.values(), results["student"]["per_class_iou"], strict=True))
        if "student" in results
        else [],
        versions={name: version(name) for name in VERSIONS},
    )
    (folder / "README.md").write_text(text)


def describe_architecture(model: PreTrainedModel) -> str:
    """Short name of a model: its checkpoint, or its head and backbone."""
    config = model.config
    if config.model_type == "timm_segmentation":
        return f"{config.head} on {config.backbone}"
    source = config.name_or_path
    return source if source and not Path(source).exists() else type(model).__name__


def escape_markdown(text: object) -> str:
    """Makes a value from a data set or a user inert in Markdown and HTML."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#|!" else c for c in escaped.replace("\n", " "))
