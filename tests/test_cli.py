"""How commands end: a user's mistake is one line, anything else keeps its traceback."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_bcd import commands
from hf_bcd.commands import COMMANDS, main, run
from hf_bcd.hub.errors import HubError
from hf_bcd.runs import launching
from hf_bcd.utils.messages import UserError


ROOT = Path(__file__).parent.parent


def failing(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize("error", [UserError("no student"), HubError("no student"), FloatingPointError("no student")])
def test_mistakes_are_one_line(error: Exception) -> None:
    with pytest.raises(SystemExit, match=r"^error: no student$"):
        run(failing(error))


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), OSError("disk full"), KeyError("x")])
def test_any_other_error_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(failing(error))


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(failing(KeyboardInterrupt("stopped at step 3")))
    assert ended.value.code == 130
    assert "stopped at step 3. Run the same command with --resume_from_checkpoint true" in capsys.readouterr().err


def test_an_interruption_without_a_checkpoint_does_not_say_to_go_on_from_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(failing(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted.\n"


def test_ctrl_c_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(commands, "import_module", lambda name: failing(KeyboardInterrupt())())
    with pytest.raises(SystemExit) as ended:
        commands.start("check")
    assert ended.value.code == 130 and capsys.readouterr().err == "\ninterrupted.\n"


def test_the_console_script_lists_its_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["hf-bcd"])
    main()
    assert list(COMMANDS) == re.findall(r"^  ([\w-]+)  ", capsys.readouterr().out, re.MULTILINE)
    modules = {path.stem.replace("_", "-") for path in Path(commands.__file__).parent.glob("[!_]*.py")}
    assert modules == set(COMMANDS)  # one that is listed and missing would be a traceback
    monkeypatch.setattr("sys.argv", ["hf-bcd", "distil"])
    with pytest.raises(SystemExit, match="no command 'distil'; choose one of distill"):
        main()


@pytest.mark.parametrize("written", [["--num_processes", "2"], ["--num-processes=2"]])
def test_a_command_in_several_processes_is_what_accelerate_launches(
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")  # restored after the test
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: 0)
    monkeypatch.setattr(launching, "launch_command", found.append)
    monkeypatch.setattr("sys.argv", ["hf-bcd", "study", "mine.yaml", *written, "--part", "1/2"])
    main()
    (args,) = found
    assert (args.num_processes, args.multi_gpu, args.module) == (2, True, True)
    assert [args.training_script, *args.training_script_args] == ["hf_bcd", "study", "mine.yaml", "--part", "1/2"]
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    ("number", "devices", "message"),
    [("0", 0, "at least 1"), ("two", 0, "at least 1"), ("", 0, "at least 1"), ("3", 2, r"has 2 GPU\(s\)")],
)
def test_a_wrong_number_of_processes_is_named(
    number: str, devices: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: devices)
    with pytest.raises(UserError, match=message):
        launching.launch("distill", [], number)


def test_a_launcher_starts_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="leave one of both out"):
        launching.launch("distill", [], "2")


@pytest.mark.slow
def test_two_processes_train_one_student_and_end_as_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_bcd", "distill", "--num_processes", "2"]
    tiny_run = [
        *(
            "--config",
            "synthetic/resnet18_to_resnet10",
            "--teacher",
            "null",
            "--with_baseline",
            "false",
            "--output_dir",
            "runs",
        ),
        *(
            "--max_steps",
            "1",
            "--crop_size",
            "32",
            "--per_device_train_batch_size",
            "2",
            "--dataloader_num_workers",
            "0",
        ),
        *(
            "--dataset_options",
            "{size: [32, 48], num_images: {train: 4, validation: 2, test: 2}}",
            "--report_to",
            "none",
        ),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *tiny_run, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )

    done = start()
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "- processes: 2" in (tmp_path / "runs" / "README.md").read_text() and done.stdout.count("import hf_bcd") == 1
    )
    wrong = start("--crop_size", "0")
    assert wrong.returncode == 1 and "error: crop_size is 0" in wrong.stderr
