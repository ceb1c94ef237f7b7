"""Wrong boxes: each is a clear error, or follows a documented rule."""

import json
import math

import datasets
import numpy as np
import pytest
from boxed_folders import SIZE, THINGS, coco, imagefolder, picture, voc, yolo
from pictures import encoded, orientation, refused, save
from PIL import Image

from hf_bcd.data import BoxTrainTransform, load_dense_dataset


def box(function):
    """COCO's layout whose boxes are changed."""
    return lambda root: coco(root, bbox=lambda one: function(*one["bbox"]))


def one_more(*more, **changes):
    return lambda root: coco(root, THINGS | {"d": list(more)}, **changes)


def edited(change):
    def write(root):
        file = coco(root) / "annotations/instances_train.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return root

    return write


def second_split(**changes):
    return lambda root: coco(coco(root), file="annotations/instances_val.json", images="val", **changes)


def truncated(root):
    file = coco(root) / "train/b.jpg"
    file.write_bytes(file.read_bytes()[:300])
    return root


def labels(text):
    return lambda root: yolo(root, lines=text)


def with_names(write, names="[cat, dog, owl]"):
    def written(root):
        (root / "data.yaml").write_text(f"names: {names}")
        return write(root)

    return written


def turned(root):
    save(root / "x.jpg", SIZE)
    imagefolder(root)
    Image.new("RGB", SIZE[::-1]).save(root / "train/a.png", exif=orientation(6))
    return root


def metadata(change):
    def write(root):
        file = imagefolder(root) / "train/metadata.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        change(rows)
        file.write_text("\n".join(map(json.dumps, rows)))
        return root

    return write


