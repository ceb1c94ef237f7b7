"""The distillation methods as text: a list, a table, or one in full with equation, options, weights and citation."""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill, indent
from typing import Any

from .. import losses
from ..adapters.base import OF_BOTH
from ..losses import LOSSES, DistillationCriterion, build_criterion
from ..losses.recipe import ALWAYS_OFFERED, OFFERED_BY_ALL, options_of, read_losses, serving_options
from ..outputs import FeatureSpec
from ..utils.messages import UserError, unknown_key_message
from ..utils.yaml import yaml_text


# the paper's first pair, PSPNet-101 -> PSPNet-18 on Pascal VOC
LEVELS = {"stem": 4, "stride_4": 4, "stride_8": 8, "stride_16": 8, "stride_32": 8}
STUDENT, TEACHER = (
    {name: FeatureSpec(width, stride) for (name, stride), width in zip(LEVELS.items(), widths, strict=True)}
    for widths in ((64, 64, 128, 256, 512), (64, 256, 512, 1024, 2048))
)
HEAD_LEVELS = ("stride_32",)
PYRAMID = {f"p{level}": FeatureSpec(256, 2**level) for level in range(3, 8)}
# what models of each task can offer to losses
TASK_OFFERS = {
    "segmentation": ALWAYS_OFFERED | {"head"},
    "detection": OFFERED_BY_ALL | (OF_BOTH - {"logits", "mask_queries", "final_boxes"}),
    "instances": OFFERED_BY_ALL | {"pyramid", "boxes", "classes", "mask_queries", "final_boxes"},
}
NUM_LABELS = 21
COSTS = Path(__file__).parents[2] / "docs" / "methods_cost.json"
WIDTH = 118


def measured_costs() -> dict[str, Any]:
    """What each method costs, measured in a checkout; empty in a wheel."""
    return json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {}


def overview(costs: Mapping[str, Any]) -> str:
    """All methods, each in a few lines."""
    return "\n\n".join([*(summary(name, costs) for name in sorted(LOSSES)), fill(explanation(costs), WIDTH)])


def reference_criterion(recipe: Mapping[str, Any]) -> DistillationCriterion:
    """The criterion of a recipe's `losses` section for the reference pair."""
    options = {"offers": frozenset().union(*TASK_OFFERS.values()), "pyramids": (PYRAMID, PYRAMID)}
    return build_criterion(recipe, STUDENT, TEACHER, num_labels=NUM_LABELS, head_levels=HEAD_LEVELS, **options)


def tasks_of(name: str) -> str:
    """The tasks that a method serves, with the option that makes it do so where that is no default."""
    found = []
    for task, offers in TASK_OFFERS.items():
        serving = serving_options(name, offers)
        if serving is not None:
            found.append(task + "".join(f" (`{key}: {value}`)" for key, value in serving.items()))
    return ", ".join(found)


def describe(name: str, costs: Mapping[str, Any]) -> dict[str, str]:
    """Cells of a method by the titles of their columns; `costs` is the content of methods_cost.json, perhaps empty."""
    loss, criterion = LOSSES[name], reference_criterion({name: {}})
    trained = sum(parameter.numel() for parameter in criterion.parameters() if parameter.requires_grad)
    others = sum(tensor.numel() for tensor in criterion.state_dict().values()) - trained
    millions = f"{trained / 1e6:.2f}" + (f" + {others / 1e6:.2f}" if others >= 5_000 else "")
    measured = costs.get("methods", {}).get(name, {})
    times = {title: measured.get(title.lower()) for title in ("ms", "MiB") if costs}
    return {
        "method": name,
        "tasks": tasks_of(name),
        "transfers": loss.transfers,
        "needs": ", ".join([*sorted(loss.needs), *([f"keeps a {loss.keeps}"] if loss.keeps else [])]),
        "extra parameters (M)": millions if trained + others >= 5_000 else "none",
        **{title: "" if x is None else f"{x:.{0 if x >= 10 else 1}f}" for title, x in times.items()},
        "checked": loss.checked,
    }


def explanation(costs: Mapping[str, Any]) -> str:
    """What the numbers of a list mean, and what they were measured with."""
    text = (
        "Extra parameters: those trained with the student + others (frozen, of a discriminator, in a memory), for "
        f"PSPNet-101 -> PSPNet-18 with {NUM_LABELS} classes; the student that comes out has none of them."
    )
    if not costs:
        return text
    threads = f", threads: {costs['threads']}" if "threads" in costs else ""
    pixels = f"batch {costs['batch']} of {costs['side']} x {costs['side']} pixels"
    setting = f"{pixels}, {costs['dtype']}, {costs['device']}{threads}, PyTorch {costs['torch']}"
    return f"{text} ms and MiB: forward and backward of the method alone and what ends its step; {setting}."


