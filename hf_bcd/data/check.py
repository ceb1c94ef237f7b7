"""A data set in words, as a run would read it."""

from collections.abc import Iterator
from typing import Any

from .dataset import DenseDataset, DenseDatasets
from .labels import IGNORE_INDEX
from .loading import load_dense_dataset
from .probing import PROBED_ROWS, examine
from .sources.catalog import CATALOG


def check(name_or_path: Any, every_row: bool = False, **options: Any) -> str:
    """Loads a data set and describes it: source, terms, splits, and what the first rows (or all) of each hold.

    Args:
        name_or_path: see `load_dense_dataset`, which gets `options` as well.
        every_row: look at all rows.

    Raises:
        UserError: the data set cannot be loaded.
    """
    data = load_dense_dataset(name_or_path, **options)
    return "\n".join(_lines(data, name_or_path if isinstance(name_or_path, str) else "", every_row))


def _lines(data: DenseDatasets, name: str, every_row: bool) -> Iterator[str]:
    first, spec = next(iter(data.values())), CATALOG.get(name)
    yield f"data set  {first.name}"
    yield f"read from {first.source}" + (f" at revision {first.revision}" if first.revision else "")
    if spec is not None:
        yield f"source    {spec.source}\nlicence   {spec.licence}"
    yield f"classes   {first.num_labels}"
    for split, dataset in data.items():
        expected = spec.images.get(split) if spec else None
        agrees = "" if expected is None else ", as expected" if expected == len(dataset) else f", expected {expected}"
        yield f"\n{split}: {len(dataset)} images{agrees}"
        yield from _split_lines(dataset, len(dataset) if every_row else min(len(dataset), PROBED_ROWS))
    absent = [split for split in spec.images if split not in data] if spec else []
    if absent:
        yield f"\nnot there: {', '.join(absent)}"


def _split_lines(dataset: DenseDataset, rows: int) -> Iterator[str]:
    found = examine(map(dataset.rows.__getitem__, range(rows)), dataset.rule, dataset.num_labels)
    yield f"  of the first {rows}" if rows < len(dataset) else f"  of all {rows}"
    yield f"  image sizes (width x height): {', '.join(f'{width}x{height}' for width, height in found.sizes)}"
    yield f"  masks stored as: {', '.join(found.modes)}"
    yield f"  ids stored: {', '.join(map(str, found.stored_ids))}"
    yield f"  void: {found.void_share:.1%} of the pixels"
    for index in found.pixels[:IGNORE_INDEX].nonzero()[0].tolist():
        yield f"  class {index:3d}: {found.pixels[index] / found.pixels.sum():6.1%}  {dataset.id2label[index]}"
