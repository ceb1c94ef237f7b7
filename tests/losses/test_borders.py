import numpy as np
import pytest
import torch
from loss_references import borders_of_classes, labels_with_void, masks_of

from hf_bcd.losses.ops.borders import class_border_shares, class_borders


def test_a_border_by_hand():
    # 3 wide: columns 2 and 3 see both classes; no border between 1 and void, nor at the edge of the image
    labels = torch.tensor([[[0, 0, 0, 1, 1, 255, 0]]])
    assert class_borders(*masks_of(labels), width=3).int().tolist() == [[[0, 0, 1, 1, 0, 0, 0]]]
    # 5 wide: columns 1 to 4, and the last one sees 1 across the void
    assert class_borders(*masks_of(labels), width=5).int().tolist() == [[[0, 1, 1, 1, 1, 0, 1]]]


@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize("void", [255, 1, -1])
def test_borders_match_loops(width, void):
    labels = labels_with_void()
    labels = labels.masked_fill(labels == 255, void)
    expected = np.stack([borders_of_classes(one, 3, width // 2, void) for one in labels.numpy()])
    borders = class_borders(*masks_of(labels, 3, void), width=width)
    assert borders.any() and not borders.all()
    np.testing.assert_array_equal(borders.numpy(), expected.any(axis=1))
    shares = class_border_shares(*masks_of(labels, 3, void), (12, 16), width=width)
    np.testing.assert_array_equal(shares.numpy(), expected)
    # cells of 4 x 8 pixels
    cells = expected.reshape(2, 3, 3, 4, 2, 8).mean(axis=(3, 5))
    coarse = class_border_shares(*masks_of(labels, 3, void), (3, 2), width=width)
    np.testing.assert_allclose(coarse.numpy(), cells, rtol=1e-6)


def test_grids_that_do_not_divide_the_image_keep_shares():
    shares = class_border_shares(*masks_of(labels_with_void()), (5, 7))
    assert shares.shape == (2, 3, 5, 7) and shares.min() >= 0 and shares.max() <= 1


@pytest.mark.parametrize("width", [1, 4, -3])
def test_windows_without_a_centre_or_a_neighbour_are_refused(width):
    with pytest.raises(ValueError, match=f"width is {width}"):
        class_borders(*masks_of(labels_with_void()), width=width)
