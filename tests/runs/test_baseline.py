"""A finished student to compare with."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from hf_bcd.runs import baseline
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.stores import Store


DISTILLED = "---\ntags:\n- knowledge-distillation\n---\n"


def load(**options: object):
    return baseline.load_baseline(ModelArguments(**({"teacher": "me/t"} | options)), tiny.scenes())


def test_a_finished_baseline_is_loaded(tmp_path: Path) -> None:
    model = tiny.tiny_timm(seed=3)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags:\n- hf_bcd\n---\n")
    loaded = load(baseline=str(tmp_path))
    assert loaded is not None
    assert all((value == loaded.model.state_dict()[name]).all() for name, value in model.state_dict().items())
    assert load(teacher=None) is None


def test_a_baseline_of_other_classes_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_timm()
    model.config.id2label = {**tiny.ID2LABEL, 0: "ground", 1: "sky"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"predicts 8 classes \(ground, sky, .*synthetic has 8 \(sky, ground"):
        load(baseline=str(tmp_path))


def test_a_baseline_that_was_distilled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text(DISTILLED)
    with pytest.raises(ValueError, match="was distilled itself"):
        load(baseline=str(tmp_path))
    monkeypatch.setattr(baseline, "cached_file", lambda name, file: str(tmp_path / file) if name == "me/x" else None)
    with pytest.raises(ValueError, match="--baseline me/x was distilled itself"):
        load(baseline="me/x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None, "baseline": "runs/y"}, "name a --teacher too, or leave --baseline out"),
        ({"teacher": None, "with_baseline": True}, "name a --teacher too, or leave --baseline out"),
        ({"baseline": "runs/y", "with_baseline": True}, "--baseline runs/y and --with_baseline exclude each other"),
    ],
)
def test_comparisons_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_a_store_says_in_whose_place_it_teaches(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    store = Store.__new__(Store)
    store.source, store.content = "stores/d", {"teacher": {"repo_id": "me/b", "name": "SegFormer"}}
    monkeypatch.setattr(baseline, "open_store", lambda *_: store)
    config: Any = None
    with caplog.at_level("INFO"):
        baseline.prepare_teachers(ModelArguments(teacher="me/a", teacher_store="stores/d"), config, config)
    assert caplog.messages == ["stores/d, made of me/b, teaches in the place of me/a, which is not loaded"]
