"""Callbacks around training steps: r(t) and temperatures, interruption, finite values, pictures."""

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback

from ..utils.distributed import is_distributed
from .checkpoints import last_checkpoint
from .distiller import Distiller
from .terms import TermMeans


logger = logging.getLogger(__name__)

# launchers kill a rank 30 seconds after they passed a signal on
STEPS_BETWEEN_AGREEMENTS = 10


class DistillationCallback(TrainerCallback):
    """Tells distiller and data where the run stands: the epoch, r(t) before a step, temperatures after it.

    Args:
        distiller: what is told.
        train_dataset: likewise.
        by_epoch: whether r(t) counts epochs; where a run is as long as `max_steps` says, it has none.
    """

    def __init__(self, distiller: Distiller, train_dataset: Any, by_epoch: bool = False) -> None:
        self.distiller, self.train_dataset, self.by_epoch = distiller, train_dataset, by_epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the prepared data loader forgets its data set on several ranks and when an epoch is resumed
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, total = state.global_step + 1, state.max_steps
        criterion = self.distiller.criterion
        criterion.begin_step(step, total)
        self.distiller.student.begin_step(args.seed, step)
        if self.by_epoch:
            # an epoch's end is a sum of fractions
            criterion.set_decay(int((state.epoch or 0) + 1e-6) + 1, math.ceil(args.num_train_epochs))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.distiller.after_step(state.global_step + 1)


class InterruptCallback(TrainerCallback):
    """Turns Ctrl-C and SIGTERM into an orderly stop: finish the step, save a checkpoint, end training.

    A second signal interrupts at once. Ranks agree on the step at which all of them stop.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block; only a program's main thread can."""
        self.requested, self.pid = False, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(number, self._handle) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, previous, strict=True):
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self.pid:  # a loader worker, which inherits this handler
            # a scheduler's signal reaches all processes, but the step that is to be saved still needs this one: it ends with its
            # parent, or when told again
            if number == signal.SIGTERM and (self.requested or os.getppid() != self.pid):
                os._exit(128 + number)
            self.requested = self.requested or number == signal.SIGTERM
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("%s: saving a checkpoint after this step; again to quit at once.", signal.Signals(number).name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_distributed():
            # asking the others costs a wait, so several ranks decide only now and then
            if not control.should_log and not control.should_save and state.global_step % STEPS_BETWEEN_AGREEMENTS:
                return
            flag = torch.tensor(int(self.requested), device=args.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.requested = bool(flag)
        if self.requested:
            control.should_save = control.should_training_stop = True


class FiniteCallback(TrainerCallback):
    """Stops a run whose terms or weights are not finite, before it is logged or saved over a good checkpoint.

    Args:
        terms: the run's means of loss terms.
        parameters: the trained parameters by name.
    """

    def __init__(self, terms: TermMeans, parameters: Mapping[str, nn.Parameter]) -> None:
        self.terms, self.parameters = terms, parameters

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not control.should_save:
            return
        check_finite(self.terms.read(), args, state)
        # a gradient can overflow although the loss is finite
        finite = torch.stack([parameter.isfinite().all() for parameter in self.parameters.values()])
        if not finite.all():
            first = next(name for name, good in zip(self.parameters, finite.tolist(), strict=True) if not good)
            check_finite({f"weight {first}": math.nan}, args, state)


def check_finite(values: Mapping[str, float], args: TrainingArguments, state: TrainerState) -> None:
    """Raises a `FloatingPointError` that names values which are infinite or NaN, and the last good checkpoint."""
    bad = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
    if bad:
        last = last_checkpoint(args.output_dir or ".")
        raise FloatingPointError(
            f"{bad} at or before step {state.global_step}. Training stopped; the last good checkpoint is "
            f"{last or 'none yet'}. Resume with a smaller learning rate, bf16 instead of fp16 or a "
            "smaller weight of this term (and `--resume_anyway true`)."
        )


class PictureCallback(TrainerCallback):
    """Gives pictures of predictions to TensorBoard and Trackio after each evaluation.

    Args:
        draw: gives pictures, uint8 `[H, W, 3]`.
        callbacks: the trainer's, among which those of both are looked for.
    """

    def __init__(self, draw: Callable[[], Iterable[np.ndarray]], callbacks: Sequence[TrainerCallback]) -> None:
        self.draw, self.callbacks = draw, callbacks

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        boards = [c.tb_writer for c in self.callbacks if isinstance(c, TensorBoardCallback) and c.tb_writer]
        tracks = [c._trackio for c in self.callbacks if isinstance(c, TrackioCallback) and c._initialized]
        if not state.is_world_process_zero or not boards + tracks:
            return
        pictures = {f"evaluation/{index}": picture for index, picture in enumerate(self.draw())}
        for writer in boards:
            for name, picture in pictures.items():
                writer.add_image(name, picture, state.global_step, dataformats="HWC")
        for trackio in tracks:
            shown = {name: trackio.Image(picture) for name, picture in pictures.items()}
            trackio.log({**shown, "train/global_step": state.global_step})
