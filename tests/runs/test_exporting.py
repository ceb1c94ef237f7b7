"""Exports of a run: whose pictures find the scales, what is scored, and what a failure costs."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_targets import written_by_hand
from hub.student_folder import finished
from tiny import command_line, config, scenes, tiny_segformer
from torch import Tensor

from hf_bcd.adapters import build_adapter
from hf_bcd.card.usage import mention_exports
from hf_bcd.commands import distill, evaluate, export
from hf_bcd.export import students, targets
from hf_bcd.export.opened import OpenedFile
from hf_bcd.hub.exports import report_file
from hf_bcd.runs import exporting
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.exporting import calibration_of, data_arguments, export_run, score_export, write_recipe
from hf_bcd.training.evaluation import evaluate as score
from hf_bcd.utils.messages import UserError


def toy_file(folder: Path, shift: float = 0.0, noise: float = 0.0) -> OpenedFile:
    """A file that answers as the student in the folder does, but for a shift of its first class and noise."""
    model = students.load_adapter(str(folder)).eval().model

    @torch.no_grad()
    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        logits = model(pixel_values=pixel_values).logits.clone()
        logits[:, 0] += shift
        return {"logits": logits + noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))}

    return OpenedFile(run)


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = finished(tmp_path / "x")
    written_by_hand(folder)
    monkeypatch.setattr(targets, "find_spec", lambda name: True)
    monkeypatch.setattr(targets, "version", lambda name: "1", raising=False)
    return folder


def opens(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: float) -> None:
    report = json.loads((folder / report_file("onnx", "int8")).read_text())
    monkeypatch.setattr(exporting, "open_export", lambda *_: (toy_file(folder, **changes), dict(report)))


# ---- Data of a run ---------------------------------------------------------------------------------------------------


def test_a_recipe_keeps_what_finds_the_data_and_no_token(tmp_path: Path) -> None:
    said = {
        "dataset_name": "synthetic",
        "image_size": 48,
        "hub_token": "hf_secret",
        "cache_images": True,
        "bf16": True,
    }
    write_recipe(tmp_path, {**said, "student": {"backbone": "resnet10t"}, "dataset_options": {"size": [48, 64]}})
    assert "hf_secret" not in (tmp_path / "recipe.yaml").read_text()
    found = data_arguments(str(tmp_path), ["--dataset_revision", "v2"])
    assert found is not None
    data, args, _ = found
    assert (data.dataset_name, data.dataset_revision, data.cache_images) == ("synthetic", "v2", False)
    assert data.dataset_options == {"size": [48, 64]} and args.image_size == 48 and not args.bf16


def test_a_folder_that_names_no_data_has_none(tmp_path: Path) -> None:
    assert data_arguments(str(tmp_path), []) is None
    found = data_arguments(str(tmp_path), ["--dataset_name", "synthetic"])
    assert found is not None and found[0].dataset_name == "synthetic"


def test_data_that_moved_are_named_with_the_option(tmp_path: Path) -> None:
    write_recipe(tmp_path, {"data_dir": str(tmp_path / "gone")})
    found = data_arguments(str(tmp_path), [])
    assert found is not None
    with pytest.raises(UserError, match=r"the data of .* cannot be read \(.*gone.*--data_dir or --dataset_name"):
        exporting.load_run_data(str(tmp_path), found[0])


def test_a_calibration_folder_without_pictures_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the data of .*x cannot be read \(.*empty"):
        export.main([str(finished(tmp_path / "x")), "--precision", "int8", "--data_dir", str(tmp_path / "empty")])


def test_int8_of_a_run_without_data_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: True)
    with pytest.raises(UserError, match=r"int8 needs training pictures, and .*x does not say where they are"):
        export_run(str(finished(tmp_path / "x")), "onnx", "int8")


def test_calibration_pictures_are_spread_over_the_training_split_as_evaluation_shows_them(tmp_path: Path) -> None:
    adapter, train = build_adapter(tiny_segformer()), scenes(train=8)["train"]
    found = calibration_of(adapter, train, config(tmp_path, image_size=24), 4)
    assert len(found) == 4 and found.source == "training split of synthetic"
    shown = list(found)
    assert [tuple(one.shape) for one in shown] == [(1, 3, 24, 32)] * 4
    again = calibration_of(adapter, train.select([0, 2, 4, 6]), config(tmp_path, image_size=24), 200)
    assert len(again) == 4 and all(map(torch.equal, shown, again))
    with pytest.raises(UserError, match="--calibration_images is 0"):
        calibration_of(adapter, train, config(tmp_path), 0)


# ---- Scores ----------------------------------------------------------------------------------------------------------


def test_file_and_student_are_scored_as_an_evaluation_does(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opens(monkeypatch, student)
    data, args = scenes(), config(tmp_path / "out", image_size=48)
    report = score_export(student, "onnx", "int8", data["validation"], args)
    scores = report["scores"]["validation"]
    expected = score(students.load_adapter(str(student)), data["validation"], args)["mean_iou"]
    assert scores["file"]["mean_iou"] == scores["pytorch"]["mean_iou"] == pytest.approx(expected)
    assert scores["argmax_agreement"] == 1 and scores["images"] == 3 and scores["dataset"] == "synthetic"
    assert json.loads((student / "onnx" / "export_int8.json").read_text()) == report and not caplog.records

    opens(monkeypatch, student)  # the report as it is now
    assert set(score_export(student, "onnx", "int8", data["test"], args)["scores"]) == {"validation", "test"}
    mention_exports(student)
    card = (student / "README.md").read_text()
    value = f"{100 * expected:.2f}"
    assert "| `onnx/model_int8.onnx` | int8 | 1.0 | 2 | 8 |" in card and f" {value} | {value} |" in card
    assert "7 pictures of the training split of toys found the scales" in card and "4.0 MB" in card
    mention_exports(student)
    assert (student / "README.md").read_text() == card


def test_a_file_that_lost_more_than_two_points_says_so_and_stays(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, args = scenes()["validation"], config(tmp_path / "out", image_size=48)
    monkeypatch.setattr(exporting, "MAX_LOSS", -1e9)
    opens(monkeypatch, student, noise=5.0)
    with caplog.at_level(logging.WARNING):
        report = score_export(student, "onnx", "int8", data, args)
    assert report["scores"]["validation"]["argmax_agreement"] < 1
    (message,) = caplog.messages
    assert message.startswith("onnx int8 lost ") and "points of mIoU on the validation split of synthetic" in message
    assert (student / "onnx" / "model_int8.onnx").is_file()


def test_evaluate_scores_an_exported_file_on_the_data_of_its_run(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    report = json.loads((student / report_file("onnx", "int8")).read_text())
    for module in (exporting, evaluate):
        monkeypatch.setattr(module, "open_export", lambda *_: (toy_file(student), dict(report)))
    options = {"size": [48, 64], "num_images": {"train": 2, "validation": 1, "test": 2}}
    write_recipe(student, {"dataset_name": "synthetic", "dataset_options": options, "image_size": 48})
    evaluate.main([str(student), "--backend", "onnx", "--precision", "int8", "--disable_tqdm", "true"])
    printed = capsys.readouterr().out
    assert "onnx int8" in printed and "same class at 100.00 % of the pixels of 2 pictures" in printed
    assert set(json.loads((student / report_file("onnx", "int8")).read_text())["scores"]) == {"test"}
    assert "test" in (student / "README.md").read_text()
    with pytest.raises(UserError, match="name the folder of the student first"):
        evaluate.main(["--backend", "onnx"])
    with pytest.raises(UserError, match="--precision int8 is of an exported file; say which one with --backend"):
        evaluate.main([str(student), "--precision", "int8"])


def test_a_file_that_nothing_has_run_says_so_in_the_card(student: Path) -> None:
    report = written_by_hand(student, "coreml", "float32", runtime=None, title="Core ML", calibration=None)
    del report["latency_ms"]
    (student / report_file("coreml")).write_text(json.dumps(report))
    mention_exports(student)
    card = (student / "README.md").read_text()
    assert "| `coreml/model.mlpackage` | float32 | 1.0 | not run |  |" in card
    assert "Nobody has run `coreml/model.mlpackage` yet: Core ML files run on other machines." in card


# ---- distill --export ------------------------------------------------------------------------------------------------


def test_a_failed_export_leaves_the_student_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("the converter\nfell over")

    monkeypatch.setattr(distill, "export_run", fail)
    with caplog.at_level(logging.WARNING):
        distill.export_finished("onnx", "int8", scenes(), config(tmp_path))
    (message,) = caplog.messages
    assert "was not exported: the converter fell over; try again with: hf-bcd export" in message
    assert "--format onnx --precision int8" in message


def test_an_unknown_export_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no format 'tensorrt'"):
        distill.main(["--dataset_name", "synthetic", "--export", "tensorrt-int8", "--output_dir", str(tmp_path / "x")])


def test_an_export_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="--output_dir is .*out, which is a file; name a folder"):
        export.main(["x", "--output_dir", str(tmp_path / "out")])


def test_an_export_that_the_student_has_not_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: name)
    monkeypatch.setattr(distill, "train_model", lambda *args, **kwargs: pytest.fail("it trained"))
    options = "{size: [48, 64], num_images: {train: 2, validation: 1, test: 1}}"
    names = {
        "dataset_name": "synthetic_detection",
        "dataset_options": options,
        "student": "{backbone: resnet10t, head: gfl}",
    }
    folder = str(tmp_path / "x")
    with pytest.raises(UserError, match="detectors are exported in float32 to onnx, openvino only, not to onnx-int8"):
        distill.main(
            [text for name, value in names.items() for text in (f"--{name}", value)]
            + [
                "--max_steps",
                "1",
                "--report_to",
                "none",
                "--use_cpu",
                "true",
                "--export",
                "onnx-int8",
                "--output_dir",
                folder,
            ]
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter and the quantiser
def test_one_command_ends_with_an_int8_file_and_what_quantised_steps_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the extra `onnx` is not installed")
    monkeypatch.setattr(students, "SECONDS", 0.0)
    student = "{backbone: resnet10t, head: fpn, options: {head_channels: 8, backbone_kwargs: {channels: [8, 8, 16, 16], stem_width: 8}}}"
    options = "{size: [48, 64], num_images: {train: 4, validation: 2, test: 2}}"
    folder = tmp_path / "run"
    distill.main(
        command_line(
            dataset_name="synthetic", dataset_options=options, student=student, max_steps=2, output_dir=folder, quantize="int8",
        )
    )  # fmt: skip
    report = json.loads((folder / "onnx" / "export_int8.json").read_text())
    assert report["calibration"] == {"images": 4, "source": "training split of synthetic"}
    assert report["scores"]["validation"]["images"] == 2
    card = (folder / "README.md").read_text()
    assert "| `onnx/model_int8.onnx` | int8 |" in card and "mIoU (%), validation" in card
    assert (folder / "recipe.yaml").is_file()
    before = report["scores_before_quantised_steps"]["validation"]
    assert before["images"] == 2 and before["pytorch"] != report["scores"]["validation"]["pytorch"]
    assert "the last 1 steps with fake int8" in card
    mean = f"mIoU on the validation split was {100 * before['pytorch']['mean_iou']:.2f} in PyTorch and"
    assert f"`onnx/model_int8.onnx` is of a student whose last steps were quantised: {mean}" in card
    printed = capsys.readouterr().out
    assert "model_int8.onnx" in printed and "the student before its quantised steps: mIoU" in printed


def test_quantised_steps_want_an_int8_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: True)
    plain, quantised = config(tmp_path), config(tmp_path, quantize="int8")
    assert distill.target_to_export(ModelArguments(), plain) is None
    assert distill.target_to_export(ModelArguments(export="onnx"), plain) == ("onnx", "float32")
    assert distill.target_to_export(ModelArguments(), quantised) == ("onnx", "int8")
    assert distill.target_to_export(ModelArguments(export="openvino-int8"), quantised) == ("openvino", "int8")
    with pytest.raises(UserError, match="quantize is for int8 files, but export is onnx: say --export onnx-int8"):
        distill.target_to_export(ModelArguments(export="onnx"), quantised)
