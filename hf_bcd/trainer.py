"""BCDTrainer: transformers' Trainer for a student with a frozen teacher."""

import logging
import math
import time
from collections.abc import Mapping, Sequence, Sized
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, TrainOutput

from .adapters import DenseAdapter, build_adapter, image_processor, image_statistics, read_synonyms
from .builders import load_segmentation_model
from .callbacks import DistillationCallback, InterruptCallback, PictureCallback
from .checkpoints import CheckpointTrainer, last_checkpoint
from .config import BCDConfig
from .data import DenseDataset, DenseDatasets, DenseStream, SemanticCollator, TransformedStream, check_one_size
from .distiller import Distiller
from .hub_trainer import HubTrainer
from .losses.criterion import DistillationCriterion, build_criterion
from .metrics import SemanticMetrics
from .outputs import DenseOutput
from .preparation import (
    accept_single_values,
    adapt_to_score,
    adopt_labels,
    build_frozen_teacher,
    check_label_needs,
    eval_transform,
    lay_out,
    offers_of,
    share_cores,
    train_transform,
    with_transform,
)
from .profiling import StepProfile, as_part, part
from .terms import TermMeans, not_finite


logger = logging.getLogger(__name__)

# fixed, so that the teacher's head depends neither on the training batch nor on the number of ranks
CALIBRATION_BATCH = 8


