"""BCDTrainer: transformers' Trainer for a student with a frozen teacher."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence, Sized
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..adapters import DenseAdapter, image_processor
from ..data import TransformedStream, joined
from ..data.class_weights import class_weights
from ..outputs import Targets
from ..stores import Store
from ..tasks import task_of
from ..utils.messages import UserError
from . import checkpoints, quantization
from .alignment import check_teachers
from .callbacks import DistillationCallback, FiniteCallback, InterruptCallback, PictureCallback, check_finite
from .config import BCDConfig
from .distiller import Distiller
from .evaluation import each, evaluate, pictures, stacked, with_transform
from .hardware import fit_loaders, fused, lay_out, single_values_accepted, synchronized
from .hub import HubCallback
from .inherited import check_classes, check_samples, refuse, settle_early_stopping, settle_evaluation
from .loaders import end_workers, own_sampler, stream_loader, with_stores
from .optimization import group_parameters, step_down
from .recording import write_training_card
from .teachers import loaded, parts_of
from .teaching import calibrate, check_label_free, prepare
from .terms import Clock, TermMeans


logger = logging.getLogger(__name__)

GivenTeacher = PreTrainedModel | DenseAdapter | Store | str


class BCDTrainer(Trainer):
    """Distils a frozen teacher into a student, or trains a model without one.

    The data decide the task. The arguments are copied; the trainer changes its copy only.

    Args:
        model: model of transformers, or one of ours, to train and save; or its adapter.
        teacher_model: larger model or its adapter, its Hub id or folder, or what a `Store` keeps of it; several of them by name,
            each of which teaches by the `losses` of `args`, or by its own of them; None trains `model` without one.
        args: training arguments.
        train_dataset: canonical samples (`DenseDataset`, `DenseStream`), to which the augmentation of `args` is added,
            or any dataset of `{"index", "pixel_values", "labels"}`.
        eval_dataset: like `train_dataset`, or several by name; evaluated at the labels' own resolution.
        processing_class: image processor to save with the student, which evaluation obeys; built from the student by
            default.
        label_synonyms: JSON file `{class of the data set: [names the teacher uses]}`, or its content. Without teacher
            and training data, the names belong to `model`, which is then scored in the data set's classes.
        kwargs: further arguments of `Trainer`.

    Raises:
        UserError: if the model's classes are not the data set's, a loss option is unknown, a loss needs classes that
            the teacher lacks, or a model type has no adapter.
    """

    args: BCDConfig
    model: Distiller  # type: ignore[assignment]

    # the loss is a mean over one batch, which the base class then divides by the accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | DenseAdapter,
        teacher_model: GivenTeacher | Mapping[str, GivenTeacher] | None = None,
        args: BCDConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: Any = None,
        label_synonyms: str | Path | Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        args = copy.copy(args) if args is not None else BCDConfig(output_dir="trainer_output")
        args._n_gpu = min(args.n_gpu, 1)  # nn.DataParallel cannot carry the teacher's outputs
        fit_loaders(args)
        refuse(kwargs)
        train_dataset, eval_dataset = joined(train_dataset), each(joined, eval_dataset)
        first = next(iter(eval_dataset.values()), None) if isinstance(eval_dataset, Mapping) else eval_dataset
        reference = train_dataset if first is None else first
        check_classes(train_dataset=train_dataset, eval_dataset=eval_dataset)
        self.task = task_of(reference)
        settle_evaluation(args, eval_dataset, self.task)
        teacher = loaded(teacher_model, self.task.name)
        student, self.teacher, criterion = prepare(
            model, teacher, args, reference, label_synonyms, to_train=train_dataset is not None
        )
        check_label_free(train_dataset, self.teacher, student, args)
        distiller: Any = synchronized(Distiller(student, criterion, args.ema_decay, bool(args.quantize)), args)
        processor = processing_class or image_processor(student, **self.task.processor_size(args))
        if "optimizers" not in kwargs:
            kwargs.setdefault("optimizer_cls_and_kwargs", fused(*self.get_optimizer_cls_and_kwargs(args), args))
        self.hub = HubCallback(args)
        if train_dataset is not None:
            self.hub.prepare()
        args.push_to_hub = False  # the callback does; the base class would push pickled arguments
        parts, train = (
            parts_of(self.teacher),
            with_transform(train_dataset, self.task.train_transform(args), args.seed),
        )
        train, collate = with_stores(train, parts, self.task, args)
        evaluated = with_transform(eval_dataset, self.task.eval_transform(processor), args.seed)
        if "data_collator" not in kwargs:
            check_samples(self.task, student.num_labels, train_dataset=train, eval_dataset=evaluated)
        weights = None if train_dataset is None else class_weights(args.class_weights, train_dataset, student.id2label)
        self.class_weights = None if weights is None else weights.to(args.device)
        self.has_card, self.terms, self.clock = False, TermMeans(), Clock()
        super().__init__(
            model=distiller,
            args=args,
            data_collator=kwargs.pop("data_collator", collate),
            train_dataset=train,
            eval_dataset=evaluated,
            processing_class=processor,
            **kwargs,
        )
        # on a CPU it pays in training, and finished models are compared with their exports pixel by pixel
        if args.device.type == "cuda" or (args.device.type == "cpu" and train_dataset is not None):
            lay_out(self.distiller.student, self.distiller.finished, *parts.values())
        self.interrupt = InterruptCallback()
        trained = {name: p for name, p in self.distiller.named_parameters() if p.requires_grad}
        for callback in (
            DistillationCallback(distiller, self.train_dataset, args.decays_by_epoch(self.task.decay_per)),
            FiniteCallback(self.terms, trained),
            self.interrupt,
            PictureCallback(
                lambda: pictures(self.distiller.finished, self.eval_dataset, self.args),
                self.callback_handler.callbacks,
            ),
            self.hub,
        ):
            self.add_callback(callback)
        if distiller.quantizer is not None:
            save = partial(checkpoints.save_student, distiller, processor=self.processing_class)
            self.add_callback(quantization.QuantizationCallback(distiller.quantizer, save))

    @property
    def distiller(self) -> Distiller:
        """The student with its connectors and losses, unwrapped."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)  # type: ignore[return-value]

    @property
    def student(self) -> PreTrainedModel:
        """The model being trained, as `from_pretrained` will load it."""
        return self.distiller.student.model

    # ---- Training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Calibrates the teacher's head where a loss needs it, then trains.

        Ctrl-C and SIGTERM finish the current step, save a checkpoint and raise `KeyboardInterrupt`. A checkpoint of the
        run's last step is loaded, and nothing is trained.

        Args:
            resume_from_checkpoint: folder, or True for the last whole checkpoint of the output folder.
            kwargs: passed to `Trainer.train`.

        Raises:
            UserError: if there is no such checkpoint, or it lies beyond the end of this run.
        """
        settle_early_stopping(self.args, self.callback_handler.callbacks, self.task.scores[0].key)
        checkpoint = checkpoints.checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir or ".")
        check_teachers(self.teacher, self.train_dataset, self.task, self.args, self.distiller, self.data_collator)
        self.terms.reset()
        if checkpoint is None:
            self.calibrate()
        elif (output := self._load_finished(checkpoint)) is not None:
            return output
        else:
            self.terms.load(checkpoint, self.args.device)
        self.clock.restart()
        with (
            self.interrupt.listening(),
            single_values_accepted(self.student),
            checkpoints.disk_checked(self.args.output_dir),
        ):
            try:
                output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
            except UserError as error:  # a picture that cannot be read, hours after the start
                self._save_and_raise(error)
            finally:
                end_workers(self.callback_handler.train_dataloader)
        check_finite(self.terms.read(), self.args, self.state)  # the steps since the last log
        if self.interrupt.requested:
            raise KeyboardInterrupt(
                f"stopped at step {self.state.global_step}; its checkpoint is in the output folder"
            )
        return output

    def _save_and_raise(self, error: UserError) -> NoReturn:
        """Saves what is trained, as Ctrl-C does; loader workers' errors lose the traceback that they bring as text."""
        step, message = self.state.global_step, str(error).rpartition("UserError: ")[2].strip()
        if step and self.accelerator.num_processes == 1:  # others would wait for this rank
            self._save_checkpoint(self.model, trial=None)
            message += f" Step {step} is saved in {self.args.output_dir}: mend this, and resume."
        raise UserError(message) from error

    def _load_finished(self, checkpoint: Path) -> TrainOutput | None:
        """Takes student and state from a checkpoint of the last step; None if there are steps left.

        Raises:
            UserError: if the checkpoint is damaged, not whole, or of another run, unless `resume_anyway`.
        """
        total = self.args.max_steps
        if total <= 0:  # as the base class counts epochs
            steps = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
            total = math.ceil(self.args.num_train_epochs * steps)
        state = checkpoints.finished_state(checkpoint, checkpoints.read_state(checkpoint), total)
        ranks = 0 if state else self.args.world_size
        checkpoints.check_same_run(checkpoint, self._key(), ranks, anyway=self.args.resume_anyway)
        if state is None:
            return None
        # the first rank wrote it
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.state = state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or str(checkpoint))
        self.create_optimizer()  # the card names its options
        return TrainOutput(state.global_step, 0.0, {})

    def get_train_dataloader(self) -> DataLoader:
        """The loader of the training samples; a stream divides itself among ranks and loader workers."""
        dataset = self.train_dataset
        if isinstance(dataset, TransformedStream):
            return stream_loader(dataset, self.args, self._train_batch_size, self.data_collator)
        loader = super().get_train_dataloader()
        if isinstance(dataset, Sized) and len(loader) == 0:
            raise UserError(
                f"{len(dataset)} training images are less than a batch of {self._train_batch_size}, and "
                "dataloader_drop_last drops that. Lower per_device_train_batch_size."
            )
        # workers are seeded apart from the model's dropout, which must not depend on when they start
        loader.base_dataloader.generator = torch.Generator()  # type: ignore[attr-defined]
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return own_sampler(dataset, self.args) or super()._get_train_sampler(dataset)

    def calibrate(self) -> None:
        """Fits the teacher's head on training images: the same ones on every rank, so that all ranks agree."""
        criterion = self.distiller.criterion
        if self.teacher is None or not criterion.needs_calibration:
            return
        num_labels = self.distiller.student.num_labels
        calibrate(criterion, self.teacher, self.train_dataset, self.task, self.args, num_labels, self.data_collator)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted loss of one batch; keeps the unweighted terms for the log."""
        pixel_values = inputs["pixel_values"]
        targets = self._targets(inputs)
        steps, share = self.current_gradient_accumulation_steps, 1.0
        if num_items_in_batch is not None:  # the mean of a batch, so that ranks and batches have one divisor
            divisor = num_items_in_batch / (self.accelerator.num_processes * steps)
            targets = self.task.with_denominator(targets, divisor)
            share = len(pixel_values) * steps / self._step_images
        outputs = model(
            pixel_values=pixel_values,
            targets=targets,
            teacher_output=self._teacher_output(inputs, targets),
            share=share,
        )
        self.terms.add({**outputs["terms"], "loss": outputs["loss"].detach()}, steps)
        self.clock.images += len(pixel_values) * self.accelerator.num_processes
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _targets(self, inputs: Mapping[str, Any]) -> Targets:
        targets = self.task.targets(inputs, self.distiller.student.num_labels)
        return targets if self.class_weights is None else replace(targets, class_weights=self.class_weights)  # type: ignore

    def _teacher_output(self, inputs: Mapping[str, Any], targets: Targets) -> Any:
        if self.teacher is None:
            return None
        with torch.profiler.record_function("teacher"):
            return self.teacher.for_batch(inputs, targets.pixel_mask)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """The divisor of the task losses of the whole step, over accumulated batches and ranks."""
        if not batch_samples:
            return None
        counts = [self.task.denominator(self._targets(batch)) for batch in batch_samples]
        count = torch.stack(counts).sum().to(device)
        self._step_images = sum(len(batch["pixel_values"]) for batch in batch_samples)
        return self.accelerator.reduce(count, "sum") if self.accelerator.num_processes > 1 else count  # type: ignore

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer, its parameters grouped by weight decay and depth, unless one was given."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not given:
            group_parameters(optimizer, self.model, self.args, self.distiller.student)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule, which `lr_milestones` lower, and which begins again for quantised steps."""
        given, total = self.lr_scheduler is not None, num_training_steps
        first = quantization.steps_before(total) if self.args.quantize else total
        scheduler = super().create_scheduler(first, optimizer)
        if first < total and not given:
            quantization.restarted(scheduler, first, total)
        if self.args.lr_milestones:
            unit = 1 if self.args.max_steps > 0 else num_training_steps / self.args.num_train_epochs
            step_down(scheduler, self.args.lr_milestones, unit)
        return scheduler

    # ---- Evaluation and logging ----------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> EvalLoopOutput:
        """Streams counts instead of gathering predictions, see `evaluate`; for `predict`, gives predictions and truth too.

        Maps are `[N, H, W]` if all pictures have one size, else lists; detections are lists of mappings.
        """
        kept: Any = None if prediction_loss_only else []  # which `evaluate` sets, `predict` not
        self._eval_dataloaders = {}  # of persistent workers the base class would hand out this one again for other data
        given = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        if not any(dataloader.dataset is one for one in given):  # these were compared at first
            check_classes(**{"train_dataset": self.train_dataset, "the evaluated set": dataloader.dataset})
        options: Any = {"processor": self.processing_class, "description": description, "kept": kept}
        scores = evaluate(self.distiller.finished, dataloader.dataset, self.args, **options)
        number = scores.pop("num_samples")
        self.clock.restart()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        predictions, truth = (None, None) if kept is None else map(stacked, zip(*kept, strict=True))
        return EvalLoopOutput(predictions, truth, metrics, number)  # type: ignore[arg-type]

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Adds every loss term and the throughput to the logged means; lists are no curves.

        Raises:
            FloatingPointError: if a term is not finite.
        """
        logs = {name: value for name, value in logs.items() if not isinstance(value, list)}
        if "loss" in logs:
            means = self.terms.read()
            self.terms.reset()
            check_finite(means, self.args, self.state)
            # its `loss` too: that of the base class forgets the steps before a checkpoint
            logs |= means | self.clock.read(self.train_seconds)
        super().log(logs, start_time)

    @property
    def train_seconds(self) -> float:
        """Seconds of training up to the last log, over interruptions, without evaluations."""
        history = self.state.log_history
        return next((entry["train_seconds"] for entry in reversed(history) if "train_seconds" in entry), 0)

    # ---- Saving --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            with checkpoints.disk_checked(str(folder)):
                key = self._key() if self.is_in_train else None
                checkpoints.save_student(self.distiller, folder, self.processing_class, key)

    def _key(self) -> dict[str, Any]:
        return checkpoints.run_key(self.args, self.distiller, self.teacher, self.train_dataset)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.terms.save(Path(output_dir), writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_student(self.distiller, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("loading the best model, %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        load = super()._load_optimizer_and_scheduler
        checkpoints.load_optimizer(lambda: load(checkpoint), self.optimizer, self.lr_scheduler, checkpoint)

    # ---- The Hub -------------------------------------------------------------------------------------------------

    def push_to_hub(  # type: ignore[override] # the base class says CommitInfo, and returns these three too
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the student with its card and pushes both in one commit, from the first rank; None on the others.

        Args:
            commit_message: first line of the commit.
            blocking: wait for the end of the upload; otherwise a Future is returned.
            token: access token; `hub_token` or the stored one by default.
            revision: branch; `hub_revision` by default.
            private: visibility of a new repository; `hub_private_repo` by default.
            kwargs: passed to `create_model_card`.

        Raises:
            HubError: if the push fails; the student stays in the output folder, and the message says how to go on.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        return self.hub.push(commit_message or "End of training", blocking, token, revision, private)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md for `push_to_hub`, unless the run's report has; the base class knows no teacher."""
        if not self.has_card and self.is_world_process_zero():
            write_training_card(self)
