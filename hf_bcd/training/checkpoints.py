"""Checkpoints: the student as `from_pretrained` reads it and, apart, what distillation keeps."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..adapters.loading import drop_foreign_code
from ..utils.messages import UserError
from .distiller import Distiller


logger = logging.getLogger(__name__)

DISTILLER_FILE = "distiller.safetensors"


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a folder: what a process that died was still writing does not count."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())  # which is written last
            return str(path)
        except (OSError, ValueError):
            logger.warning("%s was not written to its end, so it does not count as a checkpoint", path)
    return None


def finished_state(checkpoint: str, total: int) -> TrainerState | None:
    """State of a checkpoint that has all `total` steps of a run; None if there are steps left.

    The best checkpoint is looked for beside it, since the folder may have moved, and forgotten where it is gone.

    Raises:
        UserError: if the checkpoint lies beyond the end of this run.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if state.global_step < total:
        return None
    if state.max_steps != total:  # neither the end of its own run nor of this one
        raise UserError(
            f"{checkpoint} has taken {state.global_step} steps of a run of {state.max_steps}, but this run has {total}. "
            f"Set max_steps to {state.max_steps} as there, or to more than {state.global_step} to train on."
        )
    logger.warning("%s has all %d steps, so nothing is left to train", checkpoint, total)
    if state.best_model_checkpoint is not None:
        best = Path(checkpoint).with_name(Path(state.best_model_checkpoint).name)
        state.best_model_checkpoint = str(best) if best.is_dir() else None
        if not best.is_dir():
            logger.warning("the best model %s is gone, so the last one stays", best)
    return state


def save_student(distiller: Distiller, folder: Path, processor: Any, *, with_criterion: bool) -> None:
    """Saves the student and its image processor; in checkpoints also connectors, temperatures and memories.

    Args:
        distiller: the unwrapped module.
        folder: created where missing.
        processor: image processor.
        with_criterion: whether distillation is to go on from here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for saved in (distiller.student.model, processor):
        drop_foreign_code(saved)
        saved.save_pretrained(folder)
    if with_criterion and (state := criterion_state(distiller)):
        save_file(state, folder / DISTILLER_FILE, metadata={"format": "pt"})


def load_student(distiller: Distiller, folder: Path) -> None:
    """Restores every weight, and fails where Trainer only warns.

    `save_pretrained` renames the keys of SegFormer, Mask2Former and others; only `from_pretrained` reads them back.

    Raises:
        UserError: if the folder holds another student, or lacks the state of the losses or has that of others.
    """
    student = distiller.student.model
    saved = type(student).from_pretrained(folder)
    try:
        student.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise UserError(f"{folder} holds another student than this run's: {error}") from error
    path = folder / DISTILLER_FILE
    if not path.is_file():
        if criterion_state(distiller):
            raise UserError(
                f"{path} is missing, so {folder} is no checkpoint of this run: its losses "
                f"{', '.join(distiller.criterion.losses)} keep what they have learnt there."
            )
        return
    try:
        distiller.criterion.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise UserError(f"{path} belongs to other losses or another teacher than this run's: {error}") from error


def load_optimizer(load: Callable[[], None], optimizer: Any, scheduler: Any, checkpoint: str | None) -> None:
    """Restores optimizer and scheduler; the present rates hold where a schedule multiplies them by a factor of the step.

    Args:
        load: restores both from the checkpoint.
        optimizer: of the run.
        scheduler: of the run.
        checkpoint: folder, for messages.

    Raises:
        UserError: if the checkpoint belongs to another optimizer.
    """
    options = optimizer.param_groups[0].keys() - {"initial_lr"}
    rates = scheduler.base_lrs if isinstance(scheduler, LambdaLR) else []
    try:
        load()
        missing = options - optimizer.param_groups[0].keys()
    except KeyError as error:  # in a parameter's state
        missing = set(error.args)
    if missing:
        kind, lacking = type(getattr(optimizer, "optimizer", optimizer)).__name__, ", ".join(sorted(missing))
        raise UserError(
            f"{checkpoint} belongs to another optimizer than {kind}: it has no {lacking}. Resume with the optimizer that "
            "the run began with."
        )
    if not isinstance(scheduler, LambdaLR) or scheduler.base_lrs == rates:
        return
    logger.warning("going on with learning rate %g instead of %g", rates[0], scheduler.base_lrs[0])
    factors = [shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
    scheduler.base_lrs, scheduler._last_lr = rates, [r * f for r, f in zip(rates, factors, strict=True)]
    for group, initial, now in zip(optimizer.param_groups, rates, scheduler._last_lr, strict=True):
        group |= {"initial_lr": initial, "lr": now}


def criterion_state(distiller: Distiller) -> dict[str, Tensor]:
    """State that losses keep across steps; empty where they keep nothing."""
    return {name: tensor.contiguous() for name, tensor in distiller.criterion.state_dict().items()}