class BCDTrainer(CheckpointTrainer, HubTrainer):
    """Distils a frozen teacher into a student, or trains a model alone when there is no teacher.

    Args:
        model: segmentation model of transformers, or one of ours, to train and save.
        teacher_model: larger segmentation model, its Hub id or folder; None trains `model` alone.
        args: training arguments.
        train_dataset: canonical samples (`DenseDataset`, `DenseStream`), to which the augmentation of `args` is added,
            or any dataset of `{"index", "pixel_values", "labels"}`.
        eval_dataset: like `train_dataset`; evaluated at the labels' own resolution.
        processing_class: image processor to save with the student; built from the student by default.
        label_synonyms: JSON file `{class of the data set: [names the teacher uses]}`, or its content. Without teacher
            and training data, the names are those of `model`, which is then scored in the data set's classes.
        kwargs: further arguments of `Trainer`.

    Raises:
        ValueError: if the model's classes are not the data set's, a loss option is unknown, a loss needs classes that
            the teacher lacks, or a model type has no adapter.
    """

    args: BCDConfig
    model: nn.Module

    # the loss is a mean over one batch, which the base class then divides by the accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel | str | None = None,
        args: BCDConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        label_synonyms: str | Path | Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else BCDConfig(output_dir="trainer_output")
        if args.n_gpu > 1:
            args._n_gpu = 1  # nn.DataParallel cannot carry the teacher's outputs; several GPUs need accelerate launch
        share_cores(args)
        if eval_dataset is None and args.eval_strategy != "no":
            logger.warning("no evaluation data, so training goes on without evaluations")
            args.eval_strategy = IntervalStrategy.NO
        if isinstance(eval_dataset, dict) and eval_dataset and args.metric_for_best_model == "mean_iou":
            args.metric_for_best_model = f"{next(iter(eval_dataset))}_mean_iou"
        if isinstance(eval_dataset, DenseStream):
            raise ValueError(
                f"eval_dataset is a stream of {eval_dataset.name}, which never ends; load it without streaming."
            )
        reference: Any = next(iter(eval_dataset.values()), None) if isinstance(eval_dataset, dict) else eval_dataset
        reference = reference if reference is not None else train_dataset
        self.label_synonyms = read_synonyms(label_synonyms)
        id2label = getattr(reference, "id2label", None)
        if train_dataset is None and teacher_model is None and id2label is not None:
            student: DenseAdapter = adapt_to_score(model, id2label, self.label_synonyms)
        else:
            student = build_adapter(model, *image_statistics(model))
        if student.label_map is None:
            adopt_labels(model, reference)
        student.freeze_unused()
        if isinstance(teacher_model, str):
            teacher_model = load_segmentation_model(teacher_model)
        self.teacher = None
        if teacher_model is not None:
            self.teacher = build_frozen_teacher(teacher_model, student.id2label, args, self.label_synonyms)
        set_seed(args.seed)  # connectors start the same whatever ran before in this process
        criterion = DistillationCriterion({}, {}, [])
        if self.teacher is not None:
            check_label_needs(self.teacher.label_map, args.resolved_losses)
            criterion = build_criterion(
                args.resolved_losses,
                student.feature_specs,
                self.teacher.feature_specs,
                num_labels=student.num_labels,
                seed=args.seed,
                offers=offers_of(self.teacher.adapter, bool(args.torch_compile)),
                head_levels=self.teacher.adapter.head_levels,
            )
            if not any(criterion.weights.values()):
                raise ValueError(
                    f"losses is {args.resolved_losses}: no term has a weight above 0, so the teacher would teach nothing. "
                    "Leave the teacher out to train the student alone."
                )
        criterion.log_gradients = args.log_gradients
        distiller = Distiller(student, criterion)
        if args.sync_batchnorm and args.world_size > 1 and args.device.type == "cuda":
            # torch's own conversion would drop the activations inside timm's BatchNormAct2d
            distiller = cast(Distiller, convert_sync_batchnorm(distiller))
        if train_dataset is not None:
            accept_single_values(distiller.student)
        self.metrics = SemanticMetrics(student.num_labels)
        self.has_card = False
        self.terms = TermMeans()
        self.profile = StepProfile(args.device) if args.profile else None
        self._profiled_steps = 0
        self._restart_clock()
        super().__init__(
            model=distiller,
            args=args,
            data_collator=kwargs.pop("data_collator", SemanticCollator()),
            train_dataset=with_transform(train_dataset, train_transform(args), args.seed),
            eval_dataset=with_transform(eval_dataset, eval_transform(student, args.image_size), args.seed),
            processing_class=processing_class or image_processor(student, shortest_edge=args.image_size),
            compute_metrics=self.add_counts,  # type: ignore[arg-type] # streamed: called once a batch
            **kwargs,
        )
        if self.is_fsdp_enabled and train_dataset is None:
            # FSDP shards a model together with its optimizer; an evaluation has none and needs no shards
            self.is_fsdp_enabled = False
            self._move_model_to_device(self.model, self.args.device)
        if self.teacher is not None:
            self.teacher.to(self.args.device)
        # on a CPU it pays in training, and finished models are compared with their exports pixel by pixel
        if args.device.type == "cuda" or (args.device.type == "cpu" and train_dataset is not None):
            for module in (self.distiller.student, self.teacher):
                if module is not None:
                    lay_out(module)
        if self.profile is not None:
            self.accelerator.backward = as_part("backward", self.accelerator.backward)
        self.interrupt = InterruptCallback()
        for callback in (DistillationCallback(distiller, self.train_dataset), self.interrupt, PictureCallback(self)):
            self.add_callback(callback)

    # ---- Training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Calibrates the teacher's head where a loss needs it, then trains.

        Ctrl-C and SIGTERM finish the current step, save a checkpoint and raise `KeyboardInterrupt`. A checkpoint of the
        run's last step is loaded, and nothing is trained.

        Args:
            resume_from_checkpoint: folder, or True for the last whole checkpoint of the output folder.
            kwargs: passed to `Trainer.train`.

        Raises:
            ValueError: if there is no such checkpoint, or it lies beyond the end of this run.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir or ".")
            if resume_from_checkpoint is None:
                raise ValueError(f"no checkpoint to resume from in {self.args.output_dir}.")
        if isinstance(resume_from_checkpoint, str) and not Path(resume_from_checkpoint).is_dir():
            raise ValueError(f"resume_from_checkpoint is {resume_from_checkpoint!r}, which is no folder.")
        if not resume_from_checkpoint:
            self.calibrate()
        elif (output := self._load_finished(resume_from_checkpoint)) is not None:
            return output
        self.terms.reset()
        self._restart_clock()
        # an evaluation before training marks the model as prepared, and then no DDP would be wrapped around it
        self.model._is_accelerate_prepared = False  # type: ignore[assignment]
        profiling = nullcontext() if self.profile is None else self.profile.running()
        with self.interrupt.listening(), profiling:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        self._check_finite(self.terms.read())  # the steps since the last log
        if self.interrupt.requested:
            raise KeyboardInterrupt(
                f"stopped at step {self.state.global_step}; its checkpoint is in the output folder"
            )
        return output

    def _load_finished(self, checkpoint: str) -> TrainOutput | None:
        """Takes student and state from a checkpoint of the last step; None if there are steps left."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        total = self.args.max_steps
        if total <= 0:  # as the base class counts epochs
            steps = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
            total = math.ceil(self.args.num_train_epochs * steps)
        if state.global_step < total:
            return None
        if state.max_steps != total:  # neither the end of its own run nor of this one
            raise ValueError(
                f"{checkpoint} has taken {state.global_step} steps of a run of {state.max_steps}, but this run has {total}. "
                f"Set max_steps to {state.max_steps} as there, or to more than {state.global_step} to train on."
            )
        logger.warning("%s has all %d steps, so nothing is left to train", checkpoint, total)
        self._load_from_checkpoint(checkpoint)
        # the first rank wrote it
        state.is_local_process_zero, state.is_world_process_zero = (
            self.is_local_process_zero(),
            self.is_world_process_zero(),
        )
        self.state = state
        self.create_optimizer()  # the card names its options
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = Path(checkpoint).with_name(Path(state.best_model_checkpoint).name)  # the folder may have moved
            state.best_model_checkpoint = str(best)
            if best.is_dir():
                self._load_best_model()
            else:
                logger.warning("the best model %s is gone, so the last one stays", best)
        return TrainOutput(state.global_step, 0.0, {})

    def get_train_dataloader(self) -> DataLoader:
        """The loader of the training samples; a stream divides itself among ranks and loader workers."""
        stream, args = self.train_dataset, self.args
        if not isinstance(stream, TransformedStream):
            loader = super().get_train_dataloader()
            if isinstance(stream, Sized) and len(loader) == 0:
                raise ValueError(
                    f"{len(stream)} training images are less than a batch of {self._train_batch_size}, and "
                    "dataloader_drop_last drops that. Lower per_device_train_batch_size."
                )
            # workers are seeded apart from the model's dropout, which must not depend on when they start
            loader.base_dataloader.generator = torch.Generator()  # type: ignore[attr-defined]
            return loader
        loader = DataLoader(
            stream.for_rank(args.process_index, args.world_size, args.dataloader_num_workers),
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        # as Accelerator.prepare does, but one process alone: more would divide the stream a second time
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def calibrate(self) -> None:
        """Fits the teacher's head on training images: the same ones on every rank, so that all ranks agree."""
        criterion = self.distiller.criterion
        if self.teacher is None or not criterion.needs_calibration:
            return
        assert self.train_dataset is not None
        count = self.args.calibration_images
        if isinstance(self.train_dataset, TransformedStream):
            samples = self.train_dataset.first(count)
        else:
            count = min(count, len(self.train_dataset))  # type: ignore[arg-type]
            step = len(self.train_dataset) / count  # type: ignore[arg-type]
            samples = [self.train_dataset[int(i * step)] for i in range(count)]
        batches, size = [], CALIBRATION_BATCH
        for start in tqdm(
            range(0, len(samples), size), desc="Teacher on calibration images", disable=self.args.disable_tqdm
        ):
            batch = self.data_collator(samples[start : start + size])
            check_one_size(batch)
            batch = self._prepare_inputs(batch)
            batches.append((self._teacher_output(batch["pixel_values"]), batch["labels"]))
        criterion.calibrate(batches, lambda steps: tqdm(steps, desc="Calibrate", disable=self.args.disable_tqdm))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted loss of one batch; keeps the unweighted terms for the log."""
        pixel_values, labels = inputs["pixel_values"], inputs["labels"]
        steps = self.current_gradient_accumulation_steps
        num_valid, share = None, 1.0
        if num_items_in_batch is not None:  # the mean count of a batch, so that ranks and batches share one divisor
            num_valid = num_items_in_batch / (self.accelerator.num_processes * steps)
            share = len(labels) * steps / self._step_images
        outputs = model(
            pixel_values=pixel_values,
            labels=labels,
            teacher_output=self._teacher_output(pixel_values),
            num_valid=num_valid,
            share=share,
        )
        self.terms.add(outputs["terms"], steps)
        self._images += len(labels) * self.accelerator.num_processes
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _teacher_output(self, pixel_values: Tensor) -> DenseOutput | None:
        if self.teacher is None:
            return None
        with part("teacher"):
            return self.teacher(pixel_values)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step; what is measured is the wait for them."""
        with part("data"):
            return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Valid pixels of the whole step, over accumulated batches and ranks."""
        if not batch_samples:
            return None
        for batch in batch_samples:
            check_one_size(batch)
        counts = [(batch["labels"] != self.distiller.ignore_index).sum() for batch in batch_samples]
        count = torch.stack(counts).sum().to(device)
        self._step_images = sum(len(batch["labels"]) for batch in batch_samples)
        return self.accelerator.reduce(count, "sum") if self.accelerator.num_processes > 1 else count  # type: ignore

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Optimizer of the arguments; weight decay spares biases, norms and other vectors."""
        if self.optimizer is None:
            trained = [p for p in (self.model if model is None else model).parameters() if p.requires_grad]
            groups = [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.args.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            if cls in (torch.optim.SGD, torch.optim.AdamW) and self.args.device.type in ("cpu", "cuda"):
                options.setdefault("fused", not self.is_fsdp_enabled)  # one kernel instead of several a tensor
            self.optimizer = cls(groups, **options)
            if self.profile is not None:  # the scheduler wraps `step` itself, so hooks
                stack = ExitStack()
                self.optimizer.register_step_pre_hook(lambda *_: stack.enter_context(part("optimizer")))
                self.optimizer.register_step_post_hook(lambda *_: stack.close())
        return self.optimizer

    # ---- Logging -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every loss term and the throughput to the logged means.

        Raises:
            FloatingPointError: if a term is not finite.
        """
        if "loss" in logs:
            means = self.terms.read()
            self.terms.reset()
            self._check_finite(means)
            logs = logs | means
            if self.profile is not None:
                logs |= self.profile.read(self.state.global_step - self._profiled_steps)
                self.profile.reset()
                self._profiled_steps = self.state.global_step
            now = time.perf_counter()
            logs["images_per_second"] = round(self._images / (now - self._clock), 2)
            logs["train_seconds"] = round(self.train_seconds + now - self._clock, 3)
            self._images, self._clock = 0, now
        super().log(logs, start_time)

    def _restart_clock(self) -> None:
        self._images, self._clock = 0, time.perf_counter()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the base class does; what it takes is not training time."""
        metrics = super().evaluate(*args, **kwargs)
        self._restart_clock()
        return metrics

    @property
    def train_seconds(self) -> float:
        """Seconds of training up to the last log, over interruptions, without evaluations."""
        return next(
            (entry["train_seconds"] for entry in reversed(self.state.log_history) if "train_seconds" in entry), 0
        )

    def _check_finite(self, values: dict[str, float]) -> None:
        if bad := not_finite(values):
            last = last_checkpoint(self.args.output_dir or ".")
            raise FloatingPointError(
                f"{bad} at or before step {self.state.global_step}. Training stopped; the last good checkpoint is "
                f"{last or 'none yet'}. Try a smaller learning rate, bf16 instead of fp16, or a smaller weight of this "
                "term."
            )

    def _check_weights(self) -> None:
        """Checks what the last step made of the weights: a gradient can overflow although the loss is finite."""
        finite = {name: p.isfinite().all() for name, p in self.distiller.named_parameters() if p.requires_grad}
        if not torch.stack(list(finite.values())).all():
            first = next(name for name, good in finite.items() if not good)
            self._check_finite({f"weight {first}": math.nan})

    # ---- Saving --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # a checkpoint taken after a step that went wrong must not replace a good one
        self._check_finite(self.terms.read())
        if not self.is_fsdp_enabled:  # ranks hold different shards there and could not raise together
            self._check_weights()
        super()._save_checkpoint(model, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md for `push_to_hub`, unless the run's report has; the base class knows no teacher."""
        from .model_card import write_card

        data = getattr(self.train_dataset, "dataset", None)
        if self.has_card or not self.is_world_process_zero():
            return
        if not isinstance(data, DenseDataset | DenseStream):
            distiller, self.model = self.model, self.student  # the base class describes a model of transformers
            try:
                super().create_model_card(*args, **kwargs)
            finally:
                self.model = distiller
            return
        models = {"student": self.student}
        if self.teacher is not None:
            models["teacher"] = self.teacher.adapter.model
        write_card(Path(self.args.output_dir or "."), self, models, {}, DenseDatasets({"train": cast(Any, data)}), [])
