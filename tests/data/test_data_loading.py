import json
import logging
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from pictures import encoded, orientation, palette, refused, save
from PIL import Image

from hf_bcd.data import load_dense_dataset


NAMES = ["sky", "road", "car"]
HEIGHT, WIDTH = 8, 12
LABEL = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
MASK = Image.fromarray(LABEL)
PHOTOGRAPH = Image.new("RGB", (WIDTH, HEIGHT), (10, 20, 30))


def write_pair(root, stem, split="train", label=LABEL, suffix="jpg"):
    save(root / split / "images" / f"{stem}.{suffix}", PHOTOGRAPH)
    save(root / split / "masks" / f"{stem}.png", label)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "streets"
    for stem in ("b", "a"):
        write_pair(root, stem)
    write_pair(root, "c", split="val", suffix="PNG")
    write_pair(root, "d", split="test", suffix="webp")
    return root


def table(images, masks, **columns):
    columns = {"image": images, "mask": masks} | columns
    features = {name: datasets.Image() for name in ("image", "mask")}
    features |= {name: datasets.Value("string") for name in columns if name not in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def rotated_jpeg():
    return {"bytes": encoded(PHOTOGRAPH, format="JPEG", exif=orientation(6)), "path": "phone.jpg"}


def test_masks_spread_over_a_split_are_read_before_training(folder):
    for index in range(6):
        write_pair(folder, f"v{index}", split="val", label=LABEL + 200 * (index == 5))
    refused(r"v5\.png", folder, id2label=NAMES)


def test_folder(folder):
    data = load_dense_dataset(folder, id2label=NAMES)
    assert list(data) == ["train", "validation", "test"] and data["val"].split == "validation"
    train = data["train"]
    assert len(train) == 2 and train.rows[0].image_name.endswith("a.jpg")
    assert train.id2label == {0: "sky", 1: "road", 2: "car"} and train.num_labels == 3
    assert train.name == "streets" and train.source == str(folder)
    assert train[0]["image"].size == (WIDTH, HEIGHT)
    assert np.array_equal(train[0]["label"], LABEL) and train[0]["label"].dtype == np.uint8
    assert np.array_equal(data["test"][0]["label"], LABEL)
    assert len(load_dense_dataset(str(folder), id2label=NAMES)["train"]) == 2
    assert len(load_dense_dataset(folder.parent, data_dir=folder.name, id2label=NAMES)["train"]) == 2


@pytest.mark.parametrize("file", ["classes.json", "id2label.json"])
def test_class_names_of_the_folder(folder, file):
    (folder / file).write_text(json.dumps(NAMES))
    assert load_dense_dataset(folder)["train"].id2label[2] == "car"
    other = dict(enumerate("xyz"))
    assert load_dense_dataset(folder, id2label=other)["train"].id2label == other


def test_class_names_from_the_masks_of_train(folder, caplog):
    write_pair(folder, "e", label=np.full_like(LABEL, 6))
    with caplog.at_level(logging.INFO, "hf_bcd.data"):
        data = load_dense_dataset(folder, ignore_labels=[6])
    assert data["train"].id2label == {0: "class_0", 1: "class_1", 2: "class_2"}
    assert "all 3 masks of 'train'" in caplog.text and "3 classes found" in caplog.text
    assert load_dense_dataset(folder)["val"].num_labels == 7
    assert load_dense_dataset(folder, reduce_labels=True)["train"].num_labels == 6
    shutil.rmtree(folder / "train")
    assert list(load_dense_dataset(folder, id2label=NAMES)) == ["validation", "test"]
    refused("inferred from a split 'train', but the splits are val, test.*give id2label", folder)


def test_label_options(folder):
    train = load_dense_dataset(folder, id2label=NAMES, ignore_labels=[1])["train"]
    assert set(np.unique(train[0]["label"])) == {0, 2, 255}
    train = load_dense_dataset(folder, id2label=NAMES[:2], reduce_labels=True)["train"]
    assert set(np.unique(train[0]["label"])) == {0, 1, 255}
    refused(r"masks.a\.png: the mask holds ids \[2\].*num_labels=2.*--reduce_labels", folder, id2label=NAMES[:2])
    message = "revision, config, label_column cannot be set for this kind of folder"
    refused(message, folder, revision="main", config="fine", label_column="mask")


def test_missing_partners(folder):
    for kind, message in (
        ("masks", r"1 of 2 images in .*images have no mask and 0 of 1 masks .*a\.jpg"),
        ("images", r"0 of 1 images .* and 1 of 2 masks in .*masks have no image .*a\.png"),
    ):
        write_pair(folder, "a")
        next((folder / "train" / kind).glob("a.*")).unlink()
        refused(message, folder, id2label=NAMES)
    shutil.rmtree(folder / "train/masks")
    refused(r"train.masks: this folder does not exist", folder, id2label=NAMES)


def test_splits_that_are_empty_or_there_twice(folder):
    write_pair(folder, "c", split="validation")
    refused("several of the splits train, validation, val, test", folder, id2label=NAMES)
    for path in (folder / "val").rglob("c.*"):
        path.unlink()
    refused(r"val.images and .*val.masks hold no images", folder, id2label=NAMES)


def test_two_images_of_one_stem_and_other_files(folder):
    (folder / "train/images/Thumbs.db").write_bytes(b"")
    (folder / "train/masks/._a.png").write_bytes(b"")
    assert len(load_dense_dataset(folder, id2label=NAMES)["train"]) == 2
    save(folder / "train/images/a.png", PHOTOGRAPH)
    refused(r"a\.(jpg|png) and a\.(jpg|png) have the same stem", folder, id2label=NAMES)


def test_folders_within_folders_are_read(folder):
    for stem in ("monday/x", "tuesday/noon/a"):
        write_pair(folder, stem)
    rows = load_dense_dataset(folder, id2label=NAMES)["train"].rows
    assert [Path(rows[index].image_name).relative_to(folder / "train/images").as_posix() for index in range(len(rows))] == [
        "a.jpg", "b.jpg", "monday/x.jpg", "tuesday/noon/a.jpg"
    ]  # fmt: skip
    (folder / "train/masks/monday/x.png").unlink()
    refused("1 of 4 images in .*images have no mask.*such as x.jpg", folder, id2label=NAMES)


def test_photographs_of_a_kind_that_is_not_read_are_named(folder):
    (folder / "train/images/a.jpg").rename(folder / "train/images/a.HEIC")
    refused(r"have no image of the same stem, such as a.png\..*images also holds files of the kinds .heic", folder)


def test_folders_in_capitals_are_those_in_small_letters(folder):
    (folder / "train/masks").rename(folder / "train/Masks")
    (folder / "val").rename(folder / "Val")
    data = load_dense_dataset(folder, id2label=NAMES)
    assert [*data] == ["train", "validation", "test"] and len(data["train"]) == 2


def test_empty_and_missing_folders(tmp_path):
    refused(r"no data found. Expected folders \{train,val,test\}", tmp_path, id2label=NAMES)
    (tmp_path / "a.heic").write_bytes(b"")
    refused(r"or parquet files. The folder holds files of the kinds .heic\.", tmp_path, id2label=NAMES)
    for absent in (tmp_path / "absent", str(tmp_path / "absent")):
        refused(r"absent: this folder does not exist", absent)


@pytest.mark.parametrize("place", ["{}", "{}/train"])
def test_masks_that_lie_elsewhere_are_named_with_the_layout_that_they_need(place, tmp_path):
    for kind, picture in (("images", PHOTOGRAPH), ("masks", LABEL)):
        save(tmp_path / place.format(kind) / "a.png", picture)
    refused(r"masks looks like masks, but is not .*: label maps are in \{train,val,test\}/masks", tmp_path)


def test_what_holds_another_kind_of_labels_is_named(folder, tmp_path):
    refused("masks holds masks, but .*streets holds no boxes: leave task out", folder, task="object-detection")
    for kind, picture in (("images", PHOTOGRAPH), ("instances", LABEL)):
        save(tmp_path / "objects/train" / kind / "a.png", picture)
    refused("has masks of objects and no label maps", tmp_path / "objects", task="semantic-segmentation")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("images/a.jpg", (WIDTH + 1, HEIGHT), r"images.a\.jpg: the image is 13x8 pixels .* mask is 12x8"),
        ("images/a.jpg", None, r"images.a\.jpg: cannot be decoded"),
        ("masks/a.png", np.stack([LABEL * 90, LABEL, LABEL], axis=-1), r"masks.a\.png: a colour-coded mask"),
        ("masks/a.jpg", LABEL, r"a\.jpg: a mask stored as JPEG"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, file, content, message):
    write_pair(tmp_path, "a")
    path = tmp_path / "train" / file
    cut = path.read_bytes()[:-60] if content is None else b""
    for old in path.parent.iterdir():
        old.unlink()
    save(path, content) if content is not None else path.write_bytes(cut)
    refused(message, tmp_path, id2label=NAMES)


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (WIDTH, HEIGHT)], ids=["as stored", "as shown"])
@pytest.mark.parametrize("kind", ["folder", "table"])
def test_rotated_photographs(tmp_path, shape, kind):
    source: Any = table([rotated_jpeg()], [Image.fromarray(LABEL.reshape(shape))])
    if kind == "folder":
        source = tmp_path
        write_pair(source, "a", label=LABEL.reshape(shape))
        (source / "train/images/a.jpg").write_bytes(rotated_jpeg()["bytes"])
    sample = load_dense_dataset(source, id2label=NAMES)["train"][0]
    assert sample["label"].shape == shape and sample["image"].size == shape[::-1]


