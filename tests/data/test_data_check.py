import json

import pytest
from pictures import grid, save

from hf_bcd.commands.check import check, main
from hf_bcd.utils.messages import UserError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "streets"
    for name in (*(f"train/{{}}/{index}.png" for index in range(6)), "val/{}/0.png"):
        save(root / name.format("images"), (4, 2))
        save(root / name.format("masks"), [[0, 1, 1, 1], [2, 2, 255, 255]])
    (root / "id2label.json").write_text(json.dumps(["sky", "road", "car"]))
    return root


REPORT = """\
train: 6 images
  of the first 4
  image sizes (width x height): 4x2
  masks stored as: L
  ids stored: 0, 1, 2, 255
  void: 25.0% of the pixels
  class   0:  12.5%  sky
  class   1:  37.5%  road
  class   2:  25.0%  car

validation: 1 images
  of all 1
"""


def test_a_folder(folder):
    assert check(folder).startswith(f"data set  streets\nread from {folder}\nclasses   3\n\n{REPORT}")


def test_every_row_is_read_on_demand(folder):
    save(folder / "train/images/5.png", grid(7, shape=(3, 3)))
    assert "of the first 4" in check(folder)
    with pytest.raises(ValueError, match=r"images/5\.png: the image is 3x3"):
        check(folder, every_row=True)
    for kind in ("images", "masks"):
        (folder / f"train/{kind}/5.png").unlink()
    assert "train: 5 images\n  of all 5\n" in check(folder, every_row=True)


def test_a_row_of_the_catalog(shared_data):
    text = check("ade20k", data_dir=shared_data / "format_samples/ade20k/ADEChallengeData2016")
    for part in (
        "source    https://sceneparsing.csail.mit.edu",
        "licence   BSD-3-Clause; images for non-commercial",
        "classes   150",
        "validation: 2 images, expected 2000",
        "ids stored: 0, 1, 2, 3, 5, 7, 10, 14, 18",
        "class   0:   4.3%  wall",
        "not there: train",
    ):
        assert part in text
    assert "train: 367 images, as expected" in check("camvid", data_dir=shared_data / "camvid")


def test_arguments(folder, tmp_path, capsys):
    (tmp_path / "names.json").write_text(json.dumps(["a", "b"]))
    names = ["--id2label", str(tmp_path / "names.json")]
    for source in ([str(folder)], ["--dataset_name", str(folder)], ["--data_dir", str(folder)]):
        main([*source, *names, "--reduce_labels"])
        text = capsys.readouterr().out
        assert text.endswith("\n") and "class   1:  25.0%  b" in text and "void: 37.5%" in text
    with pytest.raises(ValueError, match="no data set: name one of the catalog"):
        main([])
    with pytest.raises(ValueError, match=r"ids \[2\]"):
        main([str(folder), *names, "--every_row"])
    with pytest.raises(UserError, match="^'camvit' is neither a known data set"):
        main(["camvit"])


def test_pictures_without_labels(tmp_path):
    save(tmp_path / "a/one.png", (4, 3))
    found = check(str(tmp_path))
    assert "classes   those of the teacher" in found and "train: 1 images" in found and "4x3" in found
    assert "no labels: a run with a teacher" in found


def test_two_names_are_refused():
    with pytest.raises(UserError, match="named twice: synthetic, and camvid by --dataset_name"):
        main(["synthetic", "--dataset_name", "camvid"])
