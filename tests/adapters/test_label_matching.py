"""Matching the labels of teacher and student: by name, by a file, many to one."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from hf_bcd.adapters import LabelMap, match_labels, read_synonyms
from hf_bcd.data import CATALOG


def numbered(*names: str) -> dict[int, str]:
    return dict(enumerate(names))


def by_name(label_map: LabelMap, teacher: dict[int, str] | None = None) -> dict[str, str]:
    """The student's labels with the one label of the teacher that stands for each; `teacher` has other names for it."""
    names = teacher or label_map.teacher
    return {label_map.student[index]: names[source] for index, (source,) in label_map.sources.items()}


def catalog(name: str) -> dict[int, str]:
    id2label = CATALOG[name].id2label
    assert id2label is not None
    return id2label


# spelled as in the checkpoints that were trained on Pascal VOC
VOC = numbered(*(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split())  # fmt: skip


@pytest.fixture(scope="module")
def ade20k(shared_data: Path) -> dict[int, str]:
    """The 150 labels with all their synonyms."""
    table = (shared_data / "format_samples/ade20k/objectInfo150.txt").read_text().splitlines()[1:]
    full = [line.split("\t")[-1].strip() for line in table]
    assert len(full) == 150 and sum("," in name for name in full) > 50
    return numbered(*full)


@pytest.fixture(scope="module")
def cityscapes(shared_data: Path) -> dict[int, str]:
    table = json.loads((shared_data / "format_samples/cityscapes/labels_table.json").read_text())
    return {row["trainId"]: row["name"] for row in table if 0 <= row["trainId"] < 255}


@pytest.fixture(scope="module")
def coco(shared_data: Path) -> dict[int, str]:
    """The 133 panoptic classes."""
    folder = shared_data / "format_samples/coco/panopticapi_sample"
    return numbered(*(row["name"] for row in json.loads((folder / "panoptic_coco_categories.json").read_text())))


@pytest.mark.parametrize(("teacher", "student", "expected"), [
    (("road", "car", "sky"), ("sky", "road", "car"), [2, 0, 1]),
    (("road", "car", "sky"), ("car",), [1]),
    (("traffic light", "bus"), ("Bus", "Traffic_Light"), [1, 0]),
    (("tvmonitor", "potted plant"), ("TV/monitor", "pottedplant"), [0, 1]),
    (("tree", "car, auto, automobile, machine"), ("car",), [1]),
    (("tree", "car;auto;automobile"), ("Automobile", "tree"), [1, 0]),
    (("car",), ("auto; car",), [0]),
    # equal names before equal first synonyms before any shared synonym before other spellings
    (("screen door, screen", "screen, projection screen", "crt screen"), ("screen", "crt screen"), [1, 2]),
    (("earth, ground", "land, ground, soil"), ("land", "earth"), [1, 0]),
    (("plant, flora", "plant"), ("plant", "flora"), [1, 0]),
    (("couch", "sofa"), ("sofa", "couch"), [1, 0]),
    (("door-stuff", "door"), ("door", "door-stuff"), [1, 0]),
    (("plane, aeroplane", "sky-other"), ("sky", "airplane"), [1, 0]),
    # taken by the better match, so the rest is unambiguous
    (("earth", "land, ground"), ("earth, ground", "ground"), [0, 1]),
    (("earth, ground", "land, ground, soil"), ("ground",), None),
    (("bike",), ("bike, bicycle", "bike, motorbike"), None),
    (("motorbike", "minibike"), ("motorcycle",), None),
    (("road", "car"), ("road", "unicorn"), None),
    (("N/A", "car", "N/A"), ("car",), [1]),
    (("N/A", "car", "N/A"), ("N/A",), None),
    (("空", "道"), ("道", "空"), [1, 0]),
])  # fmt: skip
def test_matches(teacher, student, expected):
    found = match_labels(numbered(*teacher), numbered(*student))
    assert found.is_complete == (expected is not None)
    if expected is not None:
        assert [found.sources[index] for index in range(len(student))] == [(source,) for source in expected]


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_placeholder_names_match_by_number_if_counts_agree(side):
    names, placeholders = numbered("road", "car"), numbered("LABEL_0", "LABEL_1")
    found = match_labels(*((placeholders, names) if side == "teacher" else (names, placeholders)))
    assert found.is_identity and set(found.rules.values()) == {"number"}
    assert match_labels(numbered("road", "car", "sky"), placeholders).sources == {}


def test_the_order_of_the_mappings_does_not_matter():
    found = match_labels({1: "sky", 0: "road"}, {1: "road", 0: "sky"})
    assert list(found.sources.values()) == [(1,), (0,)] and list(found.student) == [0, 1]


def test_all_ade20k_names_match_their_short_forms_in_any_order(ade20k):
    order = random.Random(0).sample(range(150), 150)
    short = numbered(*(ade20k[index].split(",")[0].upper() for index in order))
    semicolons = numbered(*(ade20k[index].replace(", ", ";") for index in order))
    for student in (short, semicolons):
        found = match_labels(ade20k, student)
        assert [found.sources[index] for index in range(150)] == [(index,) for index in order]
        assert set(found.rules.values()) == {"name"} and found.unused == [] and not found.is_identity
    back = match_labels(short, ade20k)
    assert [back.sources[index] for index in range(150)] == [(order.index(index),) for index in range(150)]
    checkpoints = match_labels(catalog("ade20k"), ade20k)
    assert checkpoints.is_identity


ADE20K_TO_VOC = {
    "aeroplane": "airplane", "bicycle": "bicycle", "boat": "boat", "bottle": "bottle", "bus": "bus", "car": "car",
    "chair": "chair", "motorbike": "minibike", "person": "person", "sofa": "sofa", "tvmonitor": "television receiver",
}  # fmt: skip
COCO_TO_CITYSCAPES = {
    "road": "road", "sidewalk": "pavement-merged", "building": "building-other-merged", "fence": "fence-merged",
    "traffic light": "traffic light", "sky": "sky-other-merged", "person": "person", "car": "car", "truck": "truck",
    "bus": "bus", "train": "train", "motorcycle": "motorcycle", "bicycle": "bicycle",
}  # fmt: skip


def test_ade20k_to_voc(ade20k):
    """Not matched: the background, table to diningtable, plant or pot to pottedplant, and animal to any animal."""
    assert by_name(match_labels(catalog("ade20k"), VOC)) == ADE20K_TO_VOC
    long = match_labels(ade20k, VOC)
    assert by_name(long, catalog("ade20k")) == ADE20K_TO_VOC
    animals = {"bird", "cat", "cow", "dog", "horse", "sheep"}
    assert set(long.missing) == {"background", "diningtable", "pottedplant", "train"} | animals


def test_ade20k_to_cityscapes(ade20k, cityscapes):
    """Not matched: signboard to traffic sign, tree to vegetation, land or earth to terrain."""
    for teacher in (ade20k, catalog("ade20k")):
        found = match_labels(teacher, cityscapes)
        assert found.missing == ["traffic sign", "vegetation", "terrain", "rider", "train"]
        matched = by_name(found, catalog("ade20k"))
        assert matched.pop("motorcycle") == "minibike"
        assert all(ours == theirs for ours, theirs in matched.items())
        assert found.rules[17] == "synonym" and found.rules[18] == "name"


def test_coco_to_cityscapes(coco, cityscapes):
    """Not matched: one of five kinds of wall, stop sign to traffic sign, and tree to vegetation."""
    found = match_labels(coco, cityscapes)
    assert by_name(found) == COCO_TO_CITYSCAPES
    assert found.missing == ["wall", "pole", "traffic sign", "vegetation", "terrain", "rider"]


def test_coco_to_voc_lacks_the_background_alone(coco):
    found = match_labels(coco, VOC)
    assert found.missing == ["background"]
    assert {ours: theirs for ours, theirs in by_name(found).items() if ours != theirs} == {
        "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "sofa": "couch",
        "pottedplant": "potted plant", "tvmonitor": "tv",
    }  # fmt: skip


def test_coco_and_ade20k(coco, ade20k):
    matched = by_name(match_labels(ade20k, coco), catalog("ade20k"))
    assert matched["couch"] == "sofa" and matched["pavement-merged"] == "sidewalk" and matched["tv"].startswith("tele")
    # the same words, or parts of them, for something else
    for label in ("mouse", "sports ball", "handbag", "wine glass", "teddy bear", "wall-wood", "floor-other-merged",
                  "orange", "window-blind", "food-other-merged", "dining table", "railroad", "net"):  # fmt: skip
        assert label not in matched


def test_homonyms_count_as_first_names_only(ade20k):
    toys = numbered("crane", "can", "machine", "wheel", "card", "range", "press", "throne", "background")
    assert match_labels(ade20k, toys).sources == {}
    found = by_name(match_labels(ade20k, numbered("toilet", "Counter", "stool", "screen", "motorcar")))
    assert found["Counter"] == "counter" and found["stool"] == "stool" and found["motorcar"].startswith("car")
    assert found["screen"] == "screen, silver screen, projection screen"


def test_every_data_set_of_the_catalog_matches_itself():
    for name, spec in CATALOG.items():
        if spec.id2label is not None:
            assert match_labels(spec.id2label, spec.id2label).is_identity, name


@pytest.mark.parametrize(("teacher", "student", "synonyms", "sources", "rules"), [
    ("car bus minibus road", "road bus car", {"BUS": ["Minibus"], "car": []}, {0: (3,), 1: (2,)}, {0: "name", 1: "file"}),
    # given away, so not guessed again
    ("car road", "car vehicle", {"vehicle": ["car"]}, {1: (0,)}, {1: "file"}),
    ("x car,auto", "vehicle", {"vehicle": ["auto"]}, {0: (1,)}, {0: "file"}),
    ("LABEL_0 LABEL_1", "road car", {"road": ["LABEL_1"]}, {0: (1,)}, {0: "file"}),
    ("LABEL_0 LABEL_1", "road car", {"road": ["LABEL_0"]}, {0: (0,), 1: (1,)}, {0: "file", 1: "number"}),
])  # fmt: skip
def test_the_file_wins_over_guessing(teacher, student, synonyms, sources, rules):
    found = match_labels(numbered(*teacher.split()), numbered(*student.split()), synonyms)
    assert found.sources == sources and found.rules == rules
    assert found.missing == [label for index, label in enumerate(student.split()) if index not in sources]


@pytest.mark.parametrize(("synonyms", "message"), [
    ({"vehicel": ["car"]}, r"'vehicel' is no class of the data set\. Did you mean 'vehicle'\?"),
    ({"qqq": ["car"]}, r"'qqq' is no class of the data set\. It has: vehicle, road"),
    ({"vehicle": ["car", "truk"]}, r"'truk' is no class of the teacher\. Did you mean 'lorry, truck'\?"),
    ({"vehicle": ["car"], "road": ["CAR"]}, r"the teacher's 'car' is given to 'vehicle' and to 'road'"),
    ({"vehicle": ["car"], "Vehicle": ["bus"]}, r"'Vehicle' is 'vehicle', which stands there already"),
    ({"road": ["path"]}, r"'path' could be \['dirt, path', 'trail, path'\] of the teacher"),
])  # fmt: skip
def test_mistakes_in_the_file_are_named(synonyms, message):
    teacher = numbered("car", "bus", "lorry, truck", "road", "dirt, path", "trail, path")
    with pytest.raises(ValueError, match="label_synonyms: " + message):
        match_labels(teacher, numbered("vehicle", "road"), synonyms)


def test_reading_synonyms(tmp_path):
    path = tmp_path / "synonyms.json"
    path.write_text('{"vehicle": ["car", "bus"], "空": []}', encoding="utf-8")
    assert read_synonyms(path) == read_synonyms(str(path)) == {"vehicle": ["car", "bus"], "空": []}
    assert read_synonyms({"vehicle": ("car",)}) == {"vehicle": ["car"]}
    assert read_synonyms(None) == {}


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read"),
    ('{"vehicle": [', "is no JSON"),
    ('["vehicle"]', "holds a list; expected"),
    ('{"vehicle": "car"}', "'vehicle' has 'car'; expected"),
    ('{"vehicle": ["car", 3]}', r"'vehicle' has \['car', 3\]; expected"),
])  # fmt: skip
def test_unreadable_synonyms_name_the_file(text, message, tmp_path):
    path = tmp_path / "synonyms.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"label_synonyms .*synonyms.json: {message}"):
        read_synonyms(path)


