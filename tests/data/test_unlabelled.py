"""Pictures without labels: read, mixed into batches, seen by distillation and by no task loss."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from hf_bcd.data import TrainTransform, collate, holds_only_pictures, keep_in_memory, load_dense_dataset, load_pictures
from hf_bcd.data.dataset import Row, UnlabelledError, read_sample
from hf_bcd.data.labels import UNLABELLED, LabelRule
from hf_bcd.tasks import task_of
from hf_bcd.utils.messages import UserError


def save(path: Path, value: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 100, 50)).save(path)
    return path


def test_a_folder_is_read_at_any_depth_in_natural_order_without_hidden_files(tmp_path):
    for name in ("b/10.png", "b/2.png", "a.jpg", ".hidden/x.png", "b/.y.png"):
        save(tmp_path / name)
    found = load_pictures(tmp_path)
    assert [Path(found.rows[index].image_name).name for index in range(len(found))] == ["a.jpg", "2.png", "10.png"]
    sample = found[0]
    assert sample["image"].size == (64, 48) and sample["label"].shape == (48, 64)
    assert (sample["label"] == UNLABELLED).all() and sample["label"].dtype == np.uint8
    assert (found.labelled, found.num_unlabelled, found.id2label) == (0, 3, {})


def test_a_table_is_read_by_its_image_column(tmp_path):
    images = [Image.new("RGB", (8, 6), (index, 0, 0)) for index in range(3)]
    table = datasets.Dataset.from_dict({"image": images, "number": [1, 2, 3]})
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    found = load_pictures(str(tmp_path))
    assert [np.asarray(found[index]["image"])[0, 0, 0] for index in range(3)] == [0, 1, 2]


def test_an_upright_photograph_is_seen(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    sample = load_pictures(tmp_path)[0]
    assert sample["image"].size == (6, 8) and sample["label"].shape == (8, 6)


def test_a_folder_of_pictures_and_masks_is_refused(tmp_path):
    for kind in ("photos", "annotations"):
        for name in ("a.png", "b.png"):
            save(tmp_path / kind / name)
    with pytest.raises(UserError, match=r"a lies in annotations and photos, as a picture and its mask would"):
        load_pictures(tmp_path)
    assert holds_only_pictures(tmp_path / "photos") and holds_only_pictures(tmp_path)
    for labels in ("train/masks", "Instances/train"):
        (tmp_path / labels).mkdir(parents=True)
        assert not holds_only_pictures(tmp_path)
        (tmp_path / labels).rmdir()


def test_files_that_are_left_out_are_counted(tmp_path, caplog):
    folder = save(tmp_path / "photos/a.png").parent
    (folder / "b.HEIC").write_bytes(b"")
    assert len(load_pictures(folder)) == 1
    assert "1 pictures; files of other kinds are left out: .heic" in caplog.text
    with pytest.raises(UserError, match=r"holds pictures, and also files of the kinds .heic: .*without labels"):
        load_dense_dataset(folder)


@pytest.mark.parametrize("fault", ["nothing there", "broken", "no folder"])
def test_a_folder_that_gives_no_pictures_is_refused(fault, tmp_path):
    if fault == "broken":
        (tmp_path / "a.png").write_bytes(b"none")
    source = tmp_path / "away" if fault == "no folder" else tmp_path
    with pytest.raises(UserError, match=r"a\.png|no data found|does not exist"):
        load_pictures(source)


def test_a_row_without_a_mask_has_no_ids(tmp_path):
    row = Row(save(tmp_path / "a.png"), None, "a.png", "a.png")
    with pytest.raises(UnlabelledError, match=r"a\.png: a picture without labels"):
        row.mask()
    assert (read_sample(row, LabelRule(), 5)["label"] == UNLABELLED).all()


# ---- Data sets -----------------------------------------------------------------------------------------------------


def test_pictures_are_added_behind_those_with_labels(tmp_path):
    data = tiny.scenes(train=3)["train"]
    save(tmp_path / "a.png")
    mixed = data.with_unlabelled(load_pictures(tmp_path))
    assert (len(mixed), mixed.labelled, mixed.num_unlabelled, mixed.id2label) == (4, 3, 1, data.id2label)
    assert np.array_equal(mixed[1]["label"], data[1]["label"]) and (mixed[3]["label"] == UNLABELLED).all()
    assert (mixed.select([0, 2, 3]).labelled, mixed.select([0, 1]).labelled) == (2, None)
    assert len(mixed.only_labelled()) == 3 and data.only_labelled() is data
    with pytest.raises(UserError, match="pictures without labels are chosen before others"):
        mixed.select([3, 0])
    kept = keep_in_memory(mixed)
    assert np.array_equal(kept.cache[3]["label"], mixed[3]["label"])  # type: ignore[index]


def test_labels_can_be_left_unread():
    data = tiny.scenes(train=3)["train"].without_labels()
    assert data.labelled == 0 and all((sample["label"] == UNLABELLED).all() for sample in data)
    with pytest.raises(UserError, match="none of its 3 pictures has labels"):
        data.only_labelled()


# ---- Batches -------------------------------------------------------------------------------------------------------


def small_and_padded(label: np.ndarray, seed: int = 0) -> dict[str, Tensor]:
    """A picture of 20x20 at half its size in a crop of 32."""
    torch.manual_seed(seed)
    transform = TrainTransform(32, scale=(0.5, 0.5), jitter=0.0)
    return dict(transform({"image": Image.new("RGB", (20, 20)), "label": label}))


def test_a_crop_of_a_picture_without_labels_is_drawn_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "hf_bcd.data.transforms._overlap", lambda *axis: drawn.append(axis) or (0, axis[0] // 2, 0, axis[2])
    )
    transform = TrainTransform(8, scale=(1.0, 1.0))
    for value in (UNLABELLED, 3):
        drawn.clear()
        transform({"image": Image.new("RGB", (16, 16)), "label": np.full((16, 16), value, np.uint8)})
        assert len(drawn) == (2 if value == UNLABELLED else 20)  # two axes, ten attempts


def test_a_batch_tells_the_pixels_of_pictures_from_padding():
    labels = np.zeros((20, 20), np.uint8)
    labels[:10] = 255
    samples = [small_and_padded(labels), small_and_padded(np.full((20, 20), UNLABELLED, np.uint8))]
    batch = collate([{"index": index, **sample} for index, sample in enumerate(samples)])
    assert batch["labels"].dtype == torch.uint8 and (batch["labels"][1] == 255).all()
    assert batch["seen"].dtype == torch.bool and batch["seen"].flatten(1).sum(1).tolist() == [50, 100]
    targets = task_of(None).targets(batch, 8)
    assert torch.equal(targets.valid((32, 32)), batch["seen"])
    assert targets.class_masks((32, 32)).flatten(1).sum(1).tolist() == [50, 0]
    assert int(task_of(None).denominator(targets)) == 50
    assert torch.equal(targets.labelled().valid((32, 32)), batch["labels"] != 255)
    plain = collate([{"index": 0, **samples[0]}])
    assert "seen" not in plain and task_of(None).targets(plain, 8).seen is None
