"""The pages: their commands are what commands take, their numbers are measured, and the site builds."""

import argparse
import contextlib
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from hf_bcd.commands import COMMANDS, OF_RUNS
from hf_bcd.runs.arguments import build_arguments, read_arguments


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHOOSING = ROOT / "docs" / "choosing.md"


class Command(NamedTuple):
    """A command of a page; `needs` is the comment over it that says what it needs."""

    page: str
    words: tuple[str, ...]
    needs: str

    @property
    def name(self) -> str:
        """Of the subcommand; empty for other programs."""
        if self.words[0] == "hf-bcd":
            return self.words[1]
        script = re.fullmatch(r"accelerate launch (?:--\S+ \S+ )*scripts/(\w+)\.py", " ".join(self.words[:3]))
        return script[1].replace("push_to_hub", "push") if script else ""

    @property
    def arguments(self) -> list[str]:
        return list(self.words[2 if self.words[0] == "hf-bcd" else 3 :])


def commands_of(page: Path) -> Iterator[Command]:
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        needs = ""
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("#"):
                needs = line.removeprefix("#").strip()
            elif line.strip():
                yield Command(page.stem, tuple(shlex.split(line, comments=True)), needs)


ALL = [command for page in PAGES for command in commands_of(page)]
OURS = [command for command in ALL if command.name]
IDS = [f"{command.page}-{index}-{command.name}" for index, command in enumerate(OURS)]


def test_every_command_is_one_of_ours_or_known() -> None:
    others = {command.words[0] for command in ALL if not command.name}
    assert others <= {"pip", "pytest"} and len(OURS) > 20


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the paths that pages name exist."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder := tmp_path / "path" / "to" / "data" / split / kind).mkdir(parents=True)
            for index in range(2):
                shape = (32, 40, 3) if kind == "images" else (32, 40)
                pixels = generator.integers(0, 3, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    (tmp_path / "RECIPE.yaml").write_text("student: {backbone: resnet18, head: fpn}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", OURS, ids=IDS)
def test_a_command_takes_the_arguments_that_a_page_gives_it(command: Command, place: Path) -> None:
    arguments = [word for word in command.arguments if word != "\N{HORIZONTAL ELLIPSIS}"]
    assert command.name in COMMANDS
    if "--num_processes" in arguments:
        place_of = arguments.index("--num_processes")
        del arguments[place_of : place_of + 2]
    if command.name in OF_RUNS:
        own = {
            "reinforce": {"--views": 1, "--push_to_hub": 1, "--with_images": 0},
            "evaluate": {"--backend": 1, "--precision": 1},
        }
        if command.name == "evaluate" and not arguments[0].startswith("-"):
            del arguments[0]
        for option, values in own.get(command.name, {}).items():
            if option in arguments:
                start = arguments.index(option)
                del arguments[start : start + 1 + values]
        build_arguments({**read_arguments(arguments), "use_cpu": True, "report_to": "none"})
        return
    module = importlib.import_module(f"hf_bcd.commands.{command.name.replace('-', '_')}")
    parsed: list[list[str]] = []
    original = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, argv: list[str]) -> None:
        parsed.append(original(self, argv)[1])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, parse)
        module.main(arguments)
    if command.name == "study":
        read_arguments(parsed[0])
    else:
        assert parsed == [[]]


@pytest.mark.parametrize("command", OURS, ids=IDS)
def test_what_cannot_be_run_here_is_marked(command: Command) -> None:
    """Commands that are not marked are run below, or are the demos, which tests/scripts runs."""
    if "needs" in command.needs:
        assert re.search(r"needs (the Hub|a GPU|CamVid|COCO|a finished run)", command.needs)
    else:
        run_here = command.page == "first_steps" or command.name == "check"
        demo = not command.arguments or "synthetic/" in " ".join(command.arguments)
        generic = "RECIPE.yaml" in command.words or "\N{HORIZONTAL ELLIPSIS}" in command.words
        assert run_here or demo or generic, f"mark it with '# needs the Hub': {' '.join(command.words)}"


QUICK = [
    *("--max_steps", "1", "--crop_size", "32", "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"),
    *("--report_to", "none", "--calibration_images", "2"),
]
SMALL = "{channels: [8, 8, 16, 16], stem_width: 8}"


@pytest.mark.slow
def test_the_first_steps_are_made(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the page but its demo, installation and what needs the Hub, with one step."""
    steps = [
        c for c in OURS if c.page == "first_steps" and not c.needs and c.arguments and "--num_processes" not in c.words
    ]
    assert [step.name for step in steps] == ["check", "distill", "evaluate", "push"]
    for step in steps:
        arguments = step.arguments
        if step.name == "distill":
            arguments = [word.replace("resnet50", "resnet10t").replace("resnet18", "resnet10t") for word in arguments]
            arguments += [*QUICK, "--teacher_training", "{max_steps: 1}"]
            for role in ("student", "teacher"):
                arguments += [f"--{role}.options", f"{{head_channels: 8, backbone_kwargs: {SMALL}}}"]
        importlib.import_module(f"hf_bcd.commands.{step.name}").main(arguments)
    text = capsys.readouterr().out
    assert "mIoU" in text and "model.safetensors" in text
    assert (place / "runs" / "mine" / "README.md").is_file()


def test_the_numbers_of_the_decision_table_are_those_of_the_studies() -> None:
    measured = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    for heading, suffix in (("## After 300 steps", ""), ("## After 750 steps", "_longer")):
        rows = CHOOSING.read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0].splitlines()
        table = [[cell.strip() for cell in row.split("|")[1:4]] for row in rows if row.startswith("|")][2:]
        assert len(table) >= 2
        for losses, *differences in table:
            name = losses.replace(" + ", "_") + suffix
            assert f"| {name} \N{MINUS SIGN} baseline{suffix} | 3 | {' | '.join(differences)} |" in measured


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is missing: pip install 'hf_bcd[docs]'")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    index = (tmp_path / "papers" / "index.html").read_text(encoding="utf-8")
    assert "temperature" in index and "max_steps" in (tmp_path / "reference" / "index.html").read_text(
        encoding="utf-8"
    )
    assert (tmp_path / "results" / "camvid_cpu" / "results.png").is_file()
