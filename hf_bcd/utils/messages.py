"""Errors for the user: what was wrong, and the nearest thing that would have been right."""

import difflib
import re
from collections.abc import Iterable

from .text import elided, one_line, shortened


MAX_MESSAGE, MAX_KNOWN = 2000, 300


class UserError(ValueError):
    """A user's mistake: the message is one line that says what was found and what to do; commands print nothing else.

    Args:
        message: its middle is left out where a value of megabytes stands in it.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if text.startswith("Caught ") and "Original Traceback" in text:  # as a loader's worker hands it on
            text = re.split(r"^(?:[\w.]+\.)?\w+Error: ", text, flags=re.M)[-1]
        super().__init__(elided(one_line(text), MAX_MESSAGE))


def unknown_key_message(kind: str, key: object, known: Iterable[str]) -> str:
    """An error message that names the nearest known key, and all of them where they are few."""
    known, key = sorted(known), shortened(key)
    close = difflib.get_close_matches(key, known, n=1)
    listed = ", ".join(known)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if len(listed) <= MAX_KNOWN:
        hint += f" Known: {listed}."
    elif not close:
        hint = f" The nearest of {len(known)}: {', '.join(difflib.get_close_matches(key, known, n=3, cutoff=0))}."
    return f"unknown {kind} {key!r}.{hint}"
