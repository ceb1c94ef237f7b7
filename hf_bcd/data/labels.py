"""From a stored mask to class ids: decoding of the file's pixel format, then the data set's label rule."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from ..utils.files import read_text
from ..utils.messages import UserError
from ..utils.text import shortened


IGNORE_INDEX = 255
UNLABELLED = 254  # every pixel of a picture without labels, until a batch is made
MAX_LABELS = UNLABELLED  # ids 0..253; 255 marks void pixels
VOID_NAMES = ("background", "ignore", "ignored", "undefined", "unlabeled", "unlabelled", "unlabel", "void")
_TABLE_SIZE = 1 << 16  # every id that an 8-bit or 16-bit mask can hold

ColourId = tuple[tuple[int, int, int], int]  # colour, and the id that it stands for
NameSource = Mapping[Any, Any] | Sequence[Any] | str | Path


def decode_label(mask: Image.Image | np.ndarray, name: str, colours: Sequence[ColourId] = ()) -> np.ndarray:
    """Reads the stored ids `[H, W]` of a mask without interpreting them.

    Palette images give their indices; converting them to grey would turn ids into luminances. RGB images are accepted if
    their three channels are equal, as in several exports of Cityscapes, or if their colours are known.

    Args:
        mask: image of mode `P`, `L`, `1`, `I`, `I;16`, `RGB`, or opaque `LA` or `RGBA`; or integer array `[H, W]` or
            `[H, W, 3]`.
        name: the file or row, for error messages.
        colours: ids by colour; of two ids with the same colour, the first is taken. An RGB mask whose channels are equal
            is still one of ids if these are among them.

    Raises:
        UserError: the mask has colours that stand for no id, or holds no integers.
    """
    ids = np.asarray(mask)
    if ids.dtype == bool:
        ids = ids.astype(np.uint8)
    if ids.ndim == 3 and ids.shape[-1] in (2, 4) and (ids[..., -1] == 255).all():
        ids = ids[..., 0] if ids.shape[-1] == 2 else ids[..., :3]  # opaque
    if ids.ndim == 3 and ids.shape[-1] == 3:
        equal = bool((ids == ids[..., :1]).all())
        if colours and not (equal and np.isin(ids[..., 0], [IGNORE_INDEX, *(index for _, index in colours)]).all()):
            found = _colour_table(tuple(colours))[pack_rgb(ids)]
            if found.min(initial=0) < 0:
                row, column = np.argwhere(found < 0)[0]
                raise UserError(
                    f"{name}: colour {tuple(ids[row, column].tolist())} at row {row}, column {column} stands for no class. "
                    "The mask has been resized with interpolation or stored with loss, or belongs to another data set."
                )
            return found
        if not equal:
            raise UserError(
                f"{name}: a colour-coded mask (its red, green and blue channels differ). Class ids cannot be read from "
                "colours: store the masks as single-channel images of ids, or as palette images."
            )
        ids = ids[..., 0]
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        mode = f"mode {mask.mode}, " if isinstance(mask, Image.Image) else ""
        raise UserError(
            f"{name}: not a label map ({mode}{ids.dtype} array of shape {ids.shape}). Store the masks as single-channel "
            "8-bit or 16-bit images of class ids."
        )
    return ids


@lru_cache(maxsize=2)
def _colour_table(colours: tuple[ColourId, ...]) -> np.ndarray:
    table = np.full(1 << 24, -1, dtype=np.int16)
    for colour, index in reversed(colours):  # of two ids with one colour, the first remains
        table[pack_rgb(np.array(colour))] = index
    return table


def pack_rgb(pixels: np.ndarray) -> np.ndarray:
    """One number R + 256 G + 65536 B per pixel `[..., 3]`, which is also the segment id of COCO's panoptic masks."""
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    return red | green << 8 | blue << 16


@dataclass(frozen=True)
class LabelRule:
    """How the ids stored in a data set's masks become the ids of its classes, by look-up tables.

    Attributes:
        reduce_zero: 0 is void and class k is stored as k + 1, as in ADE20K.
        mapping: pairs (stored id, class id or 255), as in Cityscapes. No other id may occur, not even 255: ids of
            another encoding would otherwise train the wrong classes. Without a mapping, 255 is void.
        void_ids: further stored ids that are void.
        colours: what the colours of a colour-coded mask stand for, as stored ids.
    """

    reduce_zero: bool = False
    mapping: tuple[tuple[int, int], ...] = ()
    void_ids: tuple[int, ...] = ()
    colours: tuple[ColourId, ...] = ()

    def __post_init__(self) -> None:
        if self.reduce_zero and self.mapping:
            raise UserError("reduce_zero and mapping exclude each other: write the reduction into the mapping.")
        outside = [i for i in (*self.void_ids, *(pair[0] for pair in self.mapping)) if not 0 <= i < _TABLE_SIZE]
        if outside:
            raise UserError(f"ids {outside} cannot be stored in a mask, which holds 0..{_TABLE_SIZE - 1}.")

    def in_words(self) -> str:
        """How stored ids become classes."""
        text = f"the stored ids are the class ids, and {IGNORE_INDEX} is void"
        if self.reduce_zero:
            text = f"class k is stored as k + 1, and 0 and {IGNORE_INDEX} are void"
        elif self.mapping:
            text = f"{len(self.mapping)} stored ids are mapped to class ids or void, and no other id occurs"
        void = f"; stored {', '.join(map(str, self.void_ids))} void too" if self.void_ids else ""
        return f"{text}{void}; void pixels are ignored"

    def apply(self, ids: np.ndarray, num_labels: int, name: str) -> np.ndarray:
        """Maps integer ids `[H, W]` of `decode_label` to a copy of uint8 class ids, 0..num_labels-1 and 255.

        Raises:
            UserError: a stored id is neither a class nor void; `name` says which file or row.
        """
        if ids.dtype == np.uint8:  # bytes have look-ups of their own, several times faster than numpy's
            table, known = _byte_table(self, num_labels)
            stored = bytearray(ids.tobytes())
            if not stored.translate(None, known):
                return np.frombuffer(stored.translate(table), np.uint8).reshape(ids.shape)
        inside = ids
        if ids.dtype.itemsize > 2 or ids.dtype.kind == "i":
            inside = np.where((ids >= 0) & (ids < _TABLE_SIZE), ids, _TABLE_SIZE)
        labels = _table(self, num_labels)[inside]
        if labels.min(initial=0) < 0:
            found = np.unique(ids[labels < 0]).tolist()
            shown = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
            if not 0 <= found[0] <= found[-1] < _TABLE_SIZE:
                why = f"are outside of 0..{_TABLE_SIZE - 1} and no rule can name. Store classes as 0..254 and void as 255."
            elif self.mapping:
                why = (
                    f"its encoding maps neither to void nor to one of the num_labels={num_labels} classes. It belongs to "
                    "another data set or has another encoding."
                )
            else:
                why = (
                    f"are neither void nor one of the num_labels={num_labels} classes. Either num_labels (id2label) is "
                    "wrong, or these ids are void (ignore_labels, `--ignore_labels`), or 0 is void and the classes count "
                    "from 1 (reduce_labels, `--reduce_labels`)."
                )
            raise UserError(f"{name}: the mask holds ids [{shown}], which {why}")
        return labels.astype(np.uint8)


