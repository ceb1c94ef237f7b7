"""Distils a small segmenter or detector from a large one.

    accelerate launch scripts/distill.py                                   # demo: no download, under two minutes
    accelerate launch scripts/distill.py --config examples/recipes/camvid/mobilenetv2_deeplabv3plus_to_mobilenetv2_fpn.yaml \\
        --data_dir path/to/camvid --student.weights W --teacher.weights W
    accelerate launch scripts/distill.py --dataset_name user/data --teacher nvidia/segformer-b4-finetuned-ade-512-512 \\
        --student nvidia/mit-b0 --output_dir runs/mine
    accelerate launch scripts/distill.py --data_dir path/to/boxes --teacher '{backbone: resnet50, head: gfl, pretrained: true}' \\
        --student '{backbone: resnet18, head: gfl, pretrained: true}' --output_dir runs/mine

Without --teacher the student is trained by itself. Everything a run produces lies in its output folder.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from ..adapters import DenseAdapter, read_synonyms
from ..adapters.loading import load_adapter
from ..card.usage import fill
from ..data import DenseDatasets
from ..export.students import check_target
from ..export.targets import parse_target
from ..hub.exports import model_file
from ..runs.arguments import DataArguments, ModelArguments, build_arguments, named_teachers, read_arguments
from ..runs.baseline import (
    STORED_KEYS,
    check_untrained,
    load_baseline,
    prepare_baseline,
    prepare_teachers,
    with_stored_teachers,
)
from ..runs.experiment import (
    alone_in,
    build_student,
    checkpoint_of,
    evaluate_model,
    final_split,
    load_data,
    name_classes,
    named_pictures,
    train_model,
)
from ..runs.exporting import export_run, write_recipe
from ..runs.report import metrics_table, write_report
from ..stores import Store
from ..training.checkpoints import read_state
from ..training.config import BCDConfig
from ..training.hardware import limit_threads
from ..training.hub import HubCallback
from ..training.teachers import by_role, naming
from ..training.teaching import build_losses
from ..utils.messages import UserError
from ..utils.text import shortened
from .export import summary


DEMO = "synthetic/resnet18_to_resnet10.yaml"
# arguments that a student without a teacher makes nothing of
OF_TEACHERS = (
    "losses", "preset", "unlabelled_dir", "unlabelled_dataset", "log_gradients", "teacher_training", "inherit", "label_synonyms",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Trains what the arguments describe, scores it, reports it and pushes it if asked.

    Where they name neither recipe, data nor student, it is the demo.

    Args:
        argv: command line; the process's own by default.
    """
    recipe = read_arguments(argv, default_config=DEMO, description=__doc__)
    model_args, data_args, config = build_arguments(recipe)
    limit_threads()
    logging.basicConfig(level=logging.INFO if config.should_log else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the Hub's client would log every request
    with alone_in(str(config.output_dir), config):
        distill(model_args, data_args, config, recipe)


def distill(
    model_args: ModelArguments, data_args: DataArguments, config: BCDConfig, recipe: Mapping[str, Any]
) -> None:
    """Trains, scores, reports and pushes; `recipe` is what the arguments were built from, for the card."""
    if (checkpoint := checkpoint_of(config, "student")) is not None:
        read_state(Path(checkpoint))  # a wrong one fails before hours of teacher training
    model_args = with_stored_teachers(model_args, config.hub_token)
    recipe = {**recipe, **{key: getattr(model_args, key) for key in STORED_KEYS if key in recipe}}
    config.check_teachers(list(named_teachers(model_args)))
    exported = target_to_export(model_args, config)
    if not named_teachers(model_args) and (unused := [name for name in OF_TEACHERS if recipe.get(name)]):
        logging.warning("there is no teacher, so these have no effect: %s", ", ".join(unused))
    if recipe.get("unlabelled_share") and not named_pictures(data_args):
        logging.warning(
            "unlabelled_share has no effect: no unlabelled_dir or unlabelled_dataset has pictures without labels"
        )
    data = name_classes(model_args, load_data(data_args))
    student = build_student(model_args, config, data)
    if exported and not config.quantize:  # which has an error of its own
        check_target(student, *exported)
    baseline = load_baseline(model_args, data)
    check_untrained(model_args, config, data, student)
    HubCallback(config).prepare()
    teachers = prepare_teachers(model_args, config, data)
    for name, one in teachers.items():
        if isinstance(one, DenseAdapter):
            with naming(name):
                build_losses(student, one, config.for_teacher(name))
    baseline = baseline or prepare_baseline(model_args, config, data)
    taught: Any = teachers.get("", teachers or None)
    trainer = train_model(student, taught, config, data, label_synonyms=model_args.label_synonyms)
    models = by_role(teachers) | ({} if baseline is None else {"baseline": baseline})
    models["student"] = load_adapter(str(config.output_dir), task=trainer.task.name)  # the saved student is scored

    split, found, scores = final_split(data), {}, {}
    for name, model in models.items():
        if isinstance(model, Store):
            if split is not None and (stored := model.scores(split, config.image_size)):
                scores[name] = stored
            continue
        found[name] = model
        if split is not None and model.predicts:  # which a teacher of features does not
            synonyms = None if name in ("baseline", "student") else read_synonyms(model_args.label_synonyms)
            if missing := model.match(data[split].id2label, synonyms).missing:
                logging.warning("the %s has no score: it lacks the classes %s", name, ", ".join(missing))
            else:
                scores[name] = evaluate_model(model, config, data[split], synonyms)
    if config.should_save:
        print(metrics_table(scores, trainer.task))
        write_recipe(Path(str(config.output_dir)), recipe)
        write_report(trainer, found, scores, data, split, recipe)
        if exported:
            export_finished(*exported, data, config)
        call = fill(trainer.task.call, Path(str(config.output_dir)), str(config.output_dir))
        print(f"import hf_bcd\nfrom transformers import pipeline\n{call}")
    if config.push_to_hub and isinstance(commit := trainer.push_to_hub(), CommitInfo):  # None on further ranks
        print(f"pushed: {commit.commit_url}")


def target_to_export(args: ModelArguments, config: BCDConfig) -> tuple[str, str] | None:
    """Format and precision that the finished student is exported to; with quantised steps an int8 file shows what they brought.

    Raises:
        UserError: a package is missing, or the student is quantised and the file is not.
    """
    if args.export is None:
        return parse_target("onnx-int8") if config.quantize else None
    form, precision = parse_target(args.export)
    if config.quantize and precision != config.quantize:
        raise UserError(f"quantize is for int8 files, but export is {args.export}: say --export {form}-int8.")
    return form, precision


def export_finished(form: str, precision: str, data: DenseDatasets, config: BCDConfig) -> None:
    """Exports the student of a run that has just ended, and scores the file; a failure is a line, since the student stands."""
    folder = str(config.output_dir)
    try:
        written, report = export_run(folder, form, precision, data, config)
        print(f"{written / model_file(form, precision)}: {summary(report)}")
    except Exception as error:  # whatever a converter raises, the finished run stands
        logging.warning(
            "the student lies in %s, but was not exported: %s; try again with: hf-bcd export %s --format %s --precision %s",
            folder, shortened(error), folder, form, precision,
        )  # fmt: skip
