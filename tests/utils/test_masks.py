"""Run lengths equal to those of pycocotools, and packed bits equal to those of numpy."""

import numpy as np
import pytest
import torch

from hf_bcd.utils.masks import decode, decode_box, encode, encode_ids, mask_areas, mask_boxes, pack, union, unpack


def random_masks(count=150):
    rng = np.random.default_rng(0)
    yield from (np.zeros((3, 5), bool), np.ones((4, 2), bool), np.ones((1, 1), bool))
    for _ in range(count):
        yield rng.random(rng.integers(1, 20, 2)) < rng.random()


def test_run_lengths_are_those_of_pycocotools():
    library = pytest.importorskip("pycocotools.mask")
    for mask in random_masks():
        rle, expected = encode(mask), library.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle == expected and np.array_equal(decode(rle), mask)
        assert encode(torch.from_numpy(mask.astype(np.uint8))) == rle


def test_a_mask_within_its_box():
    for mask in random_masks():
        left, top, inside = decode_box(encode(mask))
        pasted = np.zeros_like(mask)
        pasted[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        assert np.array_equal(pasted, mask)
        if mask.any():
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            assert mask_boxes([encode(mask)])[0].tolist() == [left, top, left + inside.shape[1], top + inside.shape[0]]
        assert mask_areas([encode(mask)]).tolist() == [mask.sum()]


def test_run_lengths_may_leave_out_the_zeros_at_the_end():
    full, short = encode(np.eye(4, dtype=bool)), {"size": [4, 9], "counts": b"01"}
    assert decode_box(full)[2].tolist() == np.eye(4).tolist()
    assert [part.tolist() if isinstance(part, np.ndarray) else part for part in decode_box(short)] == [0, 0, [[True]]]


def test_all_ids_of_a_map_at_once():
    ids = np.random.default_rng(0).integers(0, 4, (9, 7)).astype(np.uint16) * 1000
    assert encode_ids(ids) == {index: encode(ids == index) for index in (1000, 2000, 3000)}
    assert encode_ids(np.zeros((2, 3), np.uint8)) == {} and encode_ids(np.full((2, 3), 7)) == {
        7: encode(np.ones((2, 3)))
    }


def test_no_masks_and_unions():
    assert mask_areas([]).shape == (0,) and mask_boxes([]).shape == (0, 4) and mask_areas([union([])]) == [0]
    first, second = (np.eye(3, dtype=bool)[::step] for step in (1, -1))
    assert np.array_equal(decode(union([encode(first), encode(second)])), first | second)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 40])
def test_packed_bits(width):
    mask = torch.rand(2, 3, width) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, -(-width // 8))
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(unpack(packed, width), mask)
    assert unpack(pack(mask[:0]), width).shape == (0, 3, width)
