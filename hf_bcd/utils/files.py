"""Text files: UTF-8 both ways, and never seen half written."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .messages import UserError
from .text import shortened


LFS_POINTER = b"version https://git-lfs"


def read_text(path: Path) -> str:
    """Reads a text file that a user wrote: UTF-8, with or without a byte order mark.

    Raises:
        OSError: it cannot be read.
        UserError: it has another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: no UTF-8 text (byte {error.start}: {error.reason}); save it with that encoding."
        ) from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({shortened(error)}).") from error


def check_readable(path: Path, remedy: str) -> None:
    """Refuses weights or state that cannot be read, such as half a download.

    Args:
        path: file of safetensors, or of tensors that `torch.save` wrote; others pass.
        remedy: a sentence for the error message.

    Raises:
        UserError: naming the file.
    """
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        return
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path}: a Git LFS pointer in the place of the file; run `git lfs pull`, or download the file."
            )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as content:
                content.keys()
        else:
            from transformers.trainer_pt_utils import safe_globals  # numpy's random state is no tensor

            with warnings.catch_warnings(action="ignore"), safe_globals():
                torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # several libraries raise all kinds of errors for a damaged file
        raise UserError(f"{path}: damaged ({shortened(error) or type(error).__name__}). {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8, so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, in which what is no finite number is null; see `write_text`."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(scores: Any) -> Any:
    """Scores that `write_json` has written, with nan again for null."""
    if isinstance(scores, Mapping):
        return {key: numbers(one) for key, one in scores.items()}
    if isinstance(scores, list):
        return [numbers(one) for one in scores]
    return math.nan if scores is None else scores


def check_folder(path: str | Path, name: str) -> None:
    """Refuses a folder to write to, given by the argument `name`, that is a file or would lie below one."""
    place = next((place for place in (Path(path), *Path(path).parents) if place.exists()), None)
    if place is not None and not place.is_dir():
        which = "which" if place == Path(path) else f"but {place}"
        raise UserError(f"{name} is {path}, {which} is a file; name a folder.")
