"""Errors for the user: what was wrong, and the nearest thing that would have been right."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A user's mistake: the message is one line that says what was found and what to do; commands print nothing else."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turns a ValueError or a missing file inside the block, where a library checks a user's values, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def unknown_key_message(kind: str, key: str, known: Iterable[str]) -> str:
    """An error message that names the nearest known key."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {key!r}.{hint} Known: {', '.join(known)}."
