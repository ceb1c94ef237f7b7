"""Where a student comes from: checkpoints, data, losses, schedule, command and machine, in the words of its card."""

import re
import subprocess
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import yaml
from transformers import PreTrainedModel

from ..adapters.loading import ModelSpec
from ..data import DenseDataset, DenseDatasets
from ..data.labels import IGNORE_INDEX
from ..data.sources.catalog import CATALOG, DatasetSpec
from ..losses.base import DistillationLoss
from ..losses.modules.schedules import Temperature
from ..losses.recipe import LOSSES, options_of
from ..utils.costs import device_name
from ..utils.yaml import yaml_text
from .escaping import REPO_ID, escape_markdown, hub_link, link, shareable_command, shareable_recipe
from .licences import Licence


HEADS = {"psp": "PSPNet", "deeplabv3plus": "DeepLabV3+", "fpn": "FPN"}


@dataclass(frozen=True)
class Origin:
    """What the command line knows of a run and its objects do not.

    Attributes:
        program: what was run, such as `accelerate launch scripts/distill.py`.
        arguments: what followed it.
        model: arguments of the models.
        data: arguments of the data set.
        recipe: what the arguments and the recipes that they name say together.
    """

    program: str
    arguments: tuple[str, ...]
    model: Any
    data: Any
    recipe: Mapping[str, Any] = field(default_factory=dict)


def hub_id(model: PreTrainedModel) -> str | None:
    """The repository that a model was loaded from; None for folders and for models built here."""
    source = model.config.name_or_path or ""
    return source if "/" in source and REPO_ID.fullmatch(source) and not Path(source).exists() else None


def spec_of(origin: Origin | None, role: str) -> ModelSpec | None:
    """How the command line describes the `student` or the `teacher`, if it does."""
    given = None if origin is None else getattr(origin.model, role)
    return None if given is None else ModelSpec.parse(given, role)


def starts_at_random(spec: ModelSpec) -> bool:
    """Whether a model rests on no weights of others."""
    return spec.backbone is not None and not spec.pretrained and spec.weights is None


def starting_checkpoint(model: PreTrainedModel, origin: Origin | None, role: str) -> str | None:
    """The repository of the weights that a model started from, if it did not start at random or from a file.

    Args:
        model: student or teacher; of a teacher that was not trained here these are its own weights.
        origin: the command line, where there was one.
        role: `student` or `teacher`.
    """
    spec = spec_of(origin, role)
    if spec is None or spec.backbone is None:
        return hub_id(model)
    weights = timm.get_pretrained_cfg(spec.backbone) if spec.pretrained else None
    return None if weights is None else weights.hf_hub_id


def describe_start(start: str | None, origin: Origin | None) -> str | None:
    """What the student started from, in Markdown; None where nobody said."""
    if start is not None:
        return hub_link(start)
    spec = spec_of(origin, "student")
    if spec is None:
        return None
    if starts_at_random(spec):
        return "random weights"
    return "weights that timm downloads" if spec.pretrained else "local weights"


def describe_baseline(models: Mapping[str, PreTrainedModel], origin: Origin | None) -> str | None:
    """How the undistilled student was made, in Markdown; None where nobody said."""
    if origin is None:
        return None
    if origin.model.baseline is None:
        return "The undistilled student is the same model, trained without the teacher on the same images, schedule and seed."
    name = hub_id(models["baseline"])
    return f"The undistilled student is {hub_link(name) if name else 'a finished one'}; how it was trained is not known here."


def describe_architecture(model: PreTrainedModel) -> str:
    """Short name of a kind of model: its head and backbone, or its class."""
    config = model.config
    if config.model_type == "timm_segmentation":
        return f"{HEADS[config.head]} on {config.backbone}"
    return type(model).__name__


def describe_checkpoint(model: PreTrainedModel, origin: Origin | None) -> str:
    """The teacher in Markdown: link and revision, or how it was made."""
    if repository := hub_id(model):
        commit = getattr(model.config, "_commit_hash", None)
        return hub_link(repository) + (f" @ {escape_markdown(commit[:12])}" if commit else "")
    text = escape_markdown(describe_architecture(model))
    spec = spec_of(origin, "teacher")
    if spec is None or spec.backbone is None:
        return text
    start = starting_checkpoint(model, origin, "teacher")
    return f"{text}, trained first on the same images{f' from {hub_link(start)}' if start else ''}"


