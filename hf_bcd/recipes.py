"""Recipes: YAML files of arguments, each of which may start from another."""

import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from .losses.criterion import unknown_key_message


class _YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number and `on` names an option; YAML 1.1 takes them for text and a truth value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str, name: str) -> Any:
    """The value of a YAML document; tags that would build Python objects are errors.

    Args:
        text: the document.
        name: file or argument that it comes from, for error messages.

    Raises:
        ValueError: if it is no YAML.
    """
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no valid YAML: {' '.join(str(error).split())}") from error


def parse_mapping(text: str, key: str) -> dict[str, Any]:
    """Reads a mapping written as YAML or JSON.

    Raises:
        ValueError: if `text` is something else.
    """
    value = read_yaml(text, key)
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {text!r}; expected a mapping such as '{{name: value}}'.")
    return value


def read_recipe(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Reads a recipe and those it starts from: `base: other.yaml` names one, relative to the recipe's own folder.

    A recipe's keys win over those of its base, each with its whole value: `losses` replaces `losses`.

    Args:
        path: the recipe.
        known: keys that a recipe may have beside `base`.

    Raises:
        ValueError: if a file is missing or holds no mapping, a key is unknown, or a recipe is its own base.
    """
    values: dict[str, Any] = {}
    chain: list[Path] = []
    asked_by = "--config"
    while True:
        if not path.is_file():
            raise ValueError(f"{asked_by} {path}: no such file.")
        if path.resolve() in [earlier.resolve() for earlier in chain]:
            raise ValueError(f"a recipe is its own base: {' -> '.join(map(str, [*chain, path]))}.")
        chain.append(path)
        recipe = read_yaml(path.read_text(), str(path)) or {}
        if not isinstance(recipe, dict):
            raise ValueError(f"{path}: expected a mapping of arguments, found {type(recipe).__name__}.")
        base = recipe.pop("base", None)
        for key in recipe:
            if key not in known:
                raise ValueError(f"{path}: {unknown_key_message('key', str(key), {*known, 'base'})}")
        values = merged(recipe, values)
        if base is None:
            return values
        if not isinstance(base, str):
            raise ValueError(f"{path}: base is {base!r}; it must be the name of another recipe.")
        path, asked_by = path.parent / base, f"{path}: base"


def merged(recipe: Mapping[str, Any], nearer: Mapping[str, Any]) -> dict[str, Any]:
    """Two recipes as one: keys of the `nearer` win, and its number of epochs also over the other's number of steps."""
    replaced = {"max_steps"} if "num_train_epochs" in nearer else set()
    return {key: value for key, value in recipe.items() if key not in replaced} | dict(nearer)


def yaml_text(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, sort_keys=False)
    return text.removesuffix("...\n").strip()
