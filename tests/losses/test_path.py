import loss_references as reference
import pytest
import torch
from loss_references import Operators, randn, random_mask

from hf_bcd.losses import path_offsets, path_range
from hf_bcd.losses.ops.path import _line_shape, _search_plan


@pytest.mark.parametrize(("radius", "count"), [(2, 4), (3, 12), (4, 22), (5, 34), (10, 152)])
def test_number_of_directions(radius, count):
    half = {tuple(o) for o in path_offsets(radius, "half").tolist()}
    full = [tuple(o) for o in path_offsets(radius, "disc").tolist()]
    assert len(half) == count
    assert len(full) == len(set(full)) == 2 * count
    assert set(full) == set(reference.disc(radius))
    assert not half & {(-y, -x) for y, x in half}  # every unordered pair once
    assert full[count:] == [(-y, -x) for y, x in full[:count]]


@pytest.mark.parametrize("radius", [2, 3, 5, 10])
def test_lines_are_irns_thick_lines(radius):
    for dy, dx in path_offsets(radius, "disc").tolist():
        corner_y, corner_x = min(dy, 0), min(dx, 0)
        assert {(corner_y + y, corner_x + x) for y, x in _line_shape(dy, dx)} == set(reference.line(dy, dx))


def test_a_thick_line_by_hand():
    # the line from (0, 0) to (1, 3) passes every point of its 2x4 box at less than one step
    assert len(_line_shape(1, 3)) == 8
    # to (2, 2): the corners (0, 2) and (2, 0) are sqrt(2) away
    assert _line_shape(2, 2) == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)}
    # to (2, -2): the mirror image, seen from the corner (0, -2) of the box
    assert _line_shape(2, -2) == {(0, 2), (0, 1), (1, 2), (1, 1), (1, 0), (2, 1), (2, 0)}
    assert _line_shape(0, 2) == {(0, 0), (0, 1), (0, 2)}


@pytest.mark.parametrize("radius", [2, 3, 5, 10])
def test_lines_are_unions_of_shorter_ones(radius):
    steps, numbers = _search_plan(radius)
    shapes = [frozenset({(0, 0)})]
    for height, width, parts in steps:
        shape = {(y + part_y, x + part_x) for part, y, x in parts for part_y, part_x in shapes[part]}
        assert (height, width) == (max(y for y, _ in shape), max(x for _, x in shape))
        shapes.append(frozenset(shape))
    offsets = [tuple(offset) for offset in path_offsets(radius).tolist()]
    assert {offset: shapes[numbers[offset]] for offset in offsets} == {
        offset: _line_shape(*offset) for offset in offsets
    }
    assert len(set(shapes)) == len(shapes) and set(numbers.values()) == set(range(1, len(shapes)))


def test_every_line_costs_one_maximum_and_one_minimum():
    """At radius 3: 1x2, 2x1, 2x2, 1x3, 3x1, 2x3, 3x2 boxes and two diagonals of 3x3."""
    with Operators() as seen:
        path_range(randn(1, 4, 4), 3)
    assert seen.names.count("maximum") == seen.names.count("minimum") == 9


@pytest.mark.parametrize("directions", ["disc", "half"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("radius", "height", "width"), [(2, 5, 4), (3, 6, 7), (4, 3, 5), (3, 1, 6), (5, 2, 2), (10, 4, 11)]
)
def test_path_range_equals_plain_loops(radius, height, width, masked, directions):
    z = randn(2, height, width)
    mask = random_mask(2, height, width) if masked else None
    ranges = path_range(z, radius, directions, mask)
    offsets = [(y, x) for y, x in path_offsets(radius, directions).tolist()]
    for image in range(2):
        valid = (torch.ones_like(z, dtype=torch.bool) if mask is None else mask)[image].numpy()
        expected = torch.from_numpy(reference.path_range(z[image].numpy(), valid, offsets))
        torch.testing.assert_close(ranges[image], expected, rtol=0, atol=0)


def test_a_line_that_leaves_the_image_uses_its_remaining_part():
    z = torch.tensor([[[1.0, 4.0, 6.0]]])
    ranges = dict(zip(map(tuple, path_offsets(3).tolist()), path_range(z, 3)[0, :, 0], strict=True))
    assert ranges[0, 2].tolist() == [5, 2, 0]  # {1, 4, 6}, {4, 6}, {6}
    assert ranges[0, -2].tolist() == [0, 3, 5]
    assert ranges[2, 0].tolist() == [0, 0, 0]  # only the start lies in the image
    # of the line to (1, 2), the points (0, 0) and (0, 1) lie in the image; (0, 2) is sqrt(4/5) away and counts too
    assert ranges[1, 2].tolist() == [5, 2, 0]
    mask = torch.tensor([[[True, False, True]]])
    assert path_range(z, 3, mask=mask)[0, path_offsets(3).tolist().index([0, 2]), 0].tolist() == [5, 0, 0]


def test_gradient_goes_to_the_extremes_of_the_line():
    z = torch.tensor([[[3.0, 1.0, 2.0]]], requires_grad=True)
    d = path_offsets(3).tolist().index([0, 2])
    path_range(z, 3)[0, d, 0, 0].backward()
    assert z.grad is not None and z.grad.tolist() == [[[1, -1, 0]]]
    constant = torch.full((1, 5, 5), 3.0, requires_grad=True)
    ranges = path_range(constant, 3)
    ranges.sum().backward()
    assert constant.grad is not None and not ranges.any() and constant.grad.abs().max() < 1e-5


@pytest.mark.parametrize("function", [path_offsets, lambda *args: path_range(torch.zeros(1, 2, 2), *args)])
def test_bad_arguments_are_named(function):
    with pytest.raises(ValueError, match="radius is 1"):
        function(1)
    with pytest.raises(ValueError, match="'circle'"):
        function(3, "circle")
