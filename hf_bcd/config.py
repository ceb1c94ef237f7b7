"""What a run can be told, from a YAML recipe, the command line or Python."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments

from .losses.criterion import read_losses, unknown_key_message
from .recipes import parse_mapping, read_recipe, read_yaml


PRESETS: dict[str, dict[str, Any]] = {
    "stable": {"bcd": {}},
    "paper": {"bcd": {"mode": "paper", "teacher_head": "orthogonal", "weight": {"boundary": 10.0, "context": 50.0}}},
}


TEACHER_DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class ModelSpec:
    """Where a model comes from: a checkpoint of transformers, or a timm backbone under one of our heads.

    Attributes:
        name_or_path: Hub id or folder of a transformers segmentation model (or of a bare backbone such as
            `nvidia/mit-b0`, whose head then starts at random).
        revision: branch, tag or commit of `name_or_path`.
        backbone: timm name, instead of `name_or_path`; or `espnet`, a whole network, for which only `options` counts.
        head: `psp`, `deeplabv3plus` or `fpn`.
        output_stride: 8, 16 or 32.
        pretrained: load the backbone's ImageNet weights from the Hub.
        weights: local safetensors file with the backbone's weights.
        options: further fields of `TimmSegmentationConfig`, or those of `EspNetConfig`.
    """

    name_or_path: str | None = None
    revision: str | None = None
    backbone: str | None = None
    head: str = "fpn"
    output_stride: int = 32
    pretrained: bool = False
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: "str | dict[str, Any] | ModelSpec", role: str) -> "ModelSpec":
        """Reads a Hub id or path, or a mapping of fields.

        Raises:
            ValueError: for an unknown field, or when not exactly one of `name_or_path` and `backbone` is given.
        """
        if isinstance(given, ModelSpec):
            return given
        fields: dict[str, Any] = {"name_or_path": given} if isinstance(given, str) else dict(given)
        known = [f.name for f in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise ValueError(unknown_key_message(f"field of {role}", key, known))
        spec = cls(**fields)
        if (spec.name_or_path is None) == (spec.backbone is None):
            raise ValueError(f"{role} needs either name_or_path (a transformers model) or backbone (a timm name).")
        return spec


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


@dataclass
class BCDConfig(TrainingArguments):
    """Training arguments of `BCDTrainer`: those of transformers, with the paper's schedule as defaults, and ours.

    Paper (Sec. V-B): SGD, learning rate 0.01, momentum 0.9, poly 0.9, batch 8, 40,000 iterations, 512x512 crops, random
    flip, brightness jitter and scale 0.5-2.
    """

    learning_rate: float = field(default=0.01, metadata={"help": "Initial learning rate."})
    optim: str = field(default="sgd", metadata={"help": "Optimizer; adamw_torch for transformer students."})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "Options of the optimizer."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of matrices and kernels."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Learning-rate schedule."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"power": 0.9, "lr_end": 0.0}, metadata={"help": "Options of the schedule."}
    )
    max_steps: int = field(default=40_000, metadata={"help": "Optimizer steps, t_max of r(t)."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Images a device and step."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Images a device and evaluation step."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 for none."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=4000, metadata={"help": "Steps between evaluations."})
    save_steps: float = field(default=4000, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between logged means."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses (not wanted)."})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Where to log."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Worker processes that read and augment."})
    dataloader_persistent_workers: bool = field(
        default=True, metadata={"help": "Keep the processes that read training data from epoch to epoch."}
    )
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Must be false here."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "What to push: the finished student (end), also the student at every save (every_save), also what it "
            "takes to resume (checkpoint, all_checkpoints)."
        },
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={"help": "No rank needs another's buffers in training: losses keep theirs equal, evaluation shares."},
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "No parameter is unused."})

    preset: Literal["stable", "paper"] = field(
        default="stable",
        metadata={
            "help": "Losses where `losses` says nothing: ours, or the paper's equations with alpha 10, beta 50."
        },
    )
    losses: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Distillation losses and their options, e.g. {bcd: {radius: 5, weight: {boundary: 3}}}."},
    )
    crop_size: int = field(default=512, metadata={"help": "Side of the square training crops, in pixels."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Short side images are resized to, in training (before scaling) and evaluation; None keeps it."
        },
    )
    scale_min: float = field(default=0.5, metadata={"help": "Smallest random scale."})
    scale_max: float = field(default=2.0, metadata={"help": "Largest random scale."})
    color_jitter: float = field(
        default=0.5, metadata={"help": "Strength of brightness, contrast and saturation jitter; 0 for none."}
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Precision of the teacher; auto is bfloat16 where the GPU has it."}
    )
    calibration_images: int = field(
        default=64, metadata={"help": "Training images that fit the teacher's boundary readout before step 1."}
    )
    profile: bool = field(
        default=False, metadata={"help": "Log seconds and memory of every part of the step; slows training down."}
    )
    log_gradients: bool = field(
        default=False,
        metadata={
            "help": "Log the norm of every weighted term's gradient at the student's last stage; slows training."
        },
    )
    sync_batchnorm: bool = field(
        default=True, metadata={"help": "Synchronise the student's BatchNorm over GPUs when there are several."}
    )

    def __post_init__(self) -> None:
        self.batch_eval_metrics = True  # evaluation streams counts; predictions are never gathered
        # an accelerate configuration with use_cpu reaches one process through the environment, several not at all: each
        # would take itself for the only one; and without use_cpu the base class refuses bf16 on a CPU
        by_launcher = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
        self.use_cpu = self.use_cpu or by_launcher or not torch.accelerator.is_available()
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) is False:  # YAML reads an unquoted `no` as false
                setattr(self, name, "no")
        super().__post_init__()
        for name, known in (("preset", PRESETS), ("teacher_dtype", TEACHER_DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(unknown_key_message(name, str(getattr(self, name)), known))
        if isinstance(self.losses, str):
            self.losses = parse_mapping(self.losses, "losses")
        losses = read_losses(self.resolved_losses)  # a typing error shows now, not after a teacher's training
        if self.torch_compile and (self.log_gradients or any(loss.measured for loss in losses.values())):
            raise ValueError(
                "log_gradients and `weight: auto` take the gradient of every term, which torch_compile hides; leave one out."
            )
        for name in ("crop_size", "calibration_images", "scale_min"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be > 0.")
        if self.profile and self.torch_compile:
            raise ValueError("profile measures the parts of a step, which torch_compile fuses; leave one of them out.")
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min {self.scale_min} exceeds scale_max {self.scale_max}.")

    @property
    def resolved_losses(self) -> dict[str, Any]:
        """The `losses` in force: the given ones, or the preset's."""
        return PRESETS[self.preset] if self.losses is None else self.losses  # type: ignore[return-value]


