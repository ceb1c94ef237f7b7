"""`hf-bcd export`: the file computes what the model computes, at every size it claims, and tells what it is."""

import json
import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters.adapter_tiny_models import dpt, espnet, labels, mask2former, mobilenet_v2, mobilevit, resnet, upernet
from hub.student_folder import finished, finished_timm
from PIL import Image
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from tiny import tiny_segformer
from torch import nn
from torch.onnx.errors import OnnxExporterError
from transformers import PreTrainedModel

from hf_bcd import TimmSegmentationModel
from hf_bcd.adapters import build_adapter
from hf_bcd.card.usage import export_sections, mention_exports
from hf_bcd.commands.export import main
from hf_bcd.export import onnx as export
from hf_bcd.export import parity as comparing
from hf_bcd.export import students, targets
from hf_bcd.export.exportable import LogitsModel, convolve_same, to_onnx, why_fixed
from hf_bcd.hub.exports import read_export
from hf_bcd.hub.pushing import name_in_examples, student_files
from hf_bcd.utils.messages import UserError


onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
for name in ("onnx", "onnxscript"):
    pytest.importorskip(name, reason="the extra `onnx` is not installed")

ROOT = Path(__file__).parents[2]
INFERENCE = ROOT / "examples" / "inference.py"


def timm(head: str, output_stride: int) -> TimmSegmentationModel:
    narrow = {"channels": [8, 8, 16, 16], "stem_width": 8}
    return TimmSegmentationModel.from_backbone(
        "resnet10t", head=head, head_channels=8, output_stride=output_stride, backbone_kwargs=narrow, **labels()
    )


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Weights and statistics with which activations neither vanish nor explode, so that a difference would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(pixel_values=torch.randn(4, 3, 96, 96, generator=generator))
    return model.eval()


def export_to(folder: Path, model: PreTrainedModel, size: tuple[int, int]) -> tuple[Path, str | None, dict]:
    path = folder / "model.onnx"
    return path, *export.write_model(path, build_adapter(model), size)


