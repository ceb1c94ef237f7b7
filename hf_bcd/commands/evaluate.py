"""Scores a segmenter or detector on a labelled data set.

    accelerate launch scripts/evaluate.py --student runs/demo --dataset_name synthetic
    accelerate launch scripts/evaluate.py --student me/segformer-b0-bcd --data_dir path/to/data --image_size 512
    hf-bcd evaluate runs/x                                          # on the data of its own run
    hf-bcd evaluate runs/x --backend onnx --precision int8          # the file of `hf-bcd export`, beside its student

`--image_size` is the short side that images are resized to; by default that of the model's own image processor, if it
keeps their aspect ratio, else none; detectors that take squares have `--square_size` instead. Writes `<output_dir>/evaluation.json` and prints the same numbers;
those of an exported file go into its report and the student's card.
"""

import argparse
import logging
import sys
from pathlib import Path

from ..adapters.loading import load_adapter, saved_size
from ..adapters.specs import ModelSpec
from ..card.usage import mention_exports
from ..export.students import open_export
from ..hub.exports import EXTENSIONS, PRECISIONS
from ..runs.arguments import build_arguments, read_arguments
from ..runs.experiment import evaluate_model, final_split, load_data
from ..runs.exporting import RECIPE, data_arguments, run_recipe, score_export
from ..runs.report import metrics_table, protocol
from ..tasks import task_of
from ..training.hardware import fit_loaders, limit_threads
from ..utils.files import write_json
from ..utils.messages import UserError


logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Scores the model that the arguments name; `argv` is the process's own command line by default."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--backend", choices=EXTENSIONS)
    own.add_argument("--precision", choices=PRECISIONS)
    args, argv = own.parse_known_args(argv)
    if args.precision is not None and args.backend is None:
        raise UserError(f"--precision {args.precision} is of an exported file; say which one with --backend.")
    folder = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if folder is not None:
        if any(word.partition("=")[0] == "--student" for word in argv):
            raise UserError(f"the model is named twice: {folder}, and by --student; leave one out.")
        argv += ["--student", folder]
    if args.backend is not None:
        limit_threads()
        evaluate_export(folder, args.backend, args.precision or "float32", argv)
        return
    saved = Path(folder or "", RECIPE)
    recipe = run_recipe(folder) if folder is not None and saved.is_file() and "--config" not in argv else None
    model_args, data_args, config = build_arguments(read_arguments(argv, recipe=recipe, description=__doc__))
    limit_threads()
    fit_loaders(config)
    if model_args.student is None:
        raise UserError("name the model to evaluate with --student (Hub id or folder).")
    spec = ModelSpec.parse(model_args.student, "student")
    if spec.name_or_path is None:
        raise UserError("--student must be a trained model: a Hub id or a folder.")
    data = load_data(data_args, for_training=False)
    split = final_split(data)
    if split is None:
        raise UserError(f"no labelled evaluation split; the data set has {', '.join(data)}.")
    adapter = load_adapter(spec, trust_remote_code=model_args.trust_remote_code, task=task_of(data[split]).name)
    if config.image_size is None and config.square_size is None:
        trust = model_args.trust_remote_code
        saved = saved_size(spec.name_or_path, revision=adapter.revision, trust_remote_code=trust)
        squares = "height" in adapter.processor_options(None).get("size", {})
        for name, size in task_of(data[split]).size_args(saved, squares).items():
            logger.warning("%s is %d, as the model's processor has it; --%s sets another", name, size, name)
            setattr(config, name, size)
    task_of(data[split]).check_args(config)
    scores = evaluate_model(adapter, config, data[split], model_args.label_synonyms)
    if config.should_save:
        measured = protocol(data[split], adapter, config, scores)
        result = {"model": spec.name_or_path, "scores": scores, "protocol": measured}
        folder = Path(config.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluation.json", result)
        print(metrics_table({spec.name_or_path: scores}, task_of(data[split])))
        print(f"written to {folder / 'evaluation.json'}")


def evaluate_export(folder: str | None, form: str, precision: str, argv: list[str]) -> None:
    """Scores an exported file of a student's folder beside the student, and writes both where the card finds them."""
    if folder is None or not Path(folder).is_dir():
        raise UserError(f"name the folder of the student first, as in: hf-bcd evaluate runs/x --backend {form}")
    open_export(Path(folder), form, precision)  # before any data are read
    found = data_arguments(folder, argv)
    if found is None:
        raise UserError(
            f"{folder} does not say which data it was made with; name them with --data_dir or --dataset_name."
        )
    data_args, config, synonyms = found
    data = load_data(data_args, for_training=False)
    split = final_split(data)
    if split is None:
        raise UserError(f"no labelled evaluation split; the data set has {', '.join(data)}.")
    report = score_export(Path(folder), form, precision, data[split], config, synonyms)
    mention_exports(Path(folder))
    scores, task = report["scores"][data[split].split], task_of(data[split])
    print(metrics_table({f"{form} {precision}": scores["file"], "pytorch": scores["pytorch"]}, task))
    if "argmax_agreement" in scores:
        print(f"same class at {100 * scores['argmax_agreement']:.2f} % of the pixels of {scores['images']} pictures")
