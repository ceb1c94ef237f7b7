"""Whether a store says what its teacher says, where no labels can tell."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..adapters import FrozenTeacher
from ..adapters.loading import ModelSpec, load_adapter
from ..losses import DistillationCriterion
from ..stores import StoredTeacher, StoredViews
from ..stores.needs import columns_of
from ..stores.writing import KL_OF_CLASSES, KL_OF_ROWS, RELATIVE, lost
from ..tasks import Task
from ..utils.messages import UserError
from .config import BCDConfig
from .evaluation import moved


logger = logging.getLogger(__name__)

VIEWS = 4
SLACK = 3.0  # times a codec's error, which was measured on other views
# what another device, library or precision may change by itself; of a map of bits a few positions
NOISE = {KL_OF_CLASSES: 0.02, KL_OF_ROWS: 0.02, RELATIVE: 0.05}
NOISE_OF_BITS = 0.3


@torch.no_grad()
def check_agreement(
    stored: StoredTeacher,
    dataset: StoredViews,
    task: Task,
    args: BCDConfig,
    criterion: DistillationCriterion,
    collate: Callable[..., Any],
) -> None:
    """Runs the teacher that a store names on a few views and compares what it says with the rows.

    The teacher is loaded for it, and dropped. A warning says where that is not possible.

    Args:
        stored: the teacher as the store keeps it.
        dataset: training samples with what is stored of them.
        task: theirs.
        args: of the run.
        criterion: its losses, which have the store's state.
        collate: makes batches.

    Raises:
        UserError: a column differs by more than its codec loses.
    """
    source = stored.store.source
    try:
        teacher = load(stored, args)
        errors: dict[str, list[Tensor]] = {}
        for sample in views(dataset):
            batch = moved(collate([sample]), args)
            for name, error in compared(stored, teacher, batch, task, criterion).items():
                errors.setdefault(name, []).append(error)
        same = teacher.fingerprint == stored.fingerprint
        del teacher
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        logger.warning(
            "The stored teacher %s was not compared with the teacher itself, and there are no labels to compare it with: %s",
            source, error,
        )  # fmt: skip
        return
    wrong = []
    for name, values in errors.items():
        column, found = stored.store.content["columns"][name], torch.stack(values).mean().item()
        noise = NOISE_OF_BITS if column["codec"] == "bits" else NOISE[column["measure"]]
        if not found <= SLACK * column["error"] + noise:
            wrong.append(
                f"{name} differs by {found:.2g}, but its codec by {column['error']:.2g} ({column['measure']})"
            )
    if wrong:
        made = stored.store.content["teacher"]
        other = "" if same else " The weights there are not those that made the store."
        raise UserError(
            f"the stored teacher {source} is not what its teacher {made['repo_id']} says of {VIEWS} training views: "
            f"{'; '.join(wrong)}.{other} Its rows were sorted, moved or computed otherwise; make it again with `hf-bcd reinforce`."
        )


def load(stored: StoredTeacher, args: BCDConfig) -> FrozenTeacher:
    """The teacher that made a store, at its commit and in its precision.

    Raises:
        UserError: the store names none, or it cannot be loaded.
    """
    made = stored.store.content["teacher"]
    if made["repo_id"] is None:
        raise UserError("the teacher came from a folder, and has no Hub id.")
    task = stored.store.content["task"]
    with args.main_process_first(desc="fetching the teacher of a store"):
        adapter = load_adapter(ModelSpec(made["repo_id"], made["revision"]), task=task, to_teach=True)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(made["dtype"])
    classes = dict(enumerate(stored.store.content["classes"]))
    return FrozenTeacher(adapter, classes, dtype=dtype, label_synonyms=made["synonyms"]).to(args.device)


def views(dataset: StoredViews) -> Iterator[dict[str, Any]]:
    """Samples of `VIEWS` pictures spread over a data set, each of another view, with what is stored of them."""
    count = min(VIEWS, len(dataset))
    for number in range(count):
        yield dataset.stored_view(int(number * len(dataset) / count), number % dataset.views)


def compared(
    stored: StoredTeacher, teacher: FrozenTeacher, batch: Any, task: Task, criterion: DistillationCriterion
) -> dict[str, Tensor]:
    """How far the columns of a store are from what its teacher says of a view, each in its own measure."""
    targets = task.targets(batch, len(stored.store.content["classes"]))
    output = teacher.for_batch(batch, targets.pixel_mask)
    kept = stored.tensors(batch)
    exact = columns_of([criterion], output, targets, kept, stored.name)
    found = {}
    for name, x in exact.items():
        shapes = [tensor.shape[-2:] if name.endswith("/relation") else tensor.shape for tensor in (x, kept[name])]
        same = shapes[0] == shapes[1]
        found[name] = lost(name, x[0].float(), kept[name][0]) if same else torch.tensor(torch.inf, device=x.device)
    return found
