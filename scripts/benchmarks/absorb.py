"""How much of a method's loss its trained connectors remove by themselves, from a student that does not move."""

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_bcd.adapters.loading import load_adapter
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.losses.criterion import DistillationCriterion
from hf_bcd.outputs import DenseOutput, Targets
from hf_bcd.tasks import task_of
from hf_bcd.training.config import BCDConfig
from hf_bcd.training.evaluation import moved
from hf_bcd.training.teaching import calibrate, prepare


BATCH, RATE = 8, 0.01  # of a training step, as by default
Seen = tuple[DenseOutput, Any, Targets]


def absorb_rows(
    methods: Sequence[str],
    student: str,
    teacher: str,
    train: Any,
    sizes: Mapping[str, Any],
    steps: int,
    measured: int = 4,
) -> list[dict[str, Any]]:
    """A row for each method that trains connectors: its terms before and after these were trained on a fixed student.

    Args:
        methods: keys of `LOSSES`.
        student: folder or Hub id of a trained one; its features are constants here.
        teacher: likewise.
        train: training samples.
        sizes: training arguments that size the crops.
        steps: of the connectors, on as many batches.
        measured: further batches, on which the terms are compared.
    """
    task, rows = task_of(train), []
    for name in methods:
        with tempfile.TemporaryDirectory() as folder:
            args = BCDConfig(folder, losses={name: {}}, report_to="none", disable_tqdm=True, **sizes)
            own, other = (load_adapter(ModelSpec(one), task=task.name) for one in (student, teacher))
            ours, theirs, criterion = prepare(own, other, args, train)
            assert theirs is not None
            connectors = [parameter for parameter in criterion.parameters() if parameter.requires_grad]
            if not connectors:
                continue
            ours, criterion = ours.to(args.device).eval(), criterion.to(args.device).train()
            transformed = train.with_transform(task.train_transform(args), args.seed)
            if criterion.needs_calibration:
                calibrate(criterion, theirs, transformed, task, args, ours.num_labels)

            batches = seen_by(ours, theirs, transformed, task, args)
            kept = list(itertools.islice(batches, measured))
            before = mean_terms(criterion, kept)
            train_connectors(criterion, connectors, itertools.islice(batches, steps))
            after = mean_terms(criterion, kept)
            found = {
                f"{term}: {part}": value
                for term in before
                for part, value in {
                    "before": before[term],
                    "after": after[term],
                    "absorbed": 1 - after[term] / before[term] if before[term] else 0.0,
                }.items()
            }
            rows.append({"method": name, "steps": steps, **found})
    return rows


def seen_by(ours: Any, theirs: Any, samples: Any, task: Any, args: BCDConfig) -> Iterator[Seen]:
    """What student and teacher make of random batches, without end, the student's maps constant; and the targets."""
    for epoch in itertools.count():
        samples.set_epoch(epoch)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(epoch))
        for indices in order.split(BATCH):
            batch = moved(task.collate([samples[index] for index in indices.tolist()]), args)
            targets = task.targets(batch, ours.num_labels)
            with torch.no_grad():
                own = ours(batch["pixel_values"])
            yield constant(own), theirs.for_batch(batch), targets


def constant(output: DenseOutput) -> DenseOutput:
    """An output whose maps are leaves: some losses take a term's gradient there, and none goes any further."""

    def leaf(x: Any) -> Any:
        return x.detach().requires_grad_() if isinstance(x, Tensor) else x

    levels = {key: {name: leaf(x) for name, x in getattr(output, key).items()} for key in ("features", "pyramid")}
    return replace(output, logits=leaf(output.logits), **levels)


def train_connectors(criterion: DistillationCriterion, connectors: Sequence[Tensor], batches: Iterator[Seen]) -> None:
    """Steps of SGD of the distillation terms, with their weights, on whatever the criterion trains."""
    optimizer = torch.optim.SGD(connectors, lr=RATE, momentum=0.9)
    for own, theirs, targets in batches:
        optimizer.zero_grad()
        total, _ = criterion({"loss_task": nothing(own)}, own, theirs, targets)
        total.backward()
        optimizer.step()
        criterion.after_step()


def mean_terms(criterion: DistillationCriterion, batches: Sequence[Seen]) -> dict[str, float]:
    """The unweighted terms, mean over batches."""
    found = [criterion({"loss_task": nothing(own)}, own, theirs, targets)[1] for own, theirs, targets in batches]
    terms = [name for name in found[0] if "/" in name and not name.startswith(("weight/", "gradient/"))]
    return {term: float(torch.stack([one[term].detach() for one in found]).mean()) for term in terms}


def nothing(own: DenseOutput) -> Tensor:
    """A task loss of 0 that depends on the student's maps."""
    maps = [own.logits, *own.features.values()]
    return torch.stack([0 * x.float().mean() for x in maps if x is not None]).sum()
