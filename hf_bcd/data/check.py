"""What a data set really holds, as a run would read it.

python -m hf_bcd.data.check ade20k --data_dir path/to/ADEChallengeData2016
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from ..utils.messages import UserError
from .dataset import DenseDataset, DenseDatasets
from .labels import IGNORE_INDEX
from .loading import load_dense_dataset
from .probing import PROBED_ROWS, Findings, examine
from .sources.catalog import CATALOG


def check(name_or_path: Any, every_row: bool = False, **options: Any) -> str:
    """Loads a data set and describes it: source, terms, splits, and what the first rows of each hold.

    Args:
        name_or_path: see `load_dense_dataset`.
        every_row: look at all rows.
        options: see `load_dense_dataset`.

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
        yield f"source    {spec.source}"
        yield f"licence   {spec.licence}"
    yield f"classes   {first.num_labels}"
    for split, dataset in data.items():
        expected = spec.images.get(split) if spec else None
        agrees = "" if expected is None else ", as expected" if expected == len(dataset) else f", expected {expected}"
        yield f"\n{split}: {len(dataset)} images{agrees}"
        number = len(dataset) if every_row else min(len(dataset), PROBED_ROWS)
        rows = map(dataset.rows.__getitem__, range(number))
        yield from _split_lines(dataset, examine(rows, dataset.rule, dataset.num_labels), number)
    absent = [split for split in spec.images if split not in data] if spec else []
    if absent:
        yield f"\nnot there: {', '.join(absent)}"


def _split_lines(dataset: DenseDataset, found: Findings, rows: int) -> Iterator[str]:
    sizes = [f"{width}x{height}" for width, height in found.sizes]
    yield f"  of the first {rows}" if rows < len(dataset) else f"  of all {rows}"
    yield f"  image sizes (width x height): {', '.join(sizes)}"
    yield f"  masks stored as: {', '.join(found.modes)}"
    yield f"  ids stored: {', '.join(map(str, found.stored_ids))}"
    yield f"  void: {found.void_share:.1%} of the pixels"
    for index in found.pixels[:IGNORE_INDEX].nonzero()[0].tolist():
        share = found.pixels[index] / found.pixels.sum()
        yield f"  class {index:3d}: {share:6.1%}  {dataset.id2label[index]}"


def report(argv: list[str] | None = None) -> str:
    """Checks the data set that a command line names; `argv` is the process's own by default.

    Raises:
        UserError: none is named, or it cannot be loaded.
    """
    parser = argparse.ArgumentParser(description="Shows what a data set holds, as a run would read it.")
    parser.add_argument("name", nargs="?", help=f"folder, Hub id, or one of {', '.join(CATALOG)}")
    parser.add_argument("--dataset_name", help="the same as name")
    parser.add_argument("--data_dir", help="root of the local copy of a known data set")
    parser.add_argument("--dataset_config", dest="config", help="configuration of a Hub data set")
    parser.add_argument("--dataset_revision", dest="revision", help="branch, tag or commit of a Hub data set")
    parser.add_argument("--image_column")
    parser.add_argument("--label_column")
    parser.add_argument("--id2label", help="JSON file with the class names")
    parser.add_argument("--reduce_labels", action="store_true", help="0 is void and classes start at 1")
    parser.add_argument("--ignore_labels", type=int, nargs="+", default=[], help="further ids that are void")
    parser.add_argument("--every_row", action="store_true", help="read all images and masks, not the first ones alone")
    options = vars(parser.parse_args(argv))
    name, alias = options.pop("name"), options.pop("dataset_name")
    source = name or alias or options.pop("data_dir")
    if source is None:
        raise UserError("no data set: name one of the catalog, a Hub id or a folder.")
    return check(source, **options)


if __name__ == "__main__":
    try:
        sys.stdout.write(report() + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
