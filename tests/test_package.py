"""What importing the package does and does not do."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import hf_bcd
from hf_bcd.losses.bcd import BCDLoss


ROOT = Path(__file__).parent.parent

# hf_bcd comes first in the process of tests/training/test_pipeline_parity.py
ORDERS = [
    "from transformers import AutoModelForSemanticSegmentation; import hf_bcd",
    "import hf_bcd.losses; import transformers; from transformers import AutoModelForSemanticSegmentation",
]

# each order in a process that has imported neither package, though what both need
IMPORT = """
import os, sys, torchvision
assert "transformers" not in sys.modules
for order in sys.argv[1:]:
    if os.fork() == 0:
        exec(order)
        print(order)
        models = [config.model_type for config in AutoModelForSemanticSegmentation._model_mapping]
        sys.exit("timm_segmentation" not in models)
    assert os.wait()[1] == 0
"""


@pytest.mark.slow
def test_auto_classes_know_our_models_whichever_comes_first() -> None:
    command = [sys.executable, "-W", "error", "-c", IMPORT, *ORDERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines() == ORDERS


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    assert all(getattr(hf_bcd, name) is not None for name in hf_bcd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'BCDTrianer'"):
        _ = hf_bcd.BCDTrianer


# what takes seconds to import, and what only training needs
HEAVY = ("torch", "torchvision", "timm", "datasets", "matplotlib", "scipy", "pandas", "transformers.training_args")
LISTS_HEAVY = f"""
import sys
{{}}
print("\\n", *[name for name in {HEAVY} if name in sys.modules], end="")
"""
CALL = "sys.argv = {}\nfrom hf_bcd.commands import main\ntry: main()\nexcept SystemExit as end: assert not end.code"


@pytest.mark.parametrize(
    "code",
    ["import hf_bcd; dir(hf_bcd)"]
    + [
        CALL.format(["hf-bcd", *arguments.split()])
        for arguments in (
            "--help",
            "distill --help",
            "evaluate -h",
            "reinforce --help",
            "methods --help",
            "study --help",
            "push --help",
        )
    ],
    ids=lambda code: code.splitlines()[0],
)
def test_help_waits_for_no_heavy_import(code: str) -> None:
    command = [sys.executable, "-W", "error", "-c", LISTS_HEAVY.format(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout.splitlines()[-1].strip()


def test_version_licence_and_paper_are_those_of_the_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {key: citation[key] for key in ("version", "license", "title")} == {
        "version": project["version"], "license": project["license"], "title": project["name"]
    }  # fmt: skip
    assert citation["version"] == hf_bcd.__version__
    (paper,) = citation["references"]
    names = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    assert f"title={{{paper['title']}}}" in BCDLoss.citation and names in BCDLoss.citation
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