def test_table_and_tables():
    one = table([PHOTOGRAPH] * 2, [MASK] * 2, caption=["x", "y"])
    data = load_dense_dataset(one, id2label=NAMES)
    assert list(data) == ["train"] and len(data["train"]) == 2
    assert np.array_equal(data["train"][1]["label"], LABEL)
    data = load_dense_dataset(datasets.DatasetDict({"train": one, "val": one}), id2label=NAMES)
    assert list(data) == ["train", "validation"]


def test_decoding_and_transforms_of_the_table_do_not_matter():
    tables = table([PHOTOGRAPH], [palette(LABEL)]).cast_column("mask", datasets.Image(mode="L"))
    assert not np.array_equal(np.asarray(tables[0]["mask"]), LABEL)
    for given in (tables, tables.with_transform(lambda batch: {"image": [0]})):
        assert np.array_equal(load_dense_dataset(given, id2label=NAMES)["train"][0]["label"], LABEL)


def test_label_maps_as_nested_lists_with_class_names():
    nested = datasets.List(datasets.List(datasets.ClassLabel(names=NAMES)))
    features = datasets.Features({"img": datasets.Image(), "seg_map": nested})
    tables = datasets.Dataset.from_dict({"img": [PHOTOGRAPH], "seg_map": [LABEL.tolist()]}, features=features)
    train = load_dense_dataset(tables)["train"]
    assert train.id2label == dict(enumerate(NAMES)) and np.array_equal(train[0]["label"], LABEL)


