import json

import numpy as np
import pytest
from PIL import Image

from hf_bcd.data.labels import LabelRule, decode_label, infer_id2label, read_id2label


IDS = np.array([[0, 1, 2], [3, 2, 255]], dtype=np.uint8)


def palette_mask(ids):
    mask = Image.fromarray(ids).convert("P")
    mask.putdata(ids.ravel().tolist())
    mask.putpalette([value for index in range(256) for value in (255 - index, index // 2, 7)])
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(IDS),
        palette_mask(IDS),
        Image.fromarray(IDS.astype(np.uint16)),
        Image.fromarray(IDS.astype(np.int32)),
        Image.fromarray(np.repeat(IDS[..., None], 3, axis=2)),
        IDS.astype(np.int64),
    ],
    ids=["L", "P", "I;16", "I", "RGB-equal", "array"],
)
def test_every_storage_of_the_same_ids_decodes_to_them(mask):
    np.testing.assert_array_equal(decode_label(mask, "mask.png"), IDS)


def test_palette_colours_are_ignored():
    mask = palette_mask(IDS)
    assert mask.mode == "P"
    assert not np.array_equal(np.asarray(mask.convert("L")), IDS)
    np.testing.assert_array_equal(decode_label(mask, "mask.png"), IDS)


def test_one_bit_masks_are_zero_and_one():
    mask = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    np.testing.assert_array_equal(decode_label(mask, "mask.png"), [[0, 1], [1, 0]])


def test_sixteen_bit_ids_keep_their_value(tmp_path):
    Image.fromarray(np.array([[0, 1000], [26001, 65535]], dtype=np.uint16)).save(tmp_path / "m.png")
    np.testing.assert_array_equal(decode_label(Image.open(tmp_path / "m.png"), "m"), [[0, 1000], [26001, 65535]])


def test_colour_coded_mask_is_refused():
    colours = np.zeros((2, 2, 3), dtype=np.uint8)
    colours[0, 0] = (128, 64, 128)
    with pytest.raises(ValueError, match=r"road\.png: a colour-coded mask"):
        decode_label(Image.fromarray(colours), "road.png")


COLOURS = (((0, 0, 0), 0), ((128, 0, 0), 1), ((70, 70, 70), 2), ((0, 0, 0), 3), ((0, 0, 142), 5))
COLOURED = np.array([[[128, 0, 0], [70, 70, 70]], [[0, 0, 0], [0, 0, 142]]], dtype=np.uint8)


def opaque(pixels):
    return Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 255, dtype=np.uint8)]))


@pytest.mark.parametrize("mask", [Image.fromarray(COLOURED), opaque(COLOURED), COLOURED], ids=["RGB", "RGBA", "array"])
def test_known_colours_become_ids(mask):
    np.testing.assert_array_equal(decode_label(mask, "m", COLOURS), [[1, 2], [0, 5]])


