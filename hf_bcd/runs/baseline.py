"""Models that a run compares with or learns from: loaded, or trained on the way and re-used when they are finished."""

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from transformers import set_seed
from transformers.utils.hub import cached_file

from ..adapters import DenseAdapter, adapt, read_synonyms
from ..adapters.loading import build_model, commit_of, load_adapter
from ..adapters.specs import ModelSpec
from ..data import DenseDataset, DenseDatasets
from ..hub.errors import explained
from ..stores import Store
from ..tasks import task_of
from ..training.checkpoints import data_key, differences
from ..training.config import OUTCOME, BCDConfig
from ..training.teachers import naming, short_name
from ..training.teaching import build_losses, check_losses, check_task
from ..utils.files import read_json, write_json
from ..utils.messages import UserError
from ..utils.yaml import parse_mapping
from .arguments import ModelArguments, named_teachers
from .experiment import check_sizes, train_model


logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"
STORED_KEYS = ("teacher", "teacher_store")  # arguments that `with_stored_teachers` may change


def check_untrained(args: ModelArguments, config: BCDConfig, data: DenseDatasets, student: DenseAdapter) -> None:
    """Builds the losses with a teacher that is yet to be trained here, so that their own checks come before that.

    Raises:
        UserError: as the losses do, or there are no labels to train it with.
    """
    given = None if args.teacher_store or isinstance(args.teacher, list) else args.teacher
    spec = None if given is None else ModelSpec.parse(given, "teacher")
    if spec is not None and not spec.is_finished:
        if getattr(data["train"], "labelled", None) == 0:
            raise UserError(
                f"{data['train'].name} has no labels, so that the teacher, which is not trained yet, cannot be trained on it; "
                "name a trained one, such as the folder of a run."
            )
        teacher_config(args, config)
        with torch.random.fork_rng(devices=[]):
            build_losses(
                student, adapt(build_model(spec, data["train"].id2label), task_of(data["train"]).name), config
            )


def prepare_teachers(args: ModelArguments, config: BCDConfig, data: DenseDatasets) -> dict[str, DenseAdapter | Store]:
    """The teachers of a run by name, "" for a single one: opened where they are stored, else as `prepare_teacher`."""
    found: dict[str, DenseAdapter | Store] = {}
    for name, own in named_teachers(args).items():
        with naming(name):
            one = open_store(own, config) or prepare_teacher(own, config.for_teacher(name), data)
            assert one is not None
            if isinstance(one, Store) and own.teacher is not None:
                given, made = ModelSpec.parse(own.teacher, "teacher"), one.content["teacher"]
                logger.info(
                    "%s, made of %s, teaches in the place of %s, which is not loaded",
                    one.source, made["repo_id"] or made["name"], given.name_or_path or given.backbone,
                )  # fmt: skip
            found[name] = one
    return found


def with_stored_teachers(args: ModelArguments, token: str | None = None) -> ModelArguments:
    """The arguments with each teacher named that a store of several holds.

    Such a store stands for a single teacher beside it, or for those of a list that it holds, unless stores are a list too.
    """
    given = args.teacher_store
    stores = [given] if isinstance(given, str) else given or []
    found = [source for one in stores for source in Store.sources_of(one, token)]
    if found == stores:
        return args
    live = args.teacher
    if isinstance(given, str):
        held = {short_name(one) for one in found}
        specs = [(one, ModelSpec.parse(one, "teacher")) for one in live] if isinstance(live, list) else []
        live = [one for one, spec in specs if short_name(str(spec.name_or_path or spec.backbone)) not in held] or None
    return dataclasses.replace(args, teacher=live, teacher_store=found)


def open_store(args: ModelArguments, config: BCDConfig) -> Store | None:
    """The stored teacher that the arguments name, which takes the place of the teacher itself."""
    if args.teacher_store is None:
        return None
    assert isinstance(args.teacher_store, str)
    with config.main_process_first(desc="fetching the store"):
        store = Store.open(args.teacher_store, token=config.hub_token)
        _ = store.table  # makes the cache that the other processes read
    return store


def prepare_teacher(args: ModelArguments, config: BCDConfig, data: DenseDatasets) -> DenseAdapter | None:
    """Loads the teacher, or trains it on the same data if it is a bare timm backbone; re-uses a finished one."""
    if args.teacher is None:
        return None
    spec = ModelSpec.parse(args.teacher, "teacher")
    if spec.is_finished:
        task = task_of(data["train"])
        teacher = load_adapter(spec, trust_remote_code=args.trust_remote_code, task=task.name, to_teach=True)
        synonyms = read_synonyms(args.label_synonyms)
        label_map = teacher.match(data["train"].id2label, synonyms) if teacher.predicts else None
        check_task(teacher, task)
        for size in task.train_sizes(config):
            teacher.check_size(teacher.size_as_teacher(size))
        check_losses(teacher, label_map, config)  # fails here rather than after the baseline's training
        if args.teacher_training:
            logger.warning(
                "%s is a finished teacher, so teacher_training is not used", spec.name_or_path or spec.backbone
            )
        return teacher
    return train_or_reuse("teacher", spec, teacher_config(args, config), data)


