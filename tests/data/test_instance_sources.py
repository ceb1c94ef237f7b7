"""The same masks from every layout and kind of table, and what is refused."""

import json
import pickle
import shutil

import datasets
import numpy as np
import pytest
from boxed_folders import NAMES, THINGS, coco, corners, imagefolder, picture, voc, yolo
from masked_folders import TASK, compressed, described, drawn, halves, outline, polygons, runs, yolo_outlines
from pictures import orientation, refused, save
from PIL import Image

from hf_bcd.commands.check import check
from hf_bcd.data import CATALOG, load_dense_dataset
from hf_bcd.data.masks import to_rle
from hf_bcd.utils.masks import decode, mask_boxes
from hf_bcd.utils.messages import UserError


# pycocotools 2.0.11 has not followed numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


LAYOUTS = {
    "COCO, polygons": polygons,
    "COCO, run lengths": lambda root: coco(root, segmentation=runs),
    "COCO, compressed run lengths": lambda root: coco(root, segmentation=compressed),
    "COCO, several polygons": lambda root: coco(root, segmentation=halves),
    "Roboflow's COCO": lambda root: polygons(root, file="train/_annotations.coco.json"),
    "YOLO": yolo_outlines,
    "imagefolder": described,
    "imagefolder of run lengths": lambda root: described(root, "masks", lambda box: compressed({"bbox": box})),
    "imagefolder of points": lambda root: described(root, form=lambda box: np.reshape(outline(*box), (-1, 2)).tolist()),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_masks(layout, tmp_path):
    data = pickle.loads(pickle.dumps(load_dense_dataset(LAYOUTS[layout](tmp_path / "data"), task=TASK)["train"]))
    assert data.task == TASK and list(data.id2label.values()) == list(NAMES) and len(data) == len(THINGS)
    for sample, things in zip((data[index] for index in range(3)), THINGS.values(), strict=True):
        assert sample["boxes"] == pytest.approx(np.array(corners(things)), abs=1e-3)
        assert sample["classes"].tolist() == [kind for *_, kind in things]
        for mask, (*box, _) in zip(sample["masks"], things, strict=True):
            assert np.array_equal(decode(mask), drawn(*box))
    boxes = load_dense_dataset(tmp_path / "data", task="object-detection")["train"]
    assert boxes[0]["masks"] is None and np.array_equal(boxes[0]["boxes"], data[0]["boxes"])
    assert boxes.rows[0].label.masks is None


def test_a_table_with_masks(tmp_path):
    things = {"bbox": [[10, 20, 40, 60]], "category": [0], "segmentation": [[outline(10, 20, 30, 40)]]}
    data = load_dense_dataset(table_of(things), task=TASK, box_format="xyxy")["train"]
    assert np.array_equal(decode(data[1]["masks"][0]), drawn(10, 20, 30, 40))
    assert data[0]["areas"].tolist() == [drawn(10, 20, 30, 40).sum()]  # not that of the box
    del things["segmentation"]
    refused("column 'objects': its things have bbox, category, but no segmentation or", table_of(things), task=TASK)


def table_of(things):
    return datasets.Dataset.from_list([{"image": picture(), "objects": things}] * 2)


def test_coco_is_read_as_by_pycocotools(shared_data, tmp_path):
    library = pytest.importorskip("pycocotools.mask")
    sample = shared_data / "format_samples/coco"
    (tmp_path / "annotations").mkdir()
    for kind, images, file in (
        ("genuine", sample / "images", sample / "instances_genuine_polygons.json"),
        ("exact", shared_data / "coco_mini/train", shared_data / "coco_mini/annotations/instances_train.json"),
        ("traced", shared_data / "coco_mini/train", shared_data / "coco_mini/annotations/instances_poly_train.json"),
    ):
        root = tmp_path / kind
        (root / "annotations").mkdir(parents=True)
        shutil.copy(file, root / "annotations/instances_val2017.json")
        (root / "val2017").symlink_to(images)
        data = load_dense_dataset("coco_detection", data_dir=root, task=TASK)["validation"]
        content = json.loads(file.read_text())
        found = {
            row.image_name.split("/")[-1]: index
            for index, row in enumerate(map(data.rows.__getitem__, range(len(data))))
        }
        for image in content["images"][:12]:
            own = [row for row in content["annotations"] if row["image_id"] == image["id"]]
            masks, size = data[found[image["file_name"].split("/")[-1]]]["masks"], (image["height"], image["width"])
            assert len(own) == len(masks)
            for row, mask in zip(own, masks, strict=True):
                expected = library.frPyObjects(row["segmentation"], *size)
                expected = library.merge(expected) if isinstance(expected, list) else expected
                assert np.array_equal(decode(mask), library.decode(expected).astype(bool))


def test_the_generated_scenes_have_masks_and_nothing_else_changes():
    options = {"num_images": {"train": 3}, "size": (64, 96), "seed": 5}
    boxes = load_dense_dataset("synthetic_detection", **options)["train"]
    masks = load_dense_dataset("synthetic_instances", **options)["train"]
    for index in range(3):
        plain, own = boxes[index], masks[index]
        assert plain["image"].tobytes() == own["image"].tobytes()
        assert all(np.array_equal(plain[key], own[key]) for key in ("boxes", "classes", "areas", "crowd"))
        assert np.array_equal(mask_boxes(own["masks"]), own["boxes"])
        assert [decode(mask).sum() for mask in own["masks"]] == own["areas"].tolist()
    assert CATALOG["synthetic_instances"].task == TASK
    refused("synthetic_detection is a data set for object-detection: .* such as cityscapes, coco_detection, synthetic_inst",
            "synthetic_detection", task=TASK)  # fmt: skip


def test_cityscapes_instances(shared_data):
    root = shared_data / "format_samples/cityscapes"
    (sample,) = (data := load_dense_dataset("cityscapes", data_dir=root, task=TASK)["val"])
    names = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert list(data.id2label.values()) == names and data.task == TASK
    ids = np.asarray(Image.open(next(root.glob("gtFine/val/*/*_instanceIds.png"))))
    stored = [index for index in np.unique(ids).tolist() if index // 1000 in (24, 25, 26, 27, 28, 31, 32, 33)]
    assert len(sample["masks"]) == len(stored) > 0
    for index, mask, kind in zip(stored, sample["masks"], sample["classes"], strict=True):
        assert np.array_equal(decode(mask), ids == index) and names[kind] == {24: "person", 26: "car"}[index // 1000]
    assert load_dense_dataset("cityscapes", data_dir=root)["val"].task == "semantic-segmentation"


def test_cityscapes_groups_are_crowds_and_other_things_are_none(tmp_path):
    ids = np.array([[0, 7, 26, 26000, 26001, 29000, 30, 33002, 24, 24]], np.uint16).repeat(2, 0)
    for split in ("train", "val"):
        save(tmp_path / f"leftImg8bit/{split}/ulm/a_leftImg8bit.png", (100, 40))
        maps = Image.fromarray(ids.repeat(20, 0).repeat(10, 1))
        save(tmp_path / f"gtFine/{split}/ulm/a_gtFine_instanceIds.png", maps)
    sample = load_dense_dataset("cityscapes", data_dir=tmp_path, task=TASK)["train"][0]
    assert sample["classes"].tolist() == [0, 2, 2, 2, 7]
    assert sample["crowd"].tolist() == [True, True, False, False, False]
    assert sample["areas"].tolist() == [800, 400, 400, 400, 400]
    (tmp_path / "gtFine/train/ulm/a_gtFine_instanceIds.png").unlink()
    refused("1 of 1 images in .*leftImg8bit/train have no mask", "cityscapes", data_dir=tmp_path, task=TASK)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], r"annotation 1 of image 1 has the box \[10, 20, 30, 40\], and the segmentation \[\].*--task object-detection"),
        (None, "the segmentation None"),
        ({"size": [100, 80], "counts": [8000]}, r"^[^(]*a.jpg: the mask of box 0: run lengths of size \[100, 80\] \(height, width\), but the image is \[80, 100\]"),
        ({"size": [80, 100], "counts": [7000]}, "add up to 7000 pixels, not to 8000"),
        ({"size": [80, 100], "counts": [8000, "x"]}, "^[^(]*run lengths that no mask has"),
        ({"points": [8000]}, "neither polygons nor run lengths .*fractions"),
        ({"size": [80, 100], "counts": "abc"}, "^[^(]*run lengths that no mask has .*malformed"),
        ([[1, 2, 3, 4, 5, 6, 7]], "the mask of box 0: neither polygons nor run lengths"),
        ([[1, 2, 3, 4, 5, "x"]], "neither polygons nor run lengths"),
        ({"size": [80, 100], "counts": "zzzz~~~"}, "^[^(]*run lengths that no mask has .they add up to 146 pixels, not to 8000"),
        ({"size": [80, 100], "counts": ""}, "they add up to 0 pixels, not to 8000"),
        ({"size": [80, 100], "counts": [-5, 8005]}, "^[^(]*run lengths that no mask has .-5 is no number of pixels"),
        ({"size": [80, 100], "counts": [5.5, 7994.5]}, "5.5 is no number of pixels"),
        ({"size": 80, "counts": [8000]}, r"run lengths of size 80 \(height, width\)"),
        ({"size": "80x100", "counts": [8000]}, r"run lengths of size '80x100' \(height, width\)"),
        ({"counts": [8000]}, r"run lengths of size None \(height, width\), but the image is \[80, 100\]"),
        ([[1, 2, 3, 4, 5, 1e7]], r"a polygon with the point \[5.0, 10000000.0\] of a picture of 100x80"),
        ([[1, 2, 3, 4, 5, float("nan")]], r"with the point \[5.0, nan\]"),
    ],
)  # fmt: skip
def test_masks_that_are_none(segmentation, message, tmp_path):
    refused(message, coco(tmp_path, segmentation=lambda one: segmentation), task=TASK)
    assert load_dense_dataset(tmp_path, task="object-detection")["train"][0]["masks"] is None