def table(costs: Mapping[str, Any]) -> str:
    """All methods, as docs/methods.md."""
    rows = [describe(name, costs) for name in sorted(LOSSES)]
    introduction = (
        "Each is a key of a recipe's `losses`, alone or beside others: `losses: {bcd: {}, ifvd: {weight: 20}}`. "
        "`hf-bcd methods KEY` prints one with its options, weights, equation and citation. Default weights are the "
        f"official ones, converted to our reductions, unless the last column says otherwise. {explanation(costs)}"
    )
    lines = [
        "# Distillation methods\n",
        fill(introduction, WIDTH, break_long_words=False, break_on_hyphens=False),
        "\nWritten by `hf-bcd methods --markdown > docs/methods.md`.\n",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "|".join("--:" if title in ("extra parameters (M)", "ms", "MiB") else "---" for title in rows[0]) + "|",
    ]
    for row in rows:
        linked = {**row, "method": f"[{row['method']}]({LOSSES[row['method']].source})"}
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in linked.values()) + " |")
    return "\n".join(lines)


def paper_index() -> str:
    """All methods as a page in Markdown: equations, and beside them the options with our defaults, weights and citation."""
    blocks = [
        "# Paper index",
        "Each method's defaults beside the equations that they belong to. `hf-bcd methods KEY` prints the same.",
    ]
    for name in sorted(LOSSES):
        cls, default = LOSSES[name], read_losses({name: {}})[name]
        texts = argument_help(cls)
        rows = [(key, yaml_text(value), texts[key]) for key, value in options_of(cls).items()]
        rows.append(("weight", yaml_text(dict(default.weights)), "a number for each term, or one for all of its own"))
        rows.append(("decay", yaml_text(default.decays), "whether r(t) multiplies it"))
        blocks += [
            f"## {name}",
            f"Transfers {cls.transfers}. [{cls.source}]({cls.source})",
            description(cls),
            *(f"**`{function.__name__}`**: {description(function)}" for function in functions_of(cls)),
            "| option | default | |\n|---|---|---|\n"
            + "\n".join(f"| `{a}` | `{b}` | {c.replace('|', chr(92) + '|')} |" for a, b, c in rows),
            f"Checked: {cls.checked}.",
            f"```bibtex\n{cls.citation}\n```",
        ]
    return "\n\n".join(blocks) + "\n"


def summary(name: str, costs: Mapping[str, Any]) -> str:
    """A method in a few lines."""
    cls, row = LOSSES[name], describe(name, costs)
    measured = "".join(f"; {row[unit]} {unit}" for unit in ("ms", "MiB") if row.get(unit))
    facts = f"needs: {row['needs']}; extra parameters (M): {row['extra parameters (M)']}{measured}"
    facts += f"\ntasks: {row['tasks'].replace('`', '')}"
    return f"{name}: {cls.transfers}\n{cls.source}\n{facts}\n" + fill(f"checked: {cls.checked}", WIDTH)


def page(name: str, costs: Mapping[str, Any]) -> str:
    """Everything about a method: what it computes, its options and weights, how to use and cite it.

    Raises:
        UserError: for an unknown method, naming the nearest known one.
    """
    if name not in LOSSES:
        raise UserError(unknown_key_message("method", name, LOSSES))
    cls, default = LOSSES[name], read_losses({name: {}})[name]
    weights, options, texts = dict(default.weights), options_of(cls), argument_help(cls)
    lines = [f"{key} = {yaml_text(value)}: {texts[key]}" for key, value in options.items()]
    lines.append(f"weight = {yaml_text(weights)}: a number for each term, or one for all of its own")
    lines.append(f"decay = {yaml_text(default.decays)}: whether r(t) multiplies it")
    written = {key: value for key, value in options.items() if value is not None} | {"weight": weights}
    blocks = [
        summary(name, costs),
        fill(explanation(costs), WIDTH),
        description(cls),
        *(f"{function.__name__}\n{indent(description(function), '  ')}" for function in functions_of(cls)),
        "options and their defaults:\n"
        + "\n".join(fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ") for line in lines),
        f"in a recipe:\n  losses: {yaml_text({name: {}})}\nor with its defaults written out:\n"
        f"  losses: {yaml_text({name: written})}",
        cls.citation,
    ]
    return "\n\n".join(blocks)


def functions_of(cls: type) -> list[Any]:
    """The pure functions of a method that the package exports."""
    if cls is losses.BCDLoss:  # its terms stand in files of their own
        return [losses.boundary_distillation_loss, losses.context_distillation_loss]
    exported = [getattr(losses, name) for name in losses.__all__]
    return [item for item in exported if inspect.isfunction(item) and item.__module__ == cls.__module__]


def description(item: Any) -> str:
    """A docstring up to its first section: what it computes, and how we read the paper."""
    return re.split(r"\n\n(?=\w+:\n)", inspect.getdoc(item) or "")[0]


def argument_help(item: Any) -> dict[str, str]:
    """The section `Args` of a docstring by argument."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.getdoc(item) or "", re.M)
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.M)
    return {name: " ".join(text.split()) for name, text in found}
