"""Runs a teacher once over the views that training will show, and stores what losses read of it."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..adapters import DenseAdapter, FrozenTeacher, read_synonyms
from ..adapters.specs import ModelSpec
from ..data import DenseDatasets
from ..data.dataset import TransformedDataset
from ..losses import DistillationCriterion
from ..stores.codecs import Column
from ..stores.needs import check_storable, columns_of, read_by, tensors_of
from ..stores.store import FORMAT, FORMAT_OF_SEVERAL, STATE_FILE, fingerprint, prefix_of
from ..stores.writing import Chosen, begin, choose, choose_together, write_shards
from ..tasks import Task, task_of
from ..training.config import BCDConfig
from ..training.evaluation import moved
from ..training.hardware import fit_loaders, lay_out
from ..training.loaders import spread_samples, view_options
from ..training.recording import record_model
from ..training.teachers import naming, short_name
from ..training.teaching import build_losses, calibrate, freeze, lacking
from ..utils.messages import UserError, unknown_key_message
from .arguments import ModelArguments, named_teachers
from .baseline import prepare_teacher
from .experiment import build_student


logger = logging.getLogger(__name__)

MEASURED_VIEWS = 8  # on which codecs are chosen and their loss is measured


class Views(Dataset[dict[str, Any]]):
    """The rows of a store as transformed samples: view after view, and in each all pictures in order."""

    def __init__(self, dataset: TransformedDataset, rows: range) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        view, index = divmod(self.rows[place], len(self.dataset))
        return self.dataset.view(index, view)


@dataclasses.dataclass
class Reinforcer:
    """A teacher with the losses that will read its outputs.

    Attributes:
        teacher: frozen, on the device of `config`.
        criteria: losses, calibrated; of several recipes that one store is to serve, one each.
        dataset: the views.
        config: arguments of the runs.
        num_labels: number of the student's classes.
        synonyms: the teacher's names for these.
        student: the losses' student, where it is not the teacher itself.
    """

    teacher: FrozenTeacher
    criteria: Sequence[DistillationCriterion]
    dataset: TransformedDataset
    config: BCDConfig
    num_labels: int
    synonyms: Mapping[str, Sequence[str]] | None = None
    student: DenseAdapter | None = None

    @property
    def task(self) -> Task:
        return task_of(self.dataset)

    def tensors(self, batch: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What losses read of the teacher's output for a batch; with `names` only these, without another look at the losses."""
        targets = self.task.targets(batch, self.num_labels)
        output = self.teacher.for_batch(batch, targets.pixel_mask)
        if names is None:
            found = {}
            student = None if self.student is None else self.student(batch["pixel_values"])
            for criterion in self.criteria:
                found |= read_by(criterion, output, targets, student)
            return found
        return columns_of(self.criteria, output, targets, names)

    def state(self) -> dict[str, Tensor]:
        """What the losses' student sides need of their teacher sides."""
        return {
            f"{name}.{key}": x.detach().cpu().contiguous()
            for criterion in self.criteria
            for name, loss in criterion.by_name().items()
            if loss.digested
            for key, x in loss.state_dict().items()
            if key.startswith("teacher_")
        }

    def digested(self) -> dict[str, Any]:
        """The options of each loss that decide what is stored for it."""
        found: dict[str, Any] = {}
        for criterion in self.criteria:
            for name, loss in criterion.by_name().items():
                if loss.digested and found.setdefault(name, loss.digested) != loss.digested:
                    raise UserError(
                        f"two recipes give loss {name!r} the options {found[name]} and {loss.digested}; one store serves one of them."
                    )
        return found


def build_reinforcer(
    model_args: ModelArguments,
    config: BCDConfig,
    data: DenseDatasets,
    recipes: Sequence[Mapping[str, Any]] | None = None,
    teacher: DenseAdapter | None = None,
) -> Reinforcer:
    """Loads or trains the teacher and prepares the losses.

    Args:
        model_args: the teacher; also the student where levels that both have matter to a loss.
        config: losses and views.
        data: with a training split.
        recipes: `losses` of several recipes, instead of those of `config`.
        teacher: loaded already.

    Raises:
        UserError: there is no teacher, a loss needs one that runs, or the training split is a stream.
    """
    if "" not in config.loss_parts:
        config = config.for_teacher(name_in_losses(model_args, config))
    teacher = teacher or prepare_teacher(model_args, config, data)
    if teacher is None:
        raise UserError("no teacher: name one with --teacher (Hub id, folder, or {backbone: ..., head: ...}).")
    split = data["train"]
    task = task_of(split)
    dataset: Any = split.with_transform(task.train_transform(config), seed=config.seed)
    if not isinstance(dataset, TransformedDataset):
        raise UserError("a stream has no views to come back to; leave streaming out.")
    student = teacher if model_args.student is None else build_student(model_args, config, data)
    synonyms = read_synonyms(model_args.label_synonyms)
    frozen = freeze(teacher, split.id2label, config, synonyms)
    lay_out(frozen)
    variants = [config] if recipes is None else [dataclasses.replace(config, losses=dict(own)) for own in recipes]
    criteria = []
    for variant in variants:
        criterion = build_losses(student, teacher, variant, lacking(frozen)).to(config.device)
        check_storable(criterion.by_name().items())
        if criterion.needs_calibration:
            calibrate(criterion, frozen, dataset, task, config, split.num_labels)
        criteria.append(criterion)
    shown = None if student is teacher else student.to(config.device).eval()
    return Reinforcer(frozen, criteria, dataset, config, split.num_labels, synonyms, shown)


