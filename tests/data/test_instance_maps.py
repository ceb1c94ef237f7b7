"""Folders with maps of instance ids."""

import json
import pickle
import shutil

import numpy as np
import pytest
from boxed_folders import NAMES, SIZE, THINGS
from masked_folders import TASK, drawn, id_maps
from pictures import palette, refused, save
from PIL import Image

from hf_bcd.commands.check import check
from hf_bcd.data import BoxTrainTransform, load_dense_dataset
from hf_bcd.utils.masks import decode, unpack


FORMS = {
    "split/images": ("{}/images", "{}/instances"),
    "images/split": ("images/{}", "instances/{}"),
    "no splits": ("images", "instances"),
    "capitals": ("{}/Images", "{}/Instances"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_folders_of_maps_are_recognised(form, dtype, tmp_path):
    data = pickle.loads(pickle.dumps(load_dense_dataset(id_maps(tmp_path, *FORMS[form], dtype=dtype))["train"]))
    assert data.task == TASK and list(data.id2label.values()) == list(NAMES)
    for sample, things in zip((data[index] for index in range(3)), THINGS.values(), strict=True):
        assert sample["classes"].tolist() == [kind for *_, kind in things] and not sample["crowd"].any()
        ids = np.zeros(SIZE[::-1], int)
        for number, (*box, _) in enumerate(things):
            ids[drawn(*box)] = number + 1
        for number, mask in enumerate(sample["masks"]):
            assert np.array_equal(decode(mask), ids == number + 1)
            assert sample["areas"][number] == (ids == number + 1).sum()
    boxes = load_dense_dataset(tmp_path, task="object-detection")["train"]
    assert boxes.task == "object-detection" and np.array_equal(boxes[0]["boxes"], data[0]["boxes"])


def nuclei(root, maps="instances", count=5, split="train"):
    """Pictures with one class of objects, of which each has another number."""
    rng = np.random.default_rng(0)
    for index in range(count):
        ids = np.zeros((64, 64), np.uint16)
        places = rng.permutation(64)[: 3 + 7 * index]
        for number, place in enumerate(places, 1):
            row, column = 8 * (place // 8), 8 * (place % 8)
            ids[row : row + 8, column : column + 7] = number
        save(root / split / f"images/{index}.png", (64, 64))
        save(root / split / maps / f"{index}.png", Image.fromarray(ids))
    return root


def test_one_class_without_any_names(tmp_path):
    data = load_dense_dataset(nuclei(tmp_path))["train"]
    assert data.id2label == {0: "object"} and len(data[4]["masks"]) == 31 and not data.notes
    assert load_dense_dataset(tmp_path, id2label=["nucleus"])["train"].id2label == {0: "nucleus"}
    text = check(tmp_path)
    assert "boxes are xyxy, as in maps of instance ids" in text and "class   0:     85  object" in text


def test_masks_stand_for_instances_where_these_are_asked_for(tmp_path):
    data = load_dense_dataset(nuclei(tmp_path, maps="masks"), task=TASK)["train"]
    assert len(data[4]["masks"]) == 31


def test_a_thousand_ids(tmp_path):
    ids = np.zeros((200, 250), np.uint16)
    for number in range(1000):
        ids[8 * (number // 40) : 8 * (number // 40) + 7, 6 * (number % 40) : 6 * (number % 40) + 5] = number + 1
    save(tmp_path / "train/images/a.png", (250, 200))
    save(tmp_path / "train/instances/a.png", Image.fromarray(ids))
    sample = load_dense_dataset(tmp_path)["train"][0]
    assert len(sample["masks"]) == 1000 and set(sample["areas"]) == {35}
    shown = BoxTrainTransform(shortest=200, flip=0)(sample)
    assert np.array_equal(unpack(shown["masks"], 250)[999].numpy(), ids == 1000)


def test_classes_in_the_ids(tmp_path):
    id_maps(tmp_path, listed=False)
    for stem, things in THINGS.items():
        ids = np.zeros(SIZE[::-1], np.uint16)
        for number, (*box, kind) in enumerate(things, 1):
            ids[drawn(*box)] = 1000 * kind + number
        save(tmp_path / f"train/instances/{stem}.png", Image.fromarray(ids))
    data = load_dense_dataset(tmp_path, id2label=list(NAMES))["train"]
    assert sorted(data[2]["classes"].tolist()) == [0, 1, 2] and data.id2label == dict(enumerate(NAMES))
    refused("category 2, which is none of the 2 classes", tmp_path, id2label=["cat", "dog"])


def test_several_pieces_are_one_instance(tmp_path):
    ids = np.zeros((80, 100), np.uint8)
    ids[5:20, 5:20] = ids[50:70, 60:90] = 3
    for index in range(2):
        save(tmp_path / f"train/images/{index}.png", SIZE)
        save(tmp_path / f"train/instances/{index}.png", ids)
    (mask,) = load_dense_dataset(tmp_path)["train"][0]["masks"]
    assert np.array_equal(decode(mask), ids == 3)


@pytest.mark.parametrize("ids", [(255,), (1, 2, 3), (2, 5)])
def test_maps_of_classes_are_pointed_out(ids, tmp_path, caplog):
    for index in range(6):
        shown = np.zeros((40, 40), np.uint8)
        for place, value in enumerate(ids):
            shown[5:30, 10 * place : 10 * place + 8] = value
        save(tmp_path / f"train/images/{index}.png", (40, 40))
        save(tmp_path / f"train/instances/{index}.png", shown)
    data = load_dense_dataset(tmp_path)["train"]
    (note,) = data.notes
    assert f"hold the ids {', '.join(map(str, ids))} only, again and again, as maps of classes do" in note
    assert caplog.text.count("as maps of classes do") == 1 and note in check(tmp_path)


def test_one_object_in_every_picture_of_a_few_is_pointed_out(tmp_path):
    for index in range(2):
        save(tmp_path / f"train/images/{index}.png", (40, 40))
        save(tmp_path / f"train/instances/{index}.png", np.full((40, 40), 255, np.uint8))
    assert "hold the ids 255 only" in load_dense_dataset(tmp_path)["train"].notes[0]


def test_maps_in_files_that_are_no_images(tmp_path):
    (nuclei(tmp_path) / "train/instances/4.png").rename(tmp_path / "4.npy")
    for index in range(4):
        (tmp_path / f"train/instances/{index}.png").unlink()
    (tmp_path / "4.npy").rename(tmp_path / "train/instances/4.npy")
    refused("4.npy: no maps of instance ids that can be read. Store them as PNG or TIFF", tmp_path)


def test_evaluation_splits_without_maps_are_left_out(tmp_path, caplog):
    nuclei(tmp_path)
    save(tmp_path / "test/images/a.png", (64, 64))
    assert list(load_dense_dataset(tmp_path)) == ["train"] and "holds no masks" in caplog.text


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Image.new("RGB", SIZE, (1, 2, 3)), "a.png: a colour-coded mask .*0 for the background"),
        (Image.new("F", SIZE, 0.5), "a.tiff: not a label map .mode F, float32"),
        (Image.new("I", SIZE, -1), "a.tiff: holds the id -1. Set what is no object to 0"),
        (Image.new("L", (100, 60), 1), "a.jpg: the image is 100x80 pixels .* but its annotation is 100x60"),
        ("a JPEG", "a.jpg: a mask stored as JPEG"),
        ("no class", r"a.json: no class of id 80, which .*a.png holds"),
        ("no file", "b.png: b.json with the class of each id is missing"),
        ("no mapping", "a.json: not a mapping of ids to classes"),
        ("no name", "a.json: the class of id 40 is .'name': 'cat'.; expected a name, or a number"),
        ("no map", "1 of 3 images in .* have no mask"),
    ],
)
def test_broken_maps(broken, message, tmp_path):
    folder = id_maps(tmp_path, listed=isinstance(broken, str)) / "train/instances"
    if isinstance(broken, Image.Image):
        (folder / "a.png").unlink()
        save(folder / ("a.tiff" if broken.mode in "FI" else "a.png"), broken)
    elif broken == "a JPEG":
        (folder / "a.png").unlink()
        save(folder / "a.jpg", Image.new("L", SIZE, 1))
    elif broken == "no map":
        (folder / "a.png").unlink()
    elif broken == "no file":
        (folder / "b.json").unlink()
    else:
        classes = {"no class": {"40": "cat"}, "no name": {"40": {"name": "cat"}, "80": "cat"}}
        (folder / "a.json").write_text(json.dumps(classes.get(broken, [1])))
    refused(message, tmp_path)


def test_palettes_give_their_indices(tmp_path):
    ids = np.zeros((64, 64), np.uint8)
    ids[4:30, 4:30], ids[40:60, 40:60] = 3, 9
    save(tmp_path / "train/images/a.png", (64, 64))
    save(tmp_path / "train/instances/a.png", palette(ids))
    assert [decode(mask).sum() for mask in load_dense_dataset(tmp_path)["train"][0]["masks"]] == [676, 400]


def test_other_annotations_beside_maps(tmp_path, caplog):
    nuclei(tmp_path)
    shutil.copytree(tmp_path / "train/instances", tmp_path / "train/masks")
    refused(
        "the mask holds ids|shades", tmp_path, id2label=["a", "b"]
    )  # they are label maps unless instances are asked for
    assert load_dense_dataset(tmp_path, task=TASK)["train"].task == TASK
