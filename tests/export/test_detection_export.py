"""`hf-bcd export` of detectors: the file finds what the model finds, and report, card and command say so."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapters.adapter_tiny_detectors import LABELS, SQUARES, tiny_detector
from adapters.adapter_tiny_models import images
from torch import Tensor

from hf_bcd.adapters import build_adapter, image_processor
from hf_bcd.card.usage import mention_exports
from hf_bcd.commands.export import main
from hf_bcd.export import onnx as export
from hf_bcd.export import parity as comparing
from hf_bcd.export import students
from hf_bcd.utils.masks import encode
from hf_bcd.utils.messages import UserError


onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
for name in ("onnx", "onnxscript"):
    pytest.importorskip(name, reason="the extra `onnx` is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gfl", "d_fine", "mask_rcnn", "rt_detr_v2", "rf_detr", "detr-timm", "deformable_detr-timm"]
)
def test_the_file_finds_what_the_model_finds(name: str, tmp_path: Path) -> None:
    adapter, size = build_adapter(tiny_detector(name)), (96, 96) if name in SQUARES else (64, 96)
    path = tmp_path / "model.onnx"
    fixed_because, parity = export.write_detector(path, adapter, size)
    assert fixed_because == "detectors are exported for one picture of one size"
    assert parity["sizes"] == [size] and parity["detections"] >= 3
    assert parity["matched"] == parity["detections"] == parity["file_detections"]
    assert parity["max_pixels"] <= 0.5 and parity["max_score"] <= 1e-3
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (put,), outputs = session.get_inputs(), session.get_outputs()
    assert (put.name, put.shape) == ("pixel_values", [1, 3, *size])
    masks = ["pred_masks"] if name == "mask_rcnn" else []
    assert [output.name for output in outputs] == ["logits", "pred_boxes", *masks] and outputs[1].shape[2] == 4
    assert ("min_mask_iou" in parity) == bool(masks) and parity.get("min_mask_iou", 1) >= 0.99
    pixel_values = adapter.shown(images(*size)[1:])  # a picture that nobody has tried
    (expected,) = adapter.predict(images(*size)[1:], [(300, 400)])
    found = [torch.from_numpy(x) for x in session.run(None, {"pixel_values": pixel_values.numpy()})]
    if name in ("gfl", "mask_rcnn"):  # the others' queries of equal score may come in any order
        with torch.no_grad():
            output: Any = adapter.model(pixel_values=pixel_values)
        for tensor, expected_tensor in zip(found[:2], (output.logits, output.pred_boxes), strict=True):
            torch.testing.assert_close(tensor, expected_tensor, rtol=1e-3, atol=1e-3)
        assert not masks or ((found[2] > 0) == (output.pred_masks > 0)).float().mean() > 0.999
    named = SimpleNamespace(**dict(zip(adapter.exported, found, strict=True)))
    (again,) = adapter.detections(named, [(300, 400)])
    torch.testing.assert_close(again["scores"], expected["scores"], rtol=0, atol=1e-3)


def answers(boxes: list[list[float]], scores: list[float], labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).view(-1, 4), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


ONE, TWO = [10.0, 10, 20, 20], [30.0, 30, 50, 40]
PAIRS = {
    "the same": (answers([ONE, TWO], [0.9, 0.4], [0, 1]), (2, 2, 2)),
    "in another order": (answers([TWO, ONE], [0.4, 0.9], [1, 0]), (2, 2, 2)),
    "moved a little": (answers([[10.4, 10, 20, 20], TWO], [0.9, 0.4005], [0, 1]), (2, 2, 2)),
    "moved too far": (answers([[10.6, 10, 20, 20], TWO], [0.9, 0.4], [0, 1]), (2, 2, 1)),
    "another score": (answers([ONE, TWO], [0.9, 0.41], [0, 1]), (2, 2, 1)),
    "another class": (answers([ONE, TWO], [0.9, 0.4], [0, 0]), (2, 2, 1)),
    "one less": (answers([ONE], [0.9], [0]), (2, 1, 1)),
    "one more": (answers([ONE, TWO, ONE], [0.9, 0.4, 0.35], [0, 1, 2]), (2, 3, 2)),
    "one more that is not sure": (answers([ONE, TWO, ONE], [0.9, 0.4, 0.2], [0, 1, 2]), (2, 2, 2)),
    "twice the same": (answers([ONE, ONE], [0.9, 0.9], [0, 0]), (2, 2, 1)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_what_counts_as_the_same_detection(case: str) -> None:
    found, counts = PAIRS[case]
    given = iter([answers([ONE, TWO], [0.9, 0.4], [0, 1]), found])
    adapter = SimpleNamespace(
        model=lambda **_: None, detections=lambda outputs, sizes: [next(given)], finds_masks=False
    )
    parity = comparing.compare_detections(lambda _: {}, adapter, [torch.zeros(1, 3, 64, 64)])
    assert (parity["detections"], parity["file_detections"], parity["matched"]) == counts


def test_masks_must_be_the_same_too() -> None:
    masks = np.zeros((3, 64, 64), bool)  # the last one is empty
    masks[0, 10:30, 10:30], masks[1, 10:30, 12:30] = True, True
    ones = [answers([ONE], [0.9], [0]) | {"masks": [encode(mask)]} for mask in masks]
    for expected, found, matched in ((0, 0, 1), (0, 1, 0), (0, 2, 0), (2, 0, 0), (2, 2, 1)):
        given = iter([ones[expected], ones[found]])
        adapter = SimpleNamespace(
            model=lambda **_: None, detections=lambda outputs, sizes, given=given: [next(given)], finds_masks=True
        )
        parity = comparing.compare_detections(lambda _: {}, adapter, [torch.zeros(1, 3, 64, 64)])
        assert parity["matched"] == matched and parity["min_mask_iou"] == 1  # of those that are matched


def test_a_model_that_is_sure_of_nothing_is_compared_by_its_best() -> None:
    unsure = answers([ONE, TWO], [0.02, 0.01], [0, 1])
    given = iter([unsure, answers([ONE, ONE], [0.02, 0.01], [0, 1])])
    adapter = SimpleNamespace(
        model=lambda **_: None, detections=lambda outputs, sizes: [next(given)], finds_masks=False
    )
    parity = comparing.compare_detections(lambda _: {}, adapter, [torch.zeros(1, 3, 64, 64)])
    assert (parity["detections"], parity["matched"]) == (2, 1)


@pytest.mark.parametrize("finest", [True, False])
def test_a_detector_of_small_things_is_compared_on_finer_pictures(
    finest: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def compared(model: Any, adapter: Any, pictures: Any) -> dict[str, Any]:
        shown.append(float(torch.cat(pictures).diff(dim=-1).abs().mean()))
        found = int(finest and len(shown) == len(comparing.BLOBS) - 1)
        return {"detections": found, "file_detections": found, "matched": found}

    for name in ("save", "open_file"):
        monkeypatch.setattr(export, name, lambda *_: None)
    monkeypatch.setattr(comparing, "compare_detections", compared)
    _, parity = export.write_detector(tmp_path / "x", build_adapter(tiny_detector("gfl")), (64, 64))
    assert parity["detections"] == finest and len(shown) == len(comparing.BLOBS) - finest and sorted(shown) == shown


def test_a_file_that_finds_something_else_is_an_error_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = {"sizes": [(64, 64)], "detections": 3, "file_detections": 3, "matched": 2}
    monkeypatch.setattr(export, "save", lambda path, *_: path.touch())
    monkeypatch.setattr(export, "compare_pictures", lambda *_: parity)
    monkeypatch.setattr(export, "open_file", lambda path: None)
    with pytest.raises(UserError, match="does not find what the model finds.*The file is kept"):
        export.write_detector(tmp_path / "model.onnx", build_adapter(tiny_detector("gfl")), (64, 64))
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet"])
def test_report_card_and_command_speak_of_boxes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    adapter, folder = build_adapter(tiny_detector(name, LABELS)), tmp_path / "x"
    adapter.model.save_pretrained(folder)
    image_processor(adapter, shortest_edge=None, square_size=96).save_pretrained(folder)
    (folder / "README.md").write_text("# A student\n\n## How it was distilled\n\nLong.\n")
    monkeypatch.setattr(students, "SECONDS", 0.0)
    main([str(folder)])
    printed = capsys.readouterr().out
    report: dict[str, Any] = json.loads((folder / "onnx" / "export.json").read_text())
    assert report["size"] == [96, 96] and report["parity"]["matched"] == report["parity"]["detections"] > 0
    count = report["parity"]["detections"]
    for words in (f"{count} of {count} detections are those of PyTorch", "fixed at 96 x 96, because detectors are"):
        assert words in printed
    assert "batch: free" not in printed

    mention_exports(folder)
    card = (folder / "README.md").read_text()
    assert card.count("## ONNX\n") == 1 and "`logits` and `pred_boxes` in DETR's form" in card
    assert f"Of {count} detections in random images, {count} are those of PyTorch" in card and "logits on" not in card
    report["parity"] |= {"detections": 0, "file_detections": 0, "matched": 0}
    (folder / "onnx" / "export.json").write_text(json.dumps(report))
    mention_exports(folder)
    unsure = (folder / "README.md").read_text()
    assert "so that the file was not compared with PyTorch. Latency" in unsure and "Of 0 detections" not in unsure
    example = card.split("```python\n")[-1].split("```")[0].replace('"x"', json.dumps(str(folder)))
    from PIL import Image

    picture = Image.fromarray(images(70, 90)[0].permute(1, 2, 0).numpy())
    monkeypatch.chdir(tmp_path)
    picture.save("picture.jpg", quality=100)
    scope: dict[str, Any] = {}
    exec(example.replace(", trust_remote_code=True", "").replace("threshold=0.5", "threshold=0.0"), scope)
    boxes = scope["found"]["boxes"].numpy()
    with Image.open("picture.jpg") as shown:
        size = shown.size
    assert len(boxes) > 0 and np.isfinite(boxes).all() and boxes[:, 2].max() <= 1.5 * size[0]