def catalog_row(split: DenseDataset, origin: Origin | None) -> DatasetSpec | None:
    """The catalog's facts about a data set, if it is that one and no namesake."""
    spec = CATALOG.get(split.name)
    if spec is None:
        return None
    named = origin is not None and origin.data.dataset_name == split.name  # a local copy lies in any folder
    return spec if named or split.source in (spec.source, *(copy.repo for copy in spec.hub)) else None


def hub_dataset(split: DenseDataset) -> tuple[str | None, str | None]:
    """Id and revision of the data on the Hub, where they came from there."""
    if "/" not in split.source or not REPO_ID.fullmatch(split.source) or Path(split.source).exists():
        return None, None
    return split.source, split.revision


def commit_of_package() -> str | None:
    """The commit of the checkout that hf_bcd runs from, `-dirty` if files differ from it."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


# ---- How it was made -------------------------------------------------------------------------------------------------


def methods_of(trainer: Any) -> dict[str, DistillationLoss]:
    """The distillation methods of a run by their keys, with those that one of them hosts."""
    named = trainer.distiller.criterion.named_modules()
    return {path.rpartition(".")[2]: loss for path, loss in named if isinstance(loss, DistillationLoss)}


def citations_of(trainer: Any) -> list[str]:
    """BibTeX entries of a run's methods, each once."""
    return list(dict.fromkeys(loss.citation for loss in methods_of(trainer).values()))


def paper_link(source: str) -> str:
    """A paper in Markdown; one of arXiv through the Hub's page, which lists the models that mention it."""
    if paper := re.search(r"\d{4}\.\d{4,5}$", source) if "arxiv.org" in source or "/papers/" in source else None:
        return link(f"arXiv:{paper[0]}", f"https://huggingface.co/papers/{paper[0]}")
    return link(source.removeprefix("https://"), source)


def describe_recipe(trainer: Any) -> list[tuple[str, str]]:
    """What the losses were, in Markdown."""
    criterion = trainer.distiller.criterion
    if trainer.teacher is None:
        return [("loss", "pixel cross-entropy")]
    terms = " + ".join(f"{weight:g} · {escape_markdown(name)}" for name, weight in criterion.weights.items())
    rows = [("loss", f"pixel cross-entropy + {terms}")]
    if criterion.decays:
        names = escape_markdown(", ".join(sorted(criterion.decays)))
        rows.append(("schedule", f"the terms of {names} are multiplied by r(t) = 1 − (t − 1) / t_max at step t"))
    rows += [(f"method of {name}", paper_link(loss.source)) for name, loss in methods_of(trainer).items()]
    for name, loss in criterion.losses.items():
        defaults = options_of(LOSSES[name])
        given = trainer.args.loss_options[name].options
        changed = {k: v for k, v in given.items() if k in defaults and v != defaults[k]}
        if changed:
            listed = ", ".join(f"{key} = {yaml_text(value)}" for key, value in changed.items())
            rows.append((f"options of {name}", escape_markdown(listed)))
        temperatures = [
            f"{inner.removesuffix('_temperature')} {module.value.item():.3g}"
            for inner, module in loss.named_modules()
            if isinstance(module, Temperature)
        ]
        if temperatures:
            rows.append((f"temperatures of {name} at the end", escape_markdown(", ".join(temperatures))))
    if (found := trainer.teacher.label_map).missing or not found.is_identity:
        missing = f"; the teacher lacks {', '.join(found.missing)}" if found.missing else ""
        number = len(found.student) - len(found.missing)
        text = f"{number} of {len(found.student)} are mapped to the teacher's {len(found.teacher)}{missing}"
        rows.append(("classes", escape_markdown(text)))
    levels = {"student": trainer.distiller.student.feature_specs, "teacher": trainer.teacher.feature_specs}
    for name, specs in levels.items():
        listed = ", ".join(f"{level} ({spec.channels} channels)" for level, spec in specs.items())
        rows.append((f"feature levels of the {name}", escape_markdown(listed)))
    return rows


