import json
import logging
from dataclasses import replace

import datasets
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError
from pictures import grid, palette, refused
from PIL import Image

from hf_bcd.data import CATALOG, load_dense_dataset
from hf_bcd.data.sources.catalog import CITYSCAPES_COLOURS, CITYSCAPES_IDS, _notify


TRAIN_IDS = dict(CITYSCAPES_IDS)


def three_channels(ids):
    return Image.fromarray(np.repeat(ids[..., None], 3, axis=2))


def colours(ids):
    colour_of = {stored: colour for colour, stored in CITYSCAPES_COLOURS}
    return Image.fromarray(np.array([[colour_of[i] for i in row] for row in ids.tolist()], dtype=np.uint8))


def write_repo(root, files, image_column, label_column, masks, **others):
    columns = {image_column: [Image.new("RGB", (6, 2))] * len(masks), label_column: masks}
    features = dict.fromkeys(columns, datasets.Image())
    for name, (value, feature) in others.items():
        columns[name], features[name] = [value] * len(masks), feature
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / file)


@pytest.fixture
def use_repos(tmp_path, monkeypatch):
    """Lets a row of the catalog read folders of `tmp_path` for its repositories; those not written do not exist."""

    def use(name):
        copies = [replace(copy, repo=str(tmp_path / copy.repo), revision=None) for copy in CATALOG[name].hub]
        monkeypatch.setitem(CATALOG, name, replace(CATALOG[name], hub=tuple(copies)))

    return use


@pytest.fixture
def hub_names(tmp_path, monkeypatch):
    """Stands for the file of class names in a repository."""

    def publish(names):
        def download(repo, file, **options):
            if names is None:
                raise EntryNotFoundError(f"{repo} has no {file}")
            (tmp_path / file).write_text(json.dumps(names))
            return str(tmp_path / file)

        monkeypatch.setattr("hf_bcd.data.sources.tables.hf_hub_download", download)

    return publish


@pytest.mark.parametrize("name", CATALOG)
def test_every_row_states_source_licence_numbers_and_a_way_to_get_it(name):
    spec = CATALOG[name]
    assert spec.source and spec.licence and spec.rules
    assert name.startswith("synthetic") or (spec.images and (spec.local or spec.hub))
    assert all(source.repo.count("/") == 1 for source in spec.hub)


FIRST_AND_LAST = {
    "ade20k": (150, "wall", "flag"),
    "cityscapes": (19, "road", "bicycle"),
    "coco": (133, "person", "rug-merged"),
    "coco_instances": (81, "background", "toothbrush"),
    "coco_stuff_10k": (171, "person", "wood"),
    "voc2012_aug": (21, "background", "tvmonitor"),
}


@pytest.mark.parametrize("name", FIRST_AND_LAST)
def test_class_names(name):
    names = list((CATALOG[name].id2label or {}).values())
    assert (len(names), names[0], names[-1]) == FIRST_AND_LAST[name]


def test_ade20k_names_are_those_of_the_benchmark(shared_data):
    lines = (shared_data / "format_samples/ade20k/objectInfo150.txt").read_text().splitlines()[1:]
    synonyms = [[name.strip() for name in line.split("\t")[-1].split(",")] for line in lines]
    names = CATALOG["ade20k"].id2label or {}
    assert all(names[index] in known for index, known in enumerate(synonyms))


def test_camvid(shared_data):
    data = load_dense_dataset("camvid", data_dir=shared_data / "camvid")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 367, "validation": 101, "test": 233}
    assert data["train"].num_labels == 11 and data["train"].id2label[10] == "Bicyclist"
    stored = json.loads((shared_data / "camvid" / "stats.json").read_text())["val"]["pixels"]
    labels = np.stack([data["val"][index]["label"] for index in range(101)])
    counts = np.bincount(labels.ravel(), minlength=256)
    assert counts[:11].tolist() == stored[:11] and counts[255] == stored[11] and counts[11:255].sum() == 0


@pytest.mark.parametrize("name", [name for name in CATALOG if not name.startswith("synthetic")])
def test_sets_that_the_hub_or_the_disk_lacks(name, tmp_path):
    if not CATALOG[name].hub:
        message = rf"{name} is not on the Hub: download it from http.*--data_dir.*It must hold \S"
        refused(message, name)
    if not CATALOG[name].local:
        message = f"{name} has no folder layout of its own: give its folder as the data set"
        refused(message, name, data_dir=tmp_path)


