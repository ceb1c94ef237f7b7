"""The fields of `BCDConfig` that transformers' own training arguments lack, or have another default for.

They stand apart so that `--help` needs neither torch nor the trainer, which take seconds to import.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


PRESETS: dict[str, dict[str, Any]] = {
    "joint": {"cwd": {"optional": True}, "bcd": {}},
    "stable": {"bcd": {}},
    "paper": {"bcd": {"mode": "paper", "teacher_head": "orthogonal", "weight": {"boundary": 10.0, "context": 50.0}}},
}


MAX_STEPS = 40_000
POLYNOMIAL = {"power": 0.9, "lr_end": 0.0}


@dataclass
class BCDOptions:
    """The paper's schedule, and everything about distillation; see `BCDConfig`."""

    learning_rate: float = field(default=0.01, metadata={"help": "Initial learning rate."})
    optim: str = field(default="sgd", metadata={"help": "Optimizer; adamw_torch for transformer students."})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "Options of the optimizer."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of matrices and kernels."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Learning-rate schedule."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": f"Options of the schedule; {POLYNOMIAL} for the polynomial one."}
    )
    max_steps: int = field(
        default=None,  # type: ignore[assignment] # numbers by the time that anybody reads them
        metadata={"help": f"Optimizer steps, t_max of r(t); {MAX_STEPS} unless num_train_epochs is given."},
    )
    num_train_epochs: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Passes over the training images, where max_steps says nothing."},
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Images a device and step."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Images a device and evaluation step."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 for none."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(default=4000, metadata={"help": "Steps between evaluations."})
    save_steps: float = field(default=4000, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between logged means."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses (not wanted)."})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Where to log."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Worker processes that read and augment."})
    dataloader_persistent_workers: bool = field(
        default=True, metadata={"help": "Keep the processes that read training data from epoch to epoch."}
    )
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Must be false here."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "What to push: the finished student (end), also the student at every save (every_save), also what it "
            "takes to resume (checkpoint, all_checkpoints)."
        },
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={"help": "No rank needs another's buffers in training: losses keep theirs equal, evaluation shares."},
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "No parameter is unused."})

    preset: Literal["joint", "stable", "paper"] = field(
        default="joint",
        metadata={
            "help": "Losses where `losses` says nothing: CWD, if teacher and student have the same classes, and BCD; BCD; or "
            "BCD by the paper's equations with alpha 10, beta 50."
        },
    )
    losses: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Distillation losses and their options, e.g. {bcd: {radius: 5, weight: {boundary: 3}}}; or of each "
            "of several teachers: {segformer-b4: {cwd: {}}, dinov2-base: {bcd: {}}}."
        },
    )
    crop_size: int = field(default=512, metadata={"help": "Side of the square training crops, in pixels."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Short side of images in training (before scaling) and evaluation; None keeps it, for detectors 800."
        },
    )
    image_longest: int = field(
        default=1333, metadata={"help": "Longest side of images for detectors, where image_size would make it longer."}
    )
    train_shortest: list[int] | None = field(
        default=None, metadata={"help": "Short sides to draw from in training a detector; image_size by default."}
    )
    square_size: int | None = field(
        default=None,
        metadata={"help": "Side of squares that images for a detector are resized to, whatever their aspect ratio."},
    )
    group_by_shape: bool = field(
        default=False,
        metadata={"help": "Batches of wide pictures, and of others, for detectors: less of them is padding."},
    )
    scale_min: float = field(default=0.5, metadata={"help": "Smallest random scale."})
    scale_max: float = field(default=2.0, metadata={"help": "Largest random scale."})
    color_jitter: float = field(
        default=0.5, metadata={"help": "Strength of brightness, contrast and saturation jitter; 0 for none."}
    )
    decay_per: Literal["auto", "step", "epoch"] = field(
        default="auto", metadata={"help": "What r(t) counts; auto is epochs for detectors, steps for others."}
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the learning rate from each stage of the backbone to the one before; 1 for none."
        },
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "When the learning rate is divided by ten, in epochs, or in steps where max_steps counts them."
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of an average of the student's weights, which is saved and scored; 0 for none."},
    )
    unlabelled_share: float = field(
        default=0.5,
        metadata={"help": "Share of a batch that has no labels, where --unlabelled_dir or the like adds such."},
    )
    quantize: str | None = field(
        default=None,
        metadata={
            "help": "int8: the last tenth of the steps compute with int8 weights and activations, at a hundredth of the learning rate, so that the "
            "exported student (--export onnx-int8 by default) loses less."
        },
    )
    class_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Weights of classes in the task loss: auto for the root of the median frequency over a class's own, or a JSON or YAML file or "
            "mapping {class: weight}."
        },
    )
    class_crops: float = field(
        default=0.0,
        metadata={"help": "Share of the training crops that hold a class drawn from the picture's, all alike."},
    )
    inherit: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that start with the teacher's weights, of the same shapes: [neck, bbox_head]."},
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Precision of the teacher; auto is bfloat16 where the GPU has it."}
    )
    calibration_images: int = field(
        default=64, metadata={"help": "Training images that fit the teacher's boundary readout before step 1."}
    )
    resume_anyway: bool = field(
        default=False,
        metadata={
            "help": "Resume although the checkpoint lacks files, or belongs to a run with other options or data."
        },
    )
    log_gradients: bool = field(
        default=False,
        metadata={
            "help": "Log the norm of every weighted term's gradient at the student's last stage; slows training."
        },
    )
    sync_batchnorm: bool = field(
        default=True, metadata={"help": "Synchronise the student's BatchNorm over GPUs when there are several."}
    )
