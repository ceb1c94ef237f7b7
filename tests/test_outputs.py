"""`Objects`, the truth of detection as losses see it: where something counts, where each class and each object is."""

import itertools

import pytest
import torch
from adapters.adapter_tiny_detectors import objects
from host_sync import no_host_synchronisation
from torch import Tensor

from hf_bcd.outputs import LabelMaps, Objects, box_areas, one_hot, resize_nearest
from hf_bcd.utils.masks import pack


EMPTY = torch.zeros(0, 4)


def targets(**fields) -> Objects:
    """A large box of class 2 below a small one of class 0, and a picture without boxes."""
    boxes = [torch.tensor([[4.0, 4, 20, 12], [0, 0, 28, 16]]), EMPTY]
    return Objects(boxes, [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)], (16, 32), 3, **fields)


def inside(box: list[float], row: int, column: int, cell: float = 4.0) -> bool:
    x, y = (column + 0.5) * cell, (row + 0.5) * cell
    return box[0] <= x < box[2] and box[1] <= y < box[3]


def map_of(one: Objects, image: int, size: tuple[int, int] = (4, 8)) -> Tensor:
    """Index of the smallest box at each position plus 1, by looking at every position."""
    found = torch.zeros(size, dtype=torch.long)
    for row, column in itertools.product(*map(range, size)):
        at = [k for k, box in enumerate(one.boxes[image].tolist()) if inside(box, row, column)]
        areas = box_areas(one.boxes[image])
        found[row, column] = min(at, key=lambda k: float(areas[k])) + 1 if at else 0
    return found


def test_regions_have_the_smallest_object_on_top() -> None:
    one = targets()
    regions = one.regions((4, 8))
    assert regions.dtype == torch.int64 and torch.equal(regions[0], map_of(one, 0)) and not regions[1].any()
    assert set(regions[0].flatten().tolist()) == {0, 1, 2}
    many = objects(6, 0, 9, size=(16, 32))
    assert torch.equal(many.regions((4, 8)), torch.stack([map_of(many, image) for image in range(3)]))


def test_objects_of_one_size_lie_in_their_order() -> None:
    box = torch.tensor([[0.0, 0, 8, 8]])
    one = Objects([box.repeat(3, 1)], [torch.tensor([0, 1, 2])], (8, 8), 3)
    assert one.regions((2, 2)).unique().tolist() == [3]


def test_class_masks_are_filled_boxes() -> None:
    one = targets()
    masks = one.class_masks((4, 8))
    assert masks.shape == (2, 3, 4, 8) and masks.dtype == torch.bool and not masks[1].any()
    for row, column in itertools.product(range(4), range(8)):
        boxes = one.boxes[0].tolist()
        assert masks[0, :, row, column].tolist() == [
            inside(boxes[0], row, column),
            False,
            inside(boxes[1], row, column),
        ]


def test_padding_is_void() -> None:
    mask = torch.ones(2, 16, 32, dtype=torch.bool)
    mask[0, :, 16:], mask[1, 8:] = False, False
    one = targets(pixel_mask=mask)
    valid = one.valid((4, 8))
    assert valid[0, :, :4].all() and not valid[0, :, 4:].any() and valid[1, :2].all() and not valid[1, 2:].any()
    assert not one.class_masks((4, 8))[0, :, :, 4:].any()
    assert torch.equal(one.pixel_mask, mask) and targets().pixel_mask is None and targets().valid((2, 2)).all()


def test_crowds_are_void_where_no_object_is() -> None:
    one = targets(crowds=[torch.tensor([[0.0, 0, 32, 16]]), torch.tensor([[8.0, 0, 16, 16], [0, 12, 4, 16]])])
    valid, objects_there = one.valid((4, 8)), targets().regions((4, 8)) > 0
    assert torch.equal(valid[0], objects_there[0])
    expected = torch.ones(4, 8, dtype=torch.bool)
    expected[:, 2:4], expected[3, 0] = False, False
    assert torch.equal(valid[1], expected)
    assert targets(crowds=[EMPTY, EMPTY]).valid((4, 8)).all()


