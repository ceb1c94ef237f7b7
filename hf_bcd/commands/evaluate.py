"""Scores a segmenter or detector on a labelled data set.

    accelerate launch scripts/evaluate.py --student runs/demo --dataset_name synthetic
    accelerate launch scripts/evaluate.py --student me/segformer-b0-bcd --data_dir path/to/data --image_size 512

`--image_size` is the short side that images are resized to; by default that of the model's own image processor, if it
keeps their aspect ratio, else none; detectors that take squares have `--square_size` instead. Writes `<output_dir>/evaluation.json` and prints the same numbers.
"""

import logging
from pathlib import Path

from ..adapters.loading import ModelSpec, load_adapter, saved_size
from ..runs.arguments import parse_arguments
from ..runs.experiment import evaluate_model, final_split, load_data
from ..runs.report import metrics_table, protocol
from ..tasks import task_of
from ..training.hardware import fit_loaders, limit_threads
from ..utils.files import write_json
from ..utils.messages import UserError


logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Scores the model that the arguments name; `argv` is the process's own command line by default."""
    model_args, data_args, config = parse_arguments(argv, description=__doc__)
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
