"""A trainer's run in plain values, for the card of its student."""

import subprocess
from collections.abc import Mapping, Sequence, Sized
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import timm
from torch import Tensor
from transformers import TrainerState

from ..adapters import DenseAdapter, LabelMap
from ..adapters.base import REPO_ID
from ..adapters.specs import ModelSpec
from ..card.escaping import shareable_recipe
from ..card.model_card import write_card
from ..card.record import RANDOM, DataRecord, ModelRecord, RunRecord
from ..card.usage import usage_snippets
from ..data import DenseDataset, DenseStream
from ..data.sources.catalog import CATALOG
from ..losses import DistillationLoss
from ..losses.modules.schedules import Temperature
from ..losses.recipe import options_of
from ..stores import StoredTeacher
from ..tasks import Task
from ..utils.costs import device_name
from .config import BCDConfig
from .distiller import Distiller
from .hub import HubCallback
from .quantization import RATE, steps_before
from .teachers import Teacher, Teachers, by_role, parts_of


HEADS = {
    "psp": "PSPNet",
    "deeplabv3plus": "DeepLabV3+",
    "fpn": "FPN",
    "retinanet": "RetinaNet",
    "gfl": "GFL",
    "mask_rcnn": "Mask R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
}
PACKAGES = ("transformers", "torch", "timm", "datasets", "accelerate", "huggingface_hub")


class TrainedRun(Protocol):
    """The facts of a trainer that a card is made of."""

    args: BCDConfig
    task: Task
    teacher: Teacher | Teachers | None
    hub: HubCallback
    state: TrainerState
    optimizer: Any
    train_dataset: Any
    class_weights: Tensor | None

    @property
    def distiller(self) -> Distiller: ...

    @property
    def train_seconds(self) -> float: ...


def write_training_card(trainer: TrainedRun) -> None:
    """Writes README.md beside a student that no run has reported: its training, without scores."""
    data: Any = getattr(trainer.train_dataset, "dataset", None)
    known: Any = {"train": data} if isinstance(data, DenseDataset | DenseStream) else None
    write_card(Path(trainer.args.output_dir or "."), record_run(trainer, {}, {}, known))


def record_run(
    trainer: TrainedRun,
    models: Mapping[str, DenseAdapter],
    results: Mapping[str, Any],
    data: Mapping[str, DenseDataset] | None,
    figures: Sequence[str] = (),
    recipe: Mapping[str, Any] | None = None,
) -> RunRecord:
    """All that the card of a run's student says.

    Args:
        trainer: the trainer of the student.
        models: `teacher` (`teacher_2`, ...) and `baseline`, those that exist.
        results: as in `RunRecord`.
        data: the data set; None for tensors from elsewhere.
        figures: as in `RunRecord`.
        recipe: content of the command line and the recipes that it names, where there was one.
    """
    args, criterion, student = trainer.args, trainer.distiller.criterion, trainer.distiller.student
    repository, folder = str(trainer.hub.repo_id), Path(args.output_dir or ".")
    models = {**models, "student": student}  # which knows its start; the saved one does not
    parts = parts_of(trainer.teacher)
    names = by_role({name: name for name in parts})
    # a stored one is loaded by nobody else
    by_roles = by_role(parts)
    models = {role: part.adapter for role, part in by_roles.items()} | models
    views = {role: part.store.views for role, part in by_roles.items() if isinstance(part, StoredTeacher)}
    shown = None if data is None else data[results.get("protocol", {}).get("split", "train")]
    picture = None if shown is None else next(iter(shown))["image"]
    return RunRecord(
        repository=repository,
        task=trainer.task.name,
        id2label=student.id2label,
        models={
            role: record_model(model, role, recipe, names.get(role, ""))._replace(views=views.get(role, 0))
            for role, model in models.items()
        },
        data=None if data is None else record_data(data, recipe or {}),
        results=results,
        figures=figures,
        snippets=usage_snippets(folder, repository, trainer.task.snippets, picture),
        weights=criterion.weights,
        decays=sorted(criterion.decays),
        methods=record_methods(trainer),
        classes="; ".join(
            f"{name}: {words}" if name else words
            for name, part in parts.items()
            if (words := class_words(part.label_map))
        ),
        schedule=schedule_words(trainer, augmented=data is not None),
        recipe=shareable_recipe(recipe) if recipe else "",
        versions={"hf_bcd": package_version(), **{name: version(name) for name in PACKAGES}},
        hardware=hardware_words(trainer),
        token=args.hub_token,
    )