@pytest.mark.parametrize("size", [(4, 8), (3, 5), (16, 32), (1, 1)])
def test_any_grid_and_nothing_waits(size: tuple[int, int]) -> None:
    one = targets(crowds=[EMPTY, torch.tensor([[0.0, 0, 8, 8]])])
    with no_host_synchronisation():
        masks, valid, regions = one.class_masks(size), one.valid(size), one.regions(size)
    assert masks.shape == (2, 3, *size) and valid.shape == regions.shape == (2, *size)
    assert torch.equal(masks.any(1), regions > 0)


def test_rows_of_one_one() -> None:
    assert torch.equal(one_hot(torch.tensor([2, 0]), 3), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    assert one_hot(torch.zeros(0, dtype=torch.long), 3).shape == (0, 3)


# ---- Masks -------------------------------------------------------------------------------------------------------------


def masks_of(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, 16, width, generator=generator) < 0.4 for count, width in shapes]


@pytest.mark.parametrize("width", [32, 29])
@pytest.mark.parametrize("size", [(16, None), (4, 8), (5, 7), (32, 64)])
def test_masks_take_the_place_of_boxes(width: int, size: tuple[int, int | None]) -> None:
    size = size[0], size[1] or width
    whole = masks_of((3, width), (0, width))
    boxes = [torch.tensor([[0.0, 0, 9, 9], [3, 3, 20, 12], [5, 5, 28, 16]]), EMPTY]
    classes = [torch.tensor([1, 0, 1]), torch.zeros(0, dtype=torch.long)]
    one = Objects(boxes, classes, (16, width), 3, masks=[pack(mask) for mask in whole])
    expected = resize_nearest(whole[0], size)
    assert torch.equal(one.objects(size)[0], expected) and one.objects(size)[1].shape == (0, *size)
    by_class = torch.stack([expected[1], expected[0] | expected[2], torch.zeros(size, dtype=torch.bool)])
    assert torch.equal(one.class_masks(size)[0], by_class) and not one.class_masks(size)[1].any()
    order = expected.sum((1, 2)).argsort(descending=True, stable=True)
    top = torch.zeros(size, dtype=torch.long)
    for index in order:
        top[expected[index]] = index + 1
    assert torch.equal(one.regions(size)[0], top)


def test_a_crowds_mask_is_void_where_no_object_is() -> None:
    thing, crowd = masks_of((1, 32), (1, 32))
    one = Objects(
        [torch.tensor([[0.0, 0, 32, 16]])], [torch.tensor([0])], (16, 32), 1, crowds=[torch.tensor([[0.0, 0, 32, 16]])],
        masks=[pack(thing)], crowd_masks=[pack(crowd)],
    )  # fmt: skip
    assert torch.equal(one.valid((16, 32)), thing | ~crowd) and torch.equal(one.class_masks((16, 32))[0], thing)


def test_weights_are_those_of_the_classes_where_there_is_a_label() -> None:
    ids = torch.tensor([[[0, 1], [2, 255]], [[255, 255], [255, 255]]])
    plain, weights = LabelMaps(ids, 3), torch.tensor([0.5, 2.0, 4.0])
    assert torch.equal(plain.weights((2, 2)), plain.valid((2, 2)).float())
    assert LabelMaps(ids, 3, class_weights=weights).weights((2, 2))[0].tolist() == [[0.5, 2], [4, 0]]
    seen = torch.tensor([[[True, True], [True, False]], [[True, True], [True, False]]])  # the second has no labels
    assert LabelMaps(ids, 3, seen=seen, class_weights=weights).weights((2, 2))[1].tolist() == [[1, 1], [1, 0]]
    assert torch.equal(targets().weights((4, 8)), targets().valid((4, 8)).float())
