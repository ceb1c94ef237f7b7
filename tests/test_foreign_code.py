"""A checkpoint may name code that lies beside it. Without `trust_remote_code` none of it runs, and none is passed on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from adapters.adapter_tiny_models import tiny_model
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel, SegformerImageProcessor, pipeline

from hf_bcd.adapters.loading import drop_foreign_code
from hf_bcd.commands import distill, evaluate
from hf_bcd.export.students import export_student


DATA = {
    "dataset_name": "synthetic", "dataset_options": "{size: [48, 64], num_images: {train: 4, test: 2}}", "max_steps": 2,
}  # fmt: skip
AUTO = ("AutoConfig", "AutoModelForSemanticSegmentation", "AutoImageProcessor", "AutoBackbone")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a stranger's module writes when it is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "a_stranger_was_here"


def hostile(model: PreTrainedModel, folder: Path, marker: Path) -> str:
    """Saves a model with an image processor whose files name a stranger's module."""
    model.save_pretrained(folder)
    SegformerImageProcessor(image_mean=[0.25] * 3).save_pretrained(folder)
    (folder / "stranger.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    code = f"{folder}--stranger.Stranger"  # as for a repository, this is found wherever the file is copied to
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text()) | {"auto_map": dict.fromkeys(AUTO, code)}
        content["custom_pipelines"] = {"image-segmentation": {"impl": code, "type": "image", "pt": [], "default": {}}}
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def mentions(folder: Path) -> list[str]:
    """Files of a run that name a stranger's code."""
    files = [path for pattern in ("*.json", "*.md") for path in folder.rglob(pattern)]
    return [str(path) for path in files if "--stranger" in path.read_text() or "custom_pipelines" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny.tiny_segformer, tiny.tiny_timm])
def test_no_code_of_a_stranger_runs_or_is_passed_on(build: Any, tmp_path: Path, marker: Path) -> None:
    student, teacher = hostile(build(), tmp_path / "a", marker), hostile(build(seed=1), tmp_path / "b", marker)
    out = tmp_path / "out"
    models = {"student": student, "teacher": teacher, "baseline": teacher}
    saved = {"save_strategy": "steps", "save_steps": 1, "output_dir": out}
    distill.main(tiny.command_line(**DATA, **models, **saved))
    for folder in (student, out):
        evaluate.main(tiny.command_line(**DATA, student=folder, output_dir=tmp_path / "scores"))
    assert not marker.exists()
    assert pipeline("image-segmentation", str(out), device="cpu")(Image.new("RGB", (64, 48)))
    assert not marker.exists()
    assert len(list(out.rglob("config.json"))) == 3 and not mentions(out)  # the student and two checkpoints
    card, own = (out / "README.md").read_text(), build is tiny.tiny_timm
    assert "\n# " in card and ("trust_remote_code" in card) == ("auto_map" in (out / "config.json").read_text()) == own


@pytest.mark.slow
def test_an_export_of_a_strangers_folder_runs_no_code(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hostile(tiny.tiny_segformer(), tmp_path / "a", marker)
    monkeypatch.setattr("hf_bcd.export.students.check_runs", lambda model, image: 1 / 0)  # what follows takes seconds
    with pytest.raises(ZeroDivisionError):
        export_student(folder)
    assert not marker.exists()


def test_a_user_who_loads_and_passes_both_saves_neither_map(tmp_path: Path, marker: Path) -> None:
    folder = hostile(tiny.tiny_segformer(), tmp_path / "a", marker)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    run = tiny.trainer(tmp_path / "out", model=model, teacher=None, max_steps=1)
    run.processing_class = SegformerImageProcessor.from_pretrained(folder)
    run.train()
    run.save_model()
    run.predict(tiny.scenes()["test"])
    assert not mentions(tmp_path / "out") and not marker.exists()
    with pytest.raises(Exception, match="Stranger"):  # the trap is one
        AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_nested_configurations_forget_it_too_and_class_names_stay() -> None:
    model = tiny_model("upernet-swin")
    model.config.backbone_config.auto_map = {"AutoBackbone": "me/repo--stranger.Stranger"}
    model.config.label2id = {"auto_map": 0}
    drop_foreign_code(model)
    assert model.config.label2id == {"auto_map": 0} and "stranger" not in model.config.to_json_string()
