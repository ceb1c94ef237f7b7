"""Matching the labels of teacher and student by name."""

import logging
import random

import pytest

from hf_bcd.adapters import match_labels


def numbered(*names: str) -> dict[int, str]:
    return dict(enumerate(names))


@pytest.mark.parametrize(("teacher", "student", "expected"), [
    (("road", "car", "sky"), ("sky", "road", "car"), [2, 0, 1]),
    (("road", "car", "sky"), ("car",), [1]),
    (("traffic light", "bus"), ("Bus", "Traffic_Light"), [1, 0]),
    (("tvmonitor", "potted plant"), ("TV/monitor", "pottedplant"), [0, 1]),
    (("tree", "car, auto, automobile, machine"), ("car",), [1]),
    (("tree", "car;auto;automobile"), ("Automobile", "tree"), [1, 0]),
    (("car",), ("auto; car",), [0]),
    # equal names before equal first synonyms before any shared synonym
    (("screen door, screen", "screen, projection screen", "crt screen"), ("screen", "crt screen"), [1, 2]),
    (("earth, ground", "land, ground, soil"), ("land", "earth"), [1, 0]),
    (("plant, flora", "plant"), ("plant", "flora"), [1, 0]),
    # taken by the better match, so the rest is unambiguous
    (("earth", "land, ground"), ("earth, ground", "ground"), [0, 1]),
    (("earth, ground", "land, ground, soil"), ("ground",), None),
    (("bike",), ("bike, bicycle", "bike, motorbike"), None),
    (("road", "car"), ("road", "unicorn"), None),
    (("N/A", "car", "N/A"), ("car",), [1]),
    (("N/A", "car", "N/A"), ("N/A",), None),
    (("空", "道"), ("道", "空"), [1, 0]),
])  # fmt: skip
def test_matches(teacher, student, expected):
    assert match_labels(numbered(*teacher), numbered(*student)) == expected


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_placeholder_names_match_by_number_if_counts_agree(side, caplog):
    names, placeholders = numbered("road", "car"), numbered("LABEL_0", "LABEL_1")
    pair = (placeholders, names) if side == "teacher" else (names, placeholders)
    assert match_labels(*pair) == [0, 1]
    assert f"{side}'s labels have no names" in caplog.text
    assert match_labels(numbered("road", "car", "sky"), placeholders) is None


def test_missing_labels_are_logged(caplog):
    with caplog.at_level(logging.INFO, "hf_bcd"):
        match_labels(numbered("road", "car"), numbered("car", "unicorn", "dragon"))
    assert "lacks 2 of the student's 3 labels: ['unicorn', 'dragon']" in caplog.text
    assert "['road', 'car']" in caplog.text


def test_all_ade20k_names_match_their_short_forms_in_any_order(shared_data):
    table = (shared_data / "format_samples/ade20k/objectInfo150.txt").read_text().splitlines()[1:]
    full = [line.split("\t")[-1].strip() for line in table]
    assert len(full) == 150 and sum("," in name for name in full) > 50
    order = random.Random(0).sample(range(150), 150)
    short = numbered(*(full[index].split(",")[0].upper() for index in order))
    assert match_labels(numbered(*full), short) == order
    assert match_labels(short, numbered(*full)) == [order.index(index) for index in range(150)]
    assert match_labels(numbered(*full), numbered(*(full[index].replace(", ", ";") for index in order))) == order