def test_boxes_without_masks(tmp_path):
    refused("line 1: '0 0.25 .*' is a box without an outline", yolo(tmp_path / "yolo"), task=TASK)
    refused("Pascal VOC's XML, which has boxes and no masks", voc(tmp_path / "voc"), task=TASK)
    refused("3 of 3 boxes have no mask|1 of 1 boxes have no mask|2 of 2 boxes have no mask, such as box 0",
            described(tmp_path / "table", form=lambda box: []), task=TASK)  # fmt: skip
    refused("its things have .* but no segmentation", imagefolder(tmp_path / "plain"), task=TASK)
    refused("not streamed", tmp_path, task=TASK, streaming=True)


def test_masks_that_disagree_with_their_boxes_are_counted_once(tmp_path, caplog):
    def shift(one):
        left, *others = one["bbox"]
        return [outline(left + 5 * (one["id"] == 1), *others)]

    data = load_dense_dataset(coco(tmp_path, segmentation=shift), task=TASK)["train"]
    notes = [note for note in data.notes if "mask" in note]
    assert notes == ["1 of the 6 boxes in 3 pictures have a mask that ends outside of the box by more than 2 pixels: both stay as they are"]  # fmt: skip
    assert caplog.text.count("ends outside of the box") == 1
    assert data[0]["boxes"][0].tolist() == [10, 20, 40, 60] and mask_boxes(data[0]["masks"])[0].tolist() == [
        15,
        20,
        45,
        60,
    ]


