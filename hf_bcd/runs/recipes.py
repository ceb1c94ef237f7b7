"""Recipes: YAML files of arguments, each of which may start from another."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..utils.files import read_text
from ..utils.messages import UserError, unknown_key_message
from ..utils.yaml import read_yaml


def read_recipe(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Reads a recipe and the recipes it starts from: `base: other.yaml` names one, relative to the recipe's own folder.

    A recipe's keys win over its base's, each with its whole value: `losses` replaces `losses`.

    Args:
        path: the recipe.
        known: keys that a recipe may have beside `base`.

    Raises:
        UserError: if a file is missing or holds no mapping, a key is unknown, or a recipe is its own base.
    """
    values: dict[str, Any] = {}
    chain: list[Path] = []
    asked_by = ""
    while True:
        if not path.is_file():
            raise UserError(f"{asked_by}{path}: no such file.")
        if path.resolve() in [earlier.resolve() for earlier in chain]:
            raise UserError(f"a recipe is its own base: {' -> '.join(map(str, [*chain, path]))}.")
        chain.append(path)
        recipe = read_yaml(read_text(path), str(path)) or {}
        if not isinstance(recipe, dict):
            raise UserError(f"{path}: expected a mapping of arguments, found {type(recipe).__name__}.")
        base = recipe.pop("base", None)
        for key in recipe:
            if key not in known:
                raise UserError(f"{path}: {unknown_key_message('key', str(key), {*known, 'base'})}")
        values = merged(recipe, values)
        if base is None:
            return values
        if not isinstance(base, str):
            raise UserError(f"{path}: base is {base!r}; it must be the name of another recipe.")
        path, asked_by = path.parent / base, f"{path}: base "


def merged(recipe: Mapping[str, Any], nearer: Mapping[str, Any]) -> dict[str, Any]:
    """Two recipes as one: keys of the `nearer` win, and its number of epochs also over the other's number of steps."""
    replaced = {"max_steps"} if "num_train_epochs" in nearer else set()
    return {key: value for key, value in recipe.items() if key not in replaced} | dict(nearer)