def build_reinforcers(args: ModelArguments, config: BCDConfig, data: DenseDatasets) -> dict[str, Reinforcer]:
    """As `build_reinforcer`, of each teacher that the arguments name, by its name; "" for a single one."""
    found = dict[str, Reinforcer]()
    for name, own in (named_teachers(args) or {"": args}).items():
        with naming(name):
            found[name] = build_reinforcer(own, config, data)
    return found


def name_in_losses(args: ModelArguments, config: BCDConfig) -> str:
    """The name by which the losses of a recipe for several teachers know one of them; a `UserError` if they do not."""
    spec = ModelSpec.parse(args.teacher or "", "teacher")
    name = short_name(str(spec.name_or_path or spec.backbone))
    if name not in config.loss_parts:
        raise UserError(unknown_key_message("teacher in losses", name, config.loss_parts))
    return name


def make_store(
    folder: Path,
    reinforcer: Reinforcer | Mapping[str, Reinforcer],
    views: int,
    precision: str = "compact",
    columns: Sequence[str] = (),
) -> None:
    """Writes a store, or goes on with one that was interrupted.

    Args:
        folder: created where missing.
        reinforcer: teacher and losses; of several teachers by name, for the same views of the same pictures.
        views: number of views of each picture.
        precision: one of `PRECISIONS`.
        columns: further tensors to store, by their names: `logits`, `features/<level>`, `pyramid/<level>`; of several teachers with
            `<teacher>/` before it.

    Raises:
        UserError: the folder holds another store, a column does not exist, or views differ in size.
    """
    parts = reinforcer if isinstance(reinforcer, Mapping) else {"": reinforcer}
    first = next(iter(parts.values()))
    config, dataset = first.config, first.dataset
    if unknown := [name for name in columns if "" not in parts and name.partition("/")[0] not in parts]:
        raise UserError(f"--columns names {unknown[0]!r}; write the teacher first, as in {next(iter(parts))}/logits.")
    fit_loaders(config)
    chosen, groups, state = dict[str, dict[str, Column]](), dict[str, dict[str, Any]](), dict[str, Tensor]()
    for name, part in parts.items():
        prefix = prefix_of(name)
        with naming(name):
            own = measure(part, [key.removeprefix(prefix) for key in columns if key.startswith(prefix)])
            found = choose_codecs(part, own, precision)
        chosen[name] = {key: one.column for key, one in found.items()}
        groups[name] = describe_teacher(part) | {
            "columns": {
                key: {"codec": one.column.codec, "shape": list(one.column.shape), "error": float(f"{one.error:.4g}"), "measure": one.measure}
                for key, one in found.items()
            }
        }  # fmt: skip
        state |= {prefix + key: x for key, x in part.state().items()}
    several = {"format": FORMAT_OF_SEVERAL, "teachers": groups}
    content = describe(first, views) | groups.get("", several)
    folder.mkdir(parents=True, exist_ok=True)
    with config.main_process_first(desc="beginning the store") if config.world_size > 1 else nullcontext():
        if state and config.should_save and not (folder / STATE_FILE).is_file():
            save_file(state, folder / STATE_FILE, metadata={"format": "pt"})
        paths = begin(folder, content)
    total = views * len(dataset)
    with tqdm(total=total, desc="Teacher on views", disable=config.disable_tqdm or not config.should_save) as bar:

        def rows_of(rows: range) -> Iterator[dict[str, Any]]:
            for row in records(parts, chosen, rows):
                bar.update(config.world_size)
                yield row

        there = write_shards(paths, total, rows_of, rank=config.process_index, ranks=config.world_size)
    if there:
        logger.warning("%s: %d of %d files were there already", folder, there, len(paths))


def choose_codecs(
    reinforcer: Reinforcer, measured: Mapping[str, Sequence[Tensor]], precision: str
) -> dict[str, Chosen]:
    """The codec of each tensor of `measured`; of levels that a loss fuses, by what it makes of them."""
    found = dict[str, Chosen]()
    if precision == "compact":
        losses = {name: loss for criterion in reinforcer.criteria for name, loss in criterion.by_name().items()}
        for name, loss in losses.items():
            own = {key: samples for key, samples in measured.items() if key.startswith(f"{name}/")}
            levels = [key for key in own if key.startswith(f"{name}/levels/")]
            if not levels:
                continue

            def divergence(exact: Any, kept: Any, loss: Any = loss) -> Tensor:
                device = reinforcer.config.device
                return loss.lost(*({key: x.to(device) for key, x in one.items()} for one in (exact, kept)))

            found |= choose_together(own, levels, divergence)
    return {name: found.get(name) or choose(name, samples, precision) for name, samples in measured.items()}


