"""Checkpoints: the student as `from_pretrained` reads it and, apart, what distillation keeps."""

import errno
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ..adapters import DenseAdapter
from ..adapters.loading import drop_foreign_code
from ..data import DenseDataset, DenseStream, TransformedStream
from ..data.dataset import TransformedDataset
from ..utils.costs import count_parameters
from ..utils.files import check_readable, read_json, write_json
from ..utils.messages import UserError
from ..utils.text import shortened
from ..utils.yaml import yaml_text
from .config import OUTCOME, BCDConfig
from .distiller import Distiller
from .teachers import Teacher, Teachers, parts_of


logger = logging.getLogger(__name__)

DISTILLER_FILE = "distiller.safetensors"
STUDENT = "student."  # before the names of weights that an average is of
QUANTIZER = "quantizer."  # before those of ranges
KEY_FILE = "run_key.json"
ANYWAY = (
    " Resume with the same options, data and processes, start anew in another folder, or add --resume_anyway true."
)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a folder: what a process that died was still writing does not count."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        try:
            read_json(path / TRAINER_STATE_NAME)  # which is written last
            return str(path)
        except UserError:
            logger.warning("%s was not written to its end, so it does not count as a checkpoint", path)
    return None


def checkpoint_to_resume(given: str | bool | None, folder: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names; True asks for the last whole one of the output folder.

    Raises:
        UserError: if there is no such checkpoint.
    """
    if given is True:
        given = last_checkpoint(folder)
        if given is None:
            raise UserError(f"no checkpoint to resume from in {folder}.")
    if given and not Path(given).is_dir():
        raise UserError(f"resume_from_checkpoint is {given!r}, which is no folder.")
    return Path(given) if given else None


def read_state(checkpoint: Path) -> TrainerState:
    """The state of a checkpoint's trainer, after a look at every file: a damaged one is named before anything is trained.

    Raises:
        UserError: naming the file.
    """
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    for key in ("global_step", "max_steps"):
        value = state.get(key) if isinstance(state, dict) else None
        if type(value) is not int or value < 0:
            raise UserError(f"{checkpoint / TRAINER_STATE_NAME}: {key} is {value!r}, which is no number of steps.")
    for path in sorted(checkpoint.iterdir()):
        check_readable(path, "Resume from another checkpoint.")
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def finished_state(checkpoint: Path, state: TrainerState, total: int) -> TrainerState | None:
    """The state of a checkpoint if it has all `total` steps of a run; None if there are steps left.

    The best checkpoint is looked for beside it, since the folder may have moved, and forgotten where it is gone.

    Raises:
        UserError: if the checkpoint lies beyond the end of this run.
    """
    if state.global_step < total:
        return None
    if state.max_steps != total:  # neither the end of its own run nor of this one
        raise UserError(
            f"{checkpoint} has taken {state.global_step} steps of a run of {state.max_steps}, but this run has {total}. "
            f"Set max_steps to {state.max_steps} as there, or to more than {state.global_step} to train on."
        )
    logger.warning("%s has all %d steps, so nothing is left to train", checkpoint, total)
    if state.best_model_checkpoint is not None:
        best = checkpoint.with_name(Path(state.best_model_checkpoint).name)
        state.best_model_checkpoint = str(best) if best.is_dir() else None
        if not best.is_dir():
            logger.warning("the best model %s is gone, so the last one stays", best)
    return state


def data_key(split: Any) -> dict[str, Any]:
    """What tells a training set from others."""
    if isinstance(split, TransformedDataset | TransformedStream):
        split = split.dataset
    if not isinstance(split, DenseDataset | DenseStream):
        return {"images": len(split) if hasattr(split, "__len__") else None}
    first = next(iter(split), None)
    return {
        "name": split.name,
        "images": None if isinstance(split, DenseStream) else len(split),
        "classes": list(split.id2label.values()),
        "rule": str(split.rule),
        "first_image": None if first is None else zlib.crc32(first["image"].tobytes()),
        **(
            {"unlabelled": split.num_unlabelled}
            if isinstance(split, DenseDataset) and split.labelled is not None
            else {}
        ),
    }


def run_key(args: BCDConfig, distiller: Distiller, teacher: Teacher | Teachers | None, dataset: Any) -> dict[str, Any]:
    """All that decides how a run goes on from a checkpoint, without anything private."""
    key: dict[str, Any] = {
        f"training.{name}": str(getattr(args, name)) for name in (*OUTCOME, "calibration_images", "teacher_dtype")
    }
    if isinstance(dataset, TransformedStream):
        key["training.dataloader_num_workers"] = args.dataloader_num_workers  # which divide it
    parts = parts_of(teacher)
    for name, losses in args.loss_parts.items() if parts else ():
        prefix = f"losses.{name}/" if name else "losses."
        key |= {f"{prefix}{loss}": yaml_text(options or {}) for loss, options in losses.items()}
    key |= {"student": model_words(distiller.student), **({} if parts else {"teacher": None})}
    for name, part in parts.items():
        role = f"teacher.{name}" if name else "teacher"
        key |= {role: model_words(part.adapter), f"{role}.weights": part.fingerprint}
    return {**key, **{f"data.{name}": value for name, value in data_key(dataset).items()}}


def model_words(adapter: DenseAdapter) -> str:
    """The kind and the size of a model."""
    return f"{type(adapter.model).__name__}, {count_parameters(adapter)} parameters"


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Where two keys differ, in words; `expected` says how it is here."""
    expected = json.loads(json.dumps(expected))
    return [
        f"{key} is {shortened(found.get(key))} there and {shortened(expected.get(key))} here"
        for key in {**expected, **found}
        if found.get(key) != expected.get(key)
    ]


def check_same_run(checkpoint: Path, key: Mapping[str, Any], ranks: int, *, anyway: bool) -> None:
    """Compares a checkpoint with the run that is to go on from it.

    Args:
        checkpoint: the folder.
        key: of `run_key`.
        ranks: number of processes; 0 if nothing is left to train.
        anyway: whether what would come out otherwise is only a warning.

    Raises:
        UserError: naming what is missing or differs.
    """
    random = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    needed = [KEY_FILE, *([OPTIMIZER_NAME, SCHEDULER_NAME, *random] if ranks else [])]
    found = [f"it has no {name}" for name in needed if not (checkpoint / name).is_file()]
    if (checkpoint / KEY_FILE).is_file():
        found += differences(read_json(checkpoint / KEY_FILE), key)
    if not found:
        return
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    message = f"{checkpoint} would not go on as it would have: {'; '.join(found[:5])}{more}."
    if not anyway:
        raise UserError(f"{message}{ANYWAY}")
    logger.warning("%s Resumed anyway.", message)


@contextmanager
def disk_checked(folder: str | None) -> Iterator[None]:
    """Turns errors of a full disk inside the block, each library's own, into a `UserError` that names the folder."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or any(words in str(error) for words in ("No space left", "PytorchStreamWriter", "file write failed")):
            raise UserError(
                f"{folder}: cannot be written to ({shortened(error)}). Make room there, or lower --save_total_limit, and "
                "continue from the last whole checkpoint with --resume_from_checkpoint true."
            ) from error
        raise


def save_student(distiller: Distiller, folder: Path, processor: Any, key: Mapping[str, Any] | None = None) -> None:
    """Saves the student and its image processor; in checkpoints also connectors, temperatures and memories.

    Args:
        distiller: the unwrapped module.
        folder: created where missing.
        processor: image processor.
        key: of `run_key`, if distillation is to go on from here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for saved in (distiller.finished.model, processor):
        drop_foreign_code(saved)
        saved.save_pretrained(folder)
    if key is not None:
        write_json(folder / KEY_FILE, key)
        if state := criterion_state(distiller):
            save_file(state, folder / DISTILLER_FILE, metadata={"format": "pt"})


def load_student(distiller: Distiller, folder: Path) -> None:
    """Restores every weight, and fails where Trainer only warns.

    `save_pretrained` renames the keys of SegFormer, Mask2Former and others; only `from_pretrained` reads them back.

    Raises:
        UserError: if the folder holds another student, or lacks the state of the losses or has that of others.
    """
    student = distiller.finished.model
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
        state = load_file(path)
        own = {name.removeprefix(STUDENT): state.pop(name) for name in list(state) if name.startswith(STUDENT)}
        ranges = {name.removeprefix(QUANTIZER): state.pop(name) for name in list(state) if name.startswith(QUANTIZER)}
        if distiller.average is not None:
            distiller.student.load_state_dict(own)
        if distiller.quantizer is not None:
            distiller.quantizer.load_state_dict(ranges)
        distiller.criterion.load_state_dict(state)
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
    """State that losses keep across steps, the weights that an average is of, and the ranges of quantised steps."""
    state = distiller.criterion.state_dict()
    if distiller.average is not None:
        state |= {f"{STUDENT}{name}": tensor for name, tensor in distiller.student.state_dict().items()}
    if distiller.quantizer is not None:
        state |= {f"{QUANTIZER}{name}": tensor for name, tensor in distiller.quantizer.state_dict().items()}
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}
