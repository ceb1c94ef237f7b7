import json
import pickle
import shutil

import numpy as np
import pytest
from pictures import refused, save
from PIL import Image

from hf_bcd.data import CATALOG, load_dense_dataset
from hf_bcd.data.sources.coco import COCO_PANOPTIC, COCO_THINGS, draw_instances, panoptic_to_classes


# pycocotools 2.0.11 has not followed numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def categories(shared_data):
    file = shared_data / "format_samples/coco/panopticapi_sample/panoptic_coco_categories.json"
    return json.loads(file.read_text())


def test_tables_are_the_official_ones(shared_data):
    rows = categories(shared_data)
    assert COCO_PANOPTIC == tuple(row["id"] for row in rows) and len(COCO_PANOPTIC) == 133
    assert COCO_THINGS == tuple(row["id"] for row in rows if row["isthing"]) and len(COCO_THINGS) == 80
    names = [row["name"] for row in rows]
    assert CATALOG["coco"].id2label == dict(enumerate(names))
    assert CATALOG["coco_instances"].id2label == dict(enumerate(["background", *names[:80]]))


def decoded_by_hand(png, segments, index_of):
    """One pixel after the other, with the arithmetic that COCO's web page gives."""
    classes = {segment["id"]: index_of[segment["category_id"]] for segment in segments}
    pixels = np.asarray(Image.open(png)).tolist()
    return [[classes.get(r + 256 * g + 256 * 256 * b, 255) for r, g, b in row] for row in pixels]


def test_panoptic_masks(shared_data):
    root = shared_data / "coco_mini"
    train = load_dense_dataset("coco", data_dir=root)["train"]
    assert len(train) == 70 and train.num_labels == 133
    content = json.loads((root / "annotations/panoptic_train.json").read_text())
    index_of = {row["id"]: index for index, row in enumerate(categories(shared_data))}
    for index in (0, 41):
        annotation = content["annotations"][index]
        png = root / "annotations/panoptic_train" / annotation["file_name"]
        assert train[index]["label"].tolist() == decoded_by_hand(png, annotation["segments_info"], index_of)
        assert train.rows[index].label_name == str(png)


def test_genuine_panoptic_annotations_of_val(shared_data, tmp_path):
    sample = shared_data / "format_samples/coco/panopticapi_sample"
    (tmp_path / "annotations").mkdir()
    shutil.copy(sample / "panoptic_examples.json", tmp_path / "annotations/panoptic_val2017.json")
    shutil.copytree(sample / "panoptic_examples", tmp_path / "annotations/panoptic_val2017")
    shutil.copytree(sample / "input_images", tmp_path / "val2017")
    data = load_dense_dataset("coco", data_dir=tmp_path)
    assert list(data) == ["validation"] and len(data["val"]) == 2
    counts = np.bincount(data["val"][0]["label"].ravel(), minlength=256)
    annotation = json.loads((sample / "panoptic_examples.json").read_text())["annotations"][0]
    assert counts[0] == sum(row["area"] for row in annotation["segments_info"] if row["category_id"] == 1)
    assert counts[:133].sum() == sum(row["area"] for row in annotation["segments_info"])


def test_instances_are_the_things_of_the_panoptic_masks(shared_data):
    pytest.importorskip("pycocotools")
    root = shared_data / "coco_mini"
    panoptic = load_dense_dataset("coco", data_dir=root)["train"]
    instances = load_dense_dataset("coco_instances", data_dir=root)["train"]
    content = json.loads((root / "annotations/panoptic_train.json").read_text())
    assert instances.num_labels == 81 and len(instances) == 70
    crowds = 0
    of_panoptic = {panoptic.rows[index].image_name: index for index in range(70)}
    for index in range(30):
        other = of_panoptic[instances.rows[index].image_name]
        stuff, label = panoptic[other]["label"], instances[index]["label"]
        has_crowd = any(segment["iscrowd"] for segment in content["annotations"][other]["segments_info"])
        crowds += has_crowd
        expected, clear = np.where(stuff < 80, stuff + 1, 0), label != 255
        assert np.array_equal(label[clear], expected[clear]) and (expected[~clear] > 0).all()
        assert clear.all() or has_crowd
    assert crowds > 0


