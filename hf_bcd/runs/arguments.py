"""Arguments from a YAML recipe and the command line."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..training.config import PRESETS, BCDConfig
from ..utils.messages import UserError, unknown_key_message
from ..utils.yaml import parse_mapping, read_yaml
from .recipes import merged, read_recipe


@dataclass
class ModelArguments:
    """Student, teacher and what the run compares."""

    student: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Student: Hub id or folder, or a mapping such as {backbone: mobilenetv2_100, head: fpn}."},
    )
    teacher: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Teacher, given like the student. A timm backbone is first trained on the same data. "
            "None trains the student alone."
        },
    )
    teacher_training: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Training options that differ for a teacher trained here, e.g. {max_steps: 2000}."},
    )
    with_baseline: bool = field(
        default=False, metadata={"help": "Also train the student without its teacher, on the same budget, to compare."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Finished student without a teacher to compare with: folder or Hub id."}
    )
    label_synonyms: str | None = field(
        default=None, metadata={"help": "JSON file {class of the data set: [names the teacher may use]}."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that lies in a Hub repository; read it first."}
    )


@dataclass
class DataArguments:
    """Which data set, and how its raw columns and labels are read."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Name of the catalog (ade20k, cityscapes, ...; see `hf-bcd check -h`), Hub id, or folder."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Local copy of a data set of the catalog, in its official layout; or a folder of the data set."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    streaming: bool = field(
        default=False, metadata={"help": "Read training data while training, without storing it; needs max_steps."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Images from which a stream draws at random; all of them stay in memory."}
    )
    cache_images: bool = field(
        default=False, metadata={"help": "Keep decoded training and validation images in memory: for small sets."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Image column, if it cannot be recognised."})
    label_column: str | None = field(default=None, metadata={"help": "Mask column, if it cannot be recognised."})
    id2label: str | None = field(default=None, metadata={"help": "JSON file with the class names."})
    reduce_labels: bool = field(default=False, metadata={"help": "Raw label 0 is void and classes start at 1."})
    ignore_labels: list[int] = field(default_factory=list, metadata={"help": "Raw label ids that are void."})
    dataset_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further options of the data set, e.g. {size: [96, 128]} for synthetic."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first training samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first samples of each other split."})


MAPPINGS = ("student", "teacher", "teacher_training", "dataset_options", "losses", "lr_scheduler_kwargs")
ARGUMENT_CLASSES = (ModelArguments, DataArguments, BCDConfig)
KINDS = {int: "a whole number", float: "a number", string_to_bool: "true or false"}
RECIPE_KEYS = frozenset(f.name for cls in ARGUMENT_CLASSES for f in dataclasses.fields(cls) if f.init)


def parse_arguments(
    argv: list[str] | None = None,
    *,
    default_config: str | Path | None = None,
    description: str | None = None,
) -> tuple[ModelArguments, DataArguments, BCDConfig]:
    """Reads a recipe and the command line and builds the arguments from them, see `read_arguments`."""
    given = read_arguments(argv, default_config=default_config, description=description)
    return build_arguments(given)


def build_arguments(recipe: Mapping[str, Any]) -> tuple[ModelArguments, DataArguments, BCDConfig]:
    """Builds the arguments that a recipe describes; what it does not name has its default.

    Raises:
        UserError: for streaming without max_steps.
    """

    def build(cls: Any) -> Any:
        return cls(**{f.name: recipe[f.name] for f in dataclasses.fields(cls) if f.name in recipe})

    model_args, data_args, config = build(ModelArguments), build(DataArguments), build(BCDConfig)
    if data_args.streaming and config.max_steps <= 0:
        raise UserError(
            f"max_steps is {config.max_steps}, but a stream has no end: set --max_steps, or leave --streaming out."
        )
    return model_args, data_args, config


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
        argv: arguments; those of the process by default.
        recipe: content of a recipe, instead of `--config`.
        default_config: recipe in force when neither `--config`, a data set nor a student is given.
        description: first lines of `--help`.

    Returns:
        All that was said, as one recipe.

    Raises:
        UserError: for unknown keys, naming the nearest known one.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(  # type: ignore[call-arg]
        ARGUMENT_CLASSES,  # type: ignore[arg-type]
        description=description,
        usage="%(prog)s [--config RECIPE.yaml] [--ARGUMENT VALUE ...]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML recipe; the command line wins over it.")
    parser.add_argument("--help_all", action="store_true", help="Also list every inherited training argument.")
    _shorten_help(parser)
    if "--help_all" in argv:
        HfArgumentParser(ARGUMENT_CLASSES, description=description).print_help()  # type: ignore[arg-type]
        parser.exit()

    argv, dotted = _split_dotted(argv)
    _check_flags(argv, parser)
    namespace = parser.parse_args(argv)
    typed = [key for key in vars(namespace) if key in RECIPE_KEYS and _is_typed(parser, key, argv)]
    config = namespace.config
    if recipe is None and config is None and not {"dataset_name", "data_dir", "student"} & set(typed):
        config = default_config
    if recipe is None:
        recipe = read_recipe(Path(config), RECIPE_KEYS) if config is not None else {}
    recipe = {key: _converted(key, value, parser) for key, value in recipe.items()}
    if {"num_train_epochs", "max_steps"} <= set(typed) and namespace.max_steps > 0:
        raise UserError("--max_steps and --num_train_epochs exclude each other; give one of them.")
    recipe = merged(recipe, {key: getattr(namespace, key) for key in typed})
    values = {key: getattr(namespace, key) for key in RECIPE_KEYS} | recipe
    for key in MAPPINGS:
        if values[key] in ("none", "null"):  # so that the command line can undo what the recipe says
            values[key] = None
        if isinstance(values[key], str) and values[key].lstrip().startswith("{"):
            values[key] = parse_mapping(values[key], key)
    if values["losses"] is None and any(path[0] == "losses" for path, _ in dotted):
        values["losses"] = PRESETS.get(values["preset"])  # a dotted flag changes the losses in force
    for path, text in dotted:
        _set_nested(values, path, read_yaml(text, "--" + ".".join(path)))
    return {key: values[key] for key in [*recipe, *(path[0] for path, _ in dotted)]}


