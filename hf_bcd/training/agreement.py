"""Whether a store says what its teacher says, where no labels can tell."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..adapters import FrozenTeacher
from ..adapters.loading import load_adapter
from ..adapters.specs import ModelSpec
from ..losses import DistillationCriterion
from ..stores import StoredTeacher, StoredViews
from ..stores.needs import columns_of
from ..stores.writing import KL_OF_CLASSES, RELATIVE, lost
from ..tasks import Task
from ..utils.messages import UserError
from .config import BCDConfig
from .evaluation import moved


logger = logging.getLogger(__name__)

VIEWS = 4
SLACK = 1.25  # times what the codec loses of the same views
# what another device, library or precision may change by itself: nat of classes, else relative; of a map of bits a few positions
NOISE_OF_CLASSES, NOISE, NOISE_OF_BITS = 0.02, 0.05, 0.3


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
        UserError: a column differs by more than what its codec loses of the same views.
    """
    source = stored.store.source
    try:
        teacher = load(stored, args)
        errors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for sample in views(dataset):
            batch = moved(collate([sample]), args)
            for name, pair in compared(stored, teacher, batch, task, criterion).items():
                errors.setdefault(name, []).append(pair)
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
    for name, pairs in errors.items():
        found, own = (torch.stack(one).mean().item() for one in zip(*pairs, strict=True))
        bits = stored.store.columns[name].codec == "bits"
        noise = NOISE_OF_CLASSES if name == "logits" else NOISE_OF_BITS if bits else NOISE
        if not found <= SLACK * own + noise:
            measure = KL_OF_CLASSES if name == "logits" else RELATIVE
            wrong.append(f"{name} differs by {found:.2g}, but its codec by {own:.2g} ({measure})")
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
) -> dict[str, tuple[Tensor, Tensor]]:
    """How far the columns of a store are from what its teacher says of a view, and how far its codecs would be."""
    targets = task.targets(batch, len(stored.store.content["classes"]))
    output = teacher.for_batch(batch, targets.pixel_mask)
    kept = stored.tensors(batch)
    exact = columns_of([criterion], output, targets, kept, stored.name)
    found = {}
    for name, x in exact.items():
        if x.shape != kept[name].shape:
            found[name] = torch.tensor(torch.inf), torch.tensor(0.0)
            continue
        live = x[0].float().cpu()
        found[name] = lost(name, live, kept[name][0].cpu()), lost(name, live, stored.store.columns[name].kept(live))
    return found
