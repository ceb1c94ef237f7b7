"""The steps of a run: data, teacher, undistilled baseline, distilled student, and what they score."""

import copy
import dataclasses
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, set_seed
from transformers.utils.hub import cached_file

from .adapters import LabelMap, build_adapter, match_labels, read_synonyms
from .builders import build_model, commit_of, load_segmentation_model
from .checkpoints import last_checkpoint
from .config import BCDConfig, DataArguments, ModelArguments, ModelSpec
from .data import DenseDataset, DenseDatasets, DenseStream, check_all, keep_in_memory, load_dense_dataset
from .hub import explained
from .hub_trainer import repository_name
from .losses.criterion import check_needs, unknown_key_message
from .preparation import check_label_needs, offers_of
from .pushing import fetch_checkpoint, prepare_repository
from .recipes import parse_mapping
from .trainer import BCDTrainer


logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"
OUTCOME = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "learning_rate", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "max_grad_norm", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "bf16", "fp16", "load_best_model_at_end",
    "metric_for_best_model", "crop_size", "image_size", "scale_min", "scale_max", "color_jitter", "seed", "data_seed",
    "dataloader_drop_last", "train_sampling_strategy",
)  # fmt: skip


def load_data(args: DataArguments, for_training: bool = True) -> DenseDatasets:
    """Loads the data set that the arguments name, cut to the sample limits.

    Args:
        args: the data set.
        for_training: whether there must be a training split.

    Raises:
        ValueError: if neither a data set nor a folder is named, a limit is not positive, or there is no training split.
    """
    source = args.dataset_name or args.data_dir
    if source is None:
        raise ValueError("no data: give --dataset_name (catalog name, Hub id or folder) or --data_dir.")
    for name in ("max_train_samples", "max_eval_samples"):
        if (limit := getattr(args, name)) is not None and limit < 1:
            raise ValueError(f"--{name} is {limit}; take at least one image, or leave it out for all.")
    if args.cache_images and args.streaming:
        raise ValueError("streaming is for data that no memory holds: leave --cache_images or --streaming out.")
    options = args.dataset_options or {}
    data = load_dense_dataset(
        source,
        data_dir=args.data_dir if args.dataset_name else None,
        config=args.dataset_config,
        revision=args.dataset_revision,
        image_column=args.image_column,
        label_column=args.label_column,
        id2label=args.id2label,
        reduce_labels=args.reduce_labels,
        ignore_labels=args.ignore_labels,
        streaming=args.streaming,
        shuffle_buffer=args.shuffle_buffer,
        max_eval_samples=args.max_eval_samples,
        **(parse_mapping(options, "dataset_options") if isinstance(options, str) else options),
    )
    if for_training and "train" not in data:
        raise ValueError(f"{source} has no training split, only {', '.join(data)}.")

    def cut(split: Any, limit: int | None) -> Any:
        if isinstance(split, DenseStream):
            return split if limit is None else split.take(limit)
        return split if limit is None or limit >= len(split) else split.select(range(limit))

    limits = {name: args.max_train_samples if name == "train" else args.max_eval_samples for name in data}
    splits = {name: cut(split, limits[name]) for name, split in data.items()}
    if for_training and source != "synthetic":
        for name in ("validation", "test"):
            if name in splits:
                logger.info("reading the %d images and masks of %s", len(splits[name]), name)
                check_all(splits[name].rows, splits[name].rule, splits[name].num_labels)
    if args.cache_images and for_training:
        splits |= {name: keep_in_memory(splits[name]) for name in ("train", "validation") if name in splits}
    return DenseDatasets(splits)


def prepare_push(config: BCDConfig) -> None:
    """Creates the repository to push to, before anything is trained.

    Raises:
        HubError: if the token does not allow that, or the Hub cannot be reached.
    """
    if config.push_to_hub and config.process_index == 0:
        prepare_repository(
            repository_name(config),
            private=config.hub_private_repo,
            revision=config.hub_revision,
            token=config.hub_token,
        )


def prepare_teacher(args: ModelArguments, config: BCDConfig, data: DenseDatasets) -> PreTrainedModel | None:
    """Loads the teacher, or trains it on the same data if it is a bare timm backbone; re-uses a finished one."""
    if args.teacher is None:
        return None
    synonyms = read_synonyms(args.label_synonyms)
    spec = ModelSpec.parse(args.teacher, "teacher")
    if spec.name_or_path is not None:
        teacher = load_segmentation_model(
            spec.name_or_path, revision=spec.revision, trust_remote_code=args.trust_remote_code
        )
        # fails here rather than after the baseline's training
        check_label_needs(label_map_of(teacher, data["train"], synonyms), config.resolved_losses)
        check_needs(config.resolved_losses, offers_of(build_adapter(teacher), bool(config.torch_compile)))
        if args.teacher_training:
            logger.warning("%s is a finished teacher, so teacher_training is not used", spec.name_or_path)
        return teacher
    return train_or_reuse("teacher", spec, teacher_config(args, config), data)


