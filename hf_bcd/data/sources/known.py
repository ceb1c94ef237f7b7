"""Opens a data set of the catalog: the local copy, or the first copy on the Hub that is as expected."""

import logging
from collections.abc import Callable, Mapping, Sized
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.messages import UserError
from ..dataset import SPLIT_ALIASES
from ..labels import LabelRule, read_id2label
from ..probing import choose_encoding, examine, first_rows
from .catalog import CATALOG, DatasetSpec, HubSource
from .hub_tables import hub_names, load_tables


logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """Raw splits that agree with the catalog, where they were found, and how to read their labels."""

    splits: dict[str, Any]
    source: str
    revision: str | None
    id2label: dict[int, str]
    rule: LabelRule


def read_hub(source: HubSource, open_tables: Callable[..., Mapping[str, Any]] = load_tables) -> Mapping[str, Any]:
    """Gives the splits of a copy on the Hub, which `load_tables` stores."""
    columns = source.image_column, source.label_column
    options = {"revision": source.revision, "data_files": source.data_files}
    return open_tables(source.repo, source.repo, *columns, **options)


def open_known(
    name: str,
    data_dir: str | Path | None,
    read: Callable[[HubSource], Mapping[str, Any]] = read_hub,
    limit: int | None = None,
) -> Opened:
    """Finds a data set of the catalog and compares its first rows with what the catalog says.

    Args:
        name: key of `CATALOG`.
        data_dir: root of a local copy in the official layout; None for the Hub.
        read: gives the splits of a copy on the Hub.
        limit: number of rows after which `read` cuts a split off; None for none.

    Raises:
        UserError: there is no such copy, or none that fits; the message has a reason for each.
    """
    spec = CATALOG[name]
    _notify(name)
    layout = f"It must hold {spec.local.folders}." if spec.local else ""
    if data_dir is not None:
        if spec.local is None:
            raise UserError(f"{name} has no folder layout of its own: give its folder as the data set instead.")
        root = Path(data_dir).expanduser()
        if not root.is_dir():
            raise UserError(f"{root}: this folder does not exist.")
        splits, encoding = spec.local.open(root)
        if not splits:
            raise UserError(f"{root}: not a copy of {name}. {layout}")
        return _checked(name, spec, splits, str(root), encoding=encoding)
    download = f"download it from {spec.source} and give its folder as data_dir (`--data_dir`). {layout}"
    if not spec.hub:
        raise UserError(f"{name} is not on the Hub: {download}")
    reasons = []
    for source in spec.hub:
        try:
            splits = _labelled_splits(spec, source, read(source))
            return _checked(name, spec, splits, source.repo, revision=source.revision, limit=limit)
        except ValueError as error:
            logger.warning("%s: the copy %s is passed over. %s", name, source.repo, error)
            reasons.append(f"\n- {source.repo}: {error}")
    remedy = f"\nOr {download}" if spec.local else ""
    raise UserError(f"{name}: no copy on the Hub can be used.{''.join(reasons)}{remedy}")


@cache
def _notify(name: str) -> None:
    """States the terms of use, once per process."""
    spec = CATALOG[name]
    logger.warning("%s comes from %s. Its terms of use: %s.", name, spec.source, spec.licence)


def _labelled_splits(spec: DatasetSpec, source: HubSource, splits: Mapping[str, Any]) -> dict[str, Any]:
    named = {SPLIT_ALIASES.get(split, split): rows for split, rows in splits.items()}
    missing = [split for split in spec.images if split not in named]
    if missing:
        raise UserError(f"{source.repo} has the splits {', '.join(splits)}, but {', '.join(missing)} is expected.")
    return {split: named[split] for split in spec.images}


def _checked(
    name: str,
    spec: DatasetSpec,
    splits: Mapping[str, Any],
    source: str,
    *,
    revision: str | None = None,
    encoding: str | None = None,
    limit: int | None = None,
) -> Opened:
    names = spec.id2label or hub_names(source, revision)
    if names is None:
        raise UserError(
            f"{source} has no file id2label.json with the names of its classes, or it is not in the cache."
        )
    id2label = read_id2label(names)
    first = {split: first_rows(rows) for split, rows in splits.items()}
    together = [row for rows in first.values() for row in rows]
    rule = spec.rules[encoding or choose_encoding(together, spec.rules, len(id2label), source)]
    for split, rows in first.items():
        if not rows:
            raise UserError(f"{source}: split {split!r} holds no images.")
        if examine(rows, rule, len(id2label)).void_share == 1:
            logger.warning("%s: the first %d masks of %r are void throughout.", source, len(rows), split)
    for split, expected in spec.images.items():
        found = splits.get(split, ())
        if isinstance(found, Sized) and len(found) != min(expected, limit or expected):
            logger.warning(
                "%s: %s has %d images in %r, but %s has %d.", name, source, len(found), split, spec.source, expected
            )
    return Opened(dict(splits), source, revision, id2label, rule)