ERRORS = {
    "xyxy in COCO's JSON": (box(lambda x, y, w, h: [x, y, x + w, y + h]), r"read as xywh, as in COCO's JSON, but .* impossible for 3 of 6, such as \[50, 10, 95, 40\] in .*image a.jpg, 100x80 .*could be xyxy.*box_format xyxy"),
    "normalised in COCO's JSON": (box(lambda x, y, w, h: [x / 100, y / 80, w / 100, h / 80]), "at most 1, as fractions"),
    "outside": (one_more((150, 10, 20, 20, 0)), r"image d.jpg: box 0, \[150, 10, 20, 20\], lies outside .*100x80"),
    "left of the picture": (one_more((-40, 10, 20, 20, 0)), "lies outside of the picture"),
    "NaN": (one_more((10, math.nan, 20, 20, 0)), r"image d.jpg: box 0, \[10, nan, 20, 20\], is not finite"),
    "infinite": (one_more((10, 10, math.inf, 20, 0)), "is not finite"),
    "negative width": (one_more((40, 10, -20, 20, 0)), r"\[40, 10, -20, 20\], has a negative width or height"),
    "three numbers": (box(lambda x, y, w, h: [x, y, w]), r"annotation 1 of image 1 has the box \[10, 20, 30\]"),
    "no box": (edited(lambda content: content["annotations"][0].pop("bbox")), r"instances_train.json: not COCO's instances annotations \('bbox' is missing\)"),
    "an image that is not listed": (edited(lambda content: content["annotations"][0].update(image_id=9)), "of image 9"),
    "an image twice": (edited(lambda content: content["images"].append(content["images"][0])), "only 3 different ids"),
    "an image under two ids": (edited(lambda content: content["images"].append(content["images"][0] | {"id": 9})), "instances_train.json lists a.jpg more than once"),
    "a category that is not listed": (edited(lambda content: content["annotations"][2].update(category_id=7)), "image b.jpg: a box has the category 7, which is none of the 3 classes"),
    "a category with two names": (edited(lambda content: content["categories"].append({"id": 1, "name": "cow"})), "instances_train.json: the category 1 has two names, 'dog' and 'cow'; keep one"),
    "a box of text": (box(lambda *_: ["a", "b", "c", "d"]), r"instances_train.json: not COCO's instances annotations \(ValueError"),
    "an area of text": (lambda root: coco(root, area=lambda one: "large"), r"instances_train.json: not COCO's instances annotations \(ValueError"),
    "no categories": (edited(lambda content: content["categories"].clear()), "instances_train.json: not COCO's instances annotations .*categories is empty"),
    "a width of text": (edited(lambda content: content["images"][1].update(width="wide")), r"instances_train.json: not COCO's instances annotations \(ValueError"),
    "categories of another split": (second_split(ids=(5, 6, 7)), "categories 5: cat, 6: dog, 7: owl are not those of the other split, 0: cat"),
    "a truncated picture": (truncated, "b.jpg: cannot be decoded"),
    "sizes that are not the picture's": (edited(lambda content: content["images"][1].update(width=90)), "b.jpg: the image is 100x80 pixels .* but its annotation is 90x80"),
    "an EXIF turn without stated size": (turned, r"EXIF turns this photograph \(orientation 6\).*state the size"),
    "nothing to train on": (lambda root: coco(root, dict.fromkeys("abc", [])), "none of the 3 pictures of 'train' has a box"),
    "degenerate boxes only": (box(lambda x, y, w, h: [x, y, 0.5, h]), "6 of the 6 boxes in 3 pictures have a side below one pixel.*read as xywh"),
    "crowds only": (lambda root: coco(root, iscrowd=lambda one: 1), "all boxes of 'train' mark crowds"),
    "YOLO with pixels": (with_names(labels("0 50 40 20 10")), "boxes are read as cxcywh_normalised, as in YOLO's text files, but values are above 1"),
    "YOLO of an unknown class": (with_names(labels("3 .5 .5 .1 .1")), "a.txt: a box has the category 3, which is none of the 3"),
    "YOLO with five numbers": (with_names(labels("0 .5 .5 .1 .1 .9")), "a.txt, line 1: .*neither `class cx cy w h` nor"),
    "YOLO with half a class": (with_names(labels("0.5 .5 .5 .1 .1")), "a.txt, line 1"),
    "YOLO without labels": (with_names(lambda root: yolo(root, labels="elsewhere")), "no text file with the boxes"),
    "YOLO's names as text": (with_names(labels("0 .5 .5 .1 .1"), "cat"), r"data.yaml: names is 'cat'; expected a list of the class names"),
    "YOLO's points of bodies": (with_names(labels("0 .5 .5 .1 .1 .4 .4 .6 .6"), "[cat, dog, owl]\nkpt_shape: [2, 2]"), "data.yaml: its kpt_shape .*neither boxes nor outlines"),
    "YOLO of another number of classes": (with_names(labels("0 .5 .5 .1 .1"), "[cat, dog]\nnc: 3"), "data.yaml: nc is 3, but names has 2 classes"),
    "YOLO's names missing": (lambda root: yolo((root / "data.yaml").write_text("train: train/images") and root), "lacks names"),
    "VOC without a name": (lambda root: [(root / "Annotations").mkdir(), save(root / "JPEGImages/a.jpg", SIZE), (root / "Annotations/a.xml").write_text("<annotation><object/></annotation>")] and root, "a.xml: not an annotation of Pascal VOC"),
    "VOC without a picture": (lambda root: [voc(root), (root / "JPEGImages/b.jpg").unlink()] and root, "1 of 3 pictures have no XML file or no image, such as b"),
    "VOC with a picture listed twice": (lambda root: [voc(root), (root / "ImageSets/Main").mkdir(parents=True), (root / "ImageSets/Main/train.txt").write_text("a\nb\na\n")] and root, "train.txt: 1 of its images are listed more than once, such as a"),
    "no category": (metadata(lambda rows: [row["objects"].pop("category") for row in rows]), "its things have bbox, but no category or"),
    "more boxes than categories": (metadata(lambda rows: rows[0]["objects"]["category"].pop()), "row 0.*2 boxes, but .*'category': 1"),
    "some rows without objects": (metadata(lambda rows: rows[1].update(objects=None)), "row 1, column 'objects': empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_boxes_are_errors(case, tmp_path):
    write, message = ERRORS[case]
    refused(message, write(tmp_path))


def first(data, split="train", index=-1):
    return data[split][index]


RULES = {
    "a crowd is kept, but teaches nothing": (
        lambda root: coco(root, iscrowd=lambda one: int(one["id"] == 1)),
        lambda data: [first(data, index=0)["crowd"].tolist(), len(BoxTrainTransform(80, 100)(first(data, index=0))["boxes"])],
        [[True, False], 1], (),
    ),
    "degenerate boxes are kept, but teach nothing": (
        one_more((10, 10, 0, 20, 0), (10, 10, 0.5, 20, 0), (1, 1, 9, 9, 1)),
        lambda data: [len(first(data)["boxes"]), len(BoxTrainTransform(80, 100)(first(data))["boxes"])],
        [3, 1], ("2 of the 9 boxes in 4 pictures have a side below one pixel",),
    ),
    "no area": (
        one_more((10, 10, 9, 20, 0), area=lambda one: 0 if one["bbox"][2] == 9 else 900),
        lambda data: len(BoxTrainTransform(80, 100)(first(data))["boxes"]), 0, ("1 of the 7 boxes",),
    ),
    "boxes that end outside are clipped": (
        one_more((80, 60, 40, 40, 0), (-5, -5, 20, 20, 1)),
        lambda data: first(data)["boxes"].tolist(),
        [[80, 60, 100, 80], [0, 0, 15, 15]], ("2 of the 8 boxes in 4 pictures end outside, by up to 20.0 pixels",),
    ),
    "repeated annotations teach once": (
        one_more((10, 10, 20, 20, 0), (10, 10, 20, 20, 0), (10, 10, 20, 20, 1)),
        lambda data: [len(first(data)["boxes"]), len(BoxTrainTransform(80, 100)(first(data))["boxes"])],
        [3, 2], ("1 of the 9 boxes in 4 pictures repeat another one",),
    ),
    "gaps between categories": (
        lambda root: coco(root, ids=(1, 13, 90)),
        lambda data: [data["train"].id2label, first(data, index=0)["classes"].tolist()],
        [{0: "cat", 1: "dog", 2: "owl"}, [0, 2]], (),
    ),
    "polygons with two points": (
        lambda root: coco(root, segmentation=lambda one: [[1, 2, 3, 4]]),
        lambda data: first(data, index=0)["boxes"][0].tolist(), [10, 20, 40, 60], (),
    ),
    "pictures without boxes are left out of training": (
        one_more(), lambda data: len(data["train"]), 3, ("1 of the 4 pictures of 'train' have no box to learn from",),
    ),
    "an evaluation split keeps pictures without boxes": (
        second_split(things=THINGS | {"d": []}), lambda data: [len(data["val"]), first(data, "val")["boxes"].shape],
        [4, (0, 4)], (),
    ),
    "an evaluation split whose annotations are withheld": (
        second_split(things=dict.fromkeys("abc", [])), list, ["train"], ("split 'val.*' is left out",),
    ),
    "a file without annotations": (
        lambda root: [coco(root), save(root / "test/t.jpg", SIZE), (root / "annotations/instances_test.json").write_text(
            json.dumps({"images": [{"id": 1, "file_name": "t.jpg"}], "categories": []}))] and root,
        list, ["train"], ("left out, since it has no annotations",),
    ),
    "a class without boxes": (
        lambda root: coco(root, {"a": THINGS["a"]}), lambda data: data["train"].notes, ("no box of 'train' shows 'dog'",), ("'dog'",),
    ),
    "ten thousand boxes in one picture": (
        one_more(*((column, row, 1, 1, 0) for column in range(100) for row in range(80)), *[(0, 0, 5, 5, 1)] * 2000),
        lambda data: [len(first(data)["boxes"]), len(BoxTrainTransform(80, 100)(first(data))["boxes"])], [10_000, 8_001], (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules(case, tmp_path, caplog):
    write, look, expected, warnings = RULES[case]
    data = load_dense_dataset(write(tmp_path))
    assert look(data) == expected
    for warning in warnings:
        assert warning.split("'val")[0] in caplog.text


def exif_row(size, turn, **columns):
    image = {"bytes": encoded(Image.new("RGB", size), exif=orientation(turn)), "path": None}
    boxes = {"bbox": [[60, 10, 30, 40], [10, 10, 5, 5]], "category": [0, 0]}
    table = datasets.Dataset.from_dict({"image": [image], "objects": [boxes], **columns})
    return table.cast_column("image", datasets.Image())


def test_stated_sizes_decide_on_a_picture_that_exif_turns():
    stored = load_dense_dataset(exif_row((100, 60), 6, width=[100], height=[60]))["train"][0]
    assert stored["image"].size == (100, 60)
    upright = load_dense_dataset(exif_row((60, 100), 6, width=[100], height=[60]))["train"][0]
    assert upright["image"].size == (100, 60)
    refused("EXIF turns this photograph", exif_row((100, 60), 6))
    assert load_dense_dataset(exif_row((100, 60), 1))["train"][0]["image"].size == (100, 60)


def rows(*boxes):
    things = {"bbox": [list(map(float, box)) for box in boxes], "category": [0] * len(boxes)}
    table = datasets.Dataset.from_dict({"image": [encoded(picture())], "objects": [things]})
    return table.cast_column("image", datasets.Image())


@pytest.mark.parametrize(
    ("boxes", "box_format", "message"),
    [
        ([[10, 10, 50, 60]], None, r"could be xywh or xyxy, such as \[10, 10, 50, 60\] in .*row 0.*, 100x80"),
        (
            [[10, 10, 120, 60], [50, 40, 20, 60]],
            None,
            r"fit no format: not xywh, for \[10, 10, 120, 60\].*not xyxy, for \[50, 40",
        ),
        ([[50, 40, 20, 20]], "xyxy", r"impossible for 1 of 1, such as \[50, 40, 20, 20\] .*could be xywh"),
        ([[50, 40, 90, 70]], "xywh", r"impossible for 1 of 1, such as \[50, 40, 90, 70\] .*could be xyxy"),
        ([[50, 40, 20, 20]], "cxcywh_normalised", "values are above 1, as no fraction is"),
        ([[0.5, 0.5, 0.2, 0.2]], "xywh", "at most 1, as fractions"),
        (
            [[0.1, 0.1, 0.2, 0.2]],
            None,
            "could be cxcywh_normalised or xyxy_normalised or xywh_normalised.*--box_format cxcywh_normalised",
        ),
        ([[0.4, 0.5, 0.3, 0.2]], None, r"could be cxcywh_normalised or xywh_normalised, such as \[0.4"),
        ([[0.1, 0.2, 0.8, 0.7]], None, r"could be xyxy_normalised or xywh_normalised, such as \[0.1"),
        ([[50, 40, 20, 20]], "xwyh", "box_format is 'xwyh'; choose one of xywh, xyxy"),
    ],
)
def test_formats_that_boxes_do_not_have(boxes, box_format, message):
    refused(message, rows(*boxes), box_format=box_format)


def test_a_row_that_nobody_looked_at_is_refused_when_it_is_read(tmp_path):
    things = {f"p{index:03d}": [(10, 20, 30, 40, index % 3)] for index in range(130)}
    things["p001"] = [(150, 20, 30, 40, 0)]
    train = load_dense_dataset(coco(tmp_path, things))["train"]
    with pytest.raises(ValueError, match=r"image p001.jpg: box 0, \[150, 20, 30, 40\], lies outside"):
        train[1]
    assert np.array_equal(train[0]["boxes"], [[10, 20, 40, 60]])
