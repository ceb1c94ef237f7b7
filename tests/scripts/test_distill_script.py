"""The scripts as a user starts them, and whole runs of the command behind them."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import exit_code
from safetensors.torch import load_file

from hf_bcd import BCDTrainer
from hf_bcd.commands import distill, run


ROOT = Path(__file__).parent.parent.parent
DISTILL, EVALUATE = ROOT / "scripts" / "distill.py", ROOT / "scripts" / "evaluate.py"
RECIPES = ROOT / "examples" / "recipes"
DEMO = RECIPES / "synthetic" / "resnet18_to_resnet10.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
TINY = [
    "--dataset_options.size", "[48, 64]",
    "--dataset_options.num_images", "{train: 8, validation: 2, test: 3}",
    "--teacher.options", "{head_channels: 8, backbone_kwargs: {channels: [8, 16, 16, 32]}}",
    "--student.options", "{head_channels: 8, backbone_kwargs: {channels: [8, 8, 16, 16], stem_width: 8}}",
    "--crop_size", "48", "--per_device_train_batch_size", "2", "--calibration_images", "4",
    "--dataloader_num_workers", "0",
]  # fmt: skip

DETECTION = [
    *TINY[:4], "--image_size", "48", "--train_shortest", "32", "48", "--per_device_train_batch_size", "2",
    "--calibration_images", "4", "--teacher_training.max_steps", "2", "--max_steps", "6", "--warmup_steps", "1",
    "--with_baseline", "false", "--ema_decay", "0.9", "--losses", "{bcd: {}, ld: {}}", "--color_jitter", "0.4",
    "--report_to", "none",
]  # fmt: skip

pytestmark = pytest.mark.slow


def start(*command: object, code: int = 0) -> subprocess.CompletedProcess:
    """Runs a command line in a process of its own."""
    done = subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stdout[-1500:] + done.stderr[-3000:]
    return done


def distil(output_dir: Path, *options: object) -> None:
    """Runs `hf-bcd distill` in this process."""
    distill.main(["--output_dir", str(output_dir), *map(str, options), "--use_cpu", "true"])


def student_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_students(*folders: Path) -> None:
    first, second = map(student_of, folders)
    assert all((first[name] == second[name]).all() for name in second)


ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo, shortened, started as the README says; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    options = ["--output_dir", folder, "--max_steps", 3, "--teacher_training.max_steps", 2, "--logging_steps", 1]
    return folder, start(*ACCELERATE, "--num_processes", "1", DISTILL, *options, *TINY).stdout


def test_the_demo_leaves_a_complete_folder_and_a_table(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md", "results.json"):
        assert (folder / name).stat().st_size > 0, name
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "comparison.png",
        "boundaries.png",
        "relations.png",
    }
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() == {"teacher", "baseline", "student", "protocol"}
    metrics = {
        "mean_iou", "mean_accuracy", "overall_accuracy", "per_class_iou", "classes_averaged", "boundary_f@1",
        "boundary_f@3", "boundary_f@5", "boundary_iou", "completeness", "connectivity", "fragments", "missed",
    }  # fmt: skip
    for name in ("teacher", "baseline", "student"):
        assert results[name].keys() == metrics
        assert f"{100 * results[name]['mean_iou']:.2f}" in printed
    assert results["protocol"]["split"] == "test" and results["protocol"]["num_images"] == 3
    assert f'pipeline("image-segmentation", "{folder}")' in printed
    assert "teacher" not in student_of(folder)
    card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert card["pipeline_tag"] == "image-segmentation" and "knowledge-distillation" in card["tags"]
    events = [path for path in folder.rglob("events.out.tfevents*") if path.parent.parent.parent == folder]
    assert events, "no TensorBoard log of the student"


def test_the_printed_lines_load_the_student(demo: tuple[Path, str], tmp_path: Path) -> None:
    _, printed = demo
    *imports, call = printed[printed.index("import hf_bcd") :].strip().splitlines()[:3]
    picture = tmp_path / "picture.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(picture)
    scope: dict[str, Any] = {}
    exec("\n".join([*imports, f"found = {call.replace('picture.jpg', str(picture))}"]), scope)
    assert scope["found"] and all(segment["mask"].size == (70, 50) for segment in scope["found"])


def test_evaluate_repeats_the_runs_numbers(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = demo
    data = ["--dataset_name", "synthetic", *TINY[:4]]
    start(sys.executable, EVALUATE, "--student", folder, *data, "--output_dir", tmp_path, "--report_to", "none")
    scores = json.loads((tmp_path / "evaluation.json").read_text())["scores"]
    expected = json.loads((folder / "results.json").read_text())["student"]
    assert scores["mean_iou"] == expected["mean_iou"]


def killed(folder: Path, options: list[object], number: int = signal.SIGKILL) -> None:
    """Distils until a signal, 9 unless told, reaches the process in the fourth step."""
    step, steps = BCDTrainer.training_step, itertools.count(1)

    def training_step(self: BCDTrainer, *args: Any) -> torch.Tensor:
        if self.teacher is not None and next(steps) == 4:
            os.kill(os.getpid(), number)
        return step(self, *args)

    BCDTrainer.training_step = training_step
    run(lambda: distil(folder, *options))


def test_a_killed_run_resumes_to_the_same_student(tmp_path: Path) -> None:
    options = ["--config", DEMO, *TINY, "--teacher_training.max_steps", 1, "--max_steps", 6, "--report_to", "none"]
    options += ["--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 3]
    options += ["--with_baseline", "false", "--dataloader_num_workers", 2]
    assert exit_code(killed, tmp_path / "killed", options) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    checkpoint = tmp_path / "killed" / "checkpoint-2" / "model.safetensors"
    written = checkpoint.stat().st_mtime_ns
    distil(tmp_path / "killed", *options, "--resume_from_checkpoint", "true")
    assert checkpoint.stat().st_mtime_ns == written, "it began anew"
    distil(tmp_path / "whole", *options)
    assert_same_students(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_stopped_detector_resumes_to_the_same_student(number: int, tmp_path: Path) -> None:
    """With all that a detector's run remembers: sides that are drawn, the average of the weights, two losses, workers."""
    options = ["--config", RECIPES / "synthetic" / "gfl_resnet18_to_gfl_resnet10.yaml", *DETECTION]
    options += ["--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 3, "--dataloader_num_workers", 2]
    assert exit_code(killed, tmp_path / "killed", options, number) == (130 if number == signal.SIGINT else -number)
    last = tmp_path / "killed" / ("checkpoint-4" if number == signal.SIGINT else "checkpoint-2")
    assert last.is_dir() and not (tmp_path / "killed" / "model.safetensors").exists()
    written = (last / "model.safetensors").stat().st_mtime_ns
    distil(tmp_path / "killed", *options, "--resume_from_checkpoint", "true")
    assert (last / "model.safetensors").stat().st_mtime_ns == written, "it began anew"
    distil(tmp_path / "whole", *options)
    assert_same_students(tmp_path / "killed", tmp_path / "whole")


def test_a_command_that_died_after_a_last_step_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With teacher and baseline before their recipe is written, in the final evaluation and in the report."""
    died, whole = tmp_path / "died", tmp_path / "whole"
    options = ["--config", DEMO, *TINY, "--report_to", "none", "--losses", "{kd: {}}", "--max_steps", 3]
    options += ["--teacher_training.max_steps", 2, "--save_strategy", "steps", "--save_steps", 2]
    distil(whole, *options)
    options += ["--resume_from_checkpoint", "true"]
    deaths = [("runs.baseline.write_json", 1), ("runs.baseline.write_json", 2)]
    deaths += [("commands.distill.evaluate_model", 2), ("commands.distill.write_report", 1)]
    for name, call in deaths:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
            module, _, function = name.rpartition(".")
            module = importlib.import_module(f"hf_bcd.{module}")
            calls, original = itertools.count(1), getattr(module, function)

            def dies(*args, call=call, calls=calls, original=original, **kwargs):
                if next(calls) == call:
                    raise OSError("the disk is full")
                return original(*args, **kwargs)

            patch.setattr(module, function, dies)
            distil(died, *options)
        assert not (died / "results.json").exists()
    monkeypatch.setattr("hf_bcd.BCDTrainer.training_step", lambda *_: pytest.fail("trained again"))
    for _ in range(2):  # the second time it is a finished command that is repeated
        distil(died, *options)
        assert_same_students(died, whole)
        found, expected = (json.loads((folder / "results.json").read_text()) for folder in (died, whole))
        assert all(found[name] == expected[name] for name in ("teacher", "baseline", "student"))


def test_any_method_is_named_on_the_command_line_over_a_recipe_that_starts_from_another(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {os.path.relpath(DEMO, tmp_path)}\nwith_baseline: false\nlosses: {{kd: {{}}}}\n")
    options = [*TINY, "--max_steps", 2, "--teacher_training.max_steps", 1, "--report_to", "none"]
    losses = '{"cwd": {"weight": 3, "temperature": 5}}'
    distil(tmp_path / "run", "--config", recipe, *options, "--losses", losses)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- loss: supervised loss + 3 · cwd/cwd\n" in card and "- options of cwd: temperature = 5\n" in card
    whole = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert whole["losses"] == {"cwd": {"weight": 3, "temperature": 5}} and whole["dataset_name"] == "synthetic"
    assert whole["with_baseline"] is False and "base" not in whole and str(tmp_path) not in card
    assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} == {"comparison.png"}


def test_the_two_process_configuration_starts_two_processes(tmp_path: Path) -> None:
    """Silent failure 3: `--cpu --num_processes 2` would run one."""
    config = ROOT / "examples" / "accelerate_configs" / "cpu_x2.yaml"
    options = [*TINY, "--teacher_training.max_steps", 1, "--max_steps", 2, "--with_baseline", "false"]
    bare = ("env", "-u", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES=")  # accelerate itself does not set the former
    done = start(*bare, *ACCELERATE, "--config_file", config, DISTILL, "--output_dir", tmp_path, *options)
    assert "- processes: 2" in (tmp_path / "README.md").read_text()
    assert done.stdout.count("mIoU") == 1, "only the first process prints"


def test_real_photographs_from_a_local_folder(shared_data: Path, tmp_path: Path) -> None:
    weights = shared_data / "weights" / "mobilenetv2_100.tf_in1k.timm.safetensors"
    distil(
        tmp_path, "--config", RECIPES / "camvid" / "mobilenetv2_deeplabv3plus_to_mobilenetv2_fpn.yaml",
        "--data_dir", shared_data / "camvid", "--student.weights", weights, "--teacher.weights", weights,
        "--max_steps", 1, "--teacher_training.max_steps", 1, "--crop_size", 64, "--image_size", 90,
        "--per_device_train_batch_size", 2, "--calibration_images", 4, "--max_eval_samples", 2, "--eval_strategy", "no",
        "--report_to", "none", "--dataloader_num_workers", 0,
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["protocol"]["dataset"] == "camvid" and results["protocol"]["num_labels"] == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_name", "synthetic"], "no student: give --student"),
        (["--student", "{backbone: resnet18}"], "no data: give --dataset_name"),
        (["--student", "{backbone: resnet1}", "--dataset_name", "synthetic"], "not an architecture of timm"),
        (["--data_dir", "/missing/folder", "--student", "{backbone: resnet18}"], "/missing/folder"),
    ],
)
def test_mistakes_end_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        run(lambda: distil(tmp_path, *options))
    assert str(end.value).startswith("error: ") and message in str(end.value) and "\n" not in str(end.value)