def session_of(path: Path) -> "onnxruntime.InferenceSession":
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_same(path: Path, model: nn.Module, *shape: int) -> None:
    """The file's logits on unseen noise are those of the untouched PyTorch model."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixel_values=images).logits.numpy()
    (found,) = session_of(path).run(["logits"], {"pixel_values": images.numpy()})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.999
    assert len(np.unique(expected.argmax(1))) > 1, "one class everywhere tells nothing"


# ---- Families --------------------------------------------------------------------------------------------------------

FREE = {
    "psp": lambda: timm("psp", 8),
    "deeplabv3plus": lambda: timm("deeplabv3plus", 16),
    "fpn": lambda: timm("fpn", 32),
    "espnet": espnet,
    "segformer": tiny_segformer,
    "mobilenet_v2": lambda: mobilenet_v2(16, tf_padding=True),
    "upernet": lambda: upernet(resnet()),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FREE)
def test_batch_height_and_width_are_free(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lively(FREE[family]())
    path, fixed_because, parity = export_to(tmp_path, model, (96, 64))
    assert fixed_because is None and parity["max_difference"] < 1e-4 * max(1, parity["max_logit"])
    assert parity["sizes"] == [(72, 128), (96, 64), (121, 97)] and parity["argmax_agreement"] >= 0.999
    (put,) = session_of(path).get_inputs()
    assert (put.name, put.type, put.shape) == ("pixel_values", "tensor(float)", ["batch", 3, "height", "width"])
    for shape in ((3, 3, 70, 115), (1, 3, 64, 65)):
        assert_same(path, model, *shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "reason"),
    [(dpt, "position embeddings belong to one size"), (mobilevit, "computes something else at other sizes")],
)
def test_families_with_a_fixed_size_say_so(build: Callable[[], PreTrainedModel], reason: str, tmp_path: Path) -> None:
    model = lively(build())
    path, fixed_because, parity = export_to(tmp_path, model, (96, 96))
    assert fixed_because is not None and reason in fixed_because and parity["sizes"] == [(96, 96)]
    assert session_of(path).get_inputs()[0].shape == ["batch", 3, 96, 96]
    assert session_of(path).get_modelmeta().custom_metadata_map["size"] == f"96 x 96, because {fixed_because}"
    assert_same(path, model, 3, 3, 96, 96)


@pytest.mark.parametrize(
    ("build", "side", "message"),
    [
        (mask2former, 64, "Mask2FormerForUniversalSegmentation gives no logits for each pixel"),
        (tiny_segformer, 8, "takes no images of 8 x 8 pixels; choose another --size: .*Kernel size"),
    ],
)
def test_what_cannot_be_exported_is_refused(build: Callable[[], PreTrainedModel], side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        students.check_runs(build_adapter(build().eval()), torch.randn(1, 3, side, side))


# ---- Toys that show one thing each -----------------------------------------------------------------------------------


class Toy(nn.Module):
    """As much of a student as an export needs: `config`, and `logits` in the output."""

    def __init__(self, *layers: nn.Module, **config: object):
        super().__init__()
        self.layers, self.config = nn.Sequential(*layers), SimpleNamespace(**config)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layers(pixel_values))


@pytest.mark.parametrize("size", [(9, 12), (16, 7)])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), ((3, 5), (2, 3), 1)])
def test_our_same_padding_is_that_of_timm(
    size: tuple[int, int], kernel: int, stride: int | tuple[int, int], dilation: int
) -> None:
    theirs = Conv2dSame(4, 6, kernel, stride=stride, dilation=dilation, groups=2, bias=False)
    arguments = (torch.randn(2, 4, *size), theirs.weight, list(theirs.stride), list(theirs.dilation), 2)
    torch.testing.assert_close(convolve_same(*arguments), theirs(arguments[0]))
    torch.library.opcheck(convolve_same, arguments, test_utils="test_faketensor")


@pytest.mark.slow
def test_same_padding_and_pooling_keep_sizes_free(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [
        Conv2dSame(3, 8, 3, stride=2),
        Conv2dSame(8, 8, 5, stride=2, groups=8, bias=False),
        nn.AdaptiveAvgPool2d(3),
    ]
    toy = Toy(*layers, nn.Conv2d(8, 2, 1)).eval()
    to_onnx(LogitsModel(toy), torch.randn(2, 3, 32, 40), dynamic_size=True).save(tmp_path / "model.onnx")
    for shape in ((1, 3, 32, 40), (2, 3, 33, 47), (1, 3, 50, 31)):
        assert_same(tmp_path / "model.onnx", toy, *shape)
    assert layers[0].stride == (2, 2) and "forward" not in vars(layers[2]), "the model itself has been changed"


def test_padding_by_the_layer_before_is_not_added_twice() -> None:
    """MobileNetV2 of transformers pads outside of the convolution, by the stride and kernel that the layer names."""
    layer = LogitsModel(Toy(nn.Conv2d(3, 4, 3, stride=2), tf_padding=True)).model.layers[0]
    assert layer.stride == layer.kernel_size == (1, 1)
    assert layer(torch.randn(1, 3, 9, 10)).shape == (1, 4, 5, 5)


def test_padding_that_cannot_be_left_open_is_known_before() -> None:
    assert why_fixed(Toy(Conv2dSame(3, 4, 3, stride=2), MaxPool2dSame(3, stride=1))) is None
    assert why_fixed(Toy(MaxPool2dSame(3, stride=2))) == "its MaxPool2dSame computes its padding from the size"


@pytest.mark.parametrize(
    ("raises", "differences", "fixed_because"),
    [
        (True, [0.0], "the exporter cannot leave the sizes of this architecture open"),
        (False, [1.0, 0.0], "exported with free sizes, this architecture computes something else at other sizes"),
        (False, [0.0], None),
        (False, [1.0, 1.0], ""),
    ],
)
def test_a_file_is_free_then_fixed_then_an_error_and_kept(
    raises: bool, differences: list[float], fixed_because: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(path: Path, *arguments: object) -> None:
        if raises and arguments[-1] is None:
            raise OnnxExporterError("too hard")
        path.touch()

    found = [{"max_difference": value, "max_logit": 1.0, "argmax_agreement": 1.0} for value in differences]
    monkeypatch.setattr(export, "save", save)
    monkeypatch.setattr(export, "compare", lambda *_: found.pop(0))
    monkeypatch.setattr(export, "open_file", lambda path: None)
    adapter, path = build_adapter(tiny_segformer()), tmp_path / "model.onnx"
    if fixed_because != "":
        assert export.write_model(path, adapter, (32, 32))[0] == fixed_because
    else:
        with pytest.raises(ValueError, match=r"model.onnx does not compute what the model computes.*The file is kept"):
            export.write_model(path, adapter, (32, 32))
    assert path.is_file()


@pytest.mark.parametrize(
    ("difference", "largest", "agreement", "same"),
    [(9e-5, 0.1, 1, True), (2e-4, 0.1, 1, False), (2e-4, 5, 1, True), (6e-4, 5, 1, False), (0, 5, 0.998, False)],
)
def test_what_counts_as_the_same(difference: float, largest: float, agreement: float, same: bool) -> None:
    parity = {"max_difference": difference, "max_logit": largest, "argmax_agreement": agreement}
    assert comparing.agrees(parity) == same


# ---- A student's folder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished student after `hf-bcd export`, with a card that was there before."""
    folder = finished_timm(tmp_path_factory.mktemp("run") / "x")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\n## How it was distilled\n\nLong.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students, "SECONDS", 0.0)
        main([str(folder)])
    mention_exports(folder)
    return folder


