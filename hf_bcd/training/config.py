"""BCDConfig: the training arguments of `BCDTrainer`."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ..losses.base import check_weight
from ..losses.recipe import LossOptions, by_teacher, read_losses
from ..utils.files import check_folder
from ..utils.messages import UserError, unknown_key_message
from ..utils.text import shortened
from ..utils.yaml import parse_mapping, read_mapping
from .hardware import warn_of_emulation
from .options import MAX_STEPS, POLYNOMIAL, PRESETS, BCDOptions
from .quantization import steps_before
from .teachers import named_by, naming


# arguments that decide how a model comes out
OUTCOME = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "learning_rate", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "max_grad_norm", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "bf16", "fp16", "load_best_model_at_end",
    "metric_for_best_model", "crop_size", "image_size", "image_longest", "train_shortest", "square_size", "decay_per", "scale_min", "scale_max", "color_jitter", "seed", "data_seed",
    "dataloader_drop_last", "train_sampling_strategy", "layer_decay", "lr_milestones", "ema_decay", "inherit", "group_by_shape",
    "unlabelled_share", "class_weights", "class_crops", "quantize",
)  # fmt: skip
FINITE = 1e30
# lowest value, whether it is left out, and highest
RANGES = {
    (0, True, FINITE): (
        "learning_rate", "adam_epsilon", "scale_min", "scale_max", "eval_steps", "save_steps", "logging_steps",
        "num_train_epochs",
    ),
    (1, False, 2**31): (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "crop_size",
        "calibration_images", "image_size", "image_longest", "square_size", "save_total_limit", "dataloader_prefetch_factor",
    ),
    (0, False, FINITE): ("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "dataloader_num_workers"),
    (0, False, 2**32 - 1): ("seed", "data_seed"),
    (0, True, 1): ("layer_decay", "unlabelled_share"),
    (0, False, 1): ("ema_decay", "adam_beta1", "adam_beta2", "color_jitter", "class_crops"),
}  # fmt: skip
# what cannot be had with quantised steps
NOT_QUANTIZED = {
    "ema_decay": "an average of the weights would mix in those from before them",
    "load_best_model_at_end": "the best model may be one from before them",
    "torch_compile": "it hides the layers from them",
}
OPTIONAL = ("eval_steps", "image_size", "square_size", "save_total_limit", "dataloader_prefetch_factor", "data_seed")
# arguments that distillation or our own evaluation would ignore, with the value that says nothing
UNUSED = {
    "label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "remove_unused_columns": False, "use_liger_kernel": False,
    "include_for_metrics": None, "batch_eval_metrics": False, "prediction_loss_only": False, "label_names": None,
    "bf16_full_eval": False, "fp16_full_eval": False, "eval_accumulation_steps": None, "eval_use_gather_object": False,
    "include_num_input_tokens_seen": "no",
}  # fmt: skip
CHOICES: dict[str, Iterable[str]] = {
    "preset": list(PRESETS),
    "decay_per": ["auto", "step", "epoch"],
    "teacher_dtype": ["auto", "float32", "bfloat16"],
    "train_sampling_strategy": ["random", "sequential"],  # others need the lengths of texts
    "optim": [kind.value for kind in OptimizerNames],
    "lr_scheduler_type": [kind.value for kind in SchedulerType],
    "eval_strategy": [kind.value for kind in IntervalStrategy],
    "logging_strategy": [kind.value for kind in IntervalStrategy],
    "save_strategy": [kind.value for kind in SaveStrategy],
    "hub_strategy": [kind.value for kind in HubStrategy],
}
# stands for the first score of the task, which the data decide
FIRST_SCORE = "first_score"


@dataclass
class BCDConfig(BCDOptions, TrainingArguments):
    """Training arguments of `BCDTrainer`: transformers' own, with the paper's schedule as defaults, and ours.

    Paper (Sec. V-B): SGD, learning rate 0.01, momentum 0.9, poly 0.9, batch 8, 40,000 iterations, 512x512 crops, random
    flip, brightness jitter and scale 0.5-2.
    """

    def __post_init__(self) -> None:
        launched = [kind for kind in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{kind}") == "true"]
        if self.fsdp or self.deepspeed or launched:
            raise UserError(
                "sharding a model over GPUs (FSDP, DeepSpeed) is not supported: a student fits on one device. Launch "
                "data-parallel processes, as examples/accelerate_configs/gpu_x8.yaml does."
            )
        # an accelerate configuration with use_cpu reaches one process through the environment, several not at all: each
        # would take itself for the only one; and without use_cpu the base class refuses bf16 on a CPU
        by_launcher = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
        self.use_cpu = self.use_cpu or by_launcher or not torch.accelerator.is_available()
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) is False:  # YAML reads an unquoted `no` as false
                setattr(self, name, "no")
        self.report_to = "none" if self.report_to is None else self.report_to
        plateau = self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        if (plateau or self.load_best_model_at_end) and self.metric_for_best_model is None:
            self.metric_for_best_model = (
                FIRST_SCORE  # the base class would look for a loss, which evaluations have not
            )
            if plateau:
                self.lr_scheduler_kwargs = self.lr_scheduler_kwargs or {"mode": "max"}
        if self.max_steps is None:
            self.max_steps = MAX_STEPS if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0
        self._check_ranges()
        for name, known in CHOICES.items():
            if (given := getattr(self, name)) not in known:
                raise UserError(unknown_key_message(name, given, known))
        try:
            super().__post_init__()
        except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError) as error:  # of values alone
            raise error if isinstance(error, UserError) else UserError(str(error)) from error
        if self.lr_scheduler_type == SchedulerType.POLYNOMIAL:
            self.lr_scheduler_kwargs = self.lr_scheduler_kwargs or dict(POLYNOMIAL)
        elif self.lr_scheduler_kwargs == POLYNOMIAL:  # of what this was derived from; no other schedule takes them
            self.lr_scheduler_kwargs = None
        self._check_training()
        if self.use_cpu and (self.bf16 or self.teacher_dtype == "bfloat16"):
            warn_of_emulation()
        if isinstance(self.losses, str):
            self.losses = parse_mapping(self.losses, "losses")
        # read here and nowhere else: a typing error shows now, not after a teacher's training
        self._read_losses()
        if self.torch_compile and (self.log_gradients or any(loss.measured for loss in self.loss_options.values())):
            raise UserError(
                "log_gradients and `weight: auto` take the gradient of every term, which torch_compile hides; leave one out."
            )
        if isinstance(self.class_weights, str) and self.class_weights != "auto":
            self.class_weights = read_mapping(self.class_weights, "class_weights")
        for name, weight in (self.class_weights if isinstance(self.class_weights, Mapping) else {}).items():
            check_weight(f"class {name!r}", weight)
        for name in ("lr_milestones", "train_shortest"):
            values = getattr(self, name)
            if values is not None and not (values and all(value > 0 for value in values) and values == sorted(values)):
                raise UserError(f"{name} is {values}; give numbers above 0 in ascending order.")
        if self.unlabelled_share == 1:
            raise UserError("unlabelled_share is 1; it must be less, or leave all labels out (`--label_free true`).")
        if self.quantize not in (None, "int8"):
            raise UserError(unknown_key_message("quantize", self.quantize, ["int8"]))
        for name, reason in (NOT_QUANTIZED if self.quantize else {}).items():
            if getattr(self, name):
                raise UserError(f"quantize and {name} exclude each other: {reason}. Leave one out.")
        if self.scale_min > self.scale_max:
            raise UserError(f"scale_min {self.scale_min} exceeds scale_max {self.scale_max}.")

    def _read_losses(self) -> None:
        """Sets `loss_parts`, the losses of each teacher that has its own as they are written, by its name, or of all under "";
        and `loss_options`, what they mean, by `loss` or `teacher/loss`.
        """
        given: Any = PRESETS[self.preset] if self.losses is None else self.losses
        parts = by_teacher(given)
        if "" not in parts:
            parts = {name: parts[source] for name, source in named_by(parts).items()}
        self.loss_parts: dict[str, Mapping[str, Any]] = parts
        self.loss_options: dict[str, LossOptions] = {}
        for teacher, losses in parts.items():
            with naming(teacher):
                read = read_losses(losses)
            self.loss_options |= {f"{teacher}/{name}" if teacher else name: loss for name, loss in read.items()}

    def check_teachers(self, names: Sequence[str]) -> None:
        """Compares the teachers that `losses` names with those that there are, "" for a single one; without any, nothing matters.

        Raises:
            UserError: one is unknown, or has no losses.
        """
        parts = [name for name in self.loss_parts if name and names]
        if parts and "" in names:
            raise UserError(
                f"losses has parts for the teachers {', '.join(parts)}, but there is one teacher, which has no name; give it all "
                "losses, or give the teachers as a list."
            )
        for name in parts:
            if name not in names:
                raise UserError(unknown_key_message("teacher in losses", name, names))
        if parts and (missing := [name for name in names if name not in parts]):
            raise UserError(f"losses says nothing of the teacher {missing[0]!r}; give it some, or leave it out.")

    def for_teacher(self, name: str) -> "BCDConfig":
        """These arguments with the losses of one teacher only: its own, or those of all."""
        own, prefix = copy.copy(self), f"{name}/"
        own.losses = dict(self.loss_parts[name if name in self.loss_parts else ""])
        own.loss_parts = {"": own.losses}
        own.loss_options = {
            key.removeprefix(prefix): loss
            for key, loss in self.loss_options.items()
            if "/" not in key or key.startswith(prefix)
        }
        return own

    def decays_by_epoch(self, usual: str) -> bool:
        """Whether r(t) counts epochs, where `auto` is as usual; only a run counted in epochs can."""
        if self.max_steps > 0:
            if self.decay_per == "epoch":
                raise UserError("decay_per is epoch, but max_steps counts steps; give num_train_epochs instead of it.")
            return False
        return (usual if self.decay_per == "auto" else self.decay_per) == "epoch"

    def _check_ranges(self) -> None:
        for (low, strict, high), names in RANGES.items():
            for name in names:
                value = getattr(self, name)
                if value is None and name in OPTIONAL:
                    continue
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not (low < value if strict else low <= value) or not value <= high:
                    least = f"{'more than' if strict else 'at least'} {low:g}"
                    most = f" and at most {high:g}" if high == 1 else ""
                    raise UserError(f"{name} is {value!r}; it must be a number of {least}{most}.")

    def _check_training(self) -> None:
        """Refuses what the base class accepts and would fail on, or ignore, in the middle of training."""
        if self.max_steps == 0:
            raise UserError("max_steps is 0; train for at least one step, or score a model with hf-bcd evaluate.")
        if self.max_steps < -1:
            raise UserError(f"max_steps is {self.max_steps}; it must be at least 1, or -1 to count num_train_epochs.")
        if self.quantize and self.max_steps == 1:
            raise UserError("quantize takes the last steps of several, but max_steps is 1.")
        first = steps_before(self.max_steps) if self.quantize else self.max_steps
        if self.max_steps > 0 and (warmup := self.get_warmup_steps(first)) >= first:
            left_out = f" ({self.max_steps - first} of them are quantised)" if self.quantize else ""
            raise UserError(
                f"warmup_steps {self.warmup_steps} takes {warmup} of {self.max_steps} max_steps{left_out}; lower it."
            )
        for name, expected in UNUSED.items():
            if (given := getattr(self, name)) not in (expected, [] if expected is None else expected):
                raise UserError(f"{name} is {given}, which would be ignored here; leave it out.")
        if self.output_dir is not None:
            check_folder(self.output_dir, "output_dir")
        self._check_optimizer()
        available = {"tensorboard", *get_available_reporting_integrations()}
        if missing := [name for name in self.report_to or () if name not in available]:
            raise UserError(
                f"report_to names {', '.join(missing)}, which cannot be imported here. Install it (pip install "
                f"{missing[0]}), or report to {', '.join(sorted(available))} or none."
            )

    def _check_optimizer(self) -> None:
        """Builds optimizer and schedule once for nothing: their options are read by them only."""
        try:
            cls, options = Trainer.get_optimizer_cls_and_kwargs(self)
            optimizer = cls([torch.nn.Parameter(torch.zeros(1, 1))], **options)
        except Exception as error:  # libraries of all kinds check their own arguments
            raise UserError(
                f"optim {OptimizerNames(self.optim).value} cannot be built with optim_args {self.optim_args!r} ({shortened(error)})."
            ) from error
        given = {part.partition("=")[0].strip() for part in (self.optim_args or "").split(",")} - {"", *options}
        if given and self.optim in ("sgd", "adamw_torch") and self.optim_args != type(self).optim_args:
            raise UserError(
                f"optim_args {self.optim_args!r} sets {', '.join(sorted(given))}, which optim {OptimizerNames(self.optim).value} would ignore."
            )
        try:
            schedule = get_scheduler(self.lr_scheduler_type, optimizer, 0, 2, self.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
        except Exception as error:  # schedules check their own arguments, each by its own errors
            raise UserError(
                f"lr_scheduler_type {SchedulerType(self.lr_scheduler_type).value} cannot be built with lr_scheduler_kwargs "
                f"{self.lr_scheduler_kwargs} ({shortened(error)})."
            ) from error
        if self.quantize and not isinstance(schedule, LambdaLR):
            raise UserError(
                f"quantize begins a schedule again that follows from the step, which {SchedulerType(self.lr_scheduler_type).value} does not; "
                "choose another lr_scheduler_type."
            )