def describe_schedule(trainer: Any) -> dict[str, str]:
    """How long, on what and with which optimizer the student was trained."""
    args = trainer.args
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    resized = f"short side to {args.image_size}, then " if args.image_size else ""
    warmup = args.get_warmup_steps(trainer.state.max_steps)
    jitter = f", brightness, contrast and saturation jitter {args.color_jitter:g}" if args.color_jitter else ""
    return {
        "steps": str(trainer.state.global_step),
        "images a step": str(args.train_batch_size * args.world_size * args.gradient_accumulation_steps),
        "augmentation": f"{resized}scale {args.scale_min:g} to {args.scale_max:g}, crop {args.crop_size} x {args.crop_size}, "
        f"horizontal flip{jitter}",
        "optimizer": f"{getattr(args.optim, 'value', args.optim)}{describe_options(trainer)}",
        "learning rate": f"{args.learning_rate:g}, {scheduler} schedule"
        + (f" after {warmup} step{'s' * (warmup > 1)} of warm-up" if warmup else ""),
        "gradient clipping": f"norm {args.max_grad_norm:g}" if args.max_grad_norm else "none",
        "weight decay": f"{args.weight_decay:g}",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": str(args.seed),
        "processes": str(args.world_size),
    }


def describe_options(trainer: Any) -> str:
    """Momentum and the like, from the optimizer itself: the arguments may hold options that it does not read."""
    group = {} if trainer.optimizer is None else trainer.optimizer.param_groups[0]
    options = [f"{name} {group[name]}" for name in ("momentum", "nesterov", "betas", "eps") if group.get(name)]
    return f" ({', '.join(options)})" if options else ""


def describe_dataset(
    data: DenseDatasets, dataset_id: str | None, revision: str | None, terms: DatasetSpec | None
) -> list[tuple[str, str]]:
    """The data block in Markdown."""
    train = data["train"]
    name = escape_markdown(train.name)
    if dataset_id is not None:
        name = hub_link(dataset_id, "datasets/") + (f" @ {escape_markdown(revision)}" if revision else "")
    elif terms is not None and terms.source.startswith("http"):
        name = link(train.name, terms.source)
    elif terms is not None:
        name = f"{name} ({escape_markdown(terms.source)})"
    rows = [("data set", name)]
    counts = [f"{split}: {len(part) if isinstance(part, Sized) else 'streamed'}" for split, part in data.items()]
    rows.append(("images", escape_markdown(", ".join(counts))))
    rows.append(("labels", f"{train.num_labels} classes; {escape_markdown(describe_rule(train))}"))
    if terms is not None:
        rows.append(("terms of the data", escape_markdown(terms.licence)))
    return rows


def describe_rule(split: DenseDataset) -> str:
    """How stored ids become classes, in words."""
    rule = split.rule
    text = f"the stored ids are the class ids, and {IGNORE_INDEX} is void"
    if rule.reduce_zero:
        text = f"class k is stored as k + 1, and 0 and {IGNORE_INDEX} are void"
    elif rule.mapping:
        text = f"{len(rule.mapping)} stored ids are mapped to class ids or void, and no other id occurs"
    void = f"; stored {', '.join(map(str, rule.void_ids))} void too" if rule.void_ids else ""
    return f"{text}{void}; void pixels are ignored"


def describe_command(trainer: Any, origin: Origin | None) -> str | None:
    """The command line, without what is private."""
    if origin is None:
        return None
    token = trainer.args.hub_token
    return shareable_command(origin.program, origin.arguments, [token] if token else [])


def describe_arguments(origin: Origin | None) -> str | None:
    """One recipe, on its own, that says what the command line and its recipes do, without what is private."""
    if origin is None or not origin.recipe:
        return None
    return yaml.safe_dump(shareable_recipe(origin.recipe), sort_keys=False, allow_unicode=True, width=100)


def describe_hardware(trainer: Any) -> str:
    """What the run was trained on and how long it took."""
    args = trainer.args
    text = (
        device_name(args.device)
        if args.world_size == 1
        else f"{args.world_size} processes on {device_name(args.device)}"
    )
    if not trainer.train_seconds:
        return text
    return f"{text}; training the student took {describe_seconds(trainer.train_seconds)}, evaluations apart"


def describe_seconds(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def licence_link(licence: Licence | None) -> str:
    """Terms in Markdown."""
    if licence is None:
        return "unknown: read its card"
    return link(licence.name, licence.link) if licence.link else escape_markdown(licence.name)