def record_model(
    model: DenseAdapter, role: str, recipe: Mapping[str, Any] | None = None, name: str = ""
) -> ModelRecord:
    """A model as `student`, `teacher` (`teacher_2`, ...) or `baseline` of a run; `name` is that of one of several teachers."""
    config, start, words, trained_here = model.model.config, model.repo_id, "", None
    timm_head = HEADS.get(config.head) if config.model_type in ("timm_segmentation", "timm_detection") else None
    if role == "baseline":
        trained_here = None if recipe is None else recipe.get(role) is None
    elif (given := given_as(role, recipe or {})) is not None:
        spec = ModelSpec.parse(given, role.partition("_")[0])
        trained_here = role == "student" or not spec.is_finished
        if spec.backbone is not None:
            start = getattr(timm.get_pretrained_cfg(spec.backbone), "hf_hub_id", None) if spec.pretrained else None
            words = "weights that timm downloads" if spec.pretrained else "local weights" if spec.weights else RANDOM
        elif start is None:
            words = "local weights"
    return ModelRecord(
        f"{timm_head} on {config.backbone}" if timm_head else architecture_of(model),
        model.repo_id,
        model.revision,
        start,
        words,
        trained_here,
        {level: spec.channels for level, spec in model.feature_specs.items()},
        name,
    )


def given_as(role: str, recipe: Mapping[str, Any]) -> Any:
    """What a recipe says of a model; of several teachers, live ones come before stored ones, of which it says nothing."""
    kind, _, number = role.partition("_")
    given = recipe.get(kind)
    if kind != "teacher":
        return given
    listed = given if isinstance(given, list) else [] if given is None else [given]
    return dict(enumerate(listed, 1)).get(int(number or 1))


def architecture_of(model: DenseAdapter) -> str:
    """The class of a model; of a backbone of timm its name there."""
    config = model.model.config
    return f"{config.backbone} (timm)" if config.model_type == "timm_backbone" else type(model.model).__name__


def record_data(data: Mapping[str, DenseDataset], recipe: Mapping[str, Any]) -> DataRecord:
    """A data set, with the facts of the catalog if it is the one there and no namesake."""
    train, repository, terms = data["train"], hub_dataset(data["train"]), CATALOG.get(data["train"].name)
    if terms is not None and train.source not in (terms.source, *(copy.repo for copy in terms.hub)):
        terms = terms if recipe.get("dataset_name") == train.name else None  # a local copy lies in any folder
    return DataRecord(
        train.name,
        repository,
        train.revision if repository else None,
        terms and terms.source,
        terms and terms.licence,
        {name: len(split) if isinstance(split, Sized) else None for name, split in data.items()},
        train.rule.in_words(),
        train.notes,
        getattr(train, "num_unlabelled", 0),
    )


def hub_dataset(split: DenseDataset) -> str | None:
    """Hub id of the data, where they came from there."""
    return split.source if REPO_ID.fullmatch(split.source) and not Path(split.source).exists() else None


