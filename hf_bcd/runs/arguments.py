"""Arguments from a YAML recipe and the command line."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from ..adapters.specs import ModelSpec
from ..training.config import BCDConfig
from ..training.options import PRESETS
from ..training.teachers import named_by
from ..utils.messages import UserError, unknown_key_message
from ..utils.text import shortened
from ..utils.types import converted
from ..utils.yaml import parse_mapping, read_yaml
from .fields import DataArguments, ModelArguments
from .help import make_parser, print_help, wants_short_help
from .recipes import find_recipe, merged, packaged, read_recipe


MAPPINGS = ("student", "teacher", "teacher_training", "dataset_options", "losses", "lr_scheduler_kwargs")
ARGUMENT_CLASSES = (ModelArguments, DataArguments, BCDConfig)
RECIPE_KEYS = frozenset(f.name for cls in ARGUMENT_CLASSES for f in dataclasses.fields(cls) if f.init)
TYPES = {key: hint for cls in ARGUMENT_CLASSES for key, hint in get_type_hints(cls).items() if key in RECIPE_KEYS}
# arguments that may be None and that no text can be
UNDOABLE = {key for key, hint in TYPES.items() if NoneType in get_args(hint) and str not in get_args(hint)} | {
    "optim_args"
}
DEFAULTS = {f.name: f.default for cls in ARGUMENT_CLASSES for f in dataclasses.fields(cls)}
TRAINING_KEYS = frozenset(f.name for f in dataclasses.fields(BCDConfig) if f.init)


def parse_arguments(
    argv: list[str] | None = None, *, default_config: str | Path | None = None, description: str | None = None
) -> tuple[ModelArguments, DataArguments, BCDConfig]:
    """Reads a recipe and the command line and builds the arguments from them, see `read_arguments`."""
    return build_arguments(read_arguments(argv, default_config=default_config, description=description))


def build_arguments(recipe: Mapping[str, Any]) -> tuple[ModelArguments, DataArguments, BCDConfig]:
    """Builds the arguments that a recipe describes; the others have their defaults.

    Raises:
        UserError: for a model that is described wrongly, or streaming without max_steps.
    """

    def build(cls: Any) -> Any:
        return cls(**{f.name: recipe[f.name] for f in dataclasses.fields(cls) if f.name in recipe})

    model_args, data_args, config = build(ModelArguments), build(DataArguments), build(BCDConfig)
    if model_args.student is not None:
        ModelSpec.parse(model_args.student, "student")
    named_teachers(model_args)
    if data_args.streaming and config.max_steps <= 0:
        raise UserError(
            f"max_steps is {config.max_steps}, but a stream has no end: set --max_steps, or leave --streaming out."
        )
    return model_args, data_args, config


def named_teachers(args: ModelArguments) -> dict[str, ModelArguments]:
    """The teachers that the arguments name, each by its name with arguments in which it is the only one.

    A single one has the name ""; its store stands for itself. Where one of both arguments is a list, they add up, live teachers
    before stored ones; names are the last parts of ids and folders, see `short_name`.

    Raises:
        UserError: for a model that is described wrongly, a list without any, one of several that is to be trained first, or two of
            the same name.
    """
    if not isinstance(args.teacher, list) and not isinstance(args.teacher_store, list):
        if args.teacher is not None:
            ModelSpec.parse(args.teacher, "teacher")
        return {} if args.teacher is None and args.teacher_store is None else {"": args}
    live, stored = (
        given if isinstance(given, list) else [] if given is None else [given]
        for given in (args.teacher, args.teacher_store)
    )  # fmt: skip
    if not live and not stored:
        raise UserError("teacher is an empty list; name some, or null to train without any.")
    specs = [ModelSpec.parse(one, "teacher") for one in live]
    for spec in specs:
        if not spec.is_finished:
            raise UserError(
                f"the teacher {spec.backbone} with the head {spec.head} is one of several, but is not trained yet: train it first, "
                "then name its folder."
            )
    names = named_by([*(str(spec.name_or_path or spec.backbone) for spec in specs), *map(str, stored)])
    parts = [replace(args, teacher=one, teacher_store=None) for one in live]
    parts += [replace(args, teacher=None, teacher_store=one) for one in stored]
    return dict(zip(names, parts, strict=True))


def read_arguments(
    argv: list[str] | None = None,
    *,
    recipe: Mapping[str, Any] | None = None,
    default_config: str | Path | None = None,
    description: str | None = None,
) -> dict[str, Any]:
    """Reads a recipe and the command line: what the user types wins over the recipe.

    `--config file.yaml` names the recipe, which may start from another: `base: other.yaml`. Fields of a mapping can be
    set one by one: `--losses.bcd.radius 5` changes the losses of the recipe or preset.

    Args:
        argv: arguments; the process's own by default.
        recipe: content of a recipe, instead of `--config`.
        default_config: recipe in force when neither `--config`, a data set nor a student is given.
        description: first lines of `--help`.

    Returns:
        All that was said, as one recipe.

    Raises:
        UserError: for unknown keys, naming the nearest known one.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    typed, dotted = _typed(argv, description)
    config = typed.pop("config", None)
    if recipe is None and config is None and not {"dataset_name", "data_dir", "student"} & set(typed):
        config = default_config
    if recipe is None:
        recipe = read_recipe(find_recipe(config), RECIPE_KEYS) if config is not None else {}
    if {"num_train_epochs", "max_steps"} <= set(typed) and typed["max_steps"] > 0:
        raise UserError("--max_steps and --num_train_epochs exclude each other; give one of them.")
    values = merged({key: _converted(key, value) for key, value in recipe.items()}, typed)
    for key in (*MAPPINGS, "teacher_store"):
        text = values.get(key)
        if key in ("teacher", "teacher_store") and isinstance(text, str) and text.lstrip().startswith("["):
            values[key] = _converted(key, read_yaml(text, f"--{key}"))
        if values.get(key) in ("none", "null"):  # so that the command line can undo what the recipe says
            values[key] = None
        if isinstance(text := values.get(key), str) and text.lstrip().startswith("{"):
            values[key] = parse_mapping(text, key)
    if isinstance(synonyms := values.get("label_synonyms"), str):
        values["label_synonyms"] = packaged(synonyms)
    if values.get("losses") is None and any(path[0] == "losses" for path, _ in dotted):
        values["losses"] = PRESETS.get(
            values.get("preset", BCDConfig.preset)
        )  # a dotted flag changes the losses in force
    for path, text in dotted:
        _set_nested(values, path, read_yaml(text, "--" + ".".join(path)))
    if isinstance(values.get("teacher_training"), dict):
        values["teacher_training"] = _teacher_training(values["teacher_training"])
    return values


