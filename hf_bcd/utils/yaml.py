"""YAML as people write it: 1e-4 is a number, `on` is a word, and no tag builds an object."""

import re
import sys
from typing import Any

import yaml

from .messages import UserError


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

    Raises:
        UserError: if it is no YAML; it names `name`, the file or argument that the text comes from.
    """
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is no valid YAML: {' '.join(str(error).split())}") from error


def parse_mapping(text: str, key: str) -> dict[str, Any]:
    """Reads a mapping written as YAML or JSON.

    Raises:
        UserError: if `text` is something else.
    """
    value = read_yaml(text, key)
    if not isinstance(value, dict):
        raise UserError(f"{key} is {text!r}; expected a mapping such as '{{name: value}}'.")
    return value


def yaml_text(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, sort_keys=False)
    return text.removesuffix("...\n").strip()
