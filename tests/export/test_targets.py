"""Files of every format and precision: what they hold, what is refused, and that they answer like their student."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.student_folder import finished, finished_timm
from tiny import tiny_detector, tiny_segformer
from torch import Tensor, nn

from hf_bcd.adapters import build_adapter
from hf_bcd.export import students, targets
from hf_bcd.export.calibration import Calibration
from hf_bcd.export.opened import OpenedFile, running
from hf_bcd.export.parity import images
from hf_bcd.hub.exports import EXTENSIONS, PRECISIONS, model_file, read_exports, report_file, weights_digest
from hf_bcd.hub.pushing import student_files
from hf_bcd.utils.messages import UserError


SIZE = (64, 96)


def pictures(number: int = 4, size: tuple[int, int] = SIZE) -> Calibration:
    drawn = images(build_adapter(tiny_segformer()), number, *size).split(1)
    return Calibration(lambda: iter(drawn), number, "training split of toys")


def needs(form: str, precision: str) -> None:
    packages = targets.TARGETS[form].packages
    for name in (*packages[""], *packages.get(precision, ())):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed (extra `{form}`)")


# ---- Paths and rows --------------------------------------------------------------------------------------------------


def test_a_file_is_named_by_its_format_and_precision() -> None:
    assert model_file("onnx") == "onnx/model.onnx" and report_file("onnx") == "onnx/export.json"
    assert model_file("openvino", "float16") == "openvino/model_float16.xml"
    assert report_file("litert", "int8") == "litert/export_int8.json"
    names = {model_file(form, precision) for form in EXTENSIONS for precision in PRECISIONS}
    assert len(names) == len(EXTENSIONS) * len(PRECISIONS) and set(targets.TARGETS) == set(EXTENSIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorrt-int8", "no format 'tensorrt'; choose one of onnx, openvino"),
        ("onnx-int4", "ONNX files come in float32, float16, int8 here, not in 'int4'"),
        ("coreml-int8", "Core ML files come in float32, float16 here"),
    ],
)
def test_unknown_targets_are_named_before_anything_runs(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        targets.parse_target(text)


def test_a_target_is_a_format_and_perhaps_a_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: True)
    assert targets.parse_target("onnx-int8") == ("onnx", "int8")
    assert targets.parse_target("openvino") == ("openvino", "float32")


@pytest.mark.parametrize("form", EXTENSIONS)
def test_each_absent_target_names_its_extra(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'hf_bcd\[{form}\]'$"):
        students.export_student("x", form=form)


# ---- Opened files ----------------------------------------------------------------------------------------------------


def test_an_opened_file_gets_what_it_takes() -> None:
    shapes: list[tuple[int, ...]] = []

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        shapes.append(tuple(pixel_values.shape))
        return {"logits": pixel_values.mean((2, 3), keepdim=True)}

    shown = torch.rand(2, 3, 20, 30)
    assert OpenedFile(run)(shown)["logits"].shape == (2, 3, 1, 1)
    found = OpenedFile(run, size=(10, 15), one_by_one=True)(shown)["logits"]
    assert shapes == [(2, 3, 20, 30), (1, 3, 10, 15), (1, 3, 10, 15)]
    torch.testing.assert_close(found, shown.mean((2, 3), keepdim=True), atol=1e-2, rtol=0)


@pytest.mark.parametrize("build", [tiny_segformer, tiny_detector])
def test_an_adapter_predicts_with_the_file_in_place_of_its_model(build: Callable[[], Any]) -> None:
    adapter, shown = build_adapter(build().eval()), 255 * torch.rand(2, 3, 64, 64)
    expected = adapter.predict(shown, [(50, 70)] * 2)
    model = build_adapter(build().eval()).model

    @torch.no_grad()
    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        outputs = model(pixel_values=pixel_values)
        return {name: outputs[name] for name in adapter.exported}

    with torch.no_grad():
        for parameter in adapter.model.parameters():
            parameter.zero_()  # only the file can answer now
    found = running(adapter, OpenedFile(run)).predict(shown, [(50, 70)] * 2)
    for one, other in zip(found, expected, strict=True):
        for key in one if isinstance(one, dict) else [...]:
            torch.testing.assert_close(one[key], other[key])


def test_calibration_pictures_are_read_anew_and_resized() -> None:
    reads: list[int] = []

    def read() -> Any:
        reads.append(1)
        return iter([torch.rand(1, 3, 20, 30), torch.rand(1, 3, 10, 15)])

    found = Calibration(read, 2, "x").at((10, 15))
    for _ in range(2):
        assert [tuple(one.shape) for one in found] == [(1, 3, 10, 15)] * 2
    assert len(reads) == 2 and len(found) == 2


# ---- Refusals --------------------------------------------------------------------------------------------------------


def written_by_hand(folder: Path, form: str = "onnx", precision: str = "int8", **changes: Any) -> dict[str, Any]:
    """A report as an export leaves it, and a file that nothing can open."""
    report = {
        "format": form, "precision": precision, "title": "ONNX", "runtime": "onnxruntime",
        "file": model_file(form, precision), "files": [model_file(form, precision), report_file(form, precision)],
        "size": [48, 64], "fixed_because": None, "bytes": 1_000_000, "pytorch_bytes": 4_000_000, "threads": 1,
        "latency_ms": {"onnxruntime": 2.0, "pytorch": 8.0}, "device": "a CPU", "parity": None,
        "calibration": {"images": 7, "source": "training split of toys"}, "weights_sha256": weights_digest(folder),
    }  # fmt: skip
    path = folder / report_file(form, precision)
    path.parent.mkdir(exist_ok=True)
    (folder / model_file(form, precision)).write_bytes(b"\0")
    path.write_text(json.dumps(report | changes))
    return report | changes


def test_int8_without_pictures_names_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="name them with --data_dir or --dataset_name"):
        students.export_student("x", precision="int8")


def test_detectors_are_refused_where_nobody_has_tried_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: True)
    tiny_detector().save_pretrained(tmp_path)
    for form, precision in (("litert", "float32"), ("onnx", "int8")):
        with pytest.raises(UserError, match=f"in float32 to onnx, openvino only, not to {form}-{precision}"):
            students.export_student(str(tmp_path), form=form, precision=precision, calibration=pictures())


def test_what_a_converter_cannot_hold_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyError("no kernel for this")

    monkeypatch.setattr(targets, "find_spec", lambda name: True)
    monkeypatch.setitem(targets.TARGETS, "litert", targets.TARGETS["litert"]._replace(write=fail))
    with pytest.raises(
        UserError, match=r"model.tflite: LiteRT cannot hold this model in float32: KeyError: .no kernel"
    ):
        students.export_student(str(finished(tmp_path / "x")), form="litert", size=(64, 64))


def test_a_file_of_another_student_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: True)
    folder = finished(tmp_path / "x")
    with pytest.raises(UserError, match=r"model_int8.onnx: no such file.*hf-bcd export .* --precision int8"):
        students.open_export(folder, "onnx", "int8")
    written_by_hand(folder, weights_sha256="of somebody else")
    with pytest.raises(UserError, match=r"model_int8.onnx belongs to another student"):
        students.open_export(folder, "onnx", "int8")


def test_a_push_takes_all_files_of_these_weights(tmp_path: Path) -> None:
    folder = finished(tmp_path / "x")
    written_by_hand(folder)
    written_by_hand(folder, "openvino", "float16", weights_sha256="of somebody else")
    assert [report["precision"] for report in read_exports(folder)] == ["int8"]
    pushed = [name for name in student_files(folder) if "/" in name and not name.startswith("figures")]
    assert pushed == ["onnx/export_int8.json", "onnx/model_int8.onnx"]


@pytest.mark.parametrize(
    ("precision", "parity", "right"),
    [
        ("float32", {"max_difference": 1e-5, "max_logit": 1.0, "argmax_agreement": 1.0}, True),
        ("float32", {"max_difference": 0.5, "max_logit": 1.0, "argmax_agreement": 0.9}, False),
        ("int8", {"max_difference": 0.5, "max_logit": 1.0, "argmax_agreement": 0.9}, True),
        ("float16", {"max_difference": float("inf"), "max_logit": 1.0, "argmax_agreement": 0.9}, False),
        ("int8", {"max_difference": float("nan"), "max_logit": 1.0, "argmax_agreement": 0.9}, False),
    ],
)
def test_less_precision_may_differ_but_must_be_numbers(precision: str, parity: dict[str, float], right: bool) -> None:
    if right:
        students.check_parity(Path("x"), parity, precision)
    else:
        with pytest.raises(UserError, match="x does not compute what the model computes"):
            students.check_parity(Path("x"), parity, precision)


# ---- Real files ------------------------------------------------------------------------------------------------------

RUNNABLE = [(form, precision) for form, row in targets.TARGETS.items() if row.runtime for precision in row.precisions]


@pytest.fixture(scope="module", params=[finished_timm, finished], ids=["timm", "segformer"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("run") / "x")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of converters
@pytest.mark.parametrize(("form", "precision"), RUNNABLE)
def test_a_file_answers_like_its_student(
    form: str, precision: str, student: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs(form, precision)
    monkeypatch.setattr(students, "SECONDS", 0.0)
    calibration = pictures() if precision == "int8" else None
    folder, report = students.export_student(
        str(student), form=form, precision=precision, calibration=calibration, size=SIZE
    )
    assert folder == student and json.loads((folder / report_file(form, precision)).read_text())["format"] == form
    assert report["bytes"] > 0 and set(report["latency_ms"]) == {targets.TARGETS[form].runtime, "pytorch"}
    assert report["threads"] == 1 and report["weights_sha256"] == weights_digest(student)
    assert all((folder / name).is_file() for name in report["files"])
    assert report["calibration"] == ({"images": 4, "source": "training split of toys"} if calibration else None)
    file, _ = students.open_export(folder, form, precision)
    adapter = students.load_adapter(str(student)).eval()
    shown = images(adapter, 2, *SIZE)  # of the kind that found the scales
    with torch.no_grad():
        expected = adapter.model(pixel_values=shown).logits
    found = file(shown)["logits"]
    assert found.shape == expected.shape and found.dtype == torch.float32
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < {"float32": 1e-4, "float16": 2e-2, "int8": 0.3}[precision]
    assert error > 0 or precision == "float32", "nothing was rounded"
    assert "out-of-range" not in caplog.text, "a warning for each norm is noise"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor], Tensor]:
    """The float32 file of a MobileNet in small, pictures, and its answers; a depthwise channel has a thousand times the weights."""
    needs("onnx", "int8")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU6(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU6(), nn.Conv2d(32, 4, 1)
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[0] = model[0].bias[0] = 0.0  # nothing arrives at it, as behind a BatchNorm without variance
        model[2].weight[0] *= 1000
        shown = [6 * picture for picture in torch.randn(8, 3, 16, 16).split(1)]
        answers = model(torch.cat(shown))
    path = tmp_path_factory.mktemp("uneven") / "model.onnx"
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(model, (shown[0],), path, dynamo=True, external_data=False, verbose=False, **names)
    return path, shown, answers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of converters
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_int8_holds_channels_of_very_different_size(
    form: str, uneven: tuple[Path, list[Tensor], Tensor], tmp_path: Path
) -> None:
    needs(form, "int8")
    source, shown, expected = uneven
    path = tmp_path / f"model.{EXTENSIONS[form]}"
    targets.TARGETS[form].write(path, source, "int8", shown)
    file = targets.TARGETS[form].open(path, 1)
    found = torch.cat([file(picture)["logits"] for picture in shown])
    assert 0 < (found - expected).square().mean() / expected.var() < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of converters
def test_dense_weights_have_seven_bits_so_that_older_cpus_do_not_overflow(
    uneven: tuple[Path, list[Tensor], Tensor], tmp_path: Path
) -> None:
    import onnx

    source, shown, _ = uneven
    targets.TARGETS["onnx"].write(tmp_path / "model.onnx", source, "int8", shown)
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    largest = {
        tensor.shape: abs(tensor.astype(int)).max()
        for tensor in tensors
        if tensor.dtype == "int8" and tensor.ndim == 4
    }
    assert largest == {(32, 3, 3, 3): 64, (32, 1, 3, 3): 127, (4, 32, 1, 1): 64}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_core_ml_is_written_and_marked_as_not_run(student: Path) -> None:
    needs("coreml", "float32")
    _, report = students.export_student(str(student), form="coreml", size=SIZE)
    assert report["parity"] is None and "latency_ms" not in report and report["bytes"] > 0
    with pytest.raises(UserError, match="run on Apple's systems only"):
        students.open_export(student, "coreml", "float32")