def _typed(argv: list[str], description: str | None) -> tuple[dict[str, Any], list[tuple[list[str], str]]]:
    """The arguments that a command line gives, and its dotted ones as paths with their text."""
    if wants_short_help(argv):
        print_help(description)
    parser = make_parser(ARGUMENT_CLASSES, description)
    untyped = object()
    given = argparse.Namespace(**dict.fromkeys((*RECIPE_KEYS, "config"), untyped))
    argv, undone = _undone(argv)
    namespace, rest = parser.parse_known_args(argv, given)
    dotted: list[tuple[list[str], str]] = []
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        path = name.removeprefix("--").replace("-", "_").split(".")
        if len(path) == 1:
            raise UserError(unknown_key_message("argument", path[0], [*RECIPE_KEYS, "config"]))
        if path[0] not in MAPPINGS:
            raise UserError(unknown_key_message("mapping", path[0], MAPPINGS))
        if not equals and not rest:
            raise UserError(f"{name} has no value.")
        dotted.append((path, text if equals else rest.pop(0)))
    typed = {key: value for key, value in vars(namespace).items() if value is not untyped}
    return typed | undone, dotted


def _undone(argv: list[str]) -> tuple[list[str], dict[str, None]]:
    """Takes `--square_size none` and the like out of a command line: what a recipe says there holds no longer."""
    words, rest, undone = list(argv), list[str](), dict[str, None]()
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and key in UNDOABLE:
            undone.pop(key, None)
            if (text if equals else next(iter(words), "")) in ("none", "null"):
                undone[key] = None
                del words[: 0 if equals else 1]
                continue
        rest.append(word)
    return rest, undone


def _converted(key: str, value: Any) -> Any:
    """A recipe's value in the type of its argument."""
    if value is None and DEFAULTS[key] is None:
        return None
    if value is False and key.endswith("_strategy"):  # YAML's unquoted `no`
        return "no"
    return converted(value, TYPES[key], key)


def _teacher_training(given: dict[str, Any]) -> dict[str, Any]:
    for key in given:
        if key not in TRAINING_KEYS:
            raise UserError(unknown_key_message("training argument", key, TRAINING_KEYS))
    return {key: _converted(key, value) for key, value in given.items()}


def _set_nested(values: dict[str, Any], path: list[str], value: Any) -> None:
    key, *inner, last = path
    current = values.get(key)
    if isinstance(current, str) and key in (
        "student",
        "teacher",
    ):  # `--teacher some/model` and then one more field of it
        current = {"name_or_path": current}
    if not isinstance(current, dict | None):
        raise UserError(
            f"--{'.'.join(path)} sets a field of {key}, which is {shortened(repr(current))} and no mapping."
        )
    node: dict[str, Any] = dict(current or {})
    values[key] = node
    for number, name in enumerate(inner):
        if not isinstance(found := node.get(name) or {}, dict):
            raise UserError(
                f"--{'.'.join(path)} sets a field of {'.'.join(path[: number + 2])}, which is {shortened(repr(found))} and no "
                "mapping."
            )
        node[name] = dict(found)
        node = node[name]
    node[last] = value