def test_empty_masks_are_counted_and_teach_nothing(tmp_path):
    def hollow(one):
        return [[1, 1, 2, 2]] if one["id"] == 1 else [outline(*one["bbox"])]

    data = load_dense_dataset(coco(tmp_path, segmentation=hollow), task=TASK)["train"]
    assert data.notes == ("1 of the 6 boxes in 3 pictures have a mask without a pixel: nothing is trained on them",)
    assert data[0]["areas"][0] == 0 and decode(data[0]["masks"][0]).sum() == 0
    refused("6 of the 6 boxes in 3 pictures have a mask without a pixel",
            coco(tmp_path, segmentation=lambda one: [[1, 1, 2, 2]]), task=TASK)  # fmt: skip


@pytest.mark.parametrize(("stated", "upright"), [((80, 100), True), ((100, 80), False)])
def test_masks_of_turned_photographs(stated, upright, tmp_path):
    """The stated size says on which way of the photograph the masks were drawn."""
    polygons(tmp_path, things={"a": [(10, 20, 30, 40, 0)]})
    pixels = np.zeros((80, 100, 3), np.uint8)
    pixels[:, :50] = 255
    Image.fromarray(pixels).save(tmp_path / "train/a.jpg", exif=orientation(6))
    file = tmp_path / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["images"][0] |= {"width": stated[0], "height": stated[1]}
    file.write_text(json.dumps(content))
    sample = load_dense_dataset(tmp_path, task=TASK)["train"][0]
    assert sample["image"].size == stated and sample["masks"][0]["size"] == [*stated[::-1]]
    assert np.asarray(sample["image"])[10, -10].mean() == pytest.approx(255 if upright else 0, abs=9)


def test_what_is_printed(tmp_path):
    text = check(polygons(tmp_path, iscrowd=lambda one: int(one["id"] == 2)), task=TASK)
    assert "boxes: 6, at most 3 in a picture" in text and "crowds: 1;" in text and "2  dog" in text
    assert "masks stored as: polygons (6)" in text and "empty masks: 0; outside of their box: 0" in text
    masks = [drawn(*box) for things in THINGS.values() for *box, _ in things]
    areas = [mask.sum() for place, mask in enumerate(masks) if place != 1]
    assert f"areas: {min(areas)} to {max(areas)} pixels, half of them below {np.median(areas):.0f}" in text
    shared = sum(map(np.sum, masks[3:])) - (masks[3] | masks[4] | masks[5]).sum()
    assert f"overlaps: {shared / sum(areas):.2%} of the masks' pixels" in text
    assert "run lengths (7)" in check(
        coco(tmp_path / "runs", THINGS | {"d": [(1, 1, 40, 40, 0)]}, segmentation=runs), task=TASK
    )
    assert "masks" not in check(tmp_path, task="object-detection")


def test_points_of_one_polygon_and_fractions():
    square = [[2, 2, 8, 2, 8, 6, 2, 6]]
    expected = to_rle(square, 10, 20, "x")
    assert decode(expected).sum() == 24
    for other in ([[2, 2], [8, 2], [8, 6], [2, 6]], square[0], [np.reshape(square, (-1, 2)).tolist()], b"[[2,2,8,2,8,6,2,6]]",
                  {"fractions": [[0.1, 0.2, 0.4, 0.2, 0.4, 0.6, 0.1, 0.6]]}):  # fmt: skip
        assert to_rle(other, 10, 20, "x") == expected
    with pytest.raises(UserError, match="x: neither polygons nor run lengths"):
        to_rle([3], 10, 20, "x")
