"""examples/distill_your_own_data.ipynb runs from its first cell to its last, with fewer steps."""

import os
from pathlib import Path
from typing import Any

import pytest


nbformat = pytest.importorskip("nbformat", reason="pip install nbformat")
NOTEBOOK = Path(__file__).parent.parent / "examples" / "distill_your_own_data.ipynb"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_ten_cells_without_outputs(notebook: Any) -> None:
    assert len(notebook.cells) == 10
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
def test_every_cell_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    for given, quick in {
        "TEACHER_STEPS, STEPS = 220, 180": "TEACHER_STEPS, STEPS = 1, 4",
        '"train": 100, "validation": 20': '"train": 8, "validation": 2',
    }.items():
        (cell,) = (cell for cell in notebook.cells if given in cell.source)
        cell.source = cell.source.replace(given, quick)
    for name, value in {"HOME": tmp_path, "HF_HOME": tmp_path / "hf", "PYTHONPATH": NOTEBOOK.parents[1]}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = ["".join(str(output) for output in cell.get("outputs", [])) for cell in notebook.cells]
    assert "my_data" in shown[3] and "vehicle" in shown[3]
    assert "baseline" in shown[4] and "student" in shown[4]
    assert "image/png" in shown[5] and "image/png" in shown[6]
    assert "mIoU" in shown[7] and "text/markdown" in shown[8]
    assert "model.safetensors" in shown[9] and "bytes in" in shown[9]
    assert os.listdir(tmp_path / "runs" / "mine")