def test_class_of_the_whole_image_is_no_label_map():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    tables = datasets.Dataset.from_dict({"image": [PHOTOGRAPH], "label": [0]}, features=features)
    refused("needs one label column, but none found by name. Columns are image, label", tables)


def test_ambiguous_and_explicit_columns():
    tables = table([PHOTOGRAPH], [MASK])
    tables = tables.add_column("annotation", [None]).cast_column("annotation", datasets.Image())
    assert load_dense_dataset(tables, id2label=NAMES, label_column="mask")["train"][0]["label"].max() == 2
    for column, message in (
        (None, "annotation and mask found by name.*Set label_column"),
        ("masks", "'masks' is none.*of which image, mask, annotation can hold labels"),
        ("image", "column 'image' cannot hold both images and label maps. Set label_column"),
        ("annotation", "dataset/train, row 0, column 'annotation': empty"),
    ):
        refused(message, tables, id2label=NAMES, label_column=column)


def test_table_errors_name_the_row():
    good, bad = rotated_jpeg(), rotated_jpeg()
    bad["bytes"] = bad["bytes"][:-40]
    message = r"dataset/train, row {}, column 'image' \(phone\.jpg\): cannot be decoded"
    refused(message.format(1), table([good, bad], [MASK] * 2), id2label=NAMES)
    late = load_dense_dataset(table([good] * 5 + [bad], [MASK] * 6), id2label=NAMES)["train"]
    assert late[4]["label"].shape == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=message.format(5)):
        late[5]
    refused(r"row 0, column 'mask'.*ids \[2\]", table([PHOTOGRAPH], [MASK]), id2label=NAMES[:2])


def test_empty_table_and_streams():
    refused("split 'train' holds no images", table([], []), id2label=NAMES)
    refused("got IterableDataset", table([PHOTOGRAPH], [MASK]).to_iterable_dataset())


@pytest.mark.parametrize("image_folder", ["", "images/"])
def test_imagefolder_with_metadata(tmp_path, image_folder):
    root = tmp_path / "scenes"
    for split in ("train", "validation"):
        save(root / split / image_folder / "1.jpg", PHOTOGRAPH)
        save(root / split / "masks" / "1_ids.png", LABEL)
        row = {"file_name": f"{image_folder}1.jpg", "mask_file_name": "masks/1_ids.png"}
        (root / split / "metadata.jsonl").write_text(json.dumps(row))
    data = load_dense_dataset(root)
    assert list(data) == ["train", "validation"] and data["train"].num_labels == 3
    assert np.array_equal(data["val"][0]["label"], LABEL)
    (root / "train" / image_folder / "1.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"row 0, column 'image' \(.*1\.jpg\): cannot be decoded"):
        data["train"][0]


def test_synthetic():
    data = load_dense_dataset("synthetic", size=(48, 64), num_images={"train": 3, "validation": 2}, seed=1)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 3, "validation": 2}
    sample = data["train"][0]
    assert sample["image"].size == (64, 48) and sample["label"].shape == (48, 64)
    assert data["train"].name == "synthetic" and data["train"].num_labels == 8
    fewer = load_dense_dataset("synthetic", size=(32, 32), num_classes=3)
    assert list(fewer) == ["train", "validation", "test"] and fewer["val"].num_labels == 3


def test_names_and_options_of_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("'camvit' is neither a known data set .* did you mean 'camvid'", "camvit")
    refused("nor a Hub id 'user/name'", "data/streets/small")
    refused("seed are for the data sets synthetic, synthetic_detection, synthetic_instances only", tmp_path, seed=1)
    refused("data_dir cannot be set for 'synthetic'", "synthetic", data_dir=tmp_path)
    refused("synthetic has no option sise .*it has num_images, size, seed", "synthetic", sise=(64, 64))
    refused("id2label, reduce_labels cannot be set for 'ade20k'", "ade20k", reduce_labels=True, id2label=NAMES)
