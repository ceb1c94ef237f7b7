"""Makes values that are not ours inert in Markdown, HTML and code, and takes private ones out of a command."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.text import one_line, redacted


REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WEB_PAGE = re.compile(r"https?://[\w.~%/#?=&+-]+")
# absolute, relative to home or to a neighbouring folder; may stand inside a mapping
LOCAL_PATH = re.compile(r"""(?<![\w/.:%-])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^,'"{}\[\]\n]*""")
PATH_OPTIONS = ("data_dir", "id2label", "label_synonyms", "weights")


def escape_markdown(text: object) -> str:
    """Makes a value inert in a line of Markdown, also in a table, and in HTML."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = "".join(f"\\{c}" if c in "\\`*_[]#|!~$@" else c for c in escaped)
    escaped = re.sub(r"(?i)(?<=\bwww)\.", r"\\.", escaped.replace("://", "\\://"))  # no links of their own accord
    return re.sub(r"^(\d*)((?<!\d)[-+=]|(?<=\d)[.)](?=\s|$))", r"\1\\\2", escaped)  # no list, no rule


def code_block(text: str, language: str = "") -> str:
    """Fenced code, whatever backticks the code holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def link(text: str, url: str) -> str:
    """A Markdown link, or the bare text where the address has characters that could end it."""
    return f"[{escape_markdown(text)}]({url})" if WEB_PAGE.fullmatch(url) else escape_markdown(text)


def hub_link(repo_id: str, kind: str = "") -> str:
    """A link to a repository; `kind` is `datasets/` for those."""
    return link(repo_id, f"https://huggingface.co/{kind}{repo_id}")


def shareable_command(program: str, arguments: Sequence[str], secrets: Sequence[str] = ()) -> str:
    """The command line without tokens and without paths of this machine.

    Args:
        program: what is run, such as `accelerate launch scripts/distill.py`.
        arguments: what followed it.
        secrets: access tokens beside the one in use.
    """
    shown, option = [], ""
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if name:
            option = name.removeprefix("--")
        key = option.replace("-", "_").rpartition(".")[2]
        if "token" in key:
            continue
        if name and not equals:
            shown.append(name)
            continue
        value = without_paths(value, key)
        for secret in secrets:
            value = value.replace(secret, "<token>")
        shown.append(f"{name}{equals}{shlex.quote(redacted(value))}")
    return " ".join([program, *shown])


def shareable_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without tokens, without paths of this machine and without where its results went."""

    def shared(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {name: shared(inner, str(name)) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [shared(inner, key) for inner in value]
        return redacted(without_paths(value, key)) if isinstance(value, str) else value

    private = {"output_dir", "run_name", "push_to_hub", "resume_from_checkpoint"}
    return {
        key: shared(value, key)
        for key, value in recipe.items()
        if key not in private and "token" not in key and not key.startswith("hub_")
    }


def without_paths(value: str, key: str) -> str:
    """An argument's value with a placeholder in place of each local path."""
    if "examples/recipes/" in value:
        return value[value.index("examples/recipes/") :]
    if key == "output_dir":
        return Path(value).name or "output"
    if key in PATH_OPTIONS or ("/" in value and len(value) < 200 and Path(value).exists()):
        return f"path/to/{key}"
    return LOCAL_PATH.sub(f"path/to/{key or 'file'}", value)
