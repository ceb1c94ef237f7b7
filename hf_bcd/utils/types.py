"""Values that a user wrote, in the type of the field that they are for."""

import reprlib
from contextlib import suppress
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from .messages import UserError
from .text import shortened


MAX_WHOLE = 2**32
TRUTH = {
    word: truth for truth, words in ((True, "yes true t y 1"), (False, "no false f n 0")) for word in words.split()
}
WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a mapping", NoneType: "null",
}  # fmt: skip


def converted(value: Any, hint: Any, name: str) -> Any:
    """The value in the type of a field: numbers may stand in quotes, and 1e3 is a whole one.

    Args:
        value: as YAML or JSON gives it.
        hint: annotation of the field.
        name: what the error message calls it.

    Raises:
        UserError: if it is of another type.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    for kind in kinds:
        with suppress(ValueError, TypeError, OverflowError):
            return _as_kind(kind, value)
    expected = " or ".join(dict.fromkeys(map(_in_words, kinds)))
    raise UserError(f"{name} is {shortened(reprlib.repr(value))}; it must be {expected}.")


def _as_kind(kind: Any, value: Any) -> Any:
    """The value as one kind of argument; ValueError if it is another."""
    if kind is bool:
        value = TRUTH.get(value.lower()) if isinstance(value, str) else value
        fits = isinstance(value, bool)
    elif kind in (int, float):
        value = kind(value) if isinstance(value, str) else value
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if fits and kind is int:
            fits = value % 1 == 0 and abs(value) < MAX_WHOLE
            value = int(value) if fits else value
    elif get_origin(kind) is list or kind is list:
        (item,) = get_args(kind) or (Any,)
        fits = isinstance(value, list)
        value = [_as_kind(item, one) for one in value] if fits else value
    elif get_origin(kind) is dict or kind is dict:
        fits = isinstance(value, dict)
    elif kind is str or get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        fits = isinstance(value, str)  # which one of several, the arguments themselves check
    else:
        fits = kind is not NoneType
    if not fits:
        raise ValueError
    return value


def _in_words(kind: Any) -> str:
    item = (get_args(kind) or (None,))[0] if get_origin(kind) is list else None
    if item in (int, float):
        return "a list of whole numbers" if item is int else "a list of numbers"
    return WORDS.get(get_origin(kind) or kind, "text")
