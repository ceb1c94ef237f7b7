"""Makes values that are not ours inert in Markdown, HTML and code, and takes private ones out of a recipe."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ..utils.text import one_line, redacted
from ..utils.yaml import yaml_text


WEB_PAGE = re.compile(r"https?://[\w.~%/#?=&+-]+")
# absolute, relative to home or to a neighbouring folder; may stand inside a mapping
LOCAL_PATH = re.compile(r"""(?<![\w/.:%-])(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^,'"{}\[\]\n]*""")
PATH_OPTIONS = ("data_dir", "id2label", "label_synonyms", "weights")
PRIVATE = re.compile(r"output_dir|run_name|push_to_hub|resume_from_checkpoint|hub_.*|.*token.*")


def escape_markdown(text: object) -> str:
    """Makes a value inert in a line of Markdown, also in a table, and in HTML."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = "".join(f"\\{c}" if c in "\\`*_[]#|!~$@" else c for c in escaped)
    escaped = re.sub(r"(?i)(?<=\bwww)\.", r"\\.", escaped.replace("://", "\\://"))  # no links of their own accord
    return re.sub(r"^(\d*)((?<!\d)[-+=]|(?<=\d)[.)](?=\s|$))", r"\1\\\2", escaped)  # no list, no rule


def code_block(text: str, language: str = "") -> str:
    """Fenced code, whatever backticks the code holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def link(text: str, url: str | None) -> str:
    """A Markdown link, or the bare text where there is no address or it has characters that could end the link."""
    return f"[{escape_markdown(text)}]({url})" if url and WEB_PAGE.fullmatch(url) else escape_markdown(text)


def hub_link(repo_id: str, kind: str = "") -> str:
    """A link to a repository; `kind` is `datasets/` for those."""
    return link(repo_id, f"https://huggingface.co/{kind}{repo_id}")


def paper_link(source: str) -> str:
    """A link to a paper; for one of arXiv to the Hub's page, which lists the models that mention it."""
    paper = re.search(r"\d{4}\.\d{4,5}$", source) if "arxiv.org" in source or "/papers/" in source else None
    if paper is None:
        return link(source.removeprefix("https://"), source)
    return link(f"arXiv:{paper[0]}", f"https://huggingface.co/papers/{paper[0]}")


def render(template: str, **context: Any) -> str:
    """A template of this package as Markdown, in which values that are not ours pass through `md`, `code` or a link."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_bcd.card"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"md": escape_markdown, "code": code_block, "link": link, "hub": hub_link}
    environment.filters |= {"paper": paper_link, "yaml": yaml_text}
    return environment.get_template(template).render(context)


def shareable_recipe(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML, without tokens, paths of this machine and the place of its results."""

    several = any(isinstance(recipe.get(key), list) for key in ("teacher", "teacher_store"))

    def shared(value: Any, key: str) -> Any:
        if several and isinstance(value, str) and key in ("teacher", "teacher_store", "name_or_path"):
            key = Path(value).name  # which `losses` may call them by
        if isinstance(value, Mapping):
            return {name: shared(inner, str(name)) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [shared(inner, key) for inner in value]
        return redacted(without_paths(value, key)) if isinstance(value, str) else value

    kept = {key: shared(value, key) for key, value in recipe.items() if not PRIVATE.fullmatch(key)}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)


def without_paths(value: str, key: str) -> str:
    """An argument's value with a placeholder in place of each local path."""
    if "examples/recipes/" in value:
        return value[value.index("examples/recipes/") :]
    if key in PATH_OPTIONS or ("/" in value and len(value) < 200 and Path(value).exists()):
        return f"path/to/{key}"
    return LOCAL_PATH.sub(f"path/to/{key or 'file'}", value)
