"""What every distillation method says about itself, as a table and as a page: `hf-bcd methods`."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill, indent, wrap
from typing import Any

from .. import losses
from ..losses import LOSSES, DistillationCriterion, DistillationLoss, build_criterion
from ..losses.recipe import ALWAYS_OFFERED, options_of, read_losses
from ..outputs import FeatureSpec
from ..utils.messages import UserError, unknown_key_message
from ..utils.yaml import yaml_text


# the paper's first pair, PSPNet-101 -> PSPNet-18 on Pascal VOC
STUDENT = {
    "stem": FeatureSpec(64, 4),
    "stride_4": FeatureSpec(64, 4),
    "stride_8": FeatureSpec(128, 8),
    "stride_16": FeatureSpec(256, 8),
    "stride_32": FeatureSpec(512, 8),
}
TEACHER = {
    "stem": FeatureSpec(64, 4),
    "stride_4": FeatureSpec(256, 4),
    "stride_8": FeatureSpec(512, 8),
    "stride_16": FeatureSpec(1024, 8),
    "stride_32": FeatureSpec(2048, 8),
}
HEAD_LEVELS = ("stride_32",)
NUM_LABELS = 21
PAIR = "PSPNet-101 -> PSPNet-18 with 21 classes"

COSTS = Path(__file__).parents[2] / "docs" / "methods_cost.json"
WIDTH = 118


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        key: its name in a recipe.
        transfers: the knowledge that it transfers.
        needs: what it reads and what it keeps.
        parameters: millions of numbers, trained with the student and others.
        cost: milliseconds and MiB of a step; empty where nobody measured.
        source: address of the paper.
        checked: how far our version is checked.
    """

    key: str
    transfers: str
    needs: str
    parameters: str
    cost: tuple[str, str]
    source: str
    checked: str


def reference_criterion(recipe: Mapping[str, Any]) -> DistillationCriterion:
    """The criterion of a recipe's `losses` section for the reference pair."""
    offers = ALWAYS_OFFERED | {"head"}
    return build_criterion(recipe, STUDENT, TEACHER, num_labels=NUM_LABELS, offers=offers, head_levels=HEAD_LEVELS)


def describe(name: str, costs: Mapping[str, Any] | None) -> Method:
    """The row of a method.

    Args:
        name: its key.
        costs: contents of methods_cost.json, where there is one.
    """
    cls, criterion = LOSSES[name], reference_criterion({name: {}})
    trained = sum(parameter.numel() for parameter in criterion.parameters() if parameter.requires_grad)
    others = sum(tensor.numel() for tensor in criterion.state_dict().values()) - trained
    millions = f"{trained / 1e6:.2f}" + (f" + {others / 1e6:.2f}" if others >= 5_000 else "")
    measured = (costs or {}).get("methods", {}).get(name)
    return Method(
        name,
        cls.transfers,
        ", ".join([*sorted(cls.needs), *([f"keeps a {cls.keeps}"] if cls.keeps else [])]),
        millions if trained + others >= 5_000 else "none",
        ("", "") if measured is None else (_short(measured["ms"]), _short(measured["mib"])),
        cls.source,
        cls.checked,
    )


def _short(number: float | None) -> str:
    """Two digits at least, none behind the point from ten on."""
    return "" if number is None else f"{number:.{0 if number >= 10 else 1}f}"


def read_costs() -> dict[str, Any] | None:
    """The measurement that is checked in, if this is a checkout."""
    return json.loads(COSTS.read_text()) if COSTS.is_file() else None


# ---- The table -------------------------------------------------------------------------------------------------------


def columns(costs: Mapping[str, Any] | None) -> list[str]:
    """Titles of the table."""
    return ["method", "transfers", "needs", "extra parameters (M)", *(["ms", "MiB"] if costs else []), "checked"]


def explanation(costs: Mapping[str, Any] | None) -> str:
    """What the columns mean."""
    text = (
        "Extra parameters: those trained with the student + others (frozen, of a discriminator, in a memory), for "
        f"{PAIR}; the student that comes out has none of them."
    )
    if costs:
        text += f" ms and MiB: forward and backward of the method alone and what ends its step; {setting(costs)}."
    return text


def setting(costs: Mapping[str, Any]) -> str:
    """What the costs were measured with."""
    threads = f", threads: {costs['threads']}" if "threads" in costs else ""
    return (
        f"batch {costs['batch']} of {costs['side']} x {costs['side']} pixels, {costs['dtype']}, {costs['device']}{threads}, "
        f"PyTorch {costs['torch']}"
    )