def teacher_config(args: ModelArguments, config: BCDConfig) -> BCDConfig:
    """Training arguments of a teacher that is trained here."""
    changes = args.teacher_training or {}
    changes = parse_mapping(changes, "teacher_training") if isinstance(changes, str) else changes
    return derive_config(config, "teacher", changes)


def teacher_key(args: ModelArguments, config: BCDConfig, data: DenseDatasets) -> dict[str, Any]:
    """The key of a run's teacher: how it is trained here, or its files or commit if it is finished."""
    spec = ModelSpec.parse(args.teacher or {}, "teacher")
    if not spec.is_finished:
        return recipe_of(spec, teacher_config(args, config), data)
    key = {f"model.{key}": value for key, value in dataclasses.asdict(spec).items()}
    if spec.name_or_path is None:
        return key
    with explained("model", spec.name_or_path, revision=spec.revision):
        key["model.commit"] = commit_of(spec.name_or_path, spec.revision)
    for file in sorted(Path(spec.name_or_path).glob("*")):
        if file.suffix in (".safetensors", ".bin") or file.name in ("config.json", "preprocessor_config.json"):
            with file.open("rb") as content:
                key[f"file.{file.name}"] = hashlib.file_digest(content, "sha256").hexdigest()
    return key


def load_baseline(args: ModelArguments, data: DenseDatasets) -> DenseAdapter | None:
    """Loads the finished undistilled student that `baseline` names.

    Raises:
        UserError: if there is no teacher to compare with, one is to be trained as well, it predicts other classes, or
            it was distilled itself.
    """
    if args.teacher is None and args.teacher_store is None and (args.baseline is not None or args.with_baseline):
        raise UserError(
            "a baseline is there to compare a distilled student with: name a --teacher too, or leave --baseline out and set "
            "--with_baseline to false."
        )
    if args.baseline is None:
        return None
    if args.with_baseline:
        raise UserError(
            f"--baseline {args.baseline} and --with_baseline exclude each other: compare with a finished student, or "
            "train one."
        )
    folder = Path(args.baseline).expanduser()
    source = str(folder) if folder.is_dir() else args.baseline
    if is_distilled(source):
        raise UserError(f"--baseline {args.baseline} was distilled itself; name a student trained without a teacher.")
    task = task_of(data["train"]).name
    model = load_adapter(ModelSpec(source), trust_remote_code=args.trust_remote_code, task=task)
    labels, expected = list(model.id2label.values()), list(data["train"].id2label.values())
    if labels != expected:
        raise UserError(
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


def prepare_baseline(args: ModelArguments, config: BCDConfig, data: DenseDatasets) -> DenseAdapter | None:
    """Trains the student without its teacher, on the same budget; re-uses a finished one."""
    if not args.with_baseline or args.student is None:
        return None
    spec = ModelSpec.parse(args.student, "student")
    return train_or_reuse("baseline", spec, derive_config(config, "baseline", {}), data)


def train_or_reuse(role: str, spec: ModelSpec, config: BCDConfig, data: DenseDatasets) -> DenseAdapter:
    """Trains a model without a teacher in its own folder, or takes the one that the same recipe has left there.

    Raises:
        UserError: if the folder holds a finished model of another recipe.
    """
    folder, task = Path(config.output_dir or "."), task_of(data["train"]).name
    recipe = recipe_of(spec, config, data)
    if (folder / RECIPE_FILE).is_file():  # written last, so the model beside it is whole
        logger.warning("re-using the %s in %s", role, folder)
        check_recipe(folder / RECIPE_FILE, recipe)
    else:
        logger.warning("training the %s in %s", role, folder)
        set_seed(config.seed)
        model = adapt(build_model(spec, data["train"].id2label), task)
        check_sizes(model, config, data)
        train_model(model, None, config, data, role)
        if config.should_save:
            write_json(folder / RECIPE_FILE, recipe)
    return load_adapter(ModelSpec(str(folder)), task=task)


def recipe_of(spec: ModelSpec, config: BCDConfig, data: DenseDatasets) -> dict[str, Any]:
    """All that decides how a model trained without a teacher comes out."""
    train: Any = data["train"]
    train = train.only_labelled() if isinstance(train, DenseDataset) else train
    return {
        **{f"model.{key}": value for key, value in dataclasses.asdict(spec).items()},
        **{f"training.{key}": str(getattr(config, key)) for key in OUTCOME if key != "unlabelled_share"},
        **{f"data.{key}": value for key, value in data_key(train).items()},
    }


def check_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Compares the recipe of a finished model with the present one."""
    if found := differences(read_json(path), recipe):
        raise UserError(
            f"{path.parent} holds a model of another recipe: {found[0]}. Choose another --output_dir, or remove that folder "
            "to train it again."
        )


def derive_config(config: BCDConfig, role: str, changes: Mapping[str, Any]) -> BCDConfig:
    """The same training arguments for another model of the run: its own folder, never pushed."""
    if "num_train_epochs" in changes:  # the run's own number of steps would win over it
        changes = {"max_steps": -1, **changes}
    # `Trainer.push_to_hub` leaves names with an underscore out
    folder = Path(config.output_dir or ".") / f"_{role}"
    own = {"output_dir": str(folder), "push_to_hub": False, "run_name": None, "quantize": None}
    return dataclasses.replace(copy.deepcopy(config), **{**changes, **own})  # checks and converts every value again