def teacher_config(args: ModelArguments, config: BCDConfig) -> BCDConfig:
    """Training arguments of a teacher that is trained here."""
    changes = args.teacher_training or {}
    changes = parse_mapping(changes, "teacher_training") if isinstance(changes, str) else changes
    return derive_config(config, "teacher", changes)


def teacher_key(args: ModelArguments, config: BCDConfig, data: DenseDatasets) -> dict[str, Any]:
    """What decides which teacher a run has: how it is trained here, or its files or commit if it is finished."""
    spec = ModelSpec.parse(args.teacher or {}, "teacher")
    if spec.name_or_path is None:
        return recipe_of(spec, teacher_config(args, config), data)
    key = {f"model.{key}": value for key, value in dataclasses.asdict(spec).items()}
    with explained("model", spec.name_or_path, revision=spec.revision):
        key["model.commit"] = commit_of(spec.name_or_path, spec.revision)
    for file in sorted(Path(spec.name_or_path).glob("*")):
        if file.suffix in (".safetensors", ".bin") or file.name in ("config.json", "preprocessor_config.json"):
            with file.open("rb") as content:
                key[f"file.{file.name}"] = hashlib.file_digest(content, "sha256").hexdigest()
    return key


def load_baseline(args: ModelArguments, data: DenseDatasets) -> PreTrainedModel | None:
    """Loads the finished undistilled student that `baseline` names.

    Raises:
        ValueError: if there is no teacher to compare with, one is to be trained as well, it predicts other classes, or
            it was distilled itself.
    """
    if args.teacher is None and (args.baseline is not None or args.with_baseline):
        raise ValueError(
            "a baseline is there to compare a distilled student with: name a --teacher too, or leave --baseline out and set "
            "--with_baseline to false."
        )
    if args.baseline is None:
        return None
    if args.with_baseline:
        raise ValueError(
            f"--baseline {args.baseline} and --with_baseline exclude each other: compare with a finished student, or "
            "train one."
        )
    folder = Path(args.baseline).expanduser()
    source = str(folder) if folder.is_dir() else args.baseline
    if is_distilled(source):
        raise ValueError(f"--baseline {args.baseline} was distilled itself; name a student trained without a teacher.")
    model = load_segmentation_model(source, trust_remote_code=args.trust_remote_code)
    labels, expected = list((model.config.id2label or {}).values()), list(data["train"].id2label.values())
    if labels != expected:
        raise ValueError(
            f"--baseline {args.baseline} predicts {len(labels)} classes ({', '.join(labels[:5])}, ...), but "
            f"{data['train'].name} has {len(expected)} ({', '.join(expected[:5])}, ...); name a student of this data set."
        )
    return model


def is_distilled(source: str) -> bool:
    """Whether the card beside a model, in a folder or on the Hub, says that it had a teacher."""
    try:
        card = cached_file(source, "README.md")
        metadata = {} if card is None else ModelCard.load(card).data.to_dict()
        return "knowledge-distillation" in (metadata.get("tags") or [])
    except (OSError, ValueError, yaml.YAMLError):
        return False  # no card, or none to read; a repository that cannot be read fails when its model is loaded


def prepare_baseline(args: ModelArguments, config: BCDConfig, data: DenseDatasets) -> PreTrainedModel | None:
    """Trains the student without its teacher, on the same budget; re-uses a finished one."""
    if not args.with_baseline or args.student is None:
        return None
    spec = ModelSpec.parse(args.student, "student")
    return train_or_reuse("baseline", spec, derive_config(config, "baseline", {}), data)


def train_or_reuse(role: str, spec: ModelSpec, config: BCDConfig, data: DenseDatasets) -> PreTrainedModel:
    """Trains a model alone in its own folder, or takes the one that the same recipe has left there.

    Raises:
        ValueError: if the folder holds a finished model of another recipe.
    """
    folder = Path(config.output_dir or ".")
    recipe = recipe_of(spec, config, data)
    if (folder / RECIPE_FILE).is_file():  # written last, so the model beside it is whole
        logger.warning("re-using the %s in %s", role, folder)
        check_recipe(folder / RECIPE_FILE, recipe)
    else:
        logger.warning("training the %s in %s", role, folder)
        set_seed(config.seed)
        train_model(build_model(spec, data["train"].id2label), None, config, data, role)
        if config.should_save:
            write_json(folder / RECIPE_FILE, recipe)
    return load_segmentation_model(str(folder))


def recipe_of(spec: ModelSpec, config: BCDConfig, data: DenseDatasets) -> dict[str, Any]:
    """What decides how a model trained alone comes out."""
    return {
        **{f"model.{key}": value for key, value in dataclasses.asdict(spec).items()},
        **{f"training.{key}": str(getattr(config, key)) for key in OUTCOME},
        **{f"data.{key}": value for key, value in data_key(data["train"]).items()},
    }


def data_key(split: DenseDataset | DenseStream) -> dict[str, Any]:
    """What tells the images of one split from those of another."""
    first = next(iter(split), None)
    return {
        "name": split.name,
        "images": None if isinstance(split, DenseStream) else len(split),
        "classes": list(split.id2label.values()),
        "rule": str(split.rule),
        "first_image": None if first is None else zlib.crc32(first["image"].tobytes()),
    }


