import io
import json
import logging
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_bcd.data import load_dense_dataset
from hf_bcd.runs.arguments import DataArguments
from hf_bcd.runs.experiment import load_data


NAMES = ["sky", "road", "car"]
HEIGHT, WIDTH = 8, 12
LABEL = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3


def photograph(size=(WIDTH, HEIGHT)):
    return Image.new("RGB", size, (10, 20, 30))


def write_pair(root, stem, split="train", label=LABEL, image=None, suffix="jpg", **options):
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
    (image or photograph()).save(root / split / "images" / f"{stem}.{suffix}", **options)
    Image.fromarray(label).save(root / split / "masks" / f"{stem}.png")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "streets"
    for stem in ("b", "a"):
        write_pair(root, stem)
    write_pair(root, "c", split="val", suffix="PNG")
    write_pair(root, "d", split="test", suffix="webp")
    return root


@pytest.fixture
def table_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def table(images, masks, **columns):
    columns = {"image": images, "mask": masks} | columns
    features = {name: datasets.Image() for name in ("image", "mask")}
    features |= {name: datasets.Value("string") for name in columns if name not in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def rotated_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    photograph().save(buffer, format="JPEG", exif=exif)
    return {"bytes": buffer.getvalue(), "path": "phone.jpg"}


def test_masks_stored_with_loss_are_refused(folder):
    Image.fromarray(LABEL).save(folder / "train/masks/a.jpg")
    (folder / "train/masks/a.png").unlink()
    with pytest.raises(ValueError, match=r"a\.jpg: a mask stored as JPEG"):
        load_dense_dataset(folder, id2label=["sky", "road", "car"])


def test_photographs_of_16_bits_are_pointed_out(folder, caplog):
    Image.fromarray(np.full((HEIGHT, WIDTH), 3000, np.uint16)).save(folder / "train/images/a.png")
    (folder / "train/images/a.jpg").unlink()
    load_dense_dataset(folder, id2label=["sky", "road", "car"])
    assert [("a.png: an image of 16 bits" in record.message) for record in caplog.records] == [True]


def test_masks_that_will_be_scored_are_all_read_before_training(folder):
    for index in range(6):
        write_pair(folder, f"v{index}", split="val", label=LABEL + 200 * (index == 5))
    arguments = DataArguments(data_dir=str(folder), id2label=str(folder / "names.json"))
    (folder / "names.json").write_text('["sky", "road", "car"]')
    with pytest.raises(ValueError, match=r"v5\.png"):
        load_data(arguments)
    load_data(arguments, for_training=False)
    load_data(replace(arguments, max_eval_samples=5))


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


def test_folder_given_as_text_and_in_two_parts(folder):
    assert len(load_dense_dataset(str(folder), id2label=NAMES)["train"]) == 2
    assert len(load_dense_dataset(folder.parent, data_dir=folder.name, id2label=NAMES)["train"]) == 2


@pytest.mark.parametrize("file", ["classes.json", "id2label.json"])
def test_class_names_of_the_folder(folder, file):
    (folder / file).write_text(json.dumps(NAMES))
    assert load_dense_dataset(folder)["train"].id2label[2] == "car"
    other = dict(enumerate("xyz"))
    assert load_dense_dataset(folder, id2label=other)["train"].id2label == other


def test_class_names_from_the_masks_of_train(folder, caplog):
    write_pair(folder, "e", label=np.full((HEIGHT, WIDTH), 6, dtype=np.uint8))
    with caplog.at_level(logging.INFO, "hf_bcd.data"):
        data = load_dense_dataset(folder, ignore_labels=[6])
    assert data["train"].id2label == {0: "class_0", 1: "class_1", 2: "class_2"}
    assert "all 3 masks of 'train'" in caplog.text and "3 classes found" in caplog.text
    assert load_dense_dataset(folder)["val"].num_labels == 7
    assert load_dense_dataset(folder, reduce_labels=True)["train"].num_labels == 6


def test_validation_alone_needs_class_names(folder):
    for path in sorted((folder / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "train").rmdir()
    assert list(load_dense_dataset(folder, id2label=NAMES)) == ["validation", "test"]
    with pytest.raises(ValueError, match="without a split 'train'.*give id2label"):
        load_dense_dataset(folder)


def test_label_options(folder):
    train = load_dense_dataset(folder, id2label=NAMES, ignore_labels=[1])["train"]
    assert set(np.unique(train[0]["label"])) == {0, 2, 255}
    train = load_dense_dataset(folder, id2label=NAMES[:2], reduce_labels=True)["train"]
    assert set(np.unique(train[0]["label"])) == {0, 1, 255}


def test_ids_out_of_range_name_the_file(folder):
    with pytest.raises(ValueError, match=r"masks.a\.png: the mask holds ids \[2\].*num_labels=2.*--reduce_labels"):
        load_dense_dataset(folder, id2label=NAMES[:2])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("masks", r"1 of 2 images in .*images have no mask and 0 of 1 masks .*a\.jpg"),
        ("images", r"0 of 1 images .* and 1 of 2 masks in .*masks have no image .*a\.png"),
    ],
)
def test_missing_partner(folder, kind, message):
    next((folder / "train" / kind).glob("a.*")).unlink()
    with pytest.raises(ValueError, match=message):
        load_dense_dataset(folder, id2label=NAMES)


