"""Scoring a finished student shows it its images as its own pipeline would."""

import json
from pathlib import Path

import pytest
import tiny
from adapters.adapter_tiny_models import dpt, segformer

from hf_bcd.adapters import build_adapter
from hf_bcd.commands.evaluate import main
from hf_bcd.runs import experiment
from hf_bcd.tasks import TASKS
from hf_bcd.utils.messages import UserError


DATA = {"dataset_name": "synthetic", "dataset_options": "{size: [48, 64], num_images: {test: 2}}"}


def evaluate(folder: Path, output: Path, **options: object) -> dict:
    main(tiny.command_line(student=folder, output_dir=output, **DATA, **options))
    return json.loads((output / "evaluation.json").read_text())


def test_the_size_that_a_student_was_trained_at_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.scenes()
    run = tiny.trainer(tmp_path / "student", teacher=None, data=data, max_steps=2, image_size=24)
    run.train()
    run.save_model()
    found = evaluate(tmp_path / "student", tmp_path)
    assert "image_size is 24, as the model's processor has it" in caplog.text
    assert found["protocol"]["input"] == "short side resized to 24, aspect ratio kept"
    expected = experiment.evaluate_model(run.student, tiny.config(tmp_path, image_size=24), data["test"])
    assert found["scores"]["mean_iou"] == pytest.approx(expected["mean_iou"])
    other = evaluate(tmp_path / "student", tmp_path, image_size=48)
    assert other["protocol"]["input"].startswith("short side resized to 48")
    assert other["scores"]["mean_iou"] != found["scores"]["mean_iou"]


@pytest.mark.parametrize(
    ("model", "saved", "shown", "words"),
    [
        (segformer, {}, None, ""),
        (segformer, {"shortest_edge": 512, "longest_edge": 2048}, 512, ""),
        (segformer, {"height": 512, "width": 512}, None, "squashes images to 512 x 512"),
        (dpt, {"height": 64, "width": 64}, 64, ""),
        (dpt, {}, None, ""),
    ],
)
def test_sizes_of_image_processors(model, saved: dict, shown: int | None, words: str, caplog) -> None:
    squares = "height" in build_adapter(model()).processor_options(None).get("size", {})
    found = TASKS["semantic-segmentation"].size_args(saved, squares)
    assert found == ({} if shown is None else {"image_size": shown})
    assert words in caplog.text and bool(caplog.records) == bool(words)


def test_a_model_of_another_task_is_named_also_where_its_classes_fit(tmp_path: Path) -> None:
    data = tiny.scenes()["validation"]
    names = {"id2label": data.id2label, "label2id": {name: index for index, name in data.id2label.items()}}
    words = "TimmDetectionModel is for object detection, but the data are for semantic.* say `--task object-detection`"
    with pytest.raises(UserError, match=words):
        experiment.evaluate_model(tiny.tiny_detector(**names), tiny.config(tmp_path), data)
    with pytest.raises(
        UserError, match="TimmSegmentationModel is for semantic segmentation, but the data are for object"
    ):
        experiment.evaluate_model(tiny.tiny_timm(), tiny.config(tmp_path), tiny.boxes()["validation"])


@pytest.mark.parametrize("second", [["--student", "runs/y"], ["--student=runs/y"]])
def test_two_models_are_refused(second: list[str]) -> None:
    with pytest.raises(UserError, match="the model is named twice: runs/x, and by --student"):
        main(["runs/x", *second])
