"""What the numbers of a finished run say about whether distillation can help there."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..tasks import TASKS, Score
from ..training.alignment import TEACHING_FILE
from ..utils.files import numbers, read_json
from ..utils.messages import UserError
from .exporting import saved_recipe


PULL = "gradient/"
WEAK, STRONG = 0.1, 2.0  # of the task's gradient: what a term should have, see `log_gradients`
LOST = 0.2  # share of a class's pixels below which a teacher does not know it


def diagnose(folder: Path) -> list[str]:
    """Reads a run's folder: does the teacher know more than the student, do its terms pull, do its answers fit the labels.

    Raises:
        UserError: the folder holds no finished run.
    """
    if not (folder / "results.json").is_file():
        raise UserError(f"{folder} holds no finished run: results.json is missing.")
    results = numbers(read_json(folder / "results.json"))
    state = read_json(folder / "trainer_state.json") if (folder / "trainer_state.json").is_file() else {}
    teaching = numbers(read_json(folder / TEACHING_FILE)) if (folder / TEACHING_FILE).is_file() else {}
    asked = saved_recipe(str(folder))  # by the run; a folder from elsewhere has none
    if asked and not asked.get("teacher") and not asked.get("teacher_store"):
        return [f"{folder}: no teacher took part, so there is nothing to look at."]
    lines = [*_scores(results), *_gradients(state.get("log_history", [])), *_agreement(teaching)]
    return lines or [f"{folder}: no teacher took part, so there is nothing to look at."]


def first_score(results: Mapping[str, Any]) -> Score | None:
    """The first score of the task whose scores these are."""
    scores = [task.scores[0] for task in TASKS.values()]
    held: list[Mapping[str, Any]] = [values for values in results.values() if isinstance(values, Mapping)]
    return next((score for score in reversed(scores) if any(score.key in values for values in held)), None)


def _scores(results: Mapping[str, Any]) -> Iterator[str]:
    score = first_score(results)
    if score is None:
        return
    teachers = [role for role in results if role.startswith("teacher")]
    roles = [role for role in (*teachers, "baseline", "student") if role in results]
    found = {role: score.scale * results[role][score.key] for role in roles}
    if not found:
        return
    yield f"{score.title}: " + ", ".join(f"{role} {value:.2f}" for role, value in found.items()) + "."
    if not teachers:
        yield "The teacher has no score here (it lacks the classes, or was not scored), so its lead is not known."
        return
    if "baseline" not in found:
        yield "Without a baseline (--with_baseline true) nobody knows what the student would be alone."
        return
    lead, gain = max(found[role] for role in teachers) - found["baseline"], found["student"] - found["baseline"]
    teacher = "The teacher" if len(teachers) == 1 else "The best teacher"
    if lead <= 0:
        yield (
            f"{teacher} is {-lead:.2f} points below the student alone: it has nothing to teach here. Take a better one, or train "
            "this one longer."
        )
    else:
        yield f"{teacher} leads the student alone by {lead:.2f} points; distillation brought {gain:+.2f} of them."
        if gain <= 0:
            yield "There is room, but it was not used: look at the terms below, and try other losses (hf-bcd methods)."


def _gradients(history: list[Mapping[str, Any]]) -> Iterator[str]:
    terms: dict[str, list[float]] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith(PULL) and isinstance(value, int | float) and math.isfinite(value):
                terms.setdefault(key.removeprefix(PULL), []).append(value)
    means = {term: sum(values) / len(values) for term, values in terms.items()}
    if not (task := means.pop("loss_task", 0.0)):
        yield "How much each term pulls was not logged: --log_gradients true does that, every --logging_steps steps."
        return
    for term, mean in means.items():
        share = mean / task
        verdict = "hardly anything: raise its weight" if share < WEAK else "more than the task: lower its weight"
        told = f", {verdict}" if not WEAK <= share <= STRONG else ""
        yield f"{term} pulls {share:.2f} times as much as the task at the student's last stage{told}."


def _agreement(teaching: Mapping[str, Any]) -> Iterator[str]:
    if "agreement" not in teaching:
        return
    here, commonest = teaching["agreement"], teaching["commonest"]
    yield (
        f"On {teaching['pictures']} training pictures the teacher's classes agree with {here:.1%} of the labels; always answering the "
        f"commonest class would with {commonest:.1%}."
    )
    known = {name: value for name, value in teaching["per_class"].items() if math.isfinite(value)}
    if lost := [
        f"{name} {value:.0%}" for name, value in sorted(known.items(), key=lambda pair: pair[1]) if value < LOST
    ]:
        yield f"It hardly knows {', '.join(lost)}: for these, expect nothing of terms that compare classes."
