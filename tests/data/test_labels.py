import json

import numpy as np
import pytest
from pictures import palette
from PIL import Image

from hf_bcd.data.dataset import Row
from hf_bcd.data.labels import MAX_LABELS, LabelRule, decode_label, read_id2label
from hf_bcd.data.probing import infer_id2label, survey
from hf_bcd.utils.messages import UserError


IDS = np.array([[0, 1, 2], [3, 2, 255]], dtype=np.uint8)
COLOURS = (((0, 0, 0), 0), ((128, 0, 0), 1), ((70, 70, 70), 2), ((0, 0, 0), 3), ((0, 0, 142), 5))
COLOURED = np.array([[[128, 0, 0], [70, 70, 70]], [[0, 0, 0], [0, 0, 142]]], dtype=np.uint8)
STORED = {
    "L": Image.fromarray(IDS),
    "P": palette(IDS),
    "I;16": Image.fromarray(IDS.astype(np.uint16)),
    "I": Image.fromarray(IDS.astype(np.int32)),
    "RGB-equal": Image.fromarray(np.repeat(IDS[..., None], 3, axis=2)),
    "array": IDS.astype(np.int64),
}


RULE = LabelRule()


def row(*ids, kind=np.uint8):
    return np.array([ids], dtype=kind)


@pytest.mark.parametrize("kind", STORED)
def test_every_storage_of_the_same_ids_decodes_to_them(kind):
    np.testing.assert_array_equal(decode_label(STORED[kind], "mask.png"), IDS)


def test_palette_one_bit_and_sixteen_bit_masks_keep_their_ids(tmp_path):
    assert STORED["P"].mode == "P" and not np.array_equal(np.asarray(STORED["P"].convert("L")), IDS)
    one_bit = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    np.testing.assert_array_equal(decode_label(one_bit, "mask.png"), [[0, 1], [1, 0]])
    Image.fromarray(np.array([[0, 1000], [26001, 65535]], dtype=np.uint16)).save(tmp_path / "m.png")
    np.testing.assert_array_equal(decode_label(Image.open(tmp_path / "m.png"), "m"), [[0, 1000], [26001, 65535]])


def test_known_colours_become_ids():
    opaque = np.dstack([COLOURED, np.full((2, 2), 255, dtype=np.uint8)])
    for mask in (Image.fromarray(COLOURED), Image.fromarray(opaque), COLOURED):
        np.testing.assert_array_equal(decode_label(mask, "m", COLOURS), [[1, 2], [0, 5]])