@pytest.mark.slow
def test_the_report_and_the_file_tell_what_they_hold_and_nothing_of_this_machine(student: Path) -> None:
    report, path = json.loads((student / "onnx" / "export.json").read_text()), student / "onnx" / "model.onnx"
    assert report["size"] == [48, 64] and report["fixed_because"] is None and report["opset"] == 18
    assert report["bytes"] == path.stat().st_size and report["versions"]["onnxruntime"] == onnxruntime.__version__
    assert report["parity"]["max_difference"] < 1e-3 and len(report["parity"]["sizes"]) == 3
    assert all(report["latency_ms"][name] > 0 for name in ("onnxruntime", "pytorch"))
    metadata = session_of(path).get_modelmeta().custom_metadata_map
    assert metadata["size"] == "any" and json.loads(metadata["id2label"])["1"] == "ground"
    assert json.loads(metadata["image_mean"]) == [0.485, 0.456, 0.406]
    content = path.read_bytes()
    assert not any(private in content for private in (bytes(ROOT), sys.prefix.encode(), b"site-packages"))


def test_the_command_says_what_came_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    report = {
        "format": "onnx", "runtime": "onnxruntime", "threads": 1, "pytorch_bytes": 3_500_000,
        "size": [48, 64], "fixed_because": "a reason", "opset": 18, "bytes": 2_500_000,
        "parity": {"max_difference": 2e-6, "max_logit": 3.0, "argmax_agreement": 1.0},
        "latency_ms": {"onnxruntime": 1.23, "pytorch": 4.56},
    }  # fmt: skip
    asked: dict = {}
    monkeypatch.setattr(
        "hf_bcd.commands.export.export_run", lambda *_, **options: asked.update(options) or (tmp_path, report)
    )
    main(["me/x", "--trust_remote_code", "--revision", "v2"])
    assert asked == {
        "size": None, "revision": "v2", "trust_remote_code": True, "output_dir": None, "calibration_images": 200
    }  # fmt: skip
    printed, fixed = capsys.readouterr().out, "fixed at 48 x 64, because a reason"
    for words in ("model.onnx: 2.5 MB, PyTorch 3.5 MB, opset 18", fixed, "2.0e-06", "100.00 %", "1.2 ms, PyTorch 4.6"):
        assert words in printed


