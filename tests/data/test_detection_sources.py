"""The same boxes from every layout and kind of table."""

import json

import datasets
import numpy as np
import pytest
from boxed_folders import NAMES, SIZE, THINGS, coco, corners, imagefolder, picture, voc, yolo
from pictures import refused, save

from hf_bcd.commands.check import check
from hf_bcd.data import BoxDataset, DenseDataset, load_dense_dataset


def assert_things(dataset, names=NAMES):
    assert isinstance(dataset, BoxDataset) and list(dataset.id2label.values()) == list(names)
    assert len(dataset) == len(THINGS)
    for sample, things in zip((dataset[index] for index in range(3)), THINGS.values(), strict=True):
        assert sample["image"].size == SIZE and sample["image"].mode == "RGB"
        assert sample["boxes"] == pytest.approx(np.array(corners(things)), abs=1e-3)
        assert sample["classes"].tolist() == [kind for *_, kind in things] and not sample["crowd"].any()
        assert sample["areas"] == pytest.approx([width * height for _, _, width, height, _ in things], abs=0.1)


def with_yaml(folder, text):
    (folder / "data.yaml").write_text(text)
    return folder


def coco128(folder, file, train):
    """As Ultralytics lays its data sets out."""
    yolo(folder, images="images/train2017", labels="labels/train2017")
    (folder / "train.txt").write_text("".join(f"./images/train2017/{stem}.png\n" for stem in THINGS))
    (folder / file).write_text(f"path: ../datasets/coco128\ntrain: {train}\nnames: {{0: cat, 1: dog, 2: owl}}\n")
    return folder


def edited(root, change):
    """Changes every image of COCO's file."""
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    for entry in content["images"]:
        change(entry)
    file.write_text(json.dumps(content))
    return root