def test_equal_channels_are_ids_unless_they_are_none():
    ids = np.array([[0, 5], [1, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(decode_label(np.repeat(ids[..., None], 3, axis=2), "m", COLOURS), ids)
    grey = np.full((2, 2, 3), 70, dtype=np.uint8)  # a mask that shows one class, whose colour is grey
    np.testing.assert_array_equal(decode_label(grey, "m", COLOURS), np.full((2, 2), 2))


def test_colours_without_a_class_are_refused():
    with pytest.raises(ValueError, match=r"road\.png: a colour-coded mask"):
        decode_label(Image.fromarray(COLOURED), "road.png")
    pixels = COLOURED.copy()
    pixels[1, 0] = (1, 2, 3)
    with pytest.raises(ValueError, match=r"m: colour \(1, 2, 3\) at row 1, column 0 stands for no class"):
        decode_label(pixels, "m", COLOURS)


def test_other_arrays_are_no_label_maps():
    arrays = np.zeros((2, 2)), np.zeros(4, int), np.zeros((1, 2, 2), int)
    for mask in (Image.new("RGBA", (2, 2)), Image.new("F", (2, 2)), *arrays):
        with pytest.raises(ValueError, match=r"x\.png: not a label map"):
            decode_label(mask, "x.png")


def test_reduce_zero():
    labels = LabelRule(reduce_zero=True).apply(row(0, 1, 150, 255), 150, "m")
    assert labels.dtype == np.uint8 and labels.tolist() == [[255, 0, 149, 255]]
    with pytest.raises(ValueError, match=r"ids \[256\]"):  # which is not void
        LabelRule(reduce_zero=True).apply(row(256, 1, kind=np.uint16), 150, "m")


def test_void_ids_are_stored_ids():
    ids = row(0, 5, 11, 255)
    assert LabelRule(void_ids=(11,)).apply(ids, 11, "m").tolist() == [[0, 5, 255, 255]]
    assert LabelRule(reduce_zero=True, void_ids=(5,)).apply(ids, 11, "m").tolist() == [[255, 255, 10, 255]]
    assert LabelRule().apply(row(255, 255), 3, "m").tolist() == [[255, 255]]


def test_mapping_may_use_255_and_knows_no_other_ids():
    rule = LabelRule(mapping=((7, 0), (26001, 1), (255, 2), (8, 255)))
    assert rule.apply(row(7, 26001, 255, 8, kind=np.int32), 3, "m").tolist() == [[0, 1, 2, 255]]
    with pytest.raises(ValueError, match=r"m: the mask holds ids \[9\].*another encoding"):
        rule.apply(row(7, 9), 3, "m")
    with pytest.raises(ValueError, match=r"ids \[255\]"):
        LabelRule(mapping=((7, 0), (8, 1))).apply(row(7, 255), 2, "m")
    with pytest.raises(ValueError, match=r"ids \[8\].*num_labels=3"):  # a class that does not exist
        LabelRule(mapping=((7, 0), (8, 3))).apply(row(7, 8), 3, "m")


@pytest.mark.parametrize("wrong", [11, 200, 65535])
def test_ids_out_of_range_name_file_ids_and_remedies(wrong):
    message = rf"val/masks/a.png.*\[{wrong}\].*num_labels=11.*--ignore_labels.*--reduce_labels"
    with pytest.raises(ValueError, match=message):
        LabelRule().apply(row(0, 10, wrong, 255, kind=np.int32), 11, "val/masks/a.png")


@pytest.mark.parametrize("wrong", [70000, -1])
@pytest.mark.parametrize("rule", [LabelRule(), LabelRule(mapping=((0, 0), (255, 255)))])
def test_ids_that_no_option_can_name(wrong, rule):
    with pytest.raises(ValueError, match=rf"a.png: .*ids \[{wrong}\], which are outside of 0..65535.*void as 255"):
        rule.apply(row(0, wrong, 255, kind=np.int32), 11, "a.png")


def test_long_lists_of_wrong_ids_are_shortened():
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, \.\.\.\]"):
        LabelRule().apply(row(*range(50)), 2, "m")


def test_contradictory_and_impossible_rules():
    with pytest.raises(ValueError, match="exclude each other"):
        LabelRule(reduce_zero=True, mapping=((1, 0),))
    with pytest.raises(ValueError, match=r"\[-1\].*cannot be stored"):
        LabelRule(void_ids=(-1,))


@pytest.mark.parametrize("source", [{0: "sky", 1: "road"}, {"1": "road", "0": "sky"}, ["sky", "road"]])
def test_read_id2label(source, tmp_path):
    assert list(read_id2label(source).items()) == [(0, "sky"), (1, "road")]
    path = tmp_path / "names.json"
    path.write_text(json.dumps(source))
    assert read_id2label(path) == read_id2label(str(path)) == {0: "sky", 1: "road"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({1: "sky", 2: "road"}, "0..n-1"),
        ({}, "0..n-1"),
        ([str(index) for index in range(256)], "at most 254"),
        ({"sky": 0}, "'sky' has 0. A class is an id and a name"),
        (["sky", "sky"], "sky.*more than once"),
    ],
)
def test_read_id2label_refuses(source, message):
    with pytest.raises(ValueError, match=message):
        read_id2label(source)


@pytest.mark.parametrize("content", [None, "{", "3"])
def test_read_id2label_names_the_file(tmp_path, content):
    if content:
        (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match=r"names\.json"):
        read_id2label(tmp_path / "names.json")


def test_infer_id2label_takes_the_largest_id_of_all_masks(caplog):
    def inferred(*masks, rule=RULE):
        return infer_id2label(survey((Row("", mask, "", "a") for mask in masks), rule, MAX_LABELS, images=0), "x")

    assert list(inferred(row(0, 1), row(4, 255))) == [0, 1, 2, 3, 4]
    assert inferred(row(0, 1), row(4, 255), rule=LabelRule(reduce_zero=True))[3] == "class_3"
    assert len(inferred(row(0, 1, 2, 4))) == 5 and not caplog.text
    assert len(inferred(row(0, 120, 240))) == 241
    assert "of the ids 0..240 only 3 occur" in caplog.text  # grey levels
    for ids in (row(0, 255), row(255, 255)):
        with pytest.raises(UserError, match="255 marks void"):
            inferred(ids)
    with pytest.raises(UserError, match=r"ids up to 700, but without class names .* at most 254"):
        inferred(row(0, 700, kind=np.uint16))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (LabelRule(), "the stored ids are the class ids, and 255 is void; void pixels are ignored"),
        (LabelRule(reduce_zero=True), "class k is stored as k + 1, and 0 and 255 are void; void"),
        (LabelRule(void_ids=(11, 30)), "class ids, and 255 is void; stored 11, 30 void too; void"),
        (
            LabelRule(mapping=((7, 0), (8, 1))),
            "2 stored ids are mapped to class ids or void, and no other id occurs; void",
        ),
    ],
)
def test_rules_in_words(rule: LabelRule, words: str) -> None:
    assert words in rule.in_words()
