"""`hf-bcd predict`: masks hold ids, overlays and a sheet show them, for maps and boxes, from weights and files."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters.adapter_tiny_detectors import LABELS, tiny_detector
from hub.student_folder import finished
from PIL import Image
from transformers import DeformableDetrImageProcessor

from hf_bcd.adapters.loading import load_adapter
from hf_bcd.commands.predict import main
from hf_bcd.data import rows
from hf_bcd.export.opened import OpenedFile
from hf_bcd.figures.predictions import palette_file, palette_picture
from hf_bcd.runs import predicting
from hf_bcd.runs.tiles import predict_tiled
from hf_bcd.utils.messages import UserError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder, generator = tmp_path / "pictures", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for name, size in (("a.jpg", (50, 70)), ("more/b.png", (96, 64))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_a_folder_gives_masks_overlays_a_sheet_and_numbers(pictures: Path, tmp_path: Path) -> None:
    student, out = finished(tmp_path / "x"), tmp_path / "out"
    main([str(student), str(pictures), "--output", str(out), "--image_size", "48"])
    content = json.loads((out / "predictions.json").read_text())
    assert list(content["pictures"]) == ["a.jpg", "more/b.png"] and content["backend"] == "pytorch"
    adapter = load_adapter(str(student)).eval()
    transform = predicting.shown_as_saved(str(student), adapter, predicting.TASKS[adapter.task], 48, False)
    for name, size in (("a", (50, 70)), ("more/b", (96, 64))):
        with Image.open(out / "masks" / f"{name}.png") as mask, Image.open(out / "overlays" / f"{name}.png") as drawn:
            ids, said = np.asarray(mask), content["pictures"][f"{name}.{'jpg' if name == 'a' else 'png'}"]
            assert mask.mode == "P" and drawn.mode == "RGB" and drawn.size == mask.size == size[::-1]
        with Image.open(pictures / f"{name}.{'jpg' if name == 'a' else 'png'}") as picture:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        (expected,) = adapter.predict(transform.show(pixels)[None], [size])
        np.testing.assert_array_equal(ids, expected.numpy())
        assert sum(said["pixels"].values()) == pytest.approx(1) and said["classes"] == np.unique(ids).tolist()
    with Image.open(out / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 100


@pytest.mark.parametrize("tiles", [[], ["--tile", "64", "--overlap", "16"]])
def test_a_picture_that_cannot_be_read_is_left_out_unless_it_is_the_only_one(
    tiles: list[str], pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    student, out = finished(tmp_path / "x"), tmp_path / "out"
    (pictures / "a.jpg").write_bytes(b"half a file")
    main([str(student), str(pictures), "--output", str(out), *tiles])
    content = json.loads((out / "predictions.json").read_text())
    assert list(content["pictures"]) == ["more/b.png"] and list(content["unreadable"]) == ["a.jpg"]
    assert "left out: " in caplog.text and "1 pictures, 1 cannot be read" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"a\.jpg: cannot be decoded"):
        main([str(student), str(pictures / "a.jpg"), "--output", str(out), *tiles])


def test_a_single_picture_and_tiles(pictures: Path, tmp_path: Path) -> None:
    student, out = finished(tmp_path / "x"), tmp_path / "out"
    main([str(student), str(pictures / "a.jpg"), "--output", str(out), "--tile", "64", "--overlap", "16"])
    with Image.open(out / "masks" / "a.png") as mask:
        assert mask.size == (70, 50) and np.asarray(mask).max() < 8


@pytest.mark.parametrize("installed", [True, False])
def test_tiles_write_one_mask_with_and_without_libvips(
    installed: bool, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed and find_spec("pyvips") is None:
        pytest.skip("pyvips is not installed")
    student, out = finished(tmp_path / "x"), tmp_path / "out"
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: find_spec(name) if installed else None)
    monkeypatch.setattr(predicting, "LARGEST_OVERLAY", 30)
    main([str(student), str(pictures), "--output", str(out), "--tile", "32", "--overlap", "8"])
    adapter = load_adapter(str(student)).eval()
    content = json.loads((out / "predictions.json").read_text())
    for name, shrunk in (("a.jpg", (24, 17)), ("more/b.png", (16, 24))):
        picture = predicting.DecodedRows(pictures / name)
        expected = np.concatenate(list(predict_tiled(adapter, picture, 32, 8)))
        path = (out / "masks" / name).with_suffix(".png")
        with Image.open(path) as mask, Image.open((out / "overlays" / name).with_suffix(".png")) as drawn:
            assert mask.mode == "P" and drawn.size == shrunk
            np.testing.assert_array_equal(np.asarray(mask), expected)
            palette = palette_picture(expected, adapter.num_labels).getpalette()
            assert palette is not None and mask.getpalette() == palette
        ids, counts = np.unique(expected, return_counts=True)
        said = content["pictures"][name]
        assert said["classes"] == ids.tolist() and [*said["pixels"].values()] == (counts / expected.size).tolist()


def test_a_mask_is_never_seen_half_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), palette_file(tmp_path / "a.png", 4, 4, 3) as write:
        write(np.zeros((2, 4), np.uint8))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_boxes_are_drawn_and_listed(pictures: Path, tmp_path: Path) -> None:
    student, out = tmp_path / "x", tmp_path / "out"
    tiny_detector("retinanet", LABELS).save_pretrained(student)
    DeformableDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(student)
    main([str(student), str(pictures), "--output", str(out), "--threshold", "0"])
    objects = json.loads((out / "predictions.json").read_text())["pictures"]["a.jpg"]["objects"]
    assert objects and {*objects[0]} == {"label", "score", "box"} and not (out / "masks").exists()
    with Image.open(out / "overlays" / "a.png") as drawn, Image.open(pictures / "a.jpg") as picture:
        assert drawn.size == picture.size and not np.array_equal(np.asarray(drawn), np.asarray(picture))
    with pytest.raises(UserError, match="--tile is for label maps, but .* is for object detection"):
        main([str(student), str(pictures), "--output", str(out), "--tile", "128"])


def test_an_exported_file_answers_in_place_of_the_weights(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, out = finished(tmp_path / "x"), tmp_path / "out"

    def run(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = torch.zeros(1, 8, 12, 16)
        logits[:, 5] = 1
        return {"logits": logits}

    asked: list[Any] = []
    file = OpenedFile(run, size=(48, 64), one_by_one=True)
    monkeypatch.setattr(predicting, "open_export", lambda *given: asked.append(given) or (file, {}))
    main([str(student), str(pictures), "--output", str(out), "--backend", "onnx", "--precision", "int8"])
    assert asked == [(student, "onnx", "int8")]
    content = json.loads((out / "predictions.json").read_text())
    assert [one["pixels"] for one in content["pictures"].values()] == [{"pole": 1.0}] * 2
    with pytest.raises(UserError, match="the file takes pictures of 48 x 64 pixels only; leave --tile out"):
        main(
            [str(student), str(pictures), "--output", str(out), "--backend", "onnx", "--tile", "32", "--overlap", "8"]
        )


def test_a_precision_without_a_file_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--precision int8 is of an exported file; say which one with --backend"):
        main(["x", str(pictures), "--output", str(tmp_path / "out"), "--precision", "int8"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overlap", "8"], "--overlap is 8, but only tiles overlap"),
        (
            ["--tile", "64", "--image_size", "48"],
            "--tile cuts pictures at their own size, and --image_size changes it",
        ),
        (["--image_size", "0"], "--image_size is 0; the short side must be at least 1 pixel"),
        (["--threshold", "7"], "--threshold is 7; scores lie in 0..1"),
    ],
)
def test_options_that_would_be_ignored_or_fail_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["x", "pictures", "--output", "out", *options])


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="--output is .*out, which is a file; name a folder"):
        main(["x", "pictures", "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no pictures"),
        (["a.png", "a.jpg"], "would give the same file of predictions"),
        (None, "no such file"),
    ],
)
def test_pictures_that_cannot_be_named_are_refused(names: list[str] | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    if names is not None:
        folder.mkdir()
        for name in names:
            Image.new("RGB", (8, 8)).save(folder / name)
    with pytest.raises(UserError, match=message):
        main(["x", str(folder), "--output", str(tmp_path / "out")])
