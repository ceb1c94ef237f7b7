"""Exports of a run: its training pictures find the scales of int8, and its validation split scores file and student."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import DenseAdapter, image_processor
from ..adapters.loading import load_adapter
from ..adapters.specs import ModelSpec
from ..card.usage import mention_exports
from ..data import DenseDataset, DenseDatasets
from ..export.calibration import Calibration
from ..export.opened import running
from ..export.students import export_student, open_export
from ..export.targets import target_of
from ..hub.exports import BEFORE, report_file
from ..tasks import task_of
from ..training.config import BCDConfig
from ..training.evaluation import evaluate_together
from ..training.quantization import FOLDER
from ..utils.files import numbers, write_json, write_text
from ..utils.messages import UserError
from ..utils.yaml import yaml_text
from .arguments import RECIPE_KEYS, DataArguments, build_arguments, read_arguments
from .experiment import fit_classes, load_data
from .recipes import read_recipe


logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"  # in a run's folder: what it was asked for
# of a run, what decides about the pictures of an evaluation
SHOWN = ("image_size", "square_size", "seed", "label_synonyms", "per_device_eval_batch_size")
LEFT_OUT = ("cache_images", "label_free")
CALIBRATION_IMAGES = 200
MAX_LOSS = 2.0  # points of the task's first score that int8 may cost without a word


def write_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Writes what a run was asked for into its folder, so that exports find its data; it is never pushed."""
    said = {key: value for key, value in recipe.items() if key != "hub_token"}
    write_text(folder / RECIPE, "".join(f"{key}: {yaml_text(value)}\n" for key, value in said.items()))


def saved_recipe(folder: str) -> dict[str, Any]:
    """What a run was asked for; empty where its folder does not say."""
    saved = Path(folder) / RECIPE
    return dict(read_recipe(saved, RECIPE_KEYS)) if saved.is_file() else {}


def run_recipe(folder: str) -> dict[str, Any]:
    """The part of a run's recipe that decides about the pictures of an evaluation; empty where there is none."""
    keys = {*DataArguments.__dataclass_fields__, *SHOWN} - {*LEFT_OUT}
    return {key: value for key, value in saved_recipe(folder).items() if key in keys}


def data_arguments(folder: str, argv: Sequence[str]) -> tuple[DataArguments, BCDConfig, str | None] | None:
    """The data of the run in a folder and how they are shown; what is typed wins over its `recipe.yaml`.

    Returns:
        Arguments of the data, arguments of an evaluation on the CPU, and the file of synonyms of classes; None where neither
        the run nor the command line names any data.
    """
    recipe = read_arguments(list(argv), recipe=run_recipe(folder))
    if not recipe.get("dataset_name") and not recipe.get("data_dir"):
        return None
    quiet = {"output_dir": folder, "use_cpu": True, "report_to": "none", "dataloader_num_workers": 0}
    model_args, data_args, config = build_arguments({**quiet, **recipe})
    return data_args, config, model_args.label_synonyms


def load_run_data(folder: str, args: DataArguments) -> DenseDatasets:
    """The data set of a run.

    Raises:
        UserError: it is not where the run had it.
    """
    try:
        return load_data(args)
    except (UserError, OSError) as error:
        raise UserError(
            f"the data of {folder} cannot be read ({str(error).rstrip('.')}); say where they are with --data_dir or --dataset_name."
        ) from error


