import json
import logging
import shutil
from functools import partial

import numpy as np
import pictures
import pytest
from pictures import refused, save
from PIL import Image

from hf_bcd.data import CATALOG, load_dense_dataset
from hf_bcd.data.sources.catalog import CITYSCAPES_COLOURS, CITYSCAPES_IDS, VOC_COLOURS
from hf_bcd.data.sources.coco import COCO_STUFF_10K_IDS, COCO_THINGS
from hf_bcd.data.sources.layouts import listed_stems


SIZE = WIDTH, HEIGHT = 8, 6
grid = partial(pictures.grid, shape=(HEIGHT, WIDTH))


@pytest.fixture
def frankfurt(shared_data):
    return shared_data / "format_samples/cityscapes"


def test_ade20k(shared_data):
    root = shared_data / "format_samples/ade20k/ADEChallengeData2016"
    validation = load_dense_dataset("ade20k", data_dir=root)["validation"]
    assert len(validation) == 2 and validation.num_labels == 150 and validation.source == str(root)
    for index in range(2):
        label = validation[index]["label"]
        stored = np.asarray(Image.open(validation.rows[index].label_name))
        assert np.array_equal(label, np.where(stored == 0, 255, stored.astype(int) - 1))
        assert label[stored > 0].max() < 150 and (label == 255).any()


def test_genuine_cityscapes(frankfurt):
    validation = load_dense_dataset("cityscapes", data_dir=frankfurt)["validation"]
    file = frankfurt / "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelTrainIds.png"
    label = validation[0]["label"]
    assert set(np.unique(label)) <= {*range(19), 255} and validation.id2label[13] == "car"
    assert (label == np.asarray(Image.open(file))).mean() > 0.997  # the two sample files were shrunk separately
    rows = [row for row in json.loads((frankfurt / "labels_table.json").read_text()) if row["id"] >= 0]
    assert CITYSCAPES_IDS == tuple((row["id"], row["trainId"]) for row in rows)
    assert CITYSCAPES_COLOURS == tuple((tuple(row["color"]), row["id"]) for row in rows)
    assert validation.id2label == {row["trainId"]: row["name"] for row in rows if row["trainId"] != 255}


def write_cityscapes(root, suffix, mask, split="train", city="ulm"):
    save(root / f"leftImg8bit/{split}/{city}/{city}_0_0_leftImg8bit.png", SIZE)
    save(root / f"gtFine/{split}/{city}/{city}_0_0_gtFine_{suffix}.png", mask)


def test_every_local_encoding_of_cityscapes_gives_the_same_map(tmp_path):
    train_ids = dict(CITYSCAPES_IDS)
    ids = grid(*(stored for stored in train_ids if stored != 18))  # 18 has the colour of 17
    expected = np.vectorize(train_ids.get)(ids)
    colour_of = {stored: (*colour, 255) for colour, stored in CITYSCAPES_COLOURS}
    masks = {
        "ids": ("labelIds", ids),
        "three channels": ("labelIds", np.repeat(ids[..., None], 3, axis=2)),
        "train ids": ("labelTrainIds", expected),
        "colours": ("color", [[colour_of[stored] for stored in row] for row in ids.tolist()]),
    }
    for name, (suffix, mask) in masks.items():
        write_cityscapes(tmp_path / name, suffix, mask)
        label = load_dense_dataset("cityscapes", data_dir=tmp_path / name)["train"][0]["label"]
        np.testing.assert_array_equal(label, expected, err_msg=name)


def test_cityscapes_prefers_ids_finds_cities_and_leaves_test_out(tmp_path):
    write_cityscapes(tmp_path, "labelIds", grid(7))
    write_cityscapes(tmp_path, "color", np.zeros((HEIGHT, WIDTH, 3)))
    write_cityscapes(tmp_path, "labelIds", grid(26), city="bonn")
    write_cityscapes(tmp_path, "labelIds", grid(0), split="test", city="berlin")
    data = load_dense_dataset("cityscapes", data_dir=tmp_path)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 2}
    assert [data["train"][index]["label"][0, 0] for index in range(2)] == [13, 0]