@pytest.mark.slow
def test_the_card_mentions_the_export_once_and_its_example_runs(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (student / "README.md").read_text()
    assert card.count("## ONNX\n") == 1 and card.index("## ONNX\n") < card.index("## How it was distilled\n\nLong.\n")
    assert "Batch, height and width are free." in card and "threads: 1" in card
    assert 'cached_file("me/y", revision="v2", filename=' in name_in_examples(card, "me/y", "v2")

    example = card.split("```python\n")[-1].split("```")[0]  # of a student that lies beside, and on no Hub
    monkeypatch.chdir(student.parent)
    Image.new("RGB", (70, 50)).save("picture.jpg")
    scope: dict = {}
    exec(example.replace(", trust_remote_code=True", ""), scope)
    assert scope["logits"].shape == (1, 8, 12, 16)  # the processor resizes to 48 x 64


@pytest.mark.slow
def test_the_card_says_how_to_feed_a_file_of_one_size(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads((student / "onnx" / "export.json").read_text()) | {"fixed_because": "windows are fixed"}
    monkeypatch.setattr("hf_bcd.card.usage.read_exports", lambda folder: [report])
    section = export_sections(student, "me/x")
    assert "images must have 48 x 64 pixels, because windows are fixed." in section
    assert 'do_resize=True, size={"height": 48, "width": 64}, return_tensors="np")' in section


@pytest.mark.slow
def test_a_push_takes_the_export_along_unless_it_is_of_other_weights(
    student: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert [path for path in student_files(student) if path.startswith("onnx/")] == [
        "onnx/export.json",
        "onnx/model.onnx",
    ]
    weights = student / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with caplog.at_level(logging.WARNING):
            assert read_export(student) is None and export_sections(student, "me/x") == ""
            assert not any(path.startswith("onnx/") for path in student_files(student))
        assert "belongs to other weights and is left out" in caplog.text
    finally:
        weights.write_bytes(content)


def test_a_report_of_an_earlier_version_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "export.json").write_text('{"weights_sha256": null, "bytes": 3}')
    with caplog.at_level(logging.WARNING):
        assert read_export(tmp_path) is None
    assert "is the report of an earlier version and is left out; run `hf-bcd export` again" in caplog.text


def test_the_size_is_the_one_that_was_measured_then_that_of_the_processor(tmp_path: Path) -> None:
    folder, adapter = finished(tmp_path / "x"), build_adapter(tiny_segformer())

    def size() -> tuple[int, int]:
        return students.student_size(str(folder), adapter)

    assert size() == (48, 64)
    for processor, expected in (
        ({"do_resize": True, "size": {"shortest_edge": 40, "longest_edge": 160}}, (40, 40)),
        ({"do_resize": False, "size": {"height": 48, "width": 64}}, (512, 512)),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        assert size() == expected
    (folder / "preprocessor_config.json").unlink()
    assert size() == (512, 512)
    cost = {"student": {"size": [360, 480]}, "teacher": {"size": [720, 960]}}
    (folder / "results.json").write_text(json.dumps({"protocol": {"cost": cost}}))
    assert size() == (360, 480)
    assert students.student_size(str(folder), build_adapter(dpt())) == (96, 96)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None if name in ("onnxscript", "nncf") else True)
    with pytest.raises(UserError, match=r"^ONNX needs onnxscript: pip install 'hf_bcd\[onnx\]'$"):
        students.export_student("x")
    with pytest.raises(UserError, match=r"^OpenVINO needs onnxscript, nncf: pip install 'hf_bcd\[openvino\]'$"):
        students.export_student("x", form="openvino", precision="int8")


# ---- The example -----------------------------------------------------------------------------------------------------


def overlay(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> np.ndarray:
    """The picture that examples/inference.py draws for the student of a folder, in the working directory."""
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save("in.png")
    monkeypatch.setattr(sys, "argv", ["inference.py", str(folder), "in.png", "--output", "out.png", *options])
    runpy.run_path(str(INFERENCE))
    with Image.open("out.png") as picture:
        return np.asarray(picture)


@pytest.mark.slow
def test_the_example_draws_the_same_with_and_without_onnx(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = [overlay(student, monkeypatch, *options) for options in ([], ["--onnx"])]
    assert drawn[0].shape == (50, 70, 3) and capsys.readouterr().out.count("%") > 1
    assert (drawn[0] == drawn[1]).all(-1).mean() > 0.99

    folder = finished_timm(tmp_path / "x")  # the same with a file of one size
    adapter = students.load_adapter(str(folder)).eval()
    (folder / "onnx").mkdir()
    export.save(folder / "onnx" / "model.onnx", LogitsModel(adapter.model), adapter, (32, 96), "it is a test")
    assert overlay(folder, monkeypatch, "--onnx").shape == (50, 70, 3)
