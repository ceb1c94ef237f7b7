"""Writing a store: which codec each tensor gets, and shards that are whole or not there."""

import json
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.files import read_json, write_json
from ..utils.messages import UserError
from ..utils.text import shortened
from .codecs import Column
from .store import SHARD, STORE_FILE


logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 256
MAX_DENSE_CLASSES, TOP_CLASSES = 64, 16
MAX_DIVERGENCE = 0.01  # nat, of what a loss makes of its levels
STEPS = tuple(2 ** (1 - number / 6) for number in range(43))  # of the levels' root mean square: from 2 to 1/64
PRECISIONS = ("compact", "half", "exact")
KL_OF_CLASSES, KL_OF_ROWS = "KL of the classes, nat", "KL of what the loss makes of it, nat"
RELATIVE = "relative root mean square"


class Chosen(NamedTuple):
    """A column, and what its codec loses on some views: `measure` says in words what `error` is."""

    column: Column
    error: float
    measure: str


def choose(name: str, samples: Sequence[Tensor], precision: str = "compact") -> Chosen:
    """The codec of a tensor of a teacher's output.

    Args:
        name: of the column.
        samples: the tensor `[C, h, w]` or `[h, w]` of some views.
        precision: `compact`; `half` for float16 or `exact` for float32 of all that is no map of bits.
    """
    shape = tuple(samples[0].shape)
    if name.endswith("/boundary"):
        return _measured(name, Column("bits", shape), samples)
    if precision != "compact":
        return _measured(name, Column(precision, shape), samples)
    if name == "queries/boxes":  # in parts of a picture: 255 steps would be pixels wide
        return _measured(name, Column("half", shape), samples)
    if name == "logits":
        top = shape[0] > MAX_DENSE_CLASSES
        return _measured(name, Column(f"top:{TOP_CLASSES}" if top else "scores", shape), samples)
    return _measured(name, Column("int8", shape), samples)


def choose_together(
    samples: Mapping[str, Sequence[Tensor]],
    names: Sequence[str],
    divergence: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
) -> dict[str, Chosen]:
    """The widest step for several levels of which a loss makes one thing, so that this moves by `MAX_DIVERGENCE` at most.

    Args:
        samples: tensors of some views, by name.
        names: of the levels `[C, h, w]` among them.
        divergence: what the loss makes of the exact and the kept tensors of a view, each `[1, ...]`, in nat.
    """
    squares = [(x.float().square().sum(), x.numel()) for name in names for x in samples[name]]
    scale = float((sum(x for x, _ in squares) / sum(count for _, count in squares)) ** 0.5) or 1.0
    views = [dict(zip(samples, one, strict=True)) for one in zip(*samples.values(), strict=True)]
    errors = dict[int, float]()

    def columns(place: int) -> dict[str, Column]:
        return {name: Column(f"even:{scale * STEPS[place]:.4g}", tuple(samples[name][0].shape)) for name in names}

    def error(place: int) -> float:
        found = []
        for view in views:
            kept = {name: column.kept(view[name])[None] for name, column in columns(place).items()}
            exact = {name: x[None].float().cpu() for name, x in view.items()}
            found.append(divergence(exact, exact | kept).cpu())
        errors[place] = torch.stack(found).mean().item()
        return errors[place]

    place = bisect_left(range(len(STEPS) - 1), True, key=lambda place: error(place) <= MAX_DIVERGENCE)
    found = errors[place] if place in errors else error(place)
    return {name: Chosen(column, found, KL_OF_ROWS) for name, column in columns(place).items()}


def _measured(name: str, column: Column, samples: Sequence[Tensor]) -> Chosen:
    """Mean loss of a codec over samples, in the measure of what the tensor is for."""
    errors = []
    for x in samples:
        errors.append(lost(name, x.float().cpu(), column.kept(x)))
    return Chosen(column, torch.stack(errors).mean().item(), KL_OF_CLASSES if name == "logits" else RELATIVE)


def lost(name: str, exact: Tensor, kept: Tensor) -> Tensor:
    """How far what is kept of a column's tensor `[C, h, w]` or `[h, w]` is from it, a scalar in the column's measure."""
    if name == "logits":
        divergence = F.kl_div(kept.log_softmax(0), exact.log_softmax(0), log_target=True, reduction="sum")
        return divergence / exact[0].numel()
    return (exact - kept).square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(1e-12)


def begin(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    """Writes `store.json`, or compares that of a store which is to be continued; returns the shards' paths.

    Raises:
        UserError: the folder holds another store; names what differs.
    """
    count = -(-content["images"] * content["views"] // ROWS_PER_SHARD)
    content = json.loads(json.dumps({**content, "shards": count}))
    path = folder / STORE_FILE
    if path.is_file():
        found, content = _by_teacher(read_json(path)), _by_teacher(content)
        differs = [key for key in {**content, **found} if key != "versions" and found.get(key) != content.get(key)]
        if differs:
            raise UserError(
                f"{folder} holds a store with {differs[0]} {shortened(found.get(differs[0]))}, where this one has "
                f"{shortened(content.get(differs[0]))}. Choose another --output_dir, or remove that folder."
            )
    else:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    return [folder / SHARD.format(number, count) for number in range(count)]


def _by_teacher(content: Mapping[str, Any]) -> dict[str, Any]:
    """`store.json` with what it says of each of several teachers under keys that name it."""
    groups = content.get("teachers", {})
    flat = {f"teachers.{name}.{key}": x for name, group in groups.items() for key, x in group.items()}
    return {
        "teachers": ", ".join(groups) or "one",
        **{key: x for key, x in content.items() if key != "teachers"},
        **flat,
    }


def is_whole(path: Path, rows: int) -> bool:
    """Whether a shard is there with all its rows; one that cannot be read is not."""
    try:
        return pyarrow.parquet.read_metadata(path).num_rows == rows
    except (OSError, pyarrow.ArrowInvalid):
        return False


def write_shards(
    paths: Sequence[Path],
    total: int,
    rows_of: Callable[[range], Iterable[Mapping[str, Any]]],
    *,
    rank: int = 0,
    ranks: int = 1,
) -> int:
    """Writes the shards of one of several processes that are not there yet; each appears at once and whole.

    Args:
        paths: of all shards.
        total: number of all rows.
        rows_of: gives the records of some rows, in order.
        rank: number of this process.
        ranks: number of processes.

    Returns:
        The number of shards that were there already.
    """
    there = 0
    for number in range(rank, len(paths), ranks):
        rows = range(number * ROWS_PER_SHARD, min(total, (number + 1) * ROWS_PER_SHARD))
        if is_whole(paths[number], len(rows)):
            there += 1
            continue
        table = pyarrow.Table.from_pylist(list(rows_of(rows)))
        part = paths[number].with_suffix(".part")
        pyarrow.parquet.write_table(table, part, compression="none")  # the columns are compressed already
        part.replace(paths[number])
    return there
