"""Every task keeps the seam: samples, batches, targets, predictions and scores of its kind fit together."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from hf_bcd.adapters import adapt, image_processor
from hf_bcd.tasks import TASKS, Task, task_of
from hf_bcd.training.evaluation import evaluate, predict_batch, with_transform


DATA = {
    "semantic-segmentation": lambda: tiny.scenes(train=3, validation=3),
    "object-detection": lambda: tiny.boxes(train=3, validation=3),
    "instance-segmentation": lambda: tiny.instances(train=3, validation=3),
}
MODELS = {
    "semantic-segmentation": tiny.tiny_timm,
    "object-detection": tiny.tiny_detector,
    "instance-segmentation": lambda: tiny.tiny_detector("mask_rcnn"),
}
OPTIONS = {
    "semantic-segmentation": {}, "object-detection": {"image_size": 48}, "instance-segmentation": {"image_size": 48},
}  # fmt: skip
# by how much a divisor twice as large lowers the loss; detectors count what they divide by themselves
LOWERED = {"semantic-segmentation": 2, "object-detection": 1, "instance-segmentation": 1}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def test_data_sets_name_their_task(task: Task) -> None:
    data = DATA[task.name]()
    assert all(task_of(split) is task for split in data.values())
    assert task_of(data["train"].with_transform(lambda sample: sample)) is task
    assert task_of(object()) is TASKS["semantic-segmentation"]


def test_an_evaluation_gives_every_score_and_tables_show_it(task: Task, tmp_path: Any) -> None:
    data, model = DATA[task.name](), adapt(MODELS[task.name]())
    found = evaluate(model, data["validation"], tiny.config(tmp_path, **OPTIONS[task.name]))
    keys = [score.key for score in task.scores]
    assert len(set(keys)) == len(keys) and {*keys, task.per_class.key} <= found.keys()
    assert task.scores[0] in task.headline and found["num_samples"] == 3
    score = task.scores[0]
    assert score.text(0.5) == ("50.00" if score.percent else "0.50")
    assert score.label.endswith("(%)") is score.percent


def test_a_training_batch_has_targets_and_a_divisor(task: Task, tmp_path: Any) -> None:
    data = DATA[task.name]()["train"]
    samples = with_transform(data, task.train_transform(tiny.config(tmp_path, **OPTIONS[task.name])), 0)
    batch = task.collate([samples[index] for index in range(2)])
    targets = task.targets(batch, data.num_labels)
    assert targets.num_labels == data.num_labels and targets.size == batch["pixel_values"].shape[-2:]
    assert targets.valid((5, 7)).shape == (2, 5, 7) and targets.class_masks((5, 7)).shape[:2] == (2, data.num_labels)
    divisor = task.denominator(targets)
    assert divisor.ndim == 0 and divisor > 0
    student = adapt(MODELS[task.name]()).eval()
    losses = []
    for factor in (1, 2):
        student.begin_step(0, 1)
        output = student(batch["pixel_values"], task.with_denominator(targets, factor * divisor))
        losses.append(output.task_losses["loss_task"])
    torch.testing.assert_close(losses[0], LOWERED[task.name] * losses[1])


def test_predictions_are_drawn(task: Task, tmp_path: Any) -> None:
    data, model = DATA[task.name]()["validation"], adapt(MODELS[task.name]()).eval()
    shown = with_transform(data, task.eval_transform(image_processor(model, shortest_edge=None)), 0)
    (prediction,) = predict_batch(model, task, task.collate([shown[0]]))
    picture = task.picture(shown[0], prediction, data.num_labels)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    task.comparison(
        [{**data[0], "predictions": {"student": prediction}}], data.id2label, tmp_path / "a.png", ["student"]
    )
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_no_line_stands_twice_in_the_code_of_a_card(task: Task) -> None:
    for snippet in task.snippets:
        imports = [line for line in snippet.splitlines() if line.startswith(("import ", "from "))]
        assert len(imports) == len(set(imports))