def test_empty_split(folder):
    for path in (folder / "val").rglob("c.*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"val.images and .*val.masks hold no images"):
        load_dense_dataset(folder, id2label=NAMES)


def test_missing_mask_folder(folder):
    (folder / "extra" / "train" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train.masks: this folder does not exist"):
        load_dense_dataset(folder / "extra", id2label=NAMES)


def test_two_images_of_one_stem(folder):
    photograph().save(folder / "train" / "images" / "a.png")
    with pytest.raises(ValueError, match=r"a\.(jpg|png) and a\.(jpg|png) have the same stem"):
        load_dense_dataset(folder, id2label=NAMES)


def test_two_validation_splits(folder):
    write_pair(folder, "c", split="validation")
    with pytest.raises(ValueError, match="several of the splits train, val, validation, test"):
        load_dense_dataset(folder, id2label=NAMES)


def test_options_of_tables_and_of_the_hub_are_refused_for_files_in_folders(folder):
    with pytest.raises(ValueError, match="revision, config, label_column cannot be set for this kind of folder"):
        load_dense_dataset(folder, revision="main", config="fine", label_column="mask")


def test_other_files_are_passed_over(folder):
    (folder / "train" / "images" / "Thumbs.db").write_bytes(b"")
    (folder / "train" / "masks" / "._a.png").write_bytes(b"")
    assert len(load_dense_dataset(folder, id2label=NAMES)["train"]) == 2


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match=r"no data found. Expected folders \{train,val,test\}"):
        load_dense_dataset(tmp_path, id2label=NAMES)
    with pytest.raises(ValueError, match=r"absent: this folder does not exist"):
        load_dense_dataset(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"absent: this folder does not exist"):
        load_dense_dataset(str(tmp_path / "absent"))


def test_size_mismatch_names_the_file(tmp_path):
    write_pair(tmp_path, "a", image=photograph((WIDTH + 1, HEIGHT)))
    with pytest.raises(ValueError, match=r"images.a\.jpg: the image is 13x8 pixels .* mask is 12x8"):
        load_dense_dataset(tmp_path, id2label=NAMES)["train"][0]


def test_corrupt_image_names_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    write_pair(tmp_path, "a", image=Image.fromarray(noise))
    path = tmp_path / "train" / "images" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"images.a\.jpg: cannot be decoded"):
        load_dense_dataset(tmp_path, id2label=NAMES)["train"][0]


