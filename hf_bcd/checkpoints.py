"""What a checkpoint holds besides the base class's state, and how a run goes on from it."""

import json
import logging
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from .adapters import FrozenTeacher
from .builders import drop_foreign_code
from .evaluation import ScoringTrainer


logger = logging.getLogger(__name__)

DISTILLER_FILE = "distiller.safetensors"
STUDENT_PREFIX = "student.model."
CRITERION_PREFIX = "criterion."


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


class CheckpointTrainer(ScoringTrainer):
    """Trainer whose checkpoints hold the student as `from_pretrained` reads it and, apart, what distillation needs."""

    teacher: FrozenTeacher | None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves the student as `from_pretrained` reads it; in checkpoints also the connectors and temperatures."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        state = self.distiller.state_dict() if state_dict is None else state_dict
        drop_foreign_code(self.student)
        self.student.save_pretrained(folder, state_dict=with_prefix(state, STUDENT_PREFIX))
        if self.processing_class is not None:
            drop_foreign_code(self.processing_class)
            self.processing_class.save_pretrained(folder)
        criterion = with_prefix(state, CRITERION_PREFIX)
        if self.is_in_train and criterion:
            criterion = {name: tensor.contiguous() for name, tensor in criterion.items()}
            save_file(criterion, folder / DISTILLER_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restores every weight, and fails where stock Trainer only warns.

        `save_pretrained` renames the keys of SegFormer, Mask2Former and others; only `from_pretrained` reads them back.
        """
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(self.student).from_pretrained(resume_from_checkpoint)
        try:
            self.student.load_state_dict(saved.state_dict())
        except RuntimeError as error:
            raise ValueError(f"{resume_from_checkpoint} holds another student than this run's: {error}") from error
        path = Path(resume_from_checkpoint) / DISTILLER_FILE
        if path.is_file():
            try:
                self.distiller.criterion.load_state_dict(load_file(path))
            except RuntimeError as error:
                raise ValueError(
                    f"{path} belongs to other losses or another teacher than this run's: {error}"
                ) from error
        elif self.distiller.criterion.state_dict():  # many losses keep nothing
            raise ValueError(
                f"{path} is missing, so {resume_from_checkpoint} is no checkpoint of this run: its losses "
                f"{', '.join(self.distiller.criterion.losses)} keep what they have learnt there."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restores both, but for the rates that a schedule multiplies by a factor of the step: the present ones hold."""
        optimizer, scheduler = cast(Any, self.optimizer), self.lr_scheduler
        options = optimizer.param_groups[0].keys() - {"initial_lr"}
        rates = scheduler.base_lrs if isinstance(scheduler, LambdaLR) else []
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            missing = options - optimizer.param_groups[0].keys()
        except KeyError as error:  # in a parameter's state
            missing = set(error.args)
        if missing:
            present, lacking = OptimizerNames(self.args.optim).value, ", ".join(sorted(missing))
            raise ValueError(
                f"{checkpoint} belongs to another optimizer than {present}: it has no {lacking}. Resume with the optimizer "
                "that the run began with."
            )
        if not isinstance(scheduler, LambdaLR) or scheduler.base_lrs == rates:
            return
        logger.warning("going on with learning rate %g instead of %g", rates[0], scheduler.base_lrs[0])
        factors = [shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
        scheduler.base_lrs, scheduler._last_lr = rates, [r * f for r, f in zip(rates, factors, strict=True)]
        for group, initial, now in zip(optimizer.param_groups, rates, scheduler._last_lr, strict=True):
            group |= {"initial_lr": initial, "lr": now}

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        logger.info("loading the best model, %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict below `prefix`, which is cut off."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