def test_genuine_polygons_and_crowds(shared_data, tmp_path):
    masks = pytest.importorskip("pycocotools.mask")
    sample = shared_data / "format_samples/coco"
    (tmp_path / "annotations").mkdir()
    content = json.loads((sample / "instances_genuine_polygons.json").read_text())
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(content))
    shutil.copytree(sample / "images", tmp_path / "val2017")
    data = pickle.loads(pickle.dumps(load_dense_dataset("coco_instances", data_dir=tmp_path)["val"]))
    assert len(data) == 6 and sum(row["iscrowd"] for row in content["annotations"]) == 1
    for index, image in enumerate(content["images"]):
        label = data[index]["label"]
        assert label.shape == (image["height"], image["width"])
        own = [row for row in content["annotations"] if row["image_id"] == image["id"]]
        singles = {COCO_THINGS.index(row["category_id"]) + 1 for row in own if not row["iscrowd"]}
        covered = np.zeros(label.shape, dtype=bool)
        for row in own:
            runs = masks.frPyObjects(row["segmentation"], *label.shape)
            mask = masks.decode(runs if row["iscrowd"] else masks.merge(runs)).astype(bool)
            covered |= mask
            allowed = singles if row["iscrowd"] else {COCO_THINGS.index(row["category_id"]) + 1}
            assert set(np.unique(label[mask])) <= allowed | {255}
        assert (label[~covered] == 0).all() and (label[covered] > 0).all()


def box(top, left, bottom, right):
    return [[left, top, right, top, right, bottom, left, bottom]]


def instance(category, segmentation, crowd=0):
    return {"category_id": category, "iscrowd": crowd, "segmentation": segmentation}


def test_overlaps_and_crowds():
    masks = pytest.importorskip("pycocotools.mask")
    crowd = np.zeros((6, 8), dtype=np.uint8, order="F")
    crowd[:, 5:] = 1
    runs = masks.encode(crowd)
    annotations = [
        instance(1, box(0, 0, 4, 4)),
        instance(90, box(2, 2, 6, 6)),
        instance(1, box(0, 2, 2, 4)),
        instance(18, {"counts": runs["counts"].decode(), "size": [6, 8]}, crowd=1),
        instance(3, []),
    ]
    label = draw_instances(annotations, 6, 8, "x")
    expected = np.zeros((6, 8), dtype=np.uint8)
    expected[:, 5:] = 255  # the crowd
    expected[:4, :4] = 1  # and a second person within, which is no contradiction
    expected[2:6, 2:6] = 80
    expected[2:4, 2:4] = 255  # person or toothbrush
    assert np.array_equal(label, expected)


RUNS = {"counts": [6], "size": [2, 3]}


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [(RUNS, r"x: run lengths of size \[2, 3\] \(height, width\), but the image is \[3, 2\]")]
    + [(other, "x: neither polygons nor run lengths") for other in (None, 3, {"size": [3, 2]})],
)
def test_segmentations_that_are_none(segmentation, message):
    with pytest.raises(ValueError, match=message):
        draw_instances([instance(1, segmentation)], 3, 2, "x")


def test_segments_that_are_not_listed():
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[0] = (1, 2, 3)
    segment = 1 + 2 * 256 + 3 * 65536
    ids, classes = np.array([segment]), np.array([7])
    assert panoptic_to_classes(Image.fromarray(pixels), ids, classes, "m").tolist() == [[7, 7], [255, 255]]
    for listed in (segment + 1, segment - 1):
        with pytest.raises(ValueError, match=f"m: the mask holds segment {segment}, which the json"):
            panoptic_to_classes(Image.fromarray(pixels), np.array([listed]), classes, "m")
    with pytest.raises(ValueError, match="m: a panoptic mask is an RGB image.*mode L"):
        panoptic_to_classes(Image.new("L", (2, 2)), ids, classes, "m")


def write_coco(root, content):
    save(root / "train2017/1.jpg", (2, 2))
    save(root / "annotations/panoptic_train2017/1.png", np.full((2, 2, 3), (5, 0, 0)))
    (root / "annotations/panoptic_train2017.json").write_text(json.dumps(content))


def panoptic(image="1.jpg", category=1):
    segments = [{"id": 5, "category_id": category}]
    annotation = {"image_id": 3, "file_name": "1.png", "segments_info": segments}
    return {"images": [{"id": 3, "file_name": image}], "annotations": [annotation]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (panoptic("2.jpg"), r"train2017\.json lists 1 images, of which 1 are not in .*train2017, such as 2\.jpg"),
        (panoptic(category=12), r"panoptic_train2017\.json: categories \[12\] are none of COCO's 133"),
        ({"images": []}, r"panoptic_train2017\.json: not COCO's panoptic annotations \('annotations' is missing\)"),
        ("{", "not COCO's panoptic annotations"),
    ],
)
def test_annotations_of_something_else(tmp_path, content, message):
    write_coco(tmp_path, content)
    refused(message, "coco", data_dir=tmp_path)


def test_annotations_without_images(tmp_path):
    write_coco(tmp_path, panoptic())
    assert load_dense_dataset("coco", data_dir=tmp_path)["train"][0]["label"].tolist() == [[0, 0], [0, 0]]
    shutil.rmtree(tmp_path / "train2017")
    message = r"panoptic_train2017\.json needs a folder with its images; expected .*train2017"
    refused(message, "coco", data_dir=tmp_path)