def test_colour_coded_mask_names_the_file(tmp_path):
    write_pair(tmp_path, "a", label=np.stack([LABEL * 90, LABEL, LABEL], axis=-1))
    with pytest.raises(ValueError, match=r"masks.a\.png: a colour-coded mask"):
        load_dense_dataset(tmp_path, id2label=NAMES)["train"][0]


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (WIDTH, HEIGHT)], ids=["as stored", "as shown"])
def test_rotated_photograph_in_a_folder(tmp_path, shape):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_pair(tmp_path, "a", label=LABEL.reshape(shape), exif=exif)
    sample = load_dense_dataset(tmp_path, id2label=NAMES)["train"][0]
    assert sample["label"].shape == shape and sample["image"].size == shape[::-1]


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (WIDTH, HEIGHT)], ids=["as stored", "as shown"])
def test_rotated_photograph_in_a_table(shape):
    train = load_dense_dataset(table([rotated_jpeg()], [Image.fromarray(LABEL.reshape(shape))]), id2label=NAMES)[
        "train"
    ]
    assert train[0]["label"].shape == shape and train[0]["image"].size == shape[::-1]


def test_table_and_tables():
    one = table([photograph()] * 2, [Image.fromarray(LABEL)] * 2, caption=["x", "y"])
    data = load_dense_dataset(one, id2label=NAMES)
    assert list(data) == ["train"] and len(data["train"]) == 2
    assert np.array_equal(data["train"][1]["label"], LABEL)
    data = load_dense_dataset(datasets.DatasetDict({"train": one, "val": one}), id2label=NAMES)
    assert list(data) == ["train", "validation"]


def test_palette_masks_in_a_table_keep_their_ids():
    mask = Image.fromarray(LABEL).convert("P")
    mask.putdata(LABEL.ravel().tolist())
    mask.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    tables = table([photograph()], [mask]).cast_column("mask", datasets.Image(mode="L"))
    assert not np.array_equal(np.asarray(tables[0]["mask"]), LABEL)
    assert np.array_equal(load_dense_dataset(tables, id2label=NAMES)["train"][0]["label"], LABEL)


def test_transform_of_the_table_does_not_matter():
    tables = table([photograph()], [Image.fromarray(LABEL)]).with_transform(lambda batch: {"image": [0]})
    assert np.array_equal(load_dense_dataset(tables, id2label=NAMES)["train"][0]["label"], LABEL)


def test_label_maps_as_nested_lists_with_class_names():
    features = datasets.Features(
        {"img": datasets.Image(), "seg_map": datasets.List(datasets.List(datasets.ClassLabel(names=NAMES)))}
    )
    tables = datasets.Dataset.from_dict({"img": [photograph()], "seg_map": [LABEL.tolist()]}, features=features)
    train = load_dense_dataset(tables)["train"]
    assert train.id2label == dict(enumerate(NAMES)) and np.array_equal(train[0]["label"], LABEL)


def test_class_of_the_whole_image_is_no_label_map():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    tables = datasets.Dataset.from_dict({"image": [photograph()], "label": [0]}, features=features)
    with pytest.raises(ValueError, match="needs one label column, but none found by name. Columns are image, label"):
        load_dense_dataset(tables)


def test_ambiguous_and_explicit_columns():
    tables = table([photograph()], [Image.fromarray(LABEL)])
    tables = tables.add_column("annotation", [None]).cast_column("annotation", datasets.Image())
    with pytest.raises(ValueError, match="annotation and mask found by name.*Set label_column"):
        load_dense_dataset(tables, id2label=NAMES)
    assert load_dense_dataset(tables, id2label=NAMES, label_column="mask")["train"][0]["label"].max() == 2
    with pytest.raises(ValueError, match="'masks' is none.*of which image, mask, annotation can hold labels"):
        load_dense_dataset(tables, label_column="masks")
    with pytest.raises(ValueError, match="column 'image' cannot hold both images and label maps. Set label_column"):
        load_dense_dataset(tables, label_column="image")
    with pytest.raises(ValueError, match="dataset/train, row 0, column 'annotation': empty"):
        load_dense_dataset(tables, id2label=NAMES, label_column="annotation")


