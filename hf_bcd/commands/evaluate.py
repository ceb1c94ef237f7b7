"""Scores a segmentation model on a labelled data set.

    accelerate launch scripts/evaluate.py --student runs/demo --dataset_name synthetic
    accelerate launch scripts/evaluate.py --student me/segformer-b0-bcd --data_dir path/to/data --image_size 512

Images are shown as the model's own processor shows them, or as `--image_size` says. Writes `<output_dir>/evaluation.json`
and prints the same numbers.
"""

import logging
from pathlib import Path

from ..adapters import build_adapter
from ..arguments import parse_arguments
from ..builders import load_segmentation_model, saved_image_size
from ..config import ModelSpec
from ..experiment import evaluate_model, final_split, load_data, write_json
from ..reporting import metrics_table, protocol


logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Scores the model that the arguments name; `argv` is the process's own command line by default."""
    model_args, data_args, config = parse_arguments(argv, description=__doc__)
    if model_args.student is None:
        raise ValueError("name the model to evaluate with --student (Hub id or folder).")
    spec = ModelSpec.parse(model_args.student, "student")
    if spec.name_or_path is None:
        raise ValueError("--student must be a trained model: a Hub id or a folder.")
    data = load_data(data_args, for_training=False)
    split = final_split(data)
    if split is None:
        raise ValueError(f"no labelled evaluation split; the data set has {', '.join(data)}.")
    model = load_segmentation_model(
        spec.name_or_path, revision=spec.revision, trust_remote_code=model_args.trust_remote_code
    )
    if config.image_size is None:
        config.image_size = saved_image_size(
            spec.name_or_path, revision=spec.revision, trust_remote_code=model_args.trust_remote_code
        )
        if config.image_size is not None:
            logger.warning(
                "resizing images to a short side of %d, as the model's processor does; --image_size sets another",
                config.image_size,
            )
    scores = evaluate_model(model, config, data[split], model_args.label_synonyms)
    if config.should_save:
        measured = protocol(data[split], build_adapter(model), config, scores)
        result = {"model": spec.name_or_path, "scores": scores, "protocol": measured}
        folder = Path(config.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluation.json", result)
        print(metrics_table({spec.name_or_path: scores}))
