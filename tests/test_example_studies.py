"""Every study in the examples is usable as it stands: its runs parse and name known models, data and losses."""

from pathlib import Path

import pytest

from hf_bcd.adapters import read_synonyms
from hf_bcd.arguments import build_arguments
from hf_bcd.config import ModelSpec
from hf_bcd.data import CATALOG
from hf_bcd.losses import LOSSES
from hf_bcd.study import read_study


ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "examples" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_describes_its_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where its command is run
    study = read_study(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"scripts/study.py {path.relative_to(ROOT)}" in line for line in header)
    assert len({run.seed for run in study.runs}) >= 3
    for run in study.runs[: len(study.runs) // 3]:
        model, data, config = build_arguments({**run.arguments, "use_cpu": True, "report_to": "none"})
        assert data.dataset_name == "camvid" and ModelSpec.parse(model.student or "", "student")
        assert set(config.resolved_losses) <= set(LOSSES)
        if model.label_synonyms is not None:
            assert set(read_synonyms(model.label_synonyms)) <= set(CATALOG["camvid"].id2label.values())