def measure(reinforcer: Reinforcer, columns: Sequence[str] = ()) -> dict[str, list[Tensor]]:
    """The tensors to store for some views spread over the training split.

    Raises:
        UserError: one of `columns` is no tensor of the teacher's output.
    """
    samples, found = spread_samples(reinforcer.dataset, MEASURED_VIEWS), dict[str, list[Tensor]]()
    for sample in samples:
        batch = moved(reinforcer.task.collate([sample]), reinforcer.config)
        tensors = reinforcer.tensors(batch)
        targets = reinforcer.task.targets(batch, reinforcer.num_labels)
        if columns:
            known = tensors_of(reinforcer.teacher.for_batch(batch, targets.pixel_mask))
            for name in columns:
                if name not in known:
                    raise UserError(f"--columns names {name!r}; this teacher has {', '.join(known)}.")
                tensors[name] = known[name]
        for name, x in tensors.items():
            found.setdefault(name, []).append(x[0])
    if not found:
        raise UserError("the losses read nothing of a teacher's output that could be stored.")
    return found


def records(
    parts: Mapping[str, Reinforcer], columns: Mapping[str, Mapping[str, Column]], rows: range
) -> Iterator[dict[str, Any]]:
    """The rows of a store: each view is made once, whatever the number of teachers that look at it."""
    first = next(iter(parts.values()))
    config, dataset = first.config, first.dataset
    flat = {prefix_of(name) + key: column for name, own in columns.items() for key, column in own.items()}
    loader = DataLoader(
        Views(dataset, rows),
        batch_size=config.per_device_train_batch_size,
        collate_fn=_Keeping(first.task),
        num_workers=config.dataloader_num_workers,
    )
    place = rows.start
    for prints, batch in loader:
        batch, tensors = moved(batch, config), dict[str, Tensor]()
        for name, part in parts.items():
            with torch.no_grad():
                own = part.tensors(batch, list(columns[name]))
            tensors |= {prefix_of(name) + key: x.float().cpu() for key, x in own.items()}
        for number, (checksum, thumbnail) in enumerate(prints):
            view, index = divmod(place, len(dataset))
            row = {"index": index, "view": view, "image": image_name(dataset.dataset, index)}
            row |= {"checksum": checksum, "thumbnail": thumbnail}
            yield row | {name: column.pack(tensors[name][number]) for name, column in flat.items()}
            place += 1


class _Keeping:  # a class, because loader workers may be spawned
    """A task's collate, with the fingerprint of each sample."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[int, bytes]], dict[str, Any]]:
        return [fingerprint(sample["pixel_values"]) for sample in samples], self.task.collate(samples)


def image_name(split: Any, index: int) -> str:
    """The name of a picture without the folders of this machine."""
    return Path(str(split.rows[index].image_name)).name


def describe(reinforcer: Reinforcer, views: int) -> dict[str, Any]:
    """`store.json` but for what it says of a teacher."""
    split: Any = reinforcer.dataset.dataset
    return {
        "format": FORMAT,
        "task": split.task,
        "dataset": split.name,
        "images": len(split),
        "unlabelled": getattr(split, "num_unlabelled", 0),
        "views": views,
        "seed": reinforcer.config.seed,
        "classes": list(split.id2label.values()),
        "transform": view_options(reinforcer.task, reinforcer.config),
        "versions": {name: version(name) for name in ("hf_bcd", "torch", "torchvision", "transformers")},
    }


def describe_teacher(reinforcer: Reinforcer) -> dict[str, Any]:
    """What `store.json` says of a teacher, but for its columns."""
    adapter, teacher = reinforcer.teacher.adapter, reinforcer.teacher
    model: Any = adapter.model
    settings = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return {
        "teacher": {
            "name": record_model(adapter, "teacher").architecture,
            "class": type(model).__name__,
            "config": {key: value for key, value in settings.items() if key not in ("_name_or_path", "name_or_path")},
            "repo_id": adapter.repo_id,
            "revision": adapter.revision,
            "fingerprint": teacher.fingerprint,
            "has_classes": bool({"logits", "classes"} & adapter.offers),
            "synonyms": reinforcer.synonyms,
            "image_mean": adapter.image_mean.flatten().tolist(),
            "image_std": adapter.image_std.flatten().tolist(),
            "dtype": str(teacher.dtype or model.dtype).removeprefix("torch."),
        },
        "losses": reinforcer.digested(),
    }