def one_shard(*splits):
    return [f"data/{split}-00000-of-00001.parquet" for split in splits]


# repository -> catalog row, files, columns, masks, labels, further columns: as far as the repositories are known
ADE = grid(0, 1, 2, 150), grid(255, 0, 1, 149)
CITIES = grid(0, 3, 7, 18, 26, 33), grid(255, 255, 0, 255, 13, 18)
VOC = grid(0, 1, 15, 20, 255), grid(0, 1, 15, 20, 255)
SCENE = {"label": (1, datasets.ClassLabel(2))}
OF_CITIES = (
    "cityscapes", one_shard("train", "validation", "test"), "image", "semantic_segmentation", three_channels, CITIES, {},
)  # fmt: skip
COPIES = {
    "zhoubolei/scene_parse_150": (
        "ade20k", [f"scene_parsing/{split}/0000.parquet" for split in ("train", "validation", "test")],
        "image", "annotation", Image.fromarray, ADE, {"scene_category": SCENE["label"]},
    ),
    "sezer12138/ADE20k_Segementation": (
        "ade20k", one_shard("train", "val"), "image", "annotated", Image.fromarray, ADE, SCENE,
    ),
    "nielsr/ade20k-demo": (
        "ade20k_demo", one_shard("train", "validation"), "image", "label", Image.fromarray, ADE, {},
    ),
    "Chris1/cityscapes": OF_CITIES,
    "Chris1/cityscapes_segmentation": OF_CITIES,
    "jxie/pascal-voc-2012": ("voc2012_aug", one_shard("train", "val"), "image", "mask", palette, VOC, {}),
    "shijli/voc2012": (
        "voc2012_aug", one_shard("train", "val", "trainval"), "image", "mask", Image.fromarray, VOC,
        {"id": ("2007_000032", datasets.Value("string"))},
    ),
}  # fmt: skip


def test_every_copy_with_names_in_the_package_is_tried():
    repos = {source.repo for spec in CATALOG.values() if spec.id2label for source in spec.hub}
    assert repos == COPIES.keys()


@pytest.mark.parametrize("repo", COPIES)
def test_copies_on_the_hub(tmp_path, use_repos, repo):
    name, files, image_column, label_column, encode, (stored, expected), others = COPIES[repo]
    write_repo(tmp_path / repo, files, image_column, label_column, [encode(stored)] * 2, **others)
    if repo.startswith("zhoubolei"):  # the branch mixes configurations
        other = datasets.Dataset.from_dict({"number": [1]})
        (tmp_path / repo / "instance_segmentation/train").mkdir(parents=True)
        other.to_parquet(tmp_path / repo / "instance_segmentation/train/0000.parquet")
    use_repos(name)
    data = load_dense_dataset(name)
    assert list(data) == ["train", "validation"] and len(data["train"]) == 2
    assert np.array_equal(data["validation"][1]["label"], expected)
    assert data["train"].source == str(tmp_path / repo) and data["train"].name == name


def test_a_copy_with_class_names_of_its_own(tmp_path, use_repos, hub_names):
    repo = tmp_path / "segments/sidewalk-semantic"
    write_repo(repo, one_shard("train"), "pixel_values", "label", [Image.fromarray(grid(0, 1, 34))])
    use_repos("sidewalk")
    hub_names({str(index): f"name {index}" for index in range(35)})
    train = load_dense_dataset("sidewalk")["train"]
    assert train.num_labels == 35 and train.id2label[34] == "name 34"
    assert np.array_equal(train[0]["label"], grid(255, 1, 34))
    hub_names(None)
    refused("sidewalk-semantic has no file id2label.json", "sidewalk")


def test_food(tmp_path, use_repos, hub_names):
    repo = tmp_path / "EduardoPacheco/FoodSeg103"
    on_image = {"classes_on_image": ([0, 103], datasets.List(datasets.Value("int64")))}
    masks = [Image.fromarray(grid(0, 1, 103))]
    write_repo(repo, one_shard("train", "validation"), "image", "label", masks, **on_image)
    use_repos("foodseg103")
    hub_names(["background", *(f"food {index}" for index in range(103))])
    assert np.array_equal(load_dense_dataset("foodseg103")["val"][0]["label"], grid(0, 1, 103))


