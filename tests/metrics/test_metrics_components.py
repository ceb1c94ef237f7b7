import numpy as np
import pytest
import torch
from metrics_reference import EIGHT, blobs
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

from hf_bcd.metrics.components import label_components


SYNCS = {"aten.nonzero.default", "aten._local_scalar_dense.default", "aten.bincount.default", "aten.equal.default"}


class CountSyncs(TorchDispatchMode):
    """Counts the operations that make a device wait for the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) in SYNCS
        return func(*args, **(kwargs or {}))


def spiral(side):
    """A one-pixel-wide snake of ones, wound up in a square of zeros."""
    path = np.zeros((side, side), dtype=np.int64)
    y = x = 0
    dy, dx = 0, 1
    path[0, 0] = 1
    while True:
        for _ in range(2):
            ny, nx, ahead_y, ahead_x = y + dy, x + dx, y + 2 * dy, x + 2 * dx
            free = 0 <= ny < side and 0 <= nx < side and not path[ny, nx]
            clear = not (0 <= ahead_y < side and 0 <= ahead_x < side and path[ahead_y, ahead_x])
            if free and clear:
                break
            dy, dx = dx, -dy
        else:
            return path
        y, x = ny, nx
        path[y, x] = 1


def assert_matches_scipy(maps):
    """Same partition as scipy.ndimage.label, image by image and class by class, numbered in scan order."""
    found = label_components(torch.from_numpy(maps))
    ids = found.ids.numpy()
    assert np.array_equal(ids < 0, maps < 0)
    expected = np.full(maps.shape, -1)
    count = 0
    for image, class_map in enumerate(maps):
        for c in np.unique(class_map[class_map >= 0]):
            labelled, number = ndimage.label(class_map == c, EIGHT)
            expected[image][labelled > 0] = labelled[labelled > 0] + count - 1
            count += number
    pairs = np.unique(np.stack([ids.ravel(), expected.ravel()]), axis=1)
    foreground = pairs[:, pairs[0] >= 0]
    assert foreground.shape[1] == count == len(found.sizes) == len(found.first)
    assert np.array_equal(foreground[0], np.arange(count))
    values, first, sizes = np.unique(ids.ravel(), return_index=True, return_counts=True)
    assert np.array_equal(found.first.numpy(), first[values >= 0])
    assert np.array_equal(found.sizes.numpy(), sizes[values >= 0])
    assert np.array_equal(np.sort(found.first.numpy()), found.first.numpy())


def test_checkerboard_is_two_components():
    board = torch.arange(7)[:, None] + torch.arange(9)[None]
    found = label_components(board[None] % 2)
    assert found.sizes.tolist() == [32, 31]
    assert torch.equal(found.ids[0], board % 2)


def test_components_by_hand():
    found = label_components(torch.zeros(3, 2, 2, dtype=torch.int32))  # images do not touch
    assert found.sizes.tolist() == [4, 4, 4] and found.first.tolist() == [0, 4, 8]
    found = label_components(torch.tensor([[[0, -1, 5], [5, -1, 0]]]))  # rows do not wrap around
    assert found.ids.tolist() == [[[0, -1, 1], [2, -1, 3]]]
    found = label_components(torch.full((2, 3, 3), -1))
    assert (found.ids == -1).all() and len(found.sizes) == 0


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 7), (2, 7, 1), (3, 17, 23)])
@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_noise_matches_scipy(shape, num_labels):
    assert_matches_scipy(np.random.default_rng(0).integers(-1, num_labels, shape))


def test_smooth_maps_match_scipy():
    rng = np.random.default_rng(1)
    maps = np.stack([blobs(rng, 61, 47, 5, scale=2) for _ in range(4)])
    assert_matches_scipy(np.where(maps == 255, -1, maps))


@pytest.mark.parametrize("transform", [np.array, np.flipud, np.fliplr, np.transpose])
def test_snake_is_one_component_after_few_syncs(transform):
    snake = np.ascontiguousarray(transform(spiral(101)))
    assert snake.sum() > 5000
    assert_matches_scipy(np.where(snake, snake, -1)[None])
    with CountSyncs() as syncs:
        label_components(torch.from_numpy(snake)[None])
    assert 0 < syncs.count <= 8


def test_noise_needs_few_syncs():
    noise = torch.from_numpy(np.random.default_rng(2).integers(0, 2, (4, 100, 100)))
    with CountSyncs() as syncs:
        label_components(noise)
    assert 0 < syncs.count <= 12
