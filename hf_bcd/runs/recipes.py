"""Recipes: YAML files of arguments, each of which may start from another."""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..utils.files import read_text
from ..utils.messages import UserError, unknown_key_message
from ..utils.yaml import read_yaml


EXAMPLES = Path(__file__).parents[1] / "examples"


def find_recipe(name: str | Path, kind: str = "recipes") -> Path:
    """The file of a recipe or study: a path, else a name in the package such as `camvid/pspnet101_to_pspnet18.yaml`.

    `examples/recipes/` may stand before the name, as in a checkout, where these folders are links to the package's.

    Args:
        name: path or name.
        kind: folder of the package, `recipes` or `studies`.

    Raises:
        UserError: there is neither; the message has the nearest names.
    """
    if (path := Path(name)).is_file():
        return path
    folder = EXAMPLES / kind
    inner = path.as_posix().removeprefix(f"examples/{kind}/").removesuffix(".yaml") + ".yaml"
    known = {one.relative_to(folder).as_posix(): one for one in sorted(folder.rglob("*.yaml"))}
    if inner in known:
        return known[inner]
    near = difflib.get_close_matches(inner, known, n=3, cutoff=0.5)
    alike = [one for one in known if Path(inner).stem in one][:3]  # the folder is another, or the name goes on
    hint = ", ".join(dict.fromkeys([*alike, *near]))
    raise UserError(f"{name}: no such file, nor one of the package's {kind}{f'; near it are {hint}' if hint else ''}.")


def packaged(name: str) -> str:
    """The package's own file for what its recipes call `examples/...`, where there is no such file here; else the name."""
    inner = EXAMPLES.parent / name
    return str(inner) if name.startswith("examples/") and inner.is_file() and not Path(name).is_file() else name


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
