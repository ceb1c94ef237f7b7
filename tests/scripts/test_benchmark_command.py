"""`scripts/benchmark.py` runs and writes what it promises. How fast anything is, no test asks."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
from PIL import Image


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
sys.path.append(str(SCRIPT.parent))  # last, as the script itself has it

import benchmark
from benchmarks import step
from benchmarks.data import data_rows


pytestmark = pytest.mark.slow


@pytest.fixture
def small(monkeypatch):
    pairs = {"tiny -> tiny": (lambda: tiny.tiny_timm((8, 16, 16, 32)), tiny.tiny_timm)}
    monkeypatch.setattr(step, "NUM_LABELS", 8)
    for module in (step, benchmark):
        monkeypatch.setattr(module, "PAIRS", pairs)
    monkeypatch.setattr(benchmark, "data_rows", partial(data_rows, size=(64, 80), crop=48))


def test_all_benchmarks_write_what_they_measured(small, tmp_path, capsys):
    options = ["--device", "cpu", "--repeats", "1", "--largest", "256", "--side", "48", "--batch", "1", "--maps", "3"]
    costs = tmp_path / "costs.json"
    methods = ["--methods", "kd,bcd", "--write_costs", str(costs)]
    benchmark.main(["all", "--output_dir", str(tmp_path), *options, *methods])
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert {"copy_bytes_per_second", "matmul_flops_per_second", "device", "dtype"} <= results["machine"].keys()
    measured = {}
    for what in ("losses", "step", "data", "eval"):
        for row in results[what]:
            measured |= {(what, name): values for name, values in row.items() if isinstance(values, dict)}
    for name in ("autograd", "autograd + checkpoint", "streamed", "L_BD", "student's step", "kd", "bcd"):
        assert ("losses", name) in measured
    assert {
        ("step", name) for name in ("teacher forward", "student's step", "both", "step with BCD", "torchvision's")
    } <= set(measured)
    assert {("data", "crop, flip"), ("data", "crop, flip, cached"), ("eval", "all scores")} <= set(measured)
    for values in measured.values():
        assert 0 < values["low"] <= values["median"] <= values["high"]
        assert values["peak_bytes"] is None or values["peak_bytes"] >= 0
    relation, boundary, methods = results["losses"]
    written = json.loads(costs.read_text())
    assert written.items() >= {"batch": 1, "side": 48, "dtype": "float32", "threads": 1}.items()
    assert {name: cost["ms"] for name, cost in written["methods"].items()} == {
        name: pytest.approx(1e3 * methods[name]["median"], abs=0.01) for name in ("kd", "bcd")
    }
    assert relation["floor_seconds"] > 0 and relation["streamed"]["time_ratio"] > 0
    assert boundary["share_of_step"] > 0 and results["step"][0]["time_ratio"] > 0
    assert all(row["images_per_second"] > 0 for row in results["data"])
    assert {row["maps"] for row in results["eval"]} == {3}
    assert (tmp_path / "relation.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("median ms", "streamed", "step with BCD", "crop, flip, cached"))


@pytest.fixture
def unmeasured(monkeypatch):
    """What the machine can do is measured by one test only."""
    monkeypatch.setattr(benchmark, "machine_rates", lambda *_: {})


def test_connectors_are_trained_on_a_student_that_does_not_move(unmeasured, tmp_path, capsys):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.tiny_timm(seed=seed).save_pretrained(tmp_path / name)
    weights = (tmp_path / "student" / "model.safetensors").read_bytes()
    models = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    options = ["--dataset_name", "synthetic", "--side", "48", "--steps", "20", "--methods", "kd,fitnet"]
    benchmark.main(["absorb", "--device", "cpu", "--output_dir", str(tmp_path), *models, *options])
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["absorb"]  # kd trains no connectors
    assert row["method"] == "fitnet"
    before, after = row["fitnet/fitnet: before"], row["fitnet/fitnet: after"]
    assert 0 < after < before
    assert row["fitnet/fitnet: absorbed"] == pytest.approx(1 - after / before)
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == weights
    assert "absorbed" in capsys.readouterr().out


def test_the_share_of_boundary_is_measured_at_each_size(unmeasured, tmp_path):
    tiny.tiny_timm().save_pretrained(tmp_path / "teacher")
    options = ["--dataset_name", "synthetic", "--sides", "48,96", "--repeats", "2", "--output_dir", str(tmp_path)]
    benchmark.main(["boundaries", "--device", "cpu", "--teacher", str(tmp_path / "teacher"), *options])
    rows = json.loads((tmp_path / "benchmark.json").read_text())["boundaries"]
    assert [(row["crop_size"], row["image_size"], row["positions"]) for row in rows] == [(48, 48, 36), (96, 96, 144)]
    assert all(0 < row["map"] < 0.5 and 0 < row["classes"] < 0.5 < row["labels"] < 1 for row in rows)
    assert rows[1]["labels"] < rows[0]["labels"]  # the same scenes on a finer grid
    with Image.open(tmp_path / "boundaries.png") as picture:
        assert picture.width > 2 * picture.height


def test_a_method_that_does_not_exist_is_named(unmeasured, tmp_path):
    with pytest.raises(ValueError, match="unknown method 'cwdd'. Did you mean 'cwd'"):
        benchmark.main(["methods", "--output_dir", str(tmp_path), "--device", "cpu", "--methods", "kd,cwdd"])


METRIC = """
import datasets
import evaluate


class Half(evaluate.Metric):
    def _info(self):
        image = datasets.Image()
        features = datasets.Features({"predictions": image, "references": image})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, num_labels, ignore_index):
        return {"mean_iou": 0.5}
"""


def test_the_script_finds_the_library_evaluate_beside_a_script_of_that_name(tmp_path):
    (tmp_path / "half.py").write_text(METRIC)
    options = ["--device", "cpu", "--repeats", "1", "--maps", "1", "--output_dir", str(tmp_path)]
    command = [sys.executable, str(SCRIPT), "eval", *options, "--mean_iou", str(tmp_path / "half.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results.keys() == {"machine", "eval"}, "only what was asked for"
    assert "evaluate's mean_iou" in {row["scores"] for row in results["eval"]}
