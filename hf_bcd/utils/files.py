"""Text files: UTF-8 both ways, and never seen half written."""

import json
from pathlib import Path
from typing import Any

from .messages import UserError


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
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8, so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON; see `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")
