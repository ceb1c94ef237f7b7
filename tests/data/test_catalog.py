import dataclasses
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_bcd.data import CATALOG, EvalTransform, load_dense_dataset
from hf_bcd.data.labels import LabelRule, decode_label


@pytest.mark.parametrize("name", CATALOG)
def test_every_row_states_source_and_licence(name):
    assert CATALOG[name].source and CATALOG[name].licence


def test_camvid(shared_data):
    data = load_dense_dataset("camvid", data_dir=shared_data / "camvid")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 367, "validation": 101, "test": 233}
    assert data["train"].num_labels == 11 and data["train"].id2label[10] == "Bicyclist"
    stored = json.loads((shared_data / "camvid" / "stats.json").read_text())["val"]["pixels"]
    labels = np.stack([data["val"][index]["label"] for index in range(101)])
    counts = np.bincount(labels.ravel(), minlength=256)
    assert counts[:11].tolist() == stored[:11] and counts[255] == stored[11] and counts[11:255].sum() == 0


def test_camvid_without_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"camvid is not on the Hub: download it from .*train/images, train/masks"):
        load_dense_dataset("camvid")
    with pytest.raises(ValueError, match="not a copy of camvid"):
        load_dense_dataset("camvid", data_dir=tmp_path)


def test_ade20k_names():
    names = CATALOG["ade20k"].id2label or {}
    assert len(names) == 150 and (names[0], names[7], names[12], names[149]) == ("wall", "bed", "person", "flag")


def test_ade20k_names_are_those_of_the_benchmark(shared_data):
    lines = (shared_data / "format_samples/ade20k/objectInfo150.txt").read_text().splitlines()[1:]
    synonyms = [[name.strip() for name in line.split("\t")[-1].split(",")] for line in lines]
    names = CATALOG["ade20k"].id2label or {}
    assert all(names[index] in known for index, known in enumerate(synonyms))


def test_ade20k_official_folders(shared_data):
    root = shared_data / "format_samples/ade20k/ADEChallengeData2016"
    validation = load_dense_dataset("ade20k", data_dir=root)["validation"]
    assert len(validation) == 2 and validation.num_labels == 150
    for index in range(2):
        sample = validation[index]
        stored = np.asarray(Image.open(validation.rows[index].label_name))
        assert np.array_equal(sample["label"], np.where(stored == 0, 255, stored.astype(int) - 1))
        assert sample["label"][stored > 0].max() < 150 and (sample["label"] == 255).any()
        output = validation.with_transform(EvalTransform(64))[index]
        assert min(output["pixel_values"].shape[1:]) == 64 and output["labels"].shape == sample["label"].shape


def test_ade20k_on_a_branch_of_parquet_files_with_several_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    image, mask = Image.new("RGB", (4, 2)), Image.fromarray(np.array([[0, 1, 2, 150]] * 2, dtype=np.uint8))
    features = {"image": datasets.Image(), "annotation": datasets.Image(), "scene_category": datasets.ClassLabel(2)}
    scenes = datasets.Dataset.from_dict(
        {"image": [image], "annotation": [mask], "scene_category": [1]}, features=datasets.Features(features)
    )
    others = datasets.Dataset.from_dict({"number": [1]})
    for split in ("train", "validation", "test"):
        for configuration, table in (("scene_parsing", scenes), ("instance_segmentation", others)):
            folder = tmp_path / "repo" / configuration / split
            folder.mkdir(parents=True)
            table.to_parquet(folder / "0000.parquet")
    spec = CATALOG["ade20k"]
    assert spec.hub is not None
    hub = dataclasses.replace(spec.hub, repo=str(tmp_path / "repo"))
    monkeypatch.setitem(CATALOG, "ade20k", dataclasses.replace(spec, hub=hub))
    data = load_dense_dataset("ade20k")
    assert list(data) == ["train", "validation"]
    assert data["validation"][0]["label"].tolist() == [[255, 0, 1, 149]] * 2


def test_voc_palette_masks(shared_data):
    path = shared_data / "format_samples/voc/VOCdevkit/VOC2012/SegmentationClass/2007_000063.png"
    ids = decode_label(Image.open(path), str(path))
    assert np.unique(ids).tolist() == [0, 9, 12, 255]
    assert np.array_equal(LabelRule().apply(ids, 21, str(path)), ids)


def test_cityscapes_mapping(shared_data):
    root = shared_data / "format_samples/cityscapes"
    labels = json.loads((root / "labels_table.json").read_text())
    mapping = tuple((row["id"], row["trainId"]) for row in labels if row["id"] >= 0)
    folder = root / "gtFine/val/frankfurt"
    ids, train_ids = (
        decode_label(Image.open(folder / f"frankfurt_000000_000294_gtFine_{kind}.png"), kind)
        for kind in ("labelIds", "labelTrainIds")
    )
    labels = LabelRule(mapping=mapping).apply(ids, 19, "labelIds")
    assert (labels == train_ids).mean() > 0.997  # the two sample files were shrunk separately