@pytest.fixture
def cityscapes(tmp_path, use_repos):
    """Loads training data from a copy of Cityscapes with these masks."""
    use_repos("cityscapes")

    def load(*masks, encode=three_channels):
        masks = [encode(mask) for mask in masks]
        files = one_shard("train", "validation")
        write_repo(tmp_path / "Chris1/cityscapes", files, "image", "semantic_segmentation", masks)
        return load_dense_dataset("cityscapes")["train"]

    return load


@pytest.mark.parametrize("encode", [Image.fromarray, three_channels, colours])
def test_every_encoding_of_a_cityscapes_copy_gives_the_same_map(cityscapes, encode):
    ids = grid(*(stored for stored in TRAIN_IDS if stored > 22))
    assert np.array_equal(cityscapes(ids, encode=encode)[0]["label"], np.vectorize(TRAIN_IDS.get)(ids))


def test_the_encoding_is_that_of_all_first_masks_together(cityscapes):
    # the second and the fourth could be either ids or train ids
    train = cityscapes(grid(0, 13, 255), grid(7, 11), grid(18, 255), grid(8))
    assert [train[index]["label"][0, 0] for index in range(4)] == [0, 7, 18, 8]
    train = cityscapes(grid(7, 11), grid(26, 3), grid(8))
    assert [train[index]["label"][0, 0] for index in range(3)] == [0, 13, 1]
    with pytest.raises(ValueError, match="first 4 masks could be labelIds or labelTrainIds.*--data_dir"):
        cityscapes(grid(7, 11), grid(8))


def test_masks_in_two_encodings(cityscapes):
    message = r"in none of the known encodings. Not labelIds: .*row 1.*\[255\].* Not labelTrainIds: .*row 0.*\[26\]"
    with pytest.raises(ValueError, match=message):
        cityscapes(grid(7, 26), grid(0, 255))
    for first, later, wrong in ((grid(7, 26), grid(0, 255), 255), (grid(0, 255), grid(7, 26), 26)):
        with pytest.raises(ValueError, match=rf"row 4, column 'semantic_segmentation'.*ids \[{wrong}\]"):
            cityscapes(*[first] * 4, later)


def test_the_first_copy_that_fits_is_taken(tmp_path, use_repos, caplog):
    use_repos("voc2012_aug")
    first, second = (tmp_path / repo for repo in ("jxie/pascal-voc-2012", "shijli/voc2012"))
    mask = Image.fromarray(grid(0, 20))
    write_repo(second, one_shard("train", "val"), "image", "mask", [mask])
    assert load_dense_dataset("voc2012_aug")["train"].source == str(second)
    assert "jxie/pascal-voc-2012 is passed over" in caplog.text
    for files, column, wrong, reason in (
        (one_shard("train"), "mask", mask, "splits train, but validation is expected"),
        (one_shard("train", "val"), "segmentation", mask, "'mask' is none"),
        (one_shard("train", "val"), "mask", Image.fromarray(grid(21)), "ids [21]"),
        (one_shard("train", "val"), "mask", Image.new("L", (3, 3)), "its mask is 3x3"),
        (one_shard("train", "val"), "mask", None, "column 'mask': empty"),
    ):
        caplog.clear()
        for file in first.glob("data/*"):
            file.unlink()
        write_repo(first, files, "image", column, [wrong])
        assert load_dense_dataset("voc2012_aug")["train"].source == str(second)
        assert "jxie/pascal-voc-2012 is passed over" in caplog.text
        assert reason in caplog.text and "shijli/voc2012 is passed over" not in caplog.text


def test_no_copy_can_be_used():
    with pytest.raises(ValueError) as error:
        load_dense_dataset("voc2012_aug")
    start, first, second = str(error.value).split(" - ")
    assert start == "voc2012_aug: no copy on the Hub can be used."
    assert first.startswith("jxie/pascal-voc-2012: ") and "HF_HUB_OFFLINE" in first
    assert second.startswith("shijli/voc2012: ")
    assert "--data_dir" in second and "VOCdevkit/VOC2012 with JPEGImages" in second


def test_terms_are_stated_once(shared_data, caplog):
    _notify.cache_clear()
    root = shared_data / "format_samples/ade20k/ADEChallengeData2016"
    with caplog.at_level(logging.WARNING, "hf_bcd.data"):
        load_dense_dataset("ade20k", data_dir=root)
        load_dense_dataset("ade20k", data_dir=root)
    assert caplog.text.count("Its terms of use: BSD-3-Clause; images for non-commercial research") == 1
