"""What the doctor says follows from a run's numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_bcd.runs.doctor import diagnose
from hf_bcd.utils.messages import UserError


def run_folder(folder: Path, scores: dict[str, float], history: Any = (), teaching: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({role: {"mean_iou": value} for role, value in scores.items()}))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": list(history)}))
    if teaching is not None:
        (folder / "teaching.json").write_text(json.dumps(teaching))
    return folder


def said(*args: Any, **kwargs: Any) -> str:
    return "\n".join(diagnose(run_folder(*args, **kwargs)))


def test_a_teacher_below_the_student_has_nothing_to_teach(tmp_path: Path) -> None:
    text = said(tmp_path, {"teacher": 0.40, "baseline": 0.42, "student": 0.41})
    assert "teacher 40.00, baseline 42.00, student 41.00" in text
    assert "2.00 points below the student alone: it has nothing to teach here" in text


def test_the_lead_and_what_was_brought_of_it(tmp_path: Path) -> None:
    assert "leads the student alone by 10.00 points; distillation brought +4.00 of them" in said(
        tmp_path, {"teacher": 0.5, "baseline": 0.4, "student": 0.44}
    )
    assert "There is room, but it was not used" in said(tmp_path, {"teacher": 0.5, "baseline": 0.4, "student": 0.39})
    assert "Without a baseline" in said(tmp_path, {"teacher": 0.5, "student": 0.39})
    assert "no score here" in said(tmp_path, {"baseline": 0.5, "student": 0.39})


def test_a_run_without_a_teacher_is_told_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, {"student": 0.4})
    (folder / "recipe.yaml").write_text("dataset_name: synthetic\n")
    assert diagnose(folder) == [f"{folder}: no teacher took part, so there is nothing to look at."]
    (folder / "recipe.yaml").write_text("teacher_store: stores/x\n")
    assert "Without a baseline" in said(tmp_path, {"teacher": 0.5, "student": 0.4})


def test_the_best_of_several_teachers_leads(tmp_path: Path) -> None:
    text = said(tmp_path, {"teacher": 0.41, "teacher_2": 0.5, "baseline": 0.4, "student": 0.44})
    assert "teacher 41.00, teacher_2 50.00, baseline 40.00, student 44.00" in text
    assert "The best teacher leads the student alone by 10.00 points; distillation brought +4.00 of them" in text


def test_the_pull_of_each_term_is_the_mean_over_the_log(tmp_path: Path) -> None:
    history = [
        {"gradient/loss_task": 2.0, "gradient/bcd/context": 0.1, "gradient/cwd/cwd": 8.0, "gradient/kd/kd": 1.0},
        {"gradient/loss_task": 2.0, "gradient/bcd/context": 0.1, "gradient/cwd/cwd": 8.0, "gradient/kd/kd": 1.0},
        {"loss": 1.0},
    ]
    text = said(tmp_path, {"student": 0.4}, history)
    assert "bcd/context pulls 0.05 times as much as the task at the student's last stage, hardly anything" in text
    assert "cwd/cwd pulls 4.00 times as much as the task at the student's last stage, more than the task" in text
    assert "kd/kd pulls 0.50 times as much as the task at the student's last stage." in text
    assert "--log_gradients true does that, every --logging_steps steps" in said(tmp_path, {"student": 0.4})


def test_classes_that_the_teacher_does_not_know_are_named(tmp_path: Path) -> None:
    teaching = {
        "agreement": 0.8,
        "commonest": 0.3,
        "pictures": 16,
        "per_class": {"road": 0.95, "pole": 0.02, "train": None},
    }
    text = said(tmp_path, {"student": 0.4}, teaching=teaching)
    assert "agree with 80.0% of the labels; always answering the commonest class would with 30.0%" in text
    assert "hardly knows pole 2%:" in text
    assert "train" not in text.partition("hardly knows")[2]
    assert math.isfinite(teaching["agreement"])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished run: results.json is missing"):
        diagnose(tmp_path)