def check_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Compares the recipe of a finished model with the present one."""
    found = json.loads(path.read_text())
    for key, value in json.loads(json.dumps(recipe)).items():
        if found.get(key) != value:
            raise ValueError(
                f"{path.parent} holds a model of another recipe: {key} is {found.get(key)} there and {value} here. "
                "Choose another --output_dir, or remove that folder to train it again."
            )


def build_student(args: ModelArguments, data: DenseDatasets, seed: int) -> PreTrainedModel:
    """Builds the untrained student for the data set's classes; the same seed gives the same weights.

    Raises:
        ValueError: if the arguments name no student.
    """
    if args.student is None:
        raise ValueError("no student: give --student (Hub id, folder, or {backbone: ..., head: ...}).")
    set_seed(seed)
    spec = ModelSpec.parse(args.student, "student")
    return build_model(spec, data["train"].id2label, trust_remote_code=args.trust_remote_code)


def derive_config(config: BCDConfig, role: str, changes: Mapping[str, Any]) -> BCDConfig:
    """The same training arguments for another model of the run: its own folder, never pushed.

    Raises:
        ValueError: for a change of an unknown argument.
    """
    known = {f.name for f in dataclasses.fields(BCDConfig) if f.init}
    for key in changes:
        if key not in known:
            raise ValueError(unknown_key_message("training argument", key, known))
    if "num_train_epochs" in changes:  # the run's own number of steps would win over it
        changes = {"max_steps": -1, **changes}
    # `Trainer.push_to_hub` leaves names with an underscore out
    folder = Path(config.output_dir or ".") / f"_{role}"
    own = {"output_dir": str(folder), "push_to_hub": False, "run_name": None}
    return dataclasses.replace(copy.deepcopy(config), **{**changes, **own})  # checks and converts every value again


def train_model(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    config: BCDConfig,
    data: DenseDatasets,
    role: str = "student",
    label_synonyms: str | None = None,
) -> BCDTrainer:
    """Trains a model, from its last checkpoint if `resume_from_checkpoint` says so, and saves it in the output folder.

    Raises:
        ValueError: if the folder holds checkpoints of an earlier run that this one would not continue, but mix with.
    """
    checkpoint, folder = checkpoint_of(config, role), Path(config.output_dir or ".")
    left = last_checkpoint(folder)
    if checkpoint is None and left is not None:
        raise ValueError(
            f"{left} is left of an earlier run. Continue that with --resume_from_checkpoint true, choose another "
            "--output_dir, or remove it."
        )
    trainer = BCDTrainer(
        model=model,
        teacher_model=teacher,
        args=config,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        label_synonyms=label_synonyms,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(config.output_dir, _internal_call=True)  # pushed later, with what the card reports
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # the first rank writes what all ranks may read next
    return trainer


def checkpoint_of(config: BCDConfig, role: str) -> str | None:
    """The checkpoint a model continues from: the last of its own folder, or for the student a named one.

    A name is a folder or, where there is none, a Hub id `user/name[@revision]`, whose last checkpoint is downloaded.

    Raises:
        HubError: if the repository cannot be read or holds no checkpoint.
    """
    given, folder = config.resume_from_checkpoint, Path(config.output_dir or ".")
    if given in (None, False, "False", "false"):
        return None
    last = last_checkpoint(folder)
    if given in (True, "True", "true") or role != "student":
        return last
    if Path(given).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", given):
        return str(given)
    logger.info("%s is no folder here; looking for its checkpoint on the Hub", given)
    with config.main_process_first(desc="fetching the checkpoint"):
        return fetch_checkpoint(given, folder, token=config.hub_token)


def final_split(data: DenseDatasets) -> str | None:
    """The split that final numbers come from: `test` where it is labelled, else `validation`."""
    return next((name for name in ("test", "validation") if name in data), None)


def label_map_of(
    model: PreTrainedModel, data: DenseDataset, synonyms: Mapping[str, Sequence[str]] | None = None
) -> LabelMap:
    """Which of a model's classes stand for each class of the data set; a teacher from the Hub may have others."""
    names = {int(index): name for index, name in (model.config.id2label or {}).items()}
    return match_labels(names, data.id2label, synonyms)


def evaluate_model(
    model: PreTrainedModel,
    config: BCDConfig,
    data: DenseDataset,
    label_synonyms: str | Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Scores of a model on a split in the split's classes, by metric name without prefix.

    Raises:
        ValueError: if the model lacks some of these classes, and has not as many without names in common.
    """
    trainer = BCDTrainer(model=model, args=config, eval_dataset=data, label_synonyms=label_synonyms)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("TensorBoardCallback", "PictureCallback"):
            trainer.remove_callback(callback)  # a final score is no point of a training curve
    scores = trainer.evaluate(metric_key_prefix="final")
    return {name: scores[f"final_{name}"] for name in trainer.metrics.compute() if f"final_{name}" in scores}


def write_json(path: Path, content: Any) -> None:
    """Writes `content`, so that a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)
