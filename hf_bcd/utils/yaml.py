"""YAML as people write it: 1e-4 is a number, `on` is a word, and no tag builds an object."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from .files import read_text
from .messages import UserError
from .text import shortened


MAX_VALUES = 100_000


class _YamlLoader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number and `on` names an option; YAML 1.1 takes them for text and a truth value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str, name: str) -> Any:
    """The value of a YAML document; tags that would build Python objects are errors.

    Raises:
        UserError: if it is no YAML; it names `name`, the file or argument that the text comes from.
    """
    try:
        value = yaml.load(text, Loader=_YamlLoader)
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        TypeError,
    ) as error:  # such as a date that is none, a list as key
        said = shortened(error).replace(' in "<unicode string>",', " at") or type(error).__name__
        raise UserError(f"{name} is no valid YAML: {said}") from error
    if _size(value, {}) > MAX_VALUES:
        raise UserError(f"{name}: its aliases stand for more than {MAX_VALUES} values; write out what it means.")
    return value


def _size(value: Any, known: dict[int, float]) -> float:
    """Number of values in nested lists and mappings as they would be written out; infinite if one holds itself."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # until its parts are counted
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def parse_mapping(text: str, key: str) -> dict[str, Any]:
    """Reads a mapping written as YAML or JSON.

    Raises:
        UserError: if `text` is something else.
    """
    value = read_yaml(text, key)
    if not isinstance(value, dict):
        raise UserError(f"{key} is {text!r}; expected a mapping such as '{{name: value}}'.")
    return value


def read_mapping(source: str, key: str) -> dict[str, Any]:
    """As `parse_mapping`, of a text or of the JSON or YAML file that it names.

    Raises:
        UserError: if the file cannot be read, or holds something else.
    """
    path = Path(source).expanduser()
    if path.suffix not in (".json", ".yaml", ".yml"):
        return parse_mapping(source, key)
    try:
        return parse_mapping(read_text(path), f"{key} {source}")
    except OSError as error:
        raise UserError(f"{key} {source}: cannot be read ({error.strerror}).") from error


def yaml_text(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, sort_keys=False)
    return text.removesuffix("...\n").strip()
