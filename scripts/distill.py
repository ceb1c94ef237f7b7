"""Distils a small segmentation model from a large one.

    accelerate launch scripts/distill.py                                   # demo: no download, under two minutes
    accelerate launch scripts/distill.py --config examples/recipes/camvid/mobilenetv2_deeplabv3plus_to_mobilenetv2_fpn.yaml \\
        --data_dir path/to/camvid --student.weights W --teacher.weights W
    accelerate launch scripts/distill.py --dataset_name user/data --teacher nvidia/segformer-b4-finetuned-ade-512-512 \\
        --student nvidia/mit-b0 --output_dir runs/mine

Without --teacher the student is trained alone. Everything a run produces lies in its output folder.
"""

import logging
import sys
from pathlib import Path

from hf_bcd.builders import load_segmentation_model
from hf_bcd.config import parse_arguments
from hf_bcd.experiment import (
    build_student,
    evaluate_model,
    final_split,
    load_data,
    predicts_classes_of,
    prepare_baseline,
    prepare_teacher,
    train_model,
)
from hf_bcd.reporting import loading_lines, metrics_table, write_report


DEMO = Path(__file__).parent.parent / "examples" / "recipes" / "synthetic" / "resnet18_to_resnet10.yaml"


def main() -> None:
    model_args, data_args, config = parse_arguments(default_config=DEMO, description=__doc__)
    logging.basicConfig(level=logging.INFO if config.should_log else logging.ERROR, format="%(message)s")
    data = load_data(data_args)
    student = build_student(model_args, data, config.seed)  # a wrong name fails before hours of teacher training
    models = {
        "teacher": prepare_teacher(model_args, config, data),
        "baseline": prepare_baseline(model_args, config, data),
    }
    trainer = train_model(student, models["teacher"], config, data)
    models["student"] = load_segmentation_model(str(config.output_dir))  # the scores are those of the saved student

    split = final_split(data)
    scores = {}
    if split is not None:
        for name, model in models.items():
            if model is not None and predicts_classes_of(model, data[split]):
                scores[name] = evaluate_model(model, config, data[split])
            elif model is not None:
                logging.warning("the %s has other classes than %s, so it has no score", name, data[split].name)
    if config.should_save:
        write_report(
            trainer, {name: model for name, model in models.items() if model is not None}, scores, data, split
        )
        print(metrics_table(scores))
        print(loading_lines(config.output_dir))
    if config.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}. Run the same command with --resume_from_checkpoint true to continue.", file=sys.stderr)
        sys.exit(130)
