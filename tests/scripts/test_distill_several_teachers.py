"""Whole runs with two teachers: one of classes, one of features."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from transformers import Dinov2Config, Dinov2Model

from hf_bcd.commands import distill, reinforce
from hf_bcd.commands import study as study_command
from hf_bcd.runs.study import read_study
from hf_bcd.stores import Store
from hf_bcd.utils.messages import UserError


LOSSES = {"seg.a": {"cwd": {}, "bcd": {"channels": 16, "reduced_channels": 8}}, "dino": {"pkd": {}}}
RUN = {
    "dataset_name": "synthetic", "dataset_options": {"size": [48, 64], "num_images": {"train": 8, "validation": 2, "test": 3}},
    "student": {"backbone": "resnet10t", "options": {"head_channels": 8, "backbone_kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8}}},
    "losses": LOSSES, "max_steps": 2,
}  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A recipe with a SegFormer and a DINOv2 without a head, both in folders."""
    tiny.tiny_segformer().save_pretrained(tmp_path / "seg.a")
    small = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56)
    Dinov2Model(small).save_pretrained(tmp_path / "dino")
    return RUN | {"teacher": [str(tmp_path / "seg.a"), str(tmp_path / "dino")]}


def run(folder: Path, recipe: dict[str, Any], command: Any = distill, **options: Any) -> None:
    path = folder.with_name(f"{folder.name}.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    command.main(tiny.command_line(config=path, output_dir=folder, **options))


def test_two_teachers_teach_a_student(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, recipe)
    results = json.loads((folder / "results.json").read_text())
    assert {"teacher", "student"} <= set(results) and "teacher_2" not in results, "features have no scores"
    text = (folder / "README.md").read_text()
    assert "distilled from the teachers SegformerForSemanticSegmentation and Dinov2" in text
    assert "- teacher 1, seg\\_a in the names of its losses: " in text and "- teacher 2, dino in the names" in text
    assert "dino: the teacher has none; it gave features only" in text
    for term in ("seg\\_a/cwd/cwd", "seg\\_a/bcd/boundary", "dino/pkd/pkd"):
        assert term in text
    assert {"cwd", "bcd", "pkd", "knowledge-distillation"} <= set(ModelCard(text).data.to_dict()["tags"])
    assert str(tmp_path) not in text and "path/to/seg.a" in text and "path/to/dino" in text
    assert (folder / "figures" / "boundaries.png").is_file()


def test_both_are_scored_where_both_have_classes(recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny.tiny_timm((8, 16, 16, 32), seed=1).save_pretrained(tmp_path / "timm")
    both = [str(tmp_path / "seg.a"), {"name_or_path": str(tmp_path / "timm")}]
    run(tmp_path / "run", recipe | {"teacher": both, "losses": {"cwd": {}}})
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"]["mean_iou"] != results["teacher_2"]["mean_iou"]
    assert set(results["protocol"]["cost"]) == {"teacher", "teacher_2", "student"}
    text = (tmp_path / "run" / "README.md").read_text()
    assert "|  | teacher 1 | teacher 2 | student, distilled |" in text
    assert "teacher 2, timm in the names of its losses: FPN on resnet10t" in text and "path/to/timm" in text


def test_both_may_be_stored_or_one_of_them(recipe: dict[str, Any], tmp_path: Path) -> None:
    for teacher in recipe["teacher"]:
        run(tmp_path / "stores" / Path(teacher).name, recipe | {"teacher": teacher}, reinforce, views=2)
    dino, seg = (tmp_path / "stores" / name for name in ("dino", "seg.a"))
    run(tmp_path / "stored", recipe, teacher="none", teacher_store=f"[{seg}, {dino}]")
    run(tmp_path / "mixed", recipe, teacher=tmp_path / "seg.a", teacher_store=f"[{dino}]")
    for name in ("stored", "mixed"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["teacher"]["mean_iou"] >= 0 and "teacher_2" not in results
        text = (tmp_path / name / "README.md").read_text()
        (line,) = [
            line for line in text.splitlines() if line.startswith("- teacher 2, dino in the names of its losses")
        ]
        assert "it did not run along: its outputs for 2 augmented views of each picture were computed once" in line
        assert text.count("it did not run along") == (2 if name == "stored" else 1)
    with pytest.raises(UserError, match="unknown teacher in losses 'seg_a'. Known: dino, other"):
        tmp_path.joinpath("other").symlink_to(seg)
        run(tmp_path / "wrong", recipe, teacher="none", teacher_store=f"[{tmp_path / 'other'}, {dino}]")


def test_one_store_holds_both(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "s"
    run(folder, recipe, reinforce, views=2)
    printed = capsys.readouterr().out
    assert "2 views of 8 pictures" in printed and "seg_a/bcd/boundary" in printed and "dino/features/" in printed
    assert {path.name for path in folder.glob("*.json")} == {"store.json", "scores-seg_a.json"}, (
        "features have no scores"
    )
    run(tmp_path / "both", recipe, teacher_store=folder)  # the store's teachers, in the place of the recipe's
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert results["teacher"]["mean_iou"] >= 0 and "teacher_2" not in results
    text = (tmp_path / "both" / "README.md").read_text()
    assert text.count("it did not run along") == 2 and str(tmp_path) not in text
    for term in ("seg\\_a/cwd/cwd", "seg\\_a/bcd/boundary", "dino/pkd/pkd"):
        assert term in text
    recipe = recipe | {"losses": {"pkd": {}}}
    run(tmp_path / "one", recipe, teacher="none", teacher_store=folder / "dino")
    assert (tmp_path / "one" / "README.md").read_text().count("it did not run along") == 1
    with pytest.raises(UserError, match="the store has no teacher 'seg', only seg_a, dino"):
        run(tmp_path / "wrong", recipe, teacher="none", teacher_store=folder / "seg")


def test_a_study_stores_its_teachers_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    quick = yaml.safe_load(" ".join(["{"] + [f"{a.removeprefix('--')}: {b}," for a, b in zip(*[iter(tiny.command_line())] * 2, strict=True)] + ["}"]))  # fmt: skip
    runs = {
        "baseline": {"teacher": None},
        "both": {},
        "one": {"teacher": recipe["teacher"][0], "losses": LOSSES["seg.a"]},
        "live": {"reinforce": None},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(recipe | quick | {
        "eval_strategy": "no", "seeds": [1], "runs": runs, "reinforce": {"views": 2}, "output_dir": str(tmp_path / "out"),
    }))  # fmt: skip
    study_command.main([str(path)])
    results: Any = {run.name: run.result() for run in read_study(path).runs}
    assert all(results.values())
    assert results["both"]["teacher"] == results["live"]["teacher"] == results["one"]["teacher"]
    assert results["both"]["more_teachers"] == [] and results["baseline"]["teacher"] is None
    # `one` has the first teacher of `both` and all that it gives, so it reads the same store
    (folder,) = (path for path in (tmp_path / "out" / "stores").iterdir() if path.is_dir())
    assert Store(folder).teachers == ["seg_a", "dino"]
    runs["kd"] = {"teacher": recipe["teacher"][0], "losses": {"kd": {}}}  # reads what is there
    path.write_text(yaml.safe_dump(recipe | quick | {
        "eval_strategy": "no", "seeds": [1], "runs": runs, "reinforce": {"views": 2}, "output_dir": str(tmp_path / "out"),
    }))  # fmt: skip
    study_command.main([str(path)])
    assert [path for path in (tmp_path / "out" / "stores").iterdir() if path.is_dir()] == [folder]
    assert (tmp_path / "out" / "kd" / "seed_1" / "study.json").is_file()
    again = {"teacher": None, "teacher_store": str(folder), "losses": LOSSES}
    path.write_text(yaml.safe_dump(recipe | quick | {
        "eval_strategy": "no", "seeds": [1], "runs": {"stored": again}, "output_dir": str(tmp_path / "again"),
    }))  # fmt: skip
    study_command.main([str(path)])
    (done,) = read_study(path).runs
    stored: Any = done.result()
    assert stored["scores"] == results["both"]["scores"], "the same store, whoever made it"
    assert "| teacher |" in (tmp_path / "out" / "results.md").read_text()