def export_run(
    folder: str,
    form: str,
    precision: str,
    data: DenseDatasets | None = None,
    config: BCDConfig | None = None,
    *,
    calibration_images: int = CALIBRATION_IMAGES,
    synonyms: str | None = None,
    **options: Any,
) -> tuple[Path, dict[str, Any]]:
    """Exports a student, see `export_student`, and scores file and student on the validation split where there is one.

    Of a student with quantised steps, what it was before them is exported to int8 and scored as well: what they brought.

    Args:
        folder: the student's folder or Hub id.
        form: format of the file.
        precision: its precision.
        data: the run's data set; int8 needs it, the others are scored by it.
        config: size of the pictures.
        calibration_images: number of training pictures that find the scales of int8.
        synonyms: file of names that the student's classes may have in the data.
        options: further arguments of `export_student`.

    Raises:
        UserError: as `export_student`; or there are no pictures for int8.
    """
    target = target_of(form, precision)  # before any data are read
    calibration = None
    if precision == "int8":
        if data is None or config is None:
            raise UserError(
                f"int8 needs training pictures, and {folder} does not say where they are; name them with --data_dir or --dataset_name."
            )
        spec = ModelSpec(folder, options.get("revision"))
        trust = options.get("trust_remote_code", False)
        adapter = load_adapter(spec, trust_remote_code=trust, task=task_of(data["train"]).name)
        calibration = calibration_of(adapter, data["train"], config, calibration_images)
    written, report = export_student(folder, form=form, precision=precision, calibration=calibration, **options)
    if data is not None and config is not None and target.runtime is not None and Path(folder).is_dir():
        split = next((name for name in ("validation", "test") if name in data), None)
        if split is not None and written == Path(folder):
            report = score_export(written, form, precision, data[split], config, synonyms)
            before = written / FOLDER
            if precision == saved_recipe(folder).get("quantize") and before.is_dir():
                same = {**options, "size": report["size"], "calibration_images": calibration_images}
                _, found = export_run(str(before), form, precision, data, config, synonyms=synonyms, **same)
                report[BEFORE] = found["scores"]
                write_json(written / report_file(form, precision), report)
    mention_exports(written)
    return written, report


def calibration_of(model: DenseAdapter, train: Any, config: BCDConfig, number: int) -> Calibration:
    """Pictures spread over the training split, as evaluation shows them to a model; of a stream the first ones.

    Raises:
        UserError: none are asked for.
    """
    if number < 1:
        raise UserError(f"--calibration_images is {number}; take at least one.")
    task = task_of(train)
    transform = task.eval_transform(image_processor(model, **task.processor_size(config)))
    counted = isinstance(train, DenseDataset)
    number = min(number, len(train)) if counted else number

    def read() -> Iterator[Tensor]:
        chosen = (
            (train[place * len(train) // number] for place in range(number))
            if counted
            else itertools.islice(train, number)
        )
        for sample in chosen:
            yield model.normalize(transform(sample)["pixel_values"][None])

    return Calibration(read, number, f"training split of {train.name}")


def score_export(
    folder: Path, form: str, precision: str, data: DenseDataset, config: BCDConfig, synonyms: str | None = None
) -> dict[str, Any]:
    """Scores an exported file and its student on a split in one pass, and writes both into the file's report.

    Returns:
        The report, with `scores`: by split the data set's name, its `images`, the scores of `file` and `pytorch`, and of label
        maps the part of the pixels with the same class, `argmax_agreement`.

    Raises:
        UserError: as `open_export`; or the student has other classes than the data.
    """
    file, report = open_export(folder, form, precision)
    task = task_of(data)
    models = {"file": running(load_adapter(str(folder), task=task.name).float(), file)}
    models["pytorch"] = load_adapter(str(folder), task=task.name).float()
    for model in models.values():
        fit_classes(model, data, synonyms)
    scores, agreement = evaluate_together(models, data, config)
    result = {"dataset": data.name, "images": len(data), **numbers(scores)}
    if agreement is not None:
        result["argmax_agreement"] = agreement
    report["scores"] = {**report.get("scores", {}), data.split: result}
    write_json(folder / report_file(form, precision), report)
    score = task.scores[0]
    loss = score.scale * (scores["pytorch"][score.key] - scores["file"][score.key])
    if loss > MAX_LOSS:
        logger.warning(
            "%s %s lost %.2f points of %s on the %s split of %s (%.2f to %.2f); the file stays, but think before you use it",
            form, precision, loss, score.title, data.split, data.name,
            score.scale * scores["pytorch"][score.key], score.scale * scores["file"][score.key],
        )  # fmt: skip
    return report