def test_table_errors_name_the_row():
    good, bad = rotated_jpeg(), rotated_jpeg()
    bad["bytes"] = bad["bytes"][:-40]
    with pytest.raises(ValueError, match=r"dataset/train, row 1, column 'image' \(phone\.jpg\): cannot be decoded"):
        load_dense_dataset(table([good, bad], [Image.fromarray(LABEL)] * 2), id2label=NAMES)
    late = load_dense_dataset(table([good] * 5 + [bad], [Image.fromarray(LABEL)] * 6), id2label=NAMES)["train"]
    assert late[4]["label"].shape == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"dataset/train, row 5, column 'image' \(phone\.jpg\): cannot be decoded"):
        late[5]
    with pytest.raises(ValueError, match=r"row 0, column 'mask'.*ids \[2\]"):
        load_dense_dataset(table([photograph()], [Image.fromarray(LABEL)]), id2label=NAMES[:2])


def test_empty_table_and_streams():
    with pytest.raises(ValueError, match="split 'train' holds no images"):
        load_dense_dataset(table([], []), id2label=NAMES)
    with pytest.raises(ValueError, match="got IterableDataset"):
        stream: Any = table([photograph()], [Image.fromarray(LABEL)]).to_iterable_dataset()
        load_dense_dataset(stream)


@pytest.mark.parametrize("image_folder", ["", "images/"])
def test_imagefolder_with_metadata(tmp_path, table_cache, image_folder):
    root = tmp_path / "scenes"
    for split in ("train", "validation"):
        (root / split / "masks").mkdir(parents=True)
        (root / split / image_folder).mkdir(exist_ok=True)
        photograph().save(root / split / image_folder / "1.jpg")
        Image.fromarray(LABEL).save(root / split / "masks" / "1_ids.png")
        row = {"file_name": f"{image_folder}1.jpg", "mask_file_name": "masks/1_ids.png"}
        (root / split / "metadata.jsonl").write_text(json.dumps(row))
    data = load_dense_dataset(root)
    assert list(data) == ["train", "validation"] and data["train"].num_labels == 3
    assert np.array_equal(data["val"][0]["label"], LABEL)
    (root / "train" / image_folder / "1.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"row 0, column 'image' \(.*1\.jpg\): cannot be decoded"):
        data["train"][0]


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'camvit' is neither a known data set .* did you mean 'camvid'"):
        load_dense_dataset("camvit")
    with pytest.raises(ValueError, match="nor a Hub id 'user/name'"):
        load_dense_dataset("data/streets/small")


def test_synthetic():
    data = load_dense_dataset("synthetic", size=(48, 64), num_images={"train": 3, "validation": 2}, seed=1)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 3, "validation": 2}
    sample = data["train"][0]
    assert sample["image"].size == (64, 48) and sample["label"].shape == (48, 64)
    assert data["train"].name == "synthetic" and data["train"].num_labels == 8
    fewer = load_dense_dataset("synthetic", size=(32, 32), num_classes=3)
    assert list(fewer) == ["train", "validation", "test"] and fewer["val"].num_labels == 3


def test_options_of_other_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seed are for the data set 'synthetic' only"):
        load_dense_dataset(tmp_path, seed=1)
    with pytest.raises(ValueError, match="data_dir cannot be set for 'synthetic'"):
        load_dense_dataset("synthetic", data_dir=tmp_path)
    with pytest.raises(ValueError, match="synthetic has no option sise .*it has num_images, size, seed"):
        load_dense_dataset("synthetic", sise=(64, 64))
    with pytest.raises(ValueError, match="id2label, reduce_labels cannot be set for 'ade20k'"):
        load_dense_dataset("ade20k", reduce_labels=True, id2label=NAMES)
