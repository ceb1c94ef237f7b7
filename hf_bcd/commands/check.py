"""Shows what a data set holds: source, terms, splits, and sizes, ids, boxes and classes of the first rows of each.

hf-bcd check ade20k --data_dir path/to/ADEChallengeData2016
hf-bcd check user/name --label_column mask --reduce_labels
hf-bcd check path/to/data --every_row
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data import CATALOG, BoxDataset, DenseDataset, DenseDatasets, load_dense_dataset, load_pictures
from ..data.box_probing import PROBED_PICTURES, BoxSurvey, survey_boxes
from ..data.boxes import FORMATS
from ..data.probing import PROBED_ROWS, judge, survey
from ..data.unlabelled import holds_only_pictures
from ..utils.messages import UserError


NUMBERS = re.compile(r"\d+")


def main(argv: list[str] | None = None) -> None:
    """Prints what the data set holds that the arguments name; `argv` is the process's own command line by default."""
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
    parser.add_argument(
        "--task", help="object-detection or instance-segmentation, where a source serves several tasks"
    )
    parser.add_argument("--box_format", help=f"how boxes are stored, if it is not recognised: {', '.join(FORMATS)}")
    parser.add_argument(
        "--every_row", action="store_true", help="read all images and their truth, not only the first ones"
    )
    options = vars(parser.parse_args(argv))
    name, alias = options.pop("name"), options.pop("dataset_name")
    if name is not None and alias is not None and name != alias:
        raise UserError(f"the data set is named twice: {name}, and {alias} by --dataset_name; leave one out.")
    source = name or alias
    if source is None and (folder := options.pop("data_dir")):
        source = Path(folder)
    if source is None:
        raise UserError("no data set: name one of the catalog, a Hub id or a folder.")
    print(check(source, **options))


def check(name_or_path: Any, every_row: bool = False, **options: Any) -> str:
    """Loads a data set and describes it: source, terms, splits, and what the first rows (or all) of each hold.

    Args:
        name_or_path: see `load_dense_dataset`, which gets `options` as well.
        every_row: look at all rows.

    Raises:
        UserError: the data set cannot be loaded.
    """
    local = isinstance(name_or_path, str | Path) and name_or_path not in CATALOG and not any(options.values())
    if local and holds_only_pictures(folder := Path(name_or_path).expanduser()):
        data = DenseDatasets({"train": load_pictures(folder)})
    else:
        data = load_dense_dataset(name_or_path, **options)
    return "\n".join(_lines(data, name_or_path if isinstance(name_or_path, str) else "", every_row))


def _lines(data: DenseDatasets, name: str, every_row: bool) -> Iterator[str]:
    first, spec = next(iter(data.values())), CATALOG.get(name)
    yield f"data set  {first.name}"
    yield f"read from {first.source}" + (f" at revision {first.revision}" if first.revision else "")
    if spec is not None:
        yield f"source    {spec.source}\nlicence   {spec.licence}"
    yield f"classes   {first.num_labels or 'those of the teacher'}"
    for split, dataset in data.items():
        expected = spec.images.get(split) if spec and dataset.task == spec.task else None
        agrees = "" if expected is None else ", as expected" if expected == len(dataset) else f", expected {expected}"
        yield f"\n{split}: {len(dataset)} images{agrees}"
        probed = PROBED_PICTURES // len(data) if isinstance(dataset, BoxDataset) else PROBED_ROWS
        yield from _split_lines(dataset, len(dataset) if every_row else min(len(dataset), probed))
    absent = [split for split in spec.images if split not in data] if spec else []
    if absent:
        yield f"\nnot there: {', '.join(absent)}"


def _split_lines(dataset: Any, rows: int) -> Iterator[str]:
    yield f"  of the first {rows}" if rows < len(dataset) else f"  of all {rows}"
    lines = _box_lines if isinstance(dataset, BoxDataset) else _mask_lines if dataset.id2label else _picture_lines
    yield from lines(dataset, rows)


def _picture_lines(dataset: DenseDataset, rows: int) -> Iterator[str]:
    yield f"  image sizes (width x height): {_sizes({dataset[index]['image'].size for index in range(rows)})}"
    yield "  no labels: a run with a teacher learns from its answers only"


def _box_lines(dataset: BoxDataset, rows: int) -> Iterator[str]:
    read = map(dataset.rows.__getitem__, range(rows))
    found = survey_boxes(read, dataset.rule, dataset.num_labels, dataset.masks)
    sizes = sorted(found.sizes, key=lambda size: size[0] * size[1])
    yield f"  image sizes (width x height): {_sizes(sizes) if len(sizes) < 9 else f'{len(sizes)} from {_sizes(sizes[:1])} to {_sizes(sizes[-1:])}'}"
    yield f"  {dataset.rule.in_words()}"
    yield f"  boxes: {found.boxes.sum()}, at most {found.most} in a picture; {found.empty} pictures without"
    yield f"  crowds: {found.crowds}; degenerate: {found.degenerate}; repeated: {found.repeated}; clipped: {found.clipped}"
    if dataset.masks:
        yield from _instance_lines(found)
    for index in found.boxes.nonzero()[0].tolist():
        yield f"  class {index:3d}: {found.boxes[index]:6d}  {dataset.id2label[index]}"
    absent = [name for index, name in dataset.id2label.items() if not found.boxes[index]]
    if absent and rows == len(dataset):
        yield f"  no box of {len(absent)} classes: {', '.join(absent[:8])}{', ...' if absent[8:] else ''}"
    # counts over all rows take the place of those over some
    notes = [*dataset.notes, *(found.notes() if rows == len(dataset) else ())]
    for note in {NUMBERS.sub("", note): note for note in notes}.values():
        yield f"  please check: {note}"


def _instance_lines(found: BoxSurvey) -> Iterator[str]:
    yield f"  masks stored as: {', '.join(f'{form} ({count})' for form, count in found.forms.items())}"
    if found.areas:
        smallest, median, largest = np.quantile(found.areas, [0, 0.5, 1])
        yield f"  areas: {smallest:.0f} to {largest:.0f} pixels, half of them below {median:.0f}"
        yield f"  overlaps: {found.shared / sum(found.areas):.2%} of the masks' pixels lie in another mask, too"
    yield f"  empty masks: {found.hollow}; outside of their box: {found.apart}"


def _sizes(sizes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sorted(sizes))


def _mask_lines(dataset: DenseDataset, rows: int) -> Iterator[str]:
    found = survey(map(dataset.rows.__getitem__, range(rows)), dataset.rule, dataset.num_labels)
    yield f"  image sizes (width x height): {_sizes(found.sizes)}"
    yield f"  masks stored as: {', '.join(sorted(found.modes))}"
    yield f"  ids stored: {', '.join(map(str, sorted(found.stored)))}"
    yield f"  void: {found.void_share:.1%} of the pixels"
    for index in found.classes:
        yield f"  class {index:3d}: {found.pixels[index] / found.pixels.sum():6.1%}  {dataset.id2label[index]}"
    whole = rows == len(dataset)
    train = whole and dataset.split == "train"
    for note in judge(found, dataset.id2label, dataset.source, whole=True) if train else dataset.notes:
        yield f"  please check: {note}"