def test_probabilities_of_many_classes_add_up():
    teacher = numbered("car", "road", "bus", "sky", "truck")
    found = match_labels(teacher, numbered("road", "vehicle", "sky"), {"vehicle": ["truck", "car", "bus"]})
    assert found.sources == {0: (1,), 1: (4, 0, 2), 2: (3,)}
    logits = torch.tensor([0.5, -1.0, 2.0, 3.0, 0.0]).view(1, 5, 1, 1)
    expected = [-1.0, math.log(math.exp(0.0) + math.exp(0.5) + math.exp(2.0)), 3.0]
    torch.testing.assert_close(found.apply(logits).flatten(), torch.tensor(expected))
    logits = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    before, after = logits.softmax(1), found.apply(logits).softmax(1)
    torch.testing.assert_close(after[:, 1].double(), before[:, [0, 2, 4]].sum(1), rtol=1e-5, atol=1e-6)


def test_extreme_logits_do_not_overflow():
    found = match_labels(numbered("car", "bus", "sky"), numbered("vehicle", "sky"), {"vehicle": ["car", "bus"]})
    for dtype in (torch.float16, torch.bfloat16):
        mapped = found.apply(torch.tensor([6e4, 6e4, -6e4], dtype=dtype).view(1, 3, 1, 1)).flatten()
        assert mapped.isfinite().all() and mapped[0] > mapped[1]