def markdown(costs: Mapping[str, Any] | None) -> str:
    """docs/methods.md."""
    titles = columns(costs)
    right = {"extra parameters (M)", "ms", "MiB"}
    lines = [
        "# Distillation methods\n",
        fill(
            "Each is a key of a recipe's `losses`, alone or beside others: `losses: {bcd: {}, ifvd: {weight: 20}}`. "
            "`hf-bcd methods KEY` prints one with its options, weights, equation and citation. Default weights are the "
            "official ones, converted to our reductions, unless the last column says otherwise. " + explanation(costs),
            width=WIDTH,
            break_long_words=False,
            break_on_hyphens=False,
        ),
        "\nWritten by `hf-bcd methods --markdown > docs/methods.md`.\n",
        "| " + " | ".join(titles) + " |",
        "|" + "|".join("--:" if title in right else "---" for title in titles) + "|",
    ]
    for name in sorted(LOSSES):
        row = describe(name, costs)
        cells = [f"[{name}]({row.source})", row.transfers, row.needs, row.parameters]
        cells += [*(row.cost if costs else ()), row.checked]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def table(costs: Mapping[str, Any] | None) -> str:
    """The same for a terminal."""
    rows = []
    for name in sorted(LOSSES):
        row = describe(name, costs)
        cells = [name, row.transfers, row.needs, row.parameters, *(row.cost if costs else ()), row.checked]
        rows.append((cells, row.source))
    widths = [9, 24, 17, 12, *([6, 6] if costs else [])]
    widths.append(WIDTH - sum(widths) - 2 * len(widths))
    lines = [_wrapped(columns(costs), widths), "-" * WIDTH]
    for cells, source in rows:
        lines += [_wrapped(cells, widths), " " * (widths[0] + 2) + source]
    return "\n".join([*lines, "", fill(explanation(costs), WIDTH)])


def _wrapped(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One row of text columns, as many lines as its longest cell needs."""
    parts = [wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for index in range(max(map(len, parts))):
        line = [part[index] if index < len(part) else "" for part in parts]
        lines.append("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    return "\n".join(lines)


# ---- One method ------------------------------------------------------------------------------------------------------


def page(name: str, costs: Mapping[str, Any] | None) -> str:
    """Everything about a method: what it computes, its options and weights, how to use and cite it.

    Raises:
        UserError: for an unknown method, naming the nearest known one.
    """
    if name not in LOSSES:
        raise UserError(unknown_key_message("method", name, LOSSES))
    cls, row = LOSSES[name], describe(name, costs)
    blocks = [
        f"{name}: {row.transfers}\n{row.source}",
        description(cls),
        *(f"{function.__name__}\n{indent(description(function), '  ')}" for function in functions_of(cls)),
        f"needs: {row.needs}\nextra parameters (M): {row.parameters}"
        + (f"\ncost: {row.cost[0]} ms, {row.cost[1]} MiB; {setting(costs)}" if costs and any(row.cost) else ""),
        "options and their defaults:\n" + "\n".join(option_lines(name)),
        fill(f"checked: {row.checked}", WIDTH),
        f"in a recipe:\n  losses: {yaml_text({name: {}})}\nor with its defaults written out:\n  {recipe_line(name)}",
        cls.citation,
    ]
    return "\n\n".join(blocks)


def option_lines(name: str) -> list[str]:
    """Each option of a recipe with its default and what it means."""
    cls = LOSSES[name]
    texts = argument_help(cls)
    lines = [f"{key} = {yaml_text(default)}: {texts.get(key, '')}" for key, default in options_of(cls).items()]
    default = read_losses({name: {}})[name]
    lines.append(f"weight = {yaml_text(dict(default.weights))}: a number for each term, or one for all of its own")
    lines.append(f"decay = {yaml_text(default.decays)}: whether r(t) multiplies it")
    return [fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ") for line in lines]


def recipe_line(name: str) -> str:
    """The line of a recipe that spells out the defaults of a method."""
    options = {key: value for key, value in options_of(LOSSES[name]).items() if value is not None}
    return f"losses: {yaml_text({name: {**options, 'weight': dict(read_losses({name: {}})[name].weights)}})}"


def functions_of(cls: type[DistillationLoss]) -> list[Callable]:
    """The pure functions of a method that the package exports."""
    if cls is losses.BCDLoss:  # its terms stand in files of their own
        return [losses.boundary_distillation_loss, losses.context_distillation_loss]
    exported = [getattr(losses, name) for name in losses.__all__]
    return [item for item in exported if inspect.isfunction(item) and item.__module__ == cls.__module__]


def description(item: Any) -> str:
    """A docstring up to its first section: what it computes, and how we read the paper."""
    return re.split(r"\n\n(?=\w+:\n)", inspect.getdoc(item) or "")[0]


def argument_help(item: Any) -> dict[str, str]:
    """What the section `Args` of a docstring says about each argument."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.getdoc(item) or "", re.M)
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.M)
    return {name: " ".join(text.split()) for name, text in found}
