"""The command line of a run, and its `--help`, which imports neither torch nor the trainer."""

import argparse
import ast
import dataclasses
import sys
import typing
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from ..training.options import BCDOptions
from ..utils.messages import UserError
from .fields import DataArguments, ModelArguments


# inherited arguments that --help shows beside our own
SHOWN = frozenset((
    "output_dir", "seed", "bf16", "fp16", "resume_from_checkpoint", "push_to_hub", "gradient_accumulation_steps",
    "hub_model_id", "hub_private_repo", "hub_revision", "torch_compile",
))  # fmt: skip


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:  # the base class prints the usage and ends the process
        raise UserError(f"{message}.")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines and gives every argument one or two."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=119)


def make_parser(classes: Sequence[type], description: str | None) -> argparse.ArgumentParser:
    """A parser with an argument for every field of the classes, and `--config`."""
    parser: Any = _Parser(  # type: ignore[call-arg]
        classes,  # type: ignore[arg-type]
        description=description,
        usage="%(prog)s [--config RECIPE.yaml] [--ARGUMENT VALUE ...]",
        epilog="Every field of transformers.TrainingArguments is accepted too: --help_all lists them.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        help="YAML recipe: a file, or a name such as camvid/pspnet101_to_pspnet18.yaml; the command line wins over it.",
    )
    parser.add_argument("--help_all", action="help", help="Also list every inherited training argument.")
    return parser


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust_remote_code`, with or without a truth value, to the parser of a command on a finished student."""
    words = "run the model's own code"
    parser.add_argument("--trust_remote_code", type=string_to_bool, nargs="?", const=True, default=False, help=words)


def wants_short_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for `--help`, and not for every inherited argument."""
    return bool({"-h", "--help"} & set(argv)) and "--help_all" not in argv


def print_help(description: str | None) -> NoReturn:
    """Prints our arguments and the inherited ones of `SHOWN`, and ends the process."""
    make_parser((ModelArguments, DataArguments, shown_options()), description).print_help()
    sys.exit(0)


def shown_options() -> type:
    """The fields of `BCDConfig` that `--help` shows: ours, and those of `SHOWN`, read in the source of transformers."""
    ours = {f.name: f for f in dataclasses.fields(BCDOptions)}
    inherited = {
        name: ours.get(name) or _field(text) for name, text in _inherited().items() if name in SHOWN | set(ours)
    }
    fields = inherited | ours  # in the order of BCDConfig
    return dataclasses.make_dataclass("BCDConfig", [(f.name, f.type, f) for f in fields.values()])


def _inherited() -> dict[str, str]:
    """The lines that define the fields of `TrainingArguments`, whose module would import torch."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    source = ast.parse((Path(spec.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    return {
        part.target.id: ast.unparse(part)
        for node in source.body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def _field(definition: str) -> dataclasses.Field:
    """The field that a line of a dataclass defines."""
    scope: dict[str, Any] = {**vars(typing), "field": dataclasses.field}
    exec(f"class Single:\n    {definition}", scope)
    return dataclasses.fields(dataclasses.dataclass(scope["Single"]))[0]
