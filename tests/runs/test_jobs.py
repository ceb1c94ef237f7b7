"""`hf-bcd study --jobs`: what it prints is what the Hub's own command line takes."""

import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub.cli.hf import app

from hf_bcd.commands.study import main
from hf_bcd.utils.messages import UserError


JOBS = ["--jobs", "l4x1", "--dry_run", "--steps_per_second", "2", "--storage", "me/studies", "--max_steps", "7200"]


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if line.startswith("hf jobs run")]


def test_every_run_is_a_job_that_the_hub_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "camvid").mkdir()
    main(
        ["camvid_cpu.yaml", *JOBS, "--parts", "2", "--dollars_per_hour", "0.8", "--data_dir", str(tmp_path / "camvid")]
    )
    text = capsys.readouterr().out
    found = commands(text)
    assert len(found) == 2
    for part, words in enumerate(found, 1):
        done = CliRunner().invoke(app, [*words[1:3], "--dry-run", *words[3:]], env={"HF_TOKEN": "hf_x"})
        assert done.exit_code == 0, done.output
        assert "l4x1" in done.output and "hf://buckets/me/studies:/runs" in done.output
        script = words[-1]
        assert script.startswith("pip install --quiet hf_bcd && hf-bcd study camvid_cpu.yaml ")
        assert f"--output_dir /runs/camvid_cpu --part {part}/2 " in script and script.endswith("--data_dir /data")
        assert f"{tmp_path / 'camvid'}:/data" in words
        runs = text.split("# ")[part].split(" steps")[0]
        steps = int(runs.rpartition(" ")[2])
        hours = steps / 2 / 3600 + 0.25
        assert steps == 7200 * runs.count("seed") and f"{steps} steps, {hours:.1f} h, ${hours * 0.8:.2f}" in text
        assert words[words.index("--timeout") + 1] == f"{-int(-hours * 1.5 * 60 // 1)}m"


def test_a_study_of_ones_own_is_mounted_with_the_recipes_it_starts_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for folder in ("recipes", "studies"):
        (tmp_path / folder).mkdir()
    (tmp_path / "recipes" / "a.yaml").write_text("student: {backbone: resnet18}\n")
    study = tmp_path / "studies" / "mine.yaml"
    study.write_text(yaml.safe_dump({"base": "../recipes/a.yaml", "runs": {"plain": {}, "kd": {}}, "seeds": [1, 2]}))
    main([str(study), *JOBS])
    found = commands(capsys.readouterr().out)
    assert len(found) == 4
    assert all(
        f"{tmp_path}:/study" in words and "hf-bcd study /study/studies/mine.yaml" in words[-1] for words in found
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "l4x1"], "add --dry_run"),
        (["--jobs", "l4x1", "--dry_run"], "needs --steps_per_second above 0"),
        (["--jobs", "l4x1", "--dry_run", "--steps_per_second", "2"], "--storage USER/BUCKET"),
        ([*JOBS, "--parts", "99"], "--parts is 99, but the study has"),
        ([*JOBS[:-2], "--num_train_epochs", "2"], "counts epochs"),
        ([*JOBS, "--data_dir", "/missing"], "/missing, which is no folder here"),
    ],
)
def test_what_a_job_cannot_do_without_is_asked_for(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["camvid_cpu.yaml", *options])


@pytest.mark.parametrize(
    ("key", "message"),
    [("data_dir", "data_dir, .*, from the study's file"), ("teacher", "teacher of the run .* is .*push it")],
)
def test_folders_of_the_study_file_that_no_job_would_find_are_refused(key: str, message: str, tmp_path: Path) -> None:
    study = tmp_path / "mine.yaml"
    content = {"student": {"backbone": "resnet18"}, key: str(tmp_path), "runs": {"kd": {}, "cwd": {}}, "seeds": [1]}
    study.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        main([str(study), *JOBS])