def test_single_classes_are_picked_exactly():
    logits, teacher = torch.randn(2, 4, 3, 5), numbered(*"abcd")
    assert torch.equal(match_labels(teacher, numbered("d", "b")).apply(logits), logits[:, [3, 1]])
    assert match_labels(teacher, teacher).apply(logits) is logits


def test_incomplete_maps_do_not_apply():
    found = match_labels(numbered("a", "b"), numbered("a", "x"))
    with pytest.raises(ValueError, match=r"no class for \['x'\]"):
        found.apply(torch.zeros(1, 2, 1, 1))


def test_the_report_says_what_matched_how_and_what_is_left():
    teacher = numbered("road", "couch", "car", "bus", *(f"thing {index}" for index in range(12)))
    found = match_labels(teacher, numbered("road", "sofa", "vehicle", "unicorn"), {"vehicle": ["car", "bus"]})
    assert found.report().splitlines() == [
        "The teacher's 16 classes stand for 3 of the student's 4 (1 by name, 1 by synonym, 1 by file).",
        "  sofa <- couch (by synonym)",
        "  vehicle <- car + bus (by file)",
        "  missing: unicorn. So features are distilled, but no class scores.",
        "  not used: thing 0, thing 1, thing 2, thing 3, thing 4, thing 5, thing 6, thing 7, thing 8, thing 9 and 2 more.",
    ]
    content = json.loads(json.dumps(found.to_dict()))
    assert content["matches"] == {
        "road": {"teacher": ["road"], "by": "name"},
        "sofa": {"teacher": ["couch"], "by": "synonym"},
        "vehicle": {"teacher": ["car", "bus"], "by": "file"},
    }
    assert content["missing"] == ["unicorn"] and len(content["unused"]) == 12


def test_the_report_of_equal_and_of_foreign_labels_is_short():
    same = numbered("road", "car")
    assert match_labels(same, same).report() == "The teacher's 2 classes stand for 2 of the student's 2 (2 by name)."
    assert match_labels(same, numbered("cat")).report().splitlines()[0] == (
        "The teacher's 2 classes stand for 0 of the student's 1."
    )