def test_cityscapes_without_masks(tmp_path):
    write_cityscapes(tmp_path, "labelIds", grid(7))
    save(tmp_path / "leftImg8bit/val/bonn/bonn_0_0_leftImg8bit.png", SIZE)
    refused("the splits train, validation do not all have masks.*gtFine_trainvaltest", "cityscapes", data_dir=tmp_path)
    save(tmp_path / "gtFine/val/bonn/bonn_1_0_gtFine_labelIds.png", grid(7))
    refused("1 of 1 images in .*val have no mask and 1 of 1 masks", "cityscapes", data_dir=tmp_path)
    write_cityscapes(tmp_path / "other", "labelIds", grid(0, 13, 255))  # another encoding under the name of ids
    message = r"ulm_0_0_gtFine_labelIds\.png: the mask holds ids \[255\]"
    refused(message, "cityscapes", data_dir=tmp_path / "other")


def write_voc(root, lists, folders=("SegmentationClass",)):
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name, lines in lists.items():
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(lines) + "\n")
    for stem in ("a", "b", "c"):
        save(root / f"JPEGImages/{stem}.jpg", SIZE)
        for folder in folders:
            save(root / f"{folder}/{stem}.png", grid(0, 20, 255))


@pytest.mark.parametrize("prefix", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc2012_aug(tmp_path, prefix):
    # the widely used list of the augmented set has two paths in a line
    lines = [f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png" for stem in "ac"]
    folders = ("SegmentationClass", "SegmentationClassAug")
    write_voc(tmp_path / prefix, {"trainaug": lines, "train": ["b"], "val": ["b"]}, folders)
    data = load_dense_dataset("voc2012_aug", data_dir=tmp_path)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 2, "validation": 1}
    assert "SegmentationClassAug" in data["train"].rows[1].label_name and data["train"].id2label[20] == "tvmonitor"
    assert data["val"].rows[0].label_name == str(tmp_path / prefix / "SegmentationClass" / "b.png")
    assert np.array_equal(data["val"][0]["label"], grid(0, 20, 255))


def test_plain_voc_can_be_evaluated_but_not_trained_on(tmp_path, caplog):
    write_voc(tmp_path, {"train": ["a"], "val": ["b"]})
    assert list(load_dense_dataset("voc2012_aug", data_dir=tmp_path)) == ["validation"]
    assert "nothing to train on" in caplog.text and "trainaug.txt and SegmentationClassAug" in caplog.text
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nd\n")
    message = r"val\.txt: lists 2 images, of which 1 have no image or no mask, such as d"
    refused(message, "voc2012_aug", data_dir=tmp_path)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nb\na\n")
    refused(r"val\.txt: 1 of its images are listed more than once, such as a", "voc2012_aug", data_dir=tmp_path)


def test_listed_names_may_have_points_and_endings(tmp_path):
    (tmp_path / "list.txt").write_text("a.rf.1 -1\n/JPEGImages/b.jpg /masks/b.png\n\nc\n")
    assert listed_stems(tmp_path / "list.txt") == ["a.rf.1", "b", "c"]


def test_genuine_voc_mask(shared_data, tmp_path):
    root = tmp_path / "VOC2012"
    shutil.copytree(shared_data / "format_samples/voc/VOCdevkit/VOC2012", root)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000063\n")
    validation = load_dense_dataset("voc2012_aug", data_dir=tmp_path)["val"]
    label = validation[0]["label"]
    assert np.unique(label).tolist() == [0, 9, 12, 255]
    assert (validation.id2label[9], validation.id2label[12]) == ("chair", "dog")
    mask = Image.open(root / "SegmentationClass/2007_000063.png")
    save(root / "SegmentationClass/2007_000063.png", mask.convert("RGB"))
    assert np.array_equal(load_dense_dataset("voc2012_aug", data_dir=tmp_path)["val"][0]["label"], label)
    colours = np.reshape(mask.getpalette(), (-1, 3)).tolist()
    assert [list(colour) for colour, _ in VOC_COLOURS] == [colours[index] for _, index in VOC_COLOURS]


def test_coco_stuff_tables_are_the_official_ones(shared_data):
    lines = (shared_data / "format_samples/coco_stuff/labels.txt").read_text().splitlines()
    names = {int(index): name for index, name in (line.split(": ") for line in lines)}
    present = [index for index in sorted(names) if index in COCO_THINGS or index > 91]
    assert COCO_STUFF_10K_IDS == ((0, 255), *((stored, index) for index, stored in enumerate(present)))
    assert CATALOG["coco_stuff_10k"].id2label == dict(enumerate(names[index] for index in present))


def test_coco_stuff_10k_of_matlab_files(tmp_path):
    io = pytest.importorskip("scipy.io")
    ids = grid(0, 1, 11, 13, 90, 92, 182)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "imageLists").mkdir()
    for index, split in ((1, "test"), (2, "train")):
        save(tmp_path / f"images/COCO_train2014_{index}.jpg", SIZE)
        mask = {"S": ids.astype(np.uint16), "captions": ["x"]}
        io.savemat(tmp_path / f"annotations/COCO_train2014_{index}.mat", mask)
        (tmp_path / f"imageLists/{split}.txt").write_text(f"COCO_train2014_{index}\n")
    data = load_dense_dataset("coco_stuff_10k", data_dir=tmp_path)
    assert list(data) == ["train", "test"] and data["train"].num_labels == 171
    assert data["train"].rows[0].image_name.endswith("COCO_train2014_2.jpg")
    assert np.array_equal(data["test"][0]["label"], grid(255, 0, 10, 11, 79, 80, 170))
    save(tmp_path / "annotations/COCO_train2014_1.png", ids)
    (tmp_path / "annotations/COCO_train2014_1.mat").write_bytes(b"no MATLAB file")
    refused(r"COCO_train2014_1\.mat: not a MATLAB file", "coco_stuff_10k", data_dir=tmp_path)
    io.savemat(tmp_path / "annotations/COCO_train2014_1.mat", {"S": grid(12)})  # a thing that was never annotated
    refused(r"COCO_train2014_1\.mat: the mask holds ids \[12\]", "coco_stuff_10k", data_dir=tmp_path)