@lru_cache(maxsize=32)
def _byte_table(rule: LabelRule, num_labels: int) -> tuple[bytes, bytes]:
    """The look-up table of 8-bit ids, and the ids that it knows."""
    table = _table(rule, num_labels)[:256]
    return table.astype(np.uint8).tobytes(), np.flatnonzero(table >= 0).astype(np.uint8).tobytes()


@lru_cache(maxsize=32)
def _table(rule: LabelRule, num_labels: int) -> np.ndarray:
    """Class id of every stored id, -1 where it is none; the last entry stands for all ids outside the table."""
    table = np.full(_TABLE_SIZE + 1, -1, dtype=np.int16)
    if rule.mapping:
        stored, classes = np.array(rule.mapping).T
        table[stored] = np.where((classes >= 0) & (classes < num_labels) | (classes == IGNORE_INDEX), classes, -1)
    else:
        first = int(rule.reduce_zero)
        table[first : first + num_labels] = np.arange(num_labels)
        table[:first] = IGNORE_INDEX
        table[IGNORE_INDEX] = IGNORE_INDEX
    table[list(rule.void_ids)] = IGNORE_INDEX
    table.flags.writeable = False
    return table


def read_id2label(source: NameSource, *, of_pixels: bool = True) -> dict[int, str]:
    """Class names by id, from a mapping, a list or a JSON file of either.

    A list holds names in the order of ids, or objects with `id` and `name` as annotation tools write them; a mapping has
    names, or objects with `name`, by id. Pixels have 2 to 255 classes; things have one or any number.

    Raises:
        UserError: a name is no text, the ids are not 0..n-1, a name occurs twice, or there are too few or too many classes.
    """
    origin, names = "id2label", cast(Any, source)
    if isinstance(source, str | Path):
        origin = str(source)
        try:
            names = json.loads(read_text(Path(source)))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{origin}: not a readable JSON file of class names ({error}).") from error
    if not isinstance(names, Mapping | list | tuple):
        raise UserError(
            f"{origin}: a {type(names).__name__}; expected a list of class names or a mapping of ids to names."
        )
    id2label: dict[int, str] = {}
    for key, value in names.items() if isinstance(names, Mapping) else enumerate(names):
        index, label = key, value
        if isinstance(value, Mapping):
            index, label = value.get("id", key if isinstance(names, Mapping) else None), value.get("name")
        if not isinstance(label, str) or not label.strip() or not str(index).isdecimal():
            raise UserError(
                f"{origin}: {key!r} has {shortened(repr(value))}. A class is an id and a name: a list of names, a mapping "
                "such as {0: road}, or objects with id and name."
            )
        if int(index) in id2label:
            raise UserError(f"{origin}: id {index} has two names, {id2label[int(index)]!r} and {label!r}; keep one.")
        id2label[int(index)] = label
    if of_pixels and id2label.get(IGNORE_INDEX, "").casefold() in VOID_NAMES:  # which it is without a name
        del id2label[IGNORE_INDEX]
    id2label = dict(sorted(id2label.items()))
    if list(id2label) != list(range(len(id2label))) or not 1 <= len(id2label) <= (
        MAX_LABELS if of_pixels else len(id2label)
    ):
        holes = sorted(set(range(max(id2label, default=0))) - id2label.keys())[:5]
        limit = f" with n at most {MAX_LABELS} (255 marks void pixels)" if of_pixels else ""
        missing = f"; {', '.join(map(str, holes))} {'have' if len(holes) > 1 else 'has'} no name" if holes else ""
        raise UserError(
            f"{origin}: class ids must be 0..n-1{limit}, got {len(id2label)} "
            f"ids from {min(id2label, default=None)} to {max(id2label, default=None)}{missing}."
        )
    if len(id2label) == 1 and of_pixels:
        raise UserError(
            f"{origin}: one class, {id2label[0]!r}, which every pixel would get. Name what the other pixels are as a class "
            "of its own, such as background."
        )
    twice = sorted(label for label, count in Counter(id2label.values()).items() if count > 1)
    if twice:
        raise UserError(f"{origin}: class names {twice} occur more than once; label2id would lose classes.")
    return id2label