LAYOUTS = {
    "COCO": coco,
    "COCO's folders of 2017": lambda root: coco(root, file="annotations/instances_train2017.json", images="train2017"),
    "COCO within images": lambda root: coco(root, images="images/train"),
    "COCO with the folder in its names": lambda root: edited(
        coco(root), lambda entry: entry.update(file_name=f"train/{entry['file_name']}")
    ),
    "Roboflow's COCO": lambda root: coco(root, file="train/_annotations.coco.json"),
    "COCO with numbers as text": lambda root: coco(
        root,
        area=lambda one: str(one["area"]),
        iscrowd=lambda one: "0",
        category_id=lambda one: str(one["category_id"]),
    ),
    "COCO with gaps between categories": lambda root: coco(root, ids=(1, 17, 90)),
    "YOLO": lambda root: with_yaml(yolo(root), "names: [cat, dog, owl]"),
    "YOLO, names by id": lambda root: with_yaml(
        yolo(root), "names: {0: cat, 1: dog, 2: owl}\ntrain: ../train/images\nnc: 3"
    ),
    "YOLO, ids in quotes": lambda root: with_yaml(yolo(root), "names: {'0': cat, '1': dog, '2': owl}"),
    "YOLO in capitals": lambda root: with_yaml(
        yolo(root, images="Train/Images", labels="Train/Labels"), "names: [cat, dog, owl]"
    ),
    "YOLO, other folders": lambda root: with_yaml(
        yolo(root, images="pics/images/all", labels="pics/labels/all"),
        "path: pics\ntrain: images/all\nnames: [cat, dog, owl]",
    ),
    "YOLO of images and labels": lambda root: with_yaml(
        yolo(root, images="images/train", labels="labels/train"),
        "path: /elsewhere\ntrain: images/train\nnames: [cat, dog, owl]",
    ),
    "YOLO, folders within folders": lambda root: with_yaml(
        yolo(root, images="images/train/monday", labels="labels/train/monday"), "names: [cat, dog, owl]"
    ),
    "YOLO, file of another name": lambda root: coco128(root, "coco128.yaml", "images/train2017"),
    "YOLO, list of pictures": lambda root: coco128(root, "data.yaml", "train.txt"),
    "VOC": voc,
    "VOC in VOCdevkit": lambda root: voc(root / "VOCdevkit/VOC2007").parent.parent,
    "VOC beside the pictures": lambda root: voc(root, annotations="train", images="train"),
    "imagefolder": imagefolder,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_boxes(layout, tmp_path):
    assert_things(load_dense_dataset(LAYOUTS[layout](tmp_path))["train"])


def test_yolo_outlines_are_enclosed_and_pictures_without_file_are_empty(tmp_path):
    yolo(tmp_path, {"a": [(0, 0, 1, 1, 0)]}, lines="1 0.1 0.25 0.4 0.25 0.4 0.75 0.1 0.5\n")
    yolo(tmp_path, {"v": [(0, 0, 1, 1, 0)]}, images="val/images", labels="val/labels", lines="0 .5 .5 1 1")
    save(tmp_path / "val/images/w.png", SIZE)
    data = load_dense_dataset(with_yaml(tmp_path, "names: [cat, dog]"))
    assert data["train"][0]["boxes"] == pytest.approx(np.array([[10, 20, 40, 60]])) and data["train"][0][
        "classes"
    ] == [1]
    assert [len(data["val"][index]["boxes"]) for index in range(2)] == [1, 0]


def test_yolo_as_roboflow_exports_it(tmp_path):
    for split in ("train", "valid", "test"):
        yolo(tmp_path, images=f"{split}/images", labels=f"{split}/labels")
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 3\nnames: [cat, dog, owl]\n"
    data = load_dense_dataset(with_yaml(tmp_path, text))
    assert list(data) == ["train", "validation", "test"]
    for split in data.values():
        assert_things(split)


MISPLACED = {
    "CVAT's COCO": (lambda root: coco(root, file="annotations/instances_default.json", images="images/default"), "COCO's"),
    "one COCO file for all": (lambda root: coco(root, file="result.json", images="images"), "COCO's JSON is annotations/"),
    "COCO's file beside the images": (lambda root: coco(root, file="train/annotations.json"), "COCO's JSON is annotations/"),
    "VOC in one folder": (lambda root: voc(root, annotations=".", images="."), "Pascal VOC's XML files are in Annotations"),
    "VOC by other names": (lambda root: voc(root, annotations="xml", images="images"), "Pascal VOC's XML files are in"),
    "YOLO without splits": (lambda root: yolo(root, images="images", labels="labels"), "YOLO's text files are in labels/train"),
    "YOLO of all": (lambda root: yolo(root, images="images/all", labels="labels/all"), "or data.yaml names the folders"),
}  # fmt: skip


@pytest.mark.parametrize("layout", MISPLACED)
def test_boxes_that_lie_elsewhere_are_named_with_the_layout_that_they_need(layout, tmp_path):
    write, needed = MISPLACED[layout]
    refused(rf"looks like boxes, but is not where they are looked for: .*{needed}", write(tmp_path))


def test_a_table_is_read_whatever_lies_beside_it(tmp_path):
    coco(tmp_path, file="result.json", images="elsewhere")
    assert_things(load_dense_dataset(imagefolder(tmp_path))["train"])


def test_pictures_of_a_list_must_be_there(tmp_path):
    (tmp_path / "train.txt").write_text("images/all/z.png\n")
    refused(
        r"train.txt: the picture images/all/z.png is not there", with_yaml(tmp_path, "train: train.txt\nnames: [cat]")
    )


def test_voc_splits_and_difficult_things(tmp_path):
    voc(tmp_path, extra="<difficult>1</difficult><part><bndbox><xmin>1</xmin></bndbox></part>")
    voc(tmp_path, {"a": THINGS["a"]})
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("b\nc\n")
    data = load_dense_dataset(tmp_path, id2label=list(NAMES))
    assert len(data["train"]) == 1 and not data["train"][0]["crowd"].any()
    assert [data["val"][index]["crowd"].all() for index in range(2)] == [True, True]


def test_voc_corners_that_count_from_0(tmp_path):
    voc(tmp_path, {"a": [(19, 9, 31, 21, 0)]})
    assert load_dense_dataset(tmp_path)["train"][0]["boxes"].tolist() == [[19, 9, 50, 30]]
    voc(tmp_path, {"b": [(-1, 9, 31, 21, 0)]})
    train = load_dense_dataset(tmp_path)["train"]
    assert train[0]["boxes"].tolist() == [[20, 10, 50, 30]] and "do not count from 1" in train.rule.why
    assert load_dense_dataset(tmp_path, box_format="voc")["train"][1]["boxes"].tolist() == [[0, 9, 30, 30]]


def test_roboflow_groups_are_no_classes(tmp_path):
    coco(tmp_path, file="train/_annotations.coco.json", ids=(1, 2, 3))
    file = tmp_path / "train/_annotations.coco.json"
    content = json.loads(file.read_text())
    content["categories"] = [{"id": 0, "name": "pets", "supercategory": "none"}] + [
        category | {"supercategory": "pets"} for category in content["categories"]
    ]
    file.write_text(json.dumps(content))
    assert_things(load_dense_dataset(tmp_path)["train"])


def test_coco_detection_has_the_classes_of_coco(shared_data):
    data = load_dense_dataset("coco_detection", data_dir=shared_data / "coco_mini")
    train = data["train"]
    assert train.num_labels == 80 and train.id2label[79] == "toothbrush" and len(train) == 68
    samples = [train[index] for index in range(len(train))]
    assert (
        sum(len(sample["boxes"]) for sample in samples) == 586
        and sum(sample["crowd"].sum() for sample in samples) == 6
    )
    small = sum((sample["areas"][~sample["crowd"]] < 32**2).sum() for sample in samples)
    assert small == 280 and max(len(sample["boxes"]) for sample in samples) == 42
    assert train.notes[1] == "2 of the 70 pictures of 'train' have no box to learn from and are left out"


def test_another_set_is_not_coco(tmp_path):
    refused("category 1 is 'cat' here, but 'person' in COCO", "coco_detection", data_dir=coco(tmp_path, ids=(1, 2, 3)))
    refused("coco_detection is not on the Hub", "coco_detection")
    refused("a data set for object-detection", "coco_detection", task="semantic-segmentation")
    refused("box_format cannot be set for 'synthetic'", "synthetic", box_format="xywh")


# `objects` of cppe-5: dict of lists; of detection-datasets/coco: the same with ClassLabel; of others: list of dicts
def table(form, things=THINGS, box=lambda box: box, **columns):
    classes = datasets.ClassLabel(names=list(NAMES)) if form != "ids" else datasets.Value("int64")
    kinds = {"bbox": datasets.List(datasets.Value("float32"), 4), "category": classes, "area": datasets.Value("int64")}
    rows = [
        [{"bbox": box(one), "category": kind, "area": one[2] * one[3]} for *one, kind in some]
        for some in things.values()
    ]
    if form == "list of dicts":
        feature, values = datasets.List(kinds), rows
    else:
        feature = {key: datasets.List(kind) for key, kind in kinds.items()}
        values = [{key: [one[key] for one in row] for key in kinds} for row in rows]
    name = "annotations" if form == "list of dicts" else "objects"
    features = datasets.Features(
        {"image": datasets.Image(), name: feature, "width": datasets.Value("int32"), "height": datasets.Value("int32")}
    )
    size = {"width": [SIZE[0]] * len(rows), "height": [SIZE[1]] * len(rows)}
    return datasets.Dataset.from_dict(
        {"image": [picture() for _ in rows], name: values} | size | columns, features=features
    )


@pytest.mark.parametrize("form", ["dict of lists", "list of dicts"])
def test_tables(form, tmp_path):
    (tmp_path / "data").mkdir()
    table(form).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    for data in (load_dense_dataset(tmp_path), load_dense_dataset(datasets.DatasetDict({"train": table(form)}))):
        assert_things(data["train"])
        assert data["train"].rule.box_format == "xywh" and "impossible as xyxy" in data["train"].rule.why


def test_categories_that_are_ids_become_classes_in_their_order():
    train = load_dense_dataset(table("ids"))["train"]
    assert_things(train, ["class_0", "class_1", "class_2"])
    assert_things(load_dense_dataset(table("ids"), id2label=list(NAMES))["train"])
    sparse = {stem: [(*box, kind * 40 + 1) for *box, kind in some] for stem, some in THINGS.items()}
    assert_things(load_dense_dataset(table("ids", sparse))["train"], ["class_1", "class_41", "class_81"])
    refused("row 0.*the category 81, which is none of the 3 classes", table("ids", sparse), id2label=list(NAMES))


def test_names_in_another_order_than_that_of_the_files_are_refused(tmp_path):
    (coco(tmp_path) / "classes.json").write_text('["owl", "cat", "dog"]')
    refused("id2label has the names of its files in another order.*0: 'owl'.*and not .*0: 'cat'", tmp_path)
    names = ["owl", "cat", "bird"]
    assert_things(load_dense_dataset(tmp_path, id2label=names)["train"], names)


def test_names_that_differ_in_case_only_are_named(tmp_path, caplog):
    file = voc(tmp_path) / "Annotations/a.xml"
    file.write_text(file.read_text().replace("<name>cat</name>", "<name>Cat</name>", 1))
    assert load_dense_dataset(tmp_path)["train"].id2label == {0: "Cat", 1: "cat", 2: "dog", 3: "owl"}
    assert "differ in upper and lower case only: {0: 'Cat', 1: 'cat'" in caplog.text


def test_one_class_and_many_classes():
    one = {"a": [(10, 20, 30, 40, "hat")], "b": [(50, 20, 30, 40, "hat")]}
    rows = {
        "image": [picture(), picture()],
        "objects": [{"bbox": [box], "label": [kind]} for [(*box, kind)] in one.values()],
    }
    data = load_dense_dataset(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()))
    assert data["train"].id2label == {0: "hat"}
    many = load_dense_dataset(table("ids"), id2label=[f"thing {index}" for index in range(1203)])
    assert many["train"].num_labels == 1203 and many["train"][0]["classes"].tolist() == [0, 2]