def test_coco_stuff_10k_as_converted(tmp_path):
    save(tmp_path / "images/train2014/COCO_train2014_1.jpg", SIZE)
    save(tmp_path / "annotations/train2014/COCO_train2014_1_labelTrainIds.png", grid(0, 1, 171))
    train = load_dense_dataset("coco_stuff_10k", data_dir=tmp_path)["train"]
    assert np.array_equal(train[0]["label"], grid(255, 0, 170)) and train.id2label[170] == "wood"


def test_camvid_as_it_is_downloaded(tmp_path):
    for image in ("train", "val"):
        save(tmp_path / image / "1.png", SIZE)
        save(tmp_path / f"{image}annot" / "1.png", grid(0, 10, 11))
    data = load_dense_dataset("camvid", data_dir=tmp_path)
    assert list(data) == ["train", "validation"] and data["val"].rows[0].label_name.endswith("valannot/1.png")
    assert np.array_equal(data["train"][0]["label"], grid(0, 10, 255))


@pytest.mark.parametrize("name", [name for name in CATALOG if CATALOG[name].local])
def test_folders_that_are_no_copy(tmp_path, name):
    refused(f"not a copy of {name}. It must hold ", name, data_dir=tmp_path)
    refused("absent: this folder does not exist", name, data_dir=tmp_path / "absent")


def test_numbers_that_differ_and_masks_without_a_class_are_warned_of(tmp_path, caplog):
    write_cityscapes(tmp_path, "labelIds", grid(0))
    with caplog.at_level(logging.WARNING, "hf_bcd.data"):
        load_dense_dataset("cityscapes", data_dir=tmp_path)
    assert "has 1 images in 'train', but" in caplog.text and "has 2975" in caplog.text
    assert "has 0 images in 'validation'" in caplog.text
    assert "the 1 masks are void throughout" in caplog.text