def test_equal_channels_are_ids_unless_they_are_none():
    ids = np.array([[0, 5], [1, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(decode_label(np.repeat(ids[..., None], 3, axis=2), "m", COLOURS), ids)
    grey = np.full((2, 2, 3), 70, dtype=np.uint8)  # a mask that shows one class, whose colour is grey
    np.testing.assert_array_equal(decode_label(grey, "m", COLOURS), np.full((2, 2), 2))


def test_unknown_colours_name_their_place():
    pixels = COLOURED.copy()
    pixels[1, 0] = (1, 2, 3)
    with pytest.raises(ValueError, match=r"m: colour \(1, 2, 3\) at row 1, column 0 stands for no class"):
        decode_label(pixels, "m", COLOURS)


@pytest.mark.parametrize(
    "mask",
    [Image.new("RGBA", (2, 2)), Image.new("F", (2, 2)), np.zeros((2, 2)), np.zeros(4, int), np.zeros((1, 2, 2), int)],
    ids=["RGBA", "F", "float", "flat", "batch"],
)
def test_other_arrays_are_no_label_maps(mask):
    with pytest.raises(ValueError, match=r"x\.png: not a label map"):
        decode_label(mask, "x.png")


def test_reduce_zero():
    labels = LabelRule(reduce_zero=True).apply(np.array([[0, 1, 150, 255]], dtype=np.uint8), 150, "m")
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[255, 0, 149, 255]]


def test_reduce_zero_does_not_turn_256_into_void():
    with pytest.raises(ValueError, match=r"ids \[256\]"):
        LabelRule(reduce_zero=True).apply(np.array([[256, 1]], dtype=np.uint16), 150, "m")


def test_void_ids_are_stored_ids():
    ids = np.array([[0, 5, 11, 255]], dtype=np.uint8)
    assert LabelRule(void_ids=(11,)).apply(ids, 11, "m").tolist() == [[0, 5, 255, 255]]
    assert LabelRule(reduce_zero=True, void_ids=(5,)).apply(ids, 11, "m").tolist() == [[255, 255, 10, 255]]


def test_mapping_may_use_255_and_knows_no_other_ids():
    rule = LabelRule(mapping=((7, 0), (26001, 1), (255, 2), (8, 255)))
    assert rule.apply(np.array([[7, 26001, 255, 8]], dtype=np.int32), 3, "m").tolist() == [[0, 1, 2, 255]]
    with pytest.raises(ValueError, match=r"m: the mask holds ids \[9\].*another encoding"):
        rule.apply(np.array([[7, 9]], dtype=np.uint8), 3, "m")
    with pytest.raises(ValueError, match=r"ids \[255\]"):
        LabelRule(mapping=((7, 0), (8, 1))).apply(np.array([[7, 255]], dtype=np.uint8), 2, "m")


def test_mapping_to_a_class_that_does_not_exist():
    with pytest.raises(ValueError, match=r"ids \[8\].*num_labels=3"):
        LabelRule(mapping=((7, 0), (8, 3))).apply(np.array([[7, 8]], dtype=np.uint8), 3, "m")


@pytest.mark.parametrize("wrong", [11, 200, 65535])
def test_ids_out_of_range_name_file_ids_and_remedies(wrong):
    ids = np.array([[0, 10, wrong, 255]], dtype=np.int32)
    with pytest.raises(ValueError) as error:
        LabelRule().apply(ids, 11, "val/masks/a.png")
    message = str(error.value)
    for part in ("val/masks/a.png", f"[{wrong}]", "num_labels=11", "--ignore_labels", "--reduce_labels"):
        assert part in message


@pytest.mark.parametrize("wrong", [70000, -1])
@pytest.mark.parametrize("rule", [LabelRule(), LabelRule(mapping=((0, 0), (255, 255)))])
def test_ids_that_no_option_can_name(wrong, rule):
    with pytest.raises(ValueError, match=rf"a.png: .*ids \[{wrong}\], which are outside of 0..65535.*void as 255"):
        rule.apply(np.array([[0, wrong, 255]], dtype=np.int32), 11, "a.png")


def test_long_lists_of_wrong_ids_are_shortened():
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, \.\.\.\]"):
        LabelRule().apply(np.arange(50, dtype=np.uint8)[None], 2, "m")


def test_all_void_mask():
    assert (LabelRule().apply(np.full((2, 2), 255, dtype=np.uint8), 3, "m") == 255).all()


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
        ([str(index) for index in range(256)], "at most 255"),
        ({"sky": 0}, "mapping of ids to names"),
        (["sky", "sky"], "sky.*more than once"),
    ],
)
def test_read_id2label_refuses(source, message):
    with pytest.raises(ValueError, match=message):
        read_id2label(source)


def test_read_id2label_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json"):
        read_id2label(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json"):
        read_id2label(tmp_path / "bad.json")
    (tmp_path / "number.json").write_text("3")
    with pytest.raises(ValueError, match=r"number\.json"):
        read_id2label(tmp_path / "number.json")


def test_infer_id2label_takes_the_largest_id_of_all_masks():
    masks = [(np.array([[0, 1]]), "a"), (np.array([[4, 255]]), "b")]
    assert list(infer_id2label(masks, LabelRule())) == [0, 1, 2, 3, 4]
    assert infer_id2label(masks, LabelRule(reduce_zero=True))[3] == "class_3"


def test_infer_id2label_warns_of_grey_levels(caplog):
    assert len(infer_id2label([(np.array([[0, 1, 2, 4]]), "a")], LabelRule())) == 5 and not caplog.text
    assert len(infer_id2label([(np.array([[0, 120, 240]]), "a")], LabelRule())) == 241
    assert "Of the ids 0..240 only 3 occur" in caplog.text


@pytest.mark.parametrize("ids", [[[0, 255]], [[255, 255]]])
def test_infer_id2label_needs_two_classes(ids):
    with pytest.raises(ValueError, match="255 marks void"):
        infer_id2label([(np.array(ids), "a")], LabelRule())


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
