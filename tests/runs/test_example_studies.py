"""Every study in the examples is usable as it stands: its runs parse and name known models, data and losses."""

import csv
import re
import statistics
from pathlib import Path

import pytest

from hf_bcd.adapters import read_synonyms
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.data import CATALOG
from hf_bcd.losses import LOSSES
from hf_bcd.runs.arguments import build_arguments, parse_arguments
from hf_bcd.runs.study import read_study


ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "studies").glob("*.yaml"))
STUDIES = [path for path in FILES if "\nruns:" in path.read_text()]
TEACHERS = [path for path in FILES if path not in STUDIES]
FORMER = {"pca", "gain_4", "centred"}  # options that are gone, as docs/studies.md says
RESULTS = sorted((ROOT / "examples" / "studies" / "results").iterdir())


def documented(path: Path, script: str) -> list[str]:
    """Arguments of the command in a file's header that names the file, up to the next command."""
    header = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(header).replace("\\ ", "").partition(f"{script} ")[2]
    text = re.split(r"  |accelerate launch", text)[0]
    assert str(path.relative_to(ROOT)) in text, f"no command in {path}"
    return text.split()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_describes_its_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where its command is run
    file, *argv = documented(path, "scripts/study.py")
    study = read_study(Path(file), argv=argv)
    assert len({run.seed for run in study.runs}) >= (2 if study.split == "validation" else 3)
    assert any(run.arguments["teacher"] is None for run in study.runs) or study.split == "validation"
    for run in study.runs[: len(study.runs) // 3]:
        model, data, config = build_arguments({**run.arguments, "use_cpu": True, "report_to": "none"})
        name = {"synthetic_scores": "synthetic"}.get(path.stem, path.stem.partition("_")[0])
        assert data.dataset_name in (name, path.stem) and ModelSpec.parse(model.student or "", "student")
        assert model.teacher is None or ModelSpec.parse(model.teacher, "teacher")
        assert set(config.loss_options) <= set(LOSSES)
        if model.label_synonyms is not None:
            assert set(read_synonyms(model.label_synonyms)) <= set(CATALOG["camvid"].id2label.values())


@pytest.mark.parametrize("dataset", ["voc2012_aug", "cityscapes", "ade20k"])
def test_the_same_study_serves_other_data_sets(dataset: str) -> None:
    student, teacher = (
        f"{{backbone: resnet{depth}.tv_in1k, head: psp, output_stride: 8, pretrained: true}}" for depth in (18, 101)
    )
    argv = ["--dataset_name", dataset, "--crop_size", "512", "--student", student, "--teacher", teacher]
    study = read_study(ROOT / "examples" / "studies" / "camvid_components.yaml", argv=argv)
    for run in study.runs:
        model, data, config = build_arguments({**run.arguments, "use_cpu": True, "report_to": "none"})
        assert (data.dataset_name, config.crop_size) == (dataset, 512)
        assert ModelSpec.parse(model.student or "", "student").backbone == "resnet18.tv_in1k"
        assert (model.teacher is None) == (run.name == "baseline")


@pytest.mark.parametrize("path", TEACHERS, ids=lambda path: path.stem)
def test_a_shared_teacher_is_trained_where_studies_look_for_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model, data, config = parse_arguments(
        [*documented(path, "scripts/distill.py"), "--use_cpu", "--report_to", "none"]
    )
    assert data.dataset_name == "camvid" and model.teacher is None and not model.with_baseline
    assert any(f"teacher: {config.output_dir}\n" in study.read_text() for study in STUDIES)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_the_docs_show_the_tables_that_were_measured(folder: Path) -> None:
    tables = [block for block in (folder / "results.md").read_text().split("\n\n") if block.startswith("|")]
    docs = (ROOT / "docs" / "studies.md").read_text()
    assert len(tables) == 2 and all(table in docs for table in tables)
    scores = {}
    with (folder / "results.csv").open() as file:
        for row in csv.DictReader(file):
            scores.setdefault(row["run"], []).append(100 * float(row["mean_iou"]))
    shown = dict(re.findall(r"^\| (\w[\w.]*) \| \d+ \| (\d+\.\d+)", tables[0], re.M))
    assert shown == {name: f"{statistics.fmean(values):.2f}" for name, values in scores.items()}
    study = read_study(FILES[0].parent / f"{folder.name}.yaml")
    assert set(scores) - FORMER <= {run.name for run in study.runs}