MAPPINGS = ("student", "teacher", "teacher_training", "dataset_options", "losses", "lr_scheduler_kwargs")
ARGUMENT_CLASSES = (ModelArguments, DataArguments, BCDConfig)
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
        ValueError: for streaming without max_steps.
    """

    def build(cls: Any) -> Any:
        return cls(**{f.name: recipe[f.name] for f in dataclasses.fields(cls) if f.name in recipe})

    model_args, data_args, config = build(ModelArguments), build(DataArguments), build(BCDConfig)
    if data_args.streaming and config.max_steps <= 0:
        raise ValueError(
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
        ValueError: for unknown keys, naming the nearest known one.
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
    values = {key: getattr(namespace, key) for key in RECIPE_KEYS}
    values |= {key: value for key, value in recipe.items() if key not in typed}
    for key in MAPPINGS:
        if values[key] in ("none", "null"):  # so that the command line can undo what the recipe says
            values[key] = None
        if isinstance(values[key], str) and values[key].lstrip().startswith("{"):
            values[key] = parse_mapping(values[key], key)
    if values["losses"] is None and any(path[0] == "losses" for path, _ in dotted):
        values["losses"] = PRESETS.get(values["preset"])  # a dotted flag changes the losses in force
    for path, text in dotted:
        _set_nested(values, path, read_yaml(text))
    return {key: values[key] for key in [*recipe, *typed, *(path[0] for path, _ in dotted)]}


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
                raise ValueError(unknown_key_message("mapping", path[0], MAPPINGS))
            if not equals and i + 1 >= len(argv):
                raise ValueError(f"{name} has no value.")
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
            raise ValueError(unknown_key_message("argument", flag.removeprefix("--").replace("-", "_"), known))


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
