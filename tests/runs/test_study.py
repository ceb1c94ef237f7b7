"""Studies: what a file describes, what is run once and what again, and the arithmetic of the report."""

import csv
import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import yaml

from hf_bcd.commands import study as command
from hf_bcd.runs import baseline
from hf_bcd.runs import study_running as module
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.study import Run, Study, read_study
from hf_bcd.runs.study_report import collect, mean_and_deviation, paired_difference, score_table, write_study_report
from hf_bcd.runs.study_running import evaluation_curve, run_study
from hf_bcd.tasks import TASKS


RECIPE: dict[str, Any] = {
    "dataset_name": "synthetic",
    "dataset_options": {"size": [48, 64], "num_images": {"train": 8, "validation": 2, "test": 3}},
    "student": {
        "backbone": "resnet10t",
        "options": {"head_channels": 8, "backbone_kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}},
    },
    "losses": {"kd": {}},
    "max_steps": 4,
    "logging_steps": 2,
    "eval_steps": 2,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "crop_size": 48,
    "dataloader_num_workers": 0,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def write_study(folder: Path, **changes: Any) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    keys = {"seeds": [1, 2], "runs": {"baseline": {"teacher": None}, "kd": None}} | changes
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": "recipe.yaml", "output_dir": str(folder / "out"), **keys}))
    return path


def test_a_run_reads_the_store_of_more_teachers_if_that_has_all_it_reads(tmp_path: Path) -> None:
    bcd = {"bcd": {"channels": 16}}
    runs: dict[str, Any] = {
        "baseline": {"teacher": None},
        "both": {"teacher": ["me/a", "me/b"], "losses": {"a": {"cwd": {}}, "b": bcd}},
        "a": {"teacher": "me/a", "losses": {"kd": {}}},
        "b": {"teacher": "me/b", "losses": {"bcd": {"channels": 16, "weight": {"boundary": 2}}}},
        "wider": {"teacher": "me/b", "losses": {"bcd": {"channels": 32}}},
        "other_views": {"teacher": "me/a", "losses": {"kd": {}}, "crop_size": 32},
        "live": {"teacher": "me/a", "losses": {"kd": {}}, "reinforce": None},
    }
    study = read_study(write_study(tmp_path, runs=runs, seeds=[1], reinforce={"views": 2}))
    shared, found = module.Shared(study), {}
    for run in study.runs:
        args, _, config = module.build_arguments(run.arguments)
        if run.reinforce is not None:
            groups = shared._groups(run, module.live_teachers(args, config))
            found[run.name] = {name: [list(one) for one in losses] for name, (_, _, losses) in groups.items()}
    both = {"a": [["kd"], ["cwd"]], "b": [["bcd"], ["bcd"]]}
    assert found == {
        "both": both, "a": both, "b": both, "wider": {"": [["bcd"]]}, "other_views": {"": [["kd"]]},
    }  # fmt: skip


BCD_16 = {"bcd": {"channels": 16}}


@pytest.mark.parametrize(
    ("losses", "changes", "served"),
    [
        ([{"cwd": {}}, BCD_16], {}, True),
        ([BCD_16], {}, True),
        ([{"dist": {}}, {"kd": {"weight": 3}, "bpkd": {}}], {}, True),  # of scores, which are there for cwd
        ([{"bcd": {"channels": 16, "weight": {"boundary": 2}}}], {}, True),
        ([{"bcd": {"channels": 32}}], {}, False),
        ([{"fitnet": {}}], {}, False),
        ([BCD_16], {"shown": {"views": 4}}, False),
        ([BCD_16], {"teacher": "me/b"}, False),
    ],
)
def test_a_new_method_needs_a_new_store_only_if_it_reads_more(
    losses: list[dict[str, Any]], changes: dict[str, Any], served: bool, tmp_path: Path
) -> None:
    def made_for(losses: list[dict[str, Any]], teacher: str = "me/a", shown: Any = None) -> dict[str, Any]:
        return {"teachers": {"": {"teacher": teacher, "losses": losses}}, "shown": shown or {"views": 2}}

    (tmp_path / "made_for.json").write_text(json.dumps(made_for([{"cwd": {}}, BCD_16])))
    assert module.serves(tmp_path / "made_for.json", made_for(losses, **changes)) == served


def test_a_study_is_a_recipe_its_variations_and_seeds(tmp_path: Path) -> None:
    path = write_study(tmp_path, runs={"a": {"max_steps": 3}, "b": {"losses": {"cwd": {}}}}, reference="b")
    study = read_study(path)
    assert (study.name, study.folder, study.split) == ("grid", tmp_path / "out", None)
    assert {run.reference for run in study.runs} == {"b"}
    assert [(run.name, run.seed) for run in study.runs] == [("b", 1), ("a", 1), ("b", 2), ("a", 2)]
    assert len({run.folder for run in study.runs}) == 4
    steps = {run.name: run.arguments["max_steps"] for run in study.runs}
    losses = {run.name: run.arguments["losses"] for run in study.runs}
    assert steps == {"a": 3, "b": 4} and losses == {"a": {"kd": {}}, "b": {"cwd": {}}}
    assert {run.arguments["max_steps"] for run in read_study(path, argv=["--max_steps", "9"]).runs} == {9}
    assert read_study(path, tmp_path / "elsewhere").runs[0].folder.is_relative_to(tmp_path / "elsewhere")


@pytest.mark.parametrize("argv", [["--teacher.weights", "w"], ["--teacher", "some/model"]])
def test_the_command_line_gives_a_baseline_no_teacher(argv: list[str], tmp_path: Path) -> None:
    path = write_study(tmp_path, runs={"baseline": {"teacher": None}, "kd": {"teacher": {"backbone": "a"}}})
    teachers = {run.name: run.arguments["teacher"] for run in read_study(path, argv=argv).runs}
    kd = {"backbone": "a", "weights": "w"} if argv[0] == "--teacher.weights" else "some/model"
    assert teachers == {"baseline": None, "kd": kd}


def test_a_run_may_have_a_reference_of_its_own(tmp_path: Path) -> None:
    runs = {"a": None, "a_kd": {"max_steps": 3}, "b_kd": {"max_steps": 5, "reference": "b"}, "b": {"max_steps": 2}}
    study = read_study(write_study(tmp_path, runs=runs, seeds=[1]))
    assert [(run.name, run.reference) for run in study.runs] == [("a", "a"), ("b", "a"), ("a_kd", "a"), ("b_kd", "b")]
    assert all("reference" not in run.arguments for run in study.runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {}}, "runs is {}"),
        ({"runs": ["a"]}, r"runs is \['a'\]"),
        ({"seeds": []}, r"seeds is \[\]"),
        ({"seeds": [1, "2"]}, "expected a list of integers"),
        ({"seeds": [True]}, "expected a list of integers"),
        ({"seeds": [3, 3]}, "not distinct"),
        ({"reference": "none"}, "reference is 'none'; choose one of baseline, kd"),
        ({"runs": {"a": {"max_step": 3}}}, "run 'a' has the unknown key 'max_step'"),
        ({"runs": {"a": {}, "b": {"losses": {"kdd": {}}}}}, "run 'b': unknown loss 'kdd'. Did you mean 'kd'"),
        ({"sedes": [1]}, "unknown key 'sedes'. Did you mean 'seeds'"),
    ],
)
def test_bad_studies_are_explained(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_study(write_study(tmp_path, **changes))


def test_runs_that_the_command_line_makes_the_same_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_study(tmp_path, runs={"cwd": {"losses": {"cwd": {}}}, "bcd": {"losses": {"bcd": {}}}})
    read_study(path)
    assert not caplog.messages
    read_study(path, argv=["--losses", "{kd: {}}"])
    assert "are the same; the command line wins over what sets them apart" in caplog.text


def test_what_the_message_after_an_interruption_says_continues_a_study(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    assert read_study(path, argv=["--resume_from_checkpoint", "true"]) == read_study(path)


@pytest.mark.parametrize("arguments", [["--seed", "3"], ["--part", "0/2"], ["--part", "3/2"], ["--part", "two"]])
def test_bad_command_lines_are_explained(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed belongs into|expected i/n"):
        command.main([str(write_study(tmp_path)), *arguments])


def test_differences_are_paired_by_seed() -> None:
    # differences 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7; t(2) = 4.303
    mean, half = paired_difference({1: 11, 2: 22, 3: 36, 9: 0}, {1: 10, 2: 20, 3: 30, 4: 0}) or (0, None)
    assert mean == pytest.approx(3) and half == pytest.approx(4.303 * math.sqrt(7 / 3))
    assert paired_difference({1: 2.5}, {1: 2}) == (0.5, None)
    assert paired_difference({1: 2.5}, {2: 2}) is None
    assert mean_and_deviation([1, 2, 6]) == (3, statistics.stdev([1, 2, 6])) and mean_and_deviation([5]) == (5, None)


def test_intervals_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy computes Student's t")
    for count in (2, 5, 16, 17, 40):
        values = {seed: math.sin(seed) for seed in range(count)}
        mean, half = paired_difference(values, dict.fromkeys(values, 0.0)) or (0, None)
        low, high = stats.t.interval(
            0.95, count - 1, loc=statistics.fmean(values.values()), scale=stats.sem(list(values.values()))
        )
        assert half is not None and (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3, abs=2e-3)


@pytest.mark.parametrize(("teachers", "alone", "told"), [
    ({"teacher": 0.34}, {"mean_iou": 0.38}, r"teacher's mIoU \(34.00\) does not exceed that of plain \(38.00\)"),
    ({"teacher": 0.34, "teacher_2": 0.4}, {"mean_iou": 0.38}, None),
    ({}, {"mean_iou": 0.38}, None),
    ({"teacher": 0.34}, {}, None),
])  # fmt: skip
def test_a_teacher_behind_the_student_alone_is_named(teachers: dict, alone: dict, told: str | None) -> None:
    scores = {role: {"mean_iou": value} for role, value in teachers.items()}
    found = module.behind(scores, alone, "plain", TASKS["semantic-segmentation"].scores[0])
    assert found is None if told is None else re.search(told, found or "")


def test_curves_take_the_seconds_of_the_log_before() -> None:
    history = [
        {"step": 2, "loss": 1.0, "train_seconds": 5.0},
        {"step": 2, "eval_mean_iou": 0.25},
        {"step": 4, "loss": 0.5, "train_seconds": 9.0},
        {"step": 4, "eval_mean_iou": 0.5},
        {"step": 4, "train_loss": 0.75},
    ]
    assert evaluation_curve(history, "mean_iou") == [
        {"step": 2, "seconds": 5.0, "mean_iou": 0.25},
        {"step": 4, "seconds": 9.0, "mean_iou": 0.5},
    ]


def finished(
    folder: Path,
    name: str,
    seed: int,
    scores: dict[str, float],
    teacher: dict | None = None,
    arguments: dict | None = None,
) -> Run:
    run = Run(name, seed, "plain", folder / name / f"seed_{seed}", arguments or {"seed": seed})
    run.folder.mkdir(parents=True)
    columns = ("overall_accuracy", "boundary_f@3", "boundary_iou", "completeness", "connectivity")
    values = dict.fromkeys(columns, 0.5) | {"fragments": 1.25} | scores
    result = {"arguments": run.arguments, "split": "test", "images": 3, "scores": values, "teacher": teacher}
    result |= {"steps": 4, "train_seconds": 90.0, "curve": []}
    (run.folder / "study.json").write_text(json.dumps(result))
    return run


def test_the_table_has_means_spreads_and_paired_differences(tmp_path: Path) -> None:
    teacher = dict.fromkeys(("mean_iou", "overall_accuracy", "boundary_f@3", "boundary_iou"), 0.75)
    teacher |= {"completeness": 0.75, "connectivity": 0.75, "fragments": 0.5}
    runs = [
        finished(tmp_path, "plain", 1, {"mean_iou": 0.25, "connectivity": 0.5}),
        finished(tmp_path, "plain", 2, {"mean_iou": 0.35}),
        finished(tmp_path, "kd", 1, {"mean_iou": 0.27, "connectivity": 0.6}, teacher),
        finished(tmp_path, "kd", 2, {"mean_iou": 0.33}, teacher),
        Run("kd", 3, "plain", tmp_path / "kd" / "seed_3", {}),
    ]
    study = Study("grid", tmp_path, None, runs)
    lines = [line for line in write_study_report(study).splitlines() if line]
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert list(rows) == ["run", "---", "teacher", "plain", "kd", "difference", "kd − plain"]
    assert rows["teacher"][:2] == ["", "75.00"] and rows["plain"][:2] == ["2", "30.00 ± 7.07"]
    # differences +2 and -2 points: mean 0, deviation 2.83, half an interval 12.706 · 2.83 / √2 = 25.41
    assert rows["kd"][1] == "30.00 ± 4.24" and rows["kd"][-1] == "1.5"
    assert rows["kd − plain"][:2] == ["2", "+0.00 [-25.41, +25.41]"]
    column = rows["difference"].index("connectivity")
    # +10 and 0 points: mean 5, half an interval 12.706 · 7.07 / √2 = 63.53
    assert rows["kd − plain"][column] == "+5.00 [-58.53, +68.53]"
    with (tmp_path / "results.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], float(row["mean_iou"])) for row in found] == [
        ("plain", "1", 0.25),
        ("plain", "2", 0.35),
        ("kd", "1", 0.27),
        ("kd", "2", 0.33),
    ]
    assert "4 of 5 runs" in (tmp_path / "results.md").read_text() and (tmp_path / "results.png").stat().st_size > 5000
    assert not (tmp_path / "curves.png").exists()


def test_a_report_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run of the study"):
        write_study_report(Study("grid", tmp_path, None, [Run("a", 1, "a", tmp_path / "a", {})]))


def test_a_finished_run_of_another_recipe_is_no_result(tmp_path: Path) -> None:
    run = finished(tmp_path, "a", 1, {"mean_iou": 0.5})
    changed = Run("a", 1, "a", run.folder, {"seed": 1, "max_steps": 9})
    with pytest.raises(ValueError, match="max_steps None, where the study says 9"):
        changed.result()


def test_a_finished_run_is_one_wherever_it_lies_and_whatever_it_showed(tmp_path: Path) -> None:
    given = {"seed": 1, "output_dir": "/runs/there/a/seed_1", "disable_tqdm": True, "report_to": "none"}
    run = finished(tmp_path, "a", 1, {"mean_iou": 0.5}, arguments=given)
    moved = Run("a", 1, "a", run.folder, {"seed": 1, "output_dir": str(run.folder)})
    assert moved.result()["scores"]["mean_iou"] == 0.5


@pytest.mark.slow
def test_a_study_trains_each_run_once_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.tiny_timm().save_pretrained(tmp_path / "teacher")
    path = write_study(
        tmp_path, seeds=[1], runs={"baseline": {"teacher": None}, "kd": {"teacher": str(tmp_path / "teacher")}}
    )
    study = read_study(path)
    assert run_study(study, (2, 2)) == []  # the second half first: its reference is not there yet
    assert [list(seeds) for seeds in collect(study).values()] == [[1]]
    command.main([str(path)])
    results = collect(study)
    assert list(results) == ["baseline", "kd"]
    for name, seeds in results.items():
        assert seeds[1]["steps"] == 4 and seeds[1]["images"] == 3 and 0 < seeds[1]["scores"]["mean_iou"] < 1
        assert [point["step"] for point in seeds[1]["curve"]] == [2, 4] and seeds[1]["train_seconds"] > 0
        assert (seeds[1]["teacher"] is None) == (name == "baseline")
    assert (study.folder / "curves.png").stat().st_size > 5000
    drawn = study.folder / "methods.png"
    assert drawn.stat().st_size > 5000 and "(methods.png)" in (study.folder / "results.md").read_text()
    written = drawn.stat().st_mtime_ns
    assert (study.runs[1].folder / "README.md").read_text().count("distil") > 1
    monkeypatch.setattr("hf_bcd.runs.study_running.train_model", lambda *_, **__: pytest.fail("trained again"))
    command.main([str(path)])
    assert drawn.stat().st_mtime_ns == written, "nothing is new"


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"teacher": None, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    path = write_study(tmp_path, runs={"first": first, "second": {"teacher": None, "max_steps": 2}}, seeds=[1])
    written = module.write_report

    def dies(trainer: Any, *args: Any) -> None:
        if trainer.args.max_steps == 3:
            raise OSError("no space left on the disk")
        written(trainer, *args)

    monkeypatch.setattr(module, "write_report", dies)
    with pytest.raises(SystemExit, match=r"1 runs failed.*\nfirst, seed 1: no space left on the disk"):
        command.main([str(path)])
    assert "second" in capsys.readouterr().out
    monkeypatch.setattr(module, "write_report", written)
    monkeypatch.setattr("hf_bcd.BCDTrainer.training_step", lambda *_: pytest.fail("trained again"))
    command.main([str(path)])
    assert list(collect(read_study(path))) == ["first", "second"]
    assert "first" in score_table(collect(read_study(path)), TASKS["semantic-segmentation"])


def test_refused_runs_are_named_and_the_others_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors = {"refused": ValueError("no such teacher"), "broken": KeyError("lost")}
    runs = {name: {"max_steps": steps} for steps, name in enumerate((*errors, "foreign", "fine"), 2)}
    path = write_study(tmp_path, runs=runs, reference="fine", seeds=[1])

    def train(run: Run, shared: Any) -> None:
        if run.name in errors:
            raise errors[run.name]
        finished(tmp_path / "out", run.name, run.seed, {"mean_iou": 0.5}, arguments=run.arguments)

    monkeypatch.setattr(module, "train_run", train)
    finished(tmp_path / "out", "foreign", 1, {"mean_iou": 0.25})
    with pytest.raises(SystemExit) as end:
        command.main([str(path)])
    lines = str(end.value).splitlines()
    assert "3 runs failed" in lines[0] and [line.split(",")[0] for line in lines[1:]] == [
        "broken",
        "foreign",
        "refused",
    ]
    assert "holds a finished run" in lines[2] and "no such teacher" in lines[3]
    assert "| fine | 1 | 50.00" in capsys.readouterr().out
    assert caplog.text.count("Traceback") == 1, "that of the error that nobody expected"


TEACHERS = {
    name: ModelArguments(teacher={**RECIPE["student"], "head": name}, teacher_training={"max_steps": steps})
    for name, steps in (("fpn", 1), ("psp", 2))
}


class Named(str):
    """A teacher that has every class."""

    predicts = True

    def match(self, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(missing=[])


@pytest.fixture
def teachers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What `Shared.teacher` gives, each time in a study that starts anew; a model is its head, its score too."""
    config, study, data = tiny.config(tmp_path), Study("grid", tmp_path, None, []), tiny.scenes(4, 1, (32, 32))
    monkeypatch.setattr(module, "prepare_teacher", lambda args, own, data: Named(args.teacher["head"]))
    monkeypatch.setattr(module, "evaluate_model", lambda model, config, data, synonyms: {data.split: model})
    return lambda head, split="test", **changes: module.Shared(study).teacher(
        TEACHERS[head], dataclasses.replace(config, **changes), data, split
    )


def test_every_teacher_has_its_own_scores_in_whatever_order(teachers_alone, tmp_path: Path) -> None:
    for head in ("fpn", "psp", "psp", "fpn"):
        assert teachers_alone(head) == (head, {"test": head})
    assert teachers_alone("psp", split="validation") == ("psp", {"validation": "psp"})
    folders = sorted((tmp_path / "teachers").iterdir())
    assert len(folders) == 2 and sorted(len(list(folder.glob("scores-*.json"))) for folder in folders) == [1, 2]
    teachers_alone("fpn", seed=7, output_dir=str(tmp_path / "elsewhere"), losses={"kd": {}})  # a run's own
    assert sorted((tmp_path / "teachers").iterdir()) == folders
    teachers_alone("fpn", learning_rate=1.0)  # decides what a teacher that is trained here becomes
    assert len(list((tmp_path / "teachers").iterdir())) == 3


def test_scores_of_another_teacher_are_refused(teachers_alone, tmp_path: Path) -> None:
    teachers_alone("fpn")
    (path,) = tmp_path.glob("teachers/*/scores-*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": {"model.head": "psp"}}))
    with pytest.raises(ValueError, match="holds the scores of another teacher or split; remove it"):
        teachers_alone("fpn")


def test_a_finished_teacher_is_known_by_its_files(tmp_path: Path) -> None:
    args, config, data = (
        ModelArguments(teacher=str(tmp_path / "t")),
        tiny.config(tmp_path),
        tiny.scenes(2, 1, (32, 32)),
    )
    keys = []
    for seed in (0, 0, 1):
        tiny.tiny_timm(seed=seed).save_pretrained(tmp_path / "t")
        (tmp_path / "t" / "results.json").write_text(str(len(keys)))
        keys.append(module.digest(baseline.teacher_key(args, config, data)))
    assert keys[0] == keys[1] != keys[2]


def test_two_processes_do_not_train_one_teacher_at_once(
    teachers_alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most = [], []

    def prepare(args: ModelArguments, own: Any, data: Any) -> str:
        inside.append(own.output_dir)
        most.append(len(inside))
        time.sleep(0.2)
        inside.remove(own.output_dir)
        return Named(args.teacher["head"])

    monkeypatch.setattr(module, "prepare_teacher", prepare)
    with ThreadPoolExecutor(3) as pool:  # each opens the lock file for itself, as processes do
        assert list(pool.map(teachers_alone, ["fpn"] * 3)) == [("fpn", {"test": "fpn"})] * 3
    assert most == [1, 1, 1]


def test_a_lock_that_a_dead_process_left_is_free(tmp_path: Path) -> None:
    hold = "import os, sys; from huggingface_hub.utils import WeakFileLock as L; l = L(sys.argv[1]); l.__enter__(); os._exit(1)"
    subprocess.run([sys.executable, "-c", hold, tmp_path / "lock"], check=False)
    assert (tmp_path / "lock").exists()
    with module.alone_in(tmp_path, tiny.config(tmp_path)):
        pass
