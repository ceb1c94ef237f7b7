"""Which pictures of a study are shown: those where the students gain most, and those where they lose most."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from hf_bcd.runs import study_figure
from hf_bcd.runs.study import Run, Study
from hf_bcd.tasks import TASKS


def test_the_most_helped_and_the_most_harmed_pictures_are_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Six pictures, of which a student has more and more right, and its reference always the same."""
    split = tiny.scenes(train=2, validation=6)["validation"]
    task, shown = TASKS["semantic-segmentation"], {}
    right = {"plain": [0.5] * 6, "kd": [0.5, 0.9, 0.1, 0.6, 0.4, 1.0]}
    runs = [Run(name, 1, "plain", tmp_path / name, {}) for name in right]

    class Student(torch.nn.Module):
        def __init__(self, folder: str) -> None:
            super().__init__()
            self.name = Path(folder).name

    def predict(model: Any, task: Any, batch: Any) -> list[Any]:
        (labels,), (index,) = batch["labels"], batch["index"].tolist()
        rows = int(right[model.name][index] * labels.shape[0])
        wrong = (labels.long() + 1) % split.num_labels
        wrong[:rows] = labels[:rows].long()
        return [wrong.where(labels != 255, 0)]

    monkeypatch.setattr(study_figure, "build_arguments", lambda given: (None, None, tiny.config(tmp_path)))
    monkeypatch.setattr(study_figure, "load_data", lambda args: {"validation": split})
    monkeypatch.setattr(study_figure, "load_adapter", lambda folder, task: Student(folder))
    monkeypatch.setattr(
        study_figure,
        "shown_to",
        lambda model, data, config: data.with_transform(
            lambda sample: {
                "pixel_values": torch.zeros(3, 8, 8),
                "labels": torch.from_numpy(np.asarray(sample["label"])),
            },
            seed=0,
        ),
    )
    monkeypatch.setattr(study_figure, "predict_batch", predict)
    monkeypatch.setattr(
        type(task),
        "comparison",
        lambda self, samples, names, path, errors: shown.update(samples=samples, errors=errors),
    )
    study_figure.draw_methods(Study("grid", tmp_path, None, runs), runs, tmp_path / "methods.png")
    pictures = [
        next(i for i in range(6) if np.array_equal(split[i]["label"], sample["label"])) for sample in shown["samples"]
    ]
    assert pictures == [5, 1, 4, 2] and shown["errors"] == ["plain", "kd"]
    assert all(list(sample["predictions"]) == ["plain", "kd"] for sample in shown["samples"])


def test_a_figure_that_fails_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    runs = [Run(name, 1, "a", tmp_path / name, {}) for name in ("a", "b")]
    study = Study("grid", tmp_path, None, runs)
    assert study_figure.write_methods_figure(study) is None and not caplog.text, "nothing is finished"
    for run in runs:
        run.folder.mkdir()
        (run.folder / "study.json").write_text("{}")
    monkeypatch.setattr(study_figure, "draw_methods", lambda *_: 1 / 0)
    assert study_figure.write_methods_figure(study) is None
    assert "no methods.png, because it failed: ZeroDivisionError" in caplog.text