FORMS = {
    "xywh": lambda box: box,
    "xyxy": lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]],
    "cxcywh_normalised": lambda box: [
        (box[0] + box[2] / 2) / SIZE[0], (box[1] + box[3] / 2) / SIZE[1], box[2] / SIZE[0], box[3] / SIZE[1]
    ],
    "xywh_normalised": lambda box: [box[0] / SIZE[0], box[1] / SIZE[1], box[2] / SIZE[0], box[3] / SIZE[1]],
    "xyxy_normalised": lambda box: [
        box[0] / SIZE[0], box[1] / SIZE[1], (box[0] + box[2]) / SIZE[0], (box[1] + box[3]) / SIZE[1]
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [False, True])
def test_the_format_is_recognised_or_given(form, given):
    data = table("dict of lists", box=FORMS[form])
    train = load_dense_dataset(data, box_format=form if given else None)["train"]
    assert train.rule.box_format == form and ("impossible as" in train.rule.why) != given
    found = [train[index]["boxes"] for index in range(3)]
    assert all(
        boxes == pytest.approx(np.array(corners(things)), abs=1e-3)
        for boxes, things in zip(found, THINGS.values(), strict=True)
    )


def test_fractions_may_end_a_little_outside(tmp_path):
    lines = "0 .5 .5 .2 .2\n" * 5 + "1 .95 .5 .12 .2\n"
    train = load_dense_dataset(with_yaml(yolo(tmp_path, lines=lines), "names: [cat, dog]"))["train"]
    assert train[0]["boxes"][5] == pytest.approx(np.array([89, 32, 100, 48]))
    table_of = datasets.Dataset.from_dict(
        {
            "image": [picture()],
            "objects": [{"bbox": [[0.5, 0.6, 0.2, 0.2], [0.6, 0.4, 0.2, 1.02]], "category": [0, 0]}],
        }
    )
    refused("2 of the 2 boxes .*read as xywh", table_of)