def record_methods(trainer: TrainedRun) -> dict[str, dict[str, Any]]:
    """Papers, changed options and last temperatures of the distillation methods, with those that one of them hosts."""
    parts, records = trainer.args.loss_parts, {}
    for path, loss in trainer.distiller.criterion.named_modules():
        if isinstance(loss, DistillationLoss):
            name, defaults = path.rpartition(".")[2], options_of(type(loss))
            teacher, _, plain = name.rpartition("/")
            recipe = parts.get(teacher, parts.get("", {}))
            modules = [(key, module) for key, module in loss.named_modules() if isinstance(module, Temperature)]
            records[name] = {
                "source": loss.source,
                "citation": loss.citation,
                "options": {k: v for k, v in (recipe.get(plain) or {}).items() if k in defaults and v != defaults[k]},
                "temperatures": {key.removesuffix("_temperature"): module.value.item() for key, module in modules},
            }
    return records


def class_words(found: LabelMap | None) -> str:
    """How the student's classes lie among the teacher's; empty where they are the same."""
    if found is None:
        return "the teacher has none; it gave features only"
    if found.is_identity:
        return ""
    total, lacking = len(found.student), f"; the teacher lacks {', '.join(found.missing)}" if found.missing else ""
    return f"{total - len(found.missing)} of {total} are mapped to the teacher's {len(found.teacher)}{lacking}"


def class_weight_words(trainer: TrainedRun) -> str:
    """The weight of each class in the supervised loss, and where it comes from."""
    names, weights = trainer.distiller.student.id2label.values(), trainer.class_weights
    assert weights is not None
    shown = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights.tolist(), strict=True))
    counted = "root of the median frequency over a class's own" if trainer.args.class_weights == "auto" else "as given"
    return f"{shown} ({counted})"


def quantization_words(trainer: TrainedRun) -> str:
    """The quantised steps at the end of a run."""
    total = trainer.state.max_steps
    return (
        f"the last {total - steps_before(total)} steps with fake int8, from {RATE * trainer.args.learning_rate:g} to 0"
    )


def schedule_words(trainer: TrainedRun, augmented: bool = True) -> dict[str, str]:
    """How the student was trained; `augmented` says whether its samples went through our augmentation."""
    args, warmup = trainer.args, trainer.args.get_warmup_steps(trainer.state.max_steps)
    scheduler, optimizer = (getattr(option, "value", option) for option in (args.lr_scheduler_type, args.optim))
    # from the optimizer itself: the arguments may hold options that it does not read
    groups: Any = getattr(trainer.optimizer, "param_groups", [{}])
    group = groups[0]
    told = [name for name in ("momentum", "nesterov", "betas", "eps") if group.get(name)]
    options = ", ".join(f"{name} {group[name]}" for name in told)
    return {
        "steps": str(trainer.state.global_step),
        "images a step": str(args.train_batch_size * args.world_size * args.gradient_accumulation_steps),
        **({"augmentation": trainer.task.augmentation(args)} if augmented else {}),
        "optimizer": f"{optimizer} ({options})" if options else str(optimizer),
        "learning rate": f"{args.learning_rate:g}, {scheduler} schedule"
        + (f" after {warmup} step{'s' * (warmup > 1)} of warm-up" if warmup else ""),
        **({} if trainer.class_weights is None else {"weights of classes": class_weight_words(trainer)}),
        **({"quantisation": quantization_words(trainer)} if args.quantize else {}),
        "gradient clipping": f"norm {args.max_grad_norm:g}" if args.max_grad_norm else "none",
        "weight decay": f"{args.weight_decay:g}",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": str(args.seed),
        "processes": str(args.world_size),
    }


def package_version() -> str:
    """The version of hf_bcd, with the commit of the checkout that it runs from, `-dirty` if files differ from that."""
    checkout, commit = Path(__file__).parents[2], ""
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return version("hf_bcd") + (f" (commit {commit})" if commit else "")


def hardware_words(trainer: TrainedRun) -> str:
    """The machine, and the time that the student took on it."""
    processes, seconds = trainer.args.world_size, timedelta(seconds=round(trainer.train_seconds))
    text = (f"{processes} processes on " if processes > 1 else "") + device_name(trainer.args.device)
    return f"{text}; training the student took {seconds} (h:min:s) without evaluations" if seconds else text
