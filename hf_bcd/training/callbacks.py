"""What happens around a training step."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from ..data.dataset import TransformedDataset
from ..figures.panels import colorize, palette
from ..utils.distributed import is_distributed
from .distiller import Distiller


if TYPE_CHECKING:
    from .trainer import BCDTrainer

logger = logging.getLogger(__name__)

# launchers kill a rank 30 seconds after they passed a signal on
STEPS_BETWEEN_AGREEMENTS = 10


class DistillationCallback(TrainerCallback):
    """Tells distiller and data where the run stands: the epoch, r(t) before a step, temperatures after it."""

    def __init__(self, distiller: Distiller, train_dataset: Any) -> None:
        self.distiller, self.train_dataset = distiller, train_dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the prepared data loader forgets its data set on several ranks and when an epoch is resumed
        if isinstance(self.train_dataset, TransformedDataset):
            self.train_dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.distiller.begin_step(state.global_step + 1, state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.distiller.after_step()


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
        if os.getpid() != self.pid:  # a loader worker, which inherits this handler and lives as long as it is needed
            if number == signal.SIGTERM:
                os._exit(128 + number)
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


class PictureCallback(TrainerCallback):
    """Writes input, truth and prediction of the first evaluation images to TensorBoard."""

    def __init__(self, trainer: "BCDTrainer", count: int = 4) -> None:
        self.trainer, self.count = trainer, count

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        handler = self.trainer.callback_handler
        writers = [c.tb_writer for c in handler.callbacks if isinstance(c, TensorBoardCallback) and c.tb_writer]
        dataset: Any = self.trainer.eval_dataset
        if isinstance(dataset, dict):  # several by name
            dataset = next(iter(dataset.values()), None)
        if not state.is_world_process_zero or not writers or dataset is None or self.trainer.is_fsdp_enabled:
            return
        strips = []
        for index in range(min(self.count, len(dataset))):
            sample = dataset[index]
            prediction = self.trainer.predict_classes(sample)
            strips.append(prediction_strip(sample, prediction, self.trainer.metrics.num_labels))
        for writer in writers:
            for index, strip in enumerate(strips):
                writer.add_image(f"evaluation/{index}", strip, state.global_step, dataformats="HWC")


def prediction_strip(sample: dict[str, Any], prediction: Tensor, num_labels: int) -> np.ndarray:
    """Input, truth and prediction side by side, uint8 `[H, 3 W, 3]`."""
    height, width = prediction.shape
    image = Image.fromarray(sample["pixel_values"].permute(1, 2, 0).numpy()).resize((width, height))
    colours = palette(num_labels)
    return np.concatenate([np.asarray(image), colorize(sample["labels"], colours), colorize(prediction, colours)], 1)