def test_areas_decide_where_both_formats_are_possible():
    things = {"a": [(10, 10, 30, 30, 0), (5, 20, 40, 45, 1), (20, 1, 50, 60, 2)]}
    train = load_dense_dataset(table("dict of lists", things))["train"]
    assert train.rule.box_format == "xywh" and "stated areas differ" in train.rule.why
    data = table("dict of lists", things).map(
        lambda row: {"objects": {key: row["objects"][key] for key in ("bbox", "category")}}
    )
    refused(r"could be xywh or xyxy, such as \[10, 10, 30, 30\] in .*100x80 .*--box_format xywh", data)


def test_masks_win_unless_boxes_are_asked_for(tmp_path):
    coco(tmp_path, images="train/images")
    for stem in THINGS:
        save(tmp_path / f"train/masks/{stem}.png", np.resize(np.arange(3), SIZE[::-1]))
    masks = load_dense_dataset(tmp_path, id2label=list(NAMES))["train"]
    assert not isinstance(masks, BoxDataset) and isinstance(masks, DenseDataset)
    assert_things(load_dense_dataset(tmp_path, task="object-detection")["train"])
    refused("task is 'boxes'", tmp_path, task="boxes")
    refused("reduce_labels cannot be set", tmp_path, task="object-detection", reduce_labels=True)
    refused("not streamed", tmp_path, task="object-detection", streaming=True)
    refused("box_format cannot be set", tmp_path, box_format="xywh", id2label=list(NAMES))