def _converted(key: str, value: Any, parser: argparse.ArgumentParser) -> Any:
    """A recipe's value in the type that the command line would give it: numbers may stand in quotes."""
    # of several values, such as ignore_labels, none is a number by itself
    actions = [action for action in parser._actions if action.dest == key and action.nargs not in ("+", "*")]
    convert: Any = actions[0].type if actions else None
    if value is None or convert not in KINDS:
        return value
    try:
        if isinstance(value, str):
            return convert(value)
        if isinstance(value, bool) == (convert is string_to_bool) and isinstance(value, int | float):
            if convert is not int or value % 1 == 0:
                return convert(value) if convert is int else value
    except (ValueError, argparse.ArgumentTypeError):
        pass
    raise UserError(f"{key} is {value!r} in the recipe; it must be {KINDS[convert]}.")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines and gives every argument one or two."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=119)


def _shorten_help(parser: argparse.ArgumentParser) -> None:
    """Hides the arguments that BCDConfig merely inherits, so that --help shows what this package is about."""
    own = {f.name for cls in (ModelArguments, DataArguments) for f in dataclasses.fields(cls)}
    own |= set(BCDConfig.__annotations__)
    own |= {
        "config",
        "help",
        "help_all",
        "output_dir",
        "seed",
        "bf16",
        "fp16",
        "resume_from_checkpoint",
        "push_to_hub",
    }
    own |= {"gradient_accumulation_steps", "hub_model_id", "hub_private_repo", "hub_revision", "torch_compile"}
    for action in parser._actions:
        if action.dest not in own or any(option.startswith(("--no_", "--no-")) for option in action.option_strings):
            action.help = argparse.SUPPRESS
        else:  # one spelling is enough to read
            action.option_strings = [o for o in action.option_strings if "-" not in o.lstrip("-")]
            action.metavar = "BOOL" if action.nargs == "?" else ""
    parser.epilog = "Every field of transformers.TrainingArguments is accepted too: --help_all lists them."


def _split_dotted(argv: list[str]) -> tuple[list[str], list[tuple[list[str], str]]]:
    """Takes `--losses.bcd.radius 5` out of the arguments."""
    rest, dotted, i = [], [], 0
    while i < len(argv):
        name, equals, value = argv[i].partition("=")
        path = name.removeprefix("--").split(".")
        if name.startswith("--") and len(path) > 1:
            if path[0] not in MAPPINGS:
                raise UserError(unknown_key_message("mapping", path[0], MAPPINGS))
            if not equals and i + 1 >= len(argv):
                raise UserError(f"{name} has no value.")
            dotted.append((path, value if equals else argv[i + 1]))
            i += 1 if equals else 2
        else:
            rest.append(argv[i])
            i += 1
    return rest, dotted


def _check_flags(argv: list[str], parser: argparse.ArgumentParser) -> None:
    options = parser._option_string_actions
    for text in argv:
        flag = text.partition("=")[0]
        if flag.startswith("--") and flag not in options:
            known = {option.removeprefix("--") for option in options if "-" not in option.removeprefix("--")}
            raise UserError(unknown_key_message("argument", flag.removeprefix("--").replace("-", "_"), known))


def _is_typed(parser: argparse.ArgumentParser, key: str, argv: list[str]) -> bool:
    flags = {text.partition("=")[0] for text in argv}
    return any(action.dest == key for flag, action in parser._option_string_actions.items() if flag in flags)


def _set_nested(values: dict[str, Any], path: list[str], value: Any) -> None:
    key, *inner, last = path
    current = values[key]
    if isinstance(current, str):  # `--teacher some/model` and then one more field of it
        current = {"name_or_path": current}
    node: dict[str, Any] = dict(current or {})
    values[key] = node
    for name in inner:
        node[name] = dict(node.get(name) or {})
        node = node[name]
    node[last] = value
