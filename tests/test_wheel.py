"""The wheel, installed in a folder of its own away from the checkout, has everything that its commands need."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("build", reason="pip install build")

ROOT = Path(__file__).parent.parent
# the commands of one process, each as its arguments
DRIVER = """
import json, sys
import hf_bcd
from hf_bcd.commands import main

print(hf_bcd.__file__)
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["hf-bcd", *arguments]
    main()
"""


def run(*command: str, folder: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, env=kept | environment, capture_output=True, text=True, encoding="utf-8", timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the checkout holds, so that no earlier build and nothing untracked gets in."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_bcd", source / "hf_bcd", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), ".", folder=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_what_is_no_code(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    kinds = {".yaml", ".json", ".bib", ".typed"}
    package = ROOT / "hf_bcd"
    data = {path for path in package.rglob("*") if path.suffix in kinds or path.parent.name == "templates"}
    results = package / "examples" / "studies" / "results"  # measured, for the documentation
    expected = {path.relative_to(ROOT).as_posix() for path in data if path.is_file() and results not in path.parents}
    assert expected <= names and len(expected) > 100
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "docs/")) or "/results/" in name]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


@pytest.mark.slow
def test_an_installed_wheel_runs_its_commands_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, away = tmp_path / "site", tmp_path / "away"
    away.mkdir()
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    run(sys.executable, *install, folder=away)
    for split in ("train", "val"):
        for kind, shape in (("images", (24, 32, 3)), ("masks", (24, 32))):
            (folder := away / "mine" / split / kind).mkdir(parents=True)
            Image.fromarray(np.indices(shape).sum(axis=0).astype(np.uint8) % 2).save(folder / "a.png")
    demo = [
        *("distill", "--config", "synthetic/resnet18_to_resnet10.yaml", "--output_dir", "runs/demo"),
        *("--teacher", "null", "--with_baseline", "false", "--max_steps", "2", "--crop_size", "32"),
        *("--per_device_train_batch_size", "2", "--dataloader_num_workers", "0", "--report_to", "none"),
        *("--dataset_options", "{size: [32, 48], num_images: {train: 4, validation: 1, test: 1}}"),
    ]
    commands = json.dumps([["methods"], ["check", "mine"], demo])
    text = run(sys.executable, "-c", DRIVER, commands, folder=away, PYTHONPATH=str(site), OMP_NUM_THREADS="1")
    assert Path(text.splitlines()[0]).is_relative_to(site)
    assert "bcd: " in text and "mine" in text and "mIoU" in text
    assert (away / "runs" / "demo" / "model.safetensors").is_file()
    assert (away / "runs" / "demo" / "README.md").is_file()