def test_boxes_without_masks_are_neither_label_maps_nor_streamed(tmp_path):
    coco(tmp_path / "coco")
    refused(r"COCO's JSON, which has boxes and no label maps.*--task", tmp_path / "coco", task="semantic-segmentation")
    imagefolder(tmp_path / "table")
    refused(r"pictures with boxes are not streamed; .*--streaming", tmp_path / "table", streaming=True)


def test_check_prints_boxes_format_and_what_is_odd(tmp_path):
    things = THINGS | {"d": [], "e": [(10, 10, 0.2, 9, 0), (90, 70, 40, 40, 1), (1, 2, 3, 4, 1), (1, 2, 3, 4, 1)]}
    coco(tmp_path, things, iscrowd=lambda one: int(one["bbox"] == [60, 30, 20, 10]))
    coco(
        tmp_path,
        {"v": [*THINGS["a"], (5, 5, 0.2, 9, 0)], "w": []},
        file="annotations/instances_val.json",
        images="val",
    )
    text = check(tmp_path, every_row=True)
    for line in (
        "boxes are xywh, as in COCO's JSON",
        "boxes: 9, at most 4 in a picture; 0 pictures without",
        "crowds: 0; degenerate: 1; repeated: 1; clipped: 1",
        "class   1:      4  dog",
        "2 of the 5 pictures of 'train' have no box to learn from and are left out",
        "1 of the 9 boxes in 3 pictures end outside, by up to 30.0 pixels, and are clipped",
        "val",
        "boxes: 3, at most 3 in a picture; 1 pictures without",
        "1 of the 3 boxes in 2 pictures have a side below one pixel",
        "no box of 1 classes: dog",
    ):
        assert line in text, text
    assert "1 of the 3 boxes in 1 pictures" not in text  # those of the sample
