import numpy as np
import pytest
import torch
from metrics_reference import blobs, reference_band, reference_contour
from scipy import ndimage

from hf_bcd.metrics.boundary import DISTANCES, band, boundary_counts, boundary_scores, contour, contour_reach


def square(left):
    classes = torch.zeros(1, 20, 20, dtype=torch.int32)
    classes[:, 4:12, left : left + 8] = 1
    return classes


def scores(truth, prediction, num_labels):
    return boundary_scores(
        {name: count.sum(0) for name, count in boundary_counts(truth, prediction, num_labels).items()}
    )


def random_map(seed, height, width, num_labels=4, scale=1.5, ignored=0.15):
    label = blobs(np.random.default_rng(seed), height, width, num_labels, scale, ignored)
    return np.where(label == 255, -1, label)


def test_contour_of_square():
    edges = contour(square(left=4))
    assert edges[0, 4:12, 4:12].sum() == 28  # the rim of the square
    assert edges.sum() == 28 + 32  # and the background's pixels beside it, without corners


def test_ignored_pixels_and_image_border_make_no_contour():
    classes = torch.tensor([[[0, 0, -1, 1, 1], [0, 0, -1, 1, 1]]])
    assert not contour(classes).any()
    assert not contour(torch.zeros(1, 3, 4, dtype=torch.int32)).any()
    assert contour(torch.tensor([[[0, 0, -1], [2, 0, 1]]]))[0].tolist() == [[True, False, False], [True, True, True]]


def test_shifted_square_by_hand():
    result = scores(square(left=4), square(left=8), 2)
    # Of the 28 rim pixels, 5 of the top, 5 of the bottom and 2 of the inner side lie within 1 px; of 32 outside, too.
    assert result["boundary_f@1"] == pytest.approx((12 / 28 + 12 / 32) / 2)
    # At a shift of 4, everything is found within 5 px.
    assert result["boundary_f@5"] == 1
    # At this size one erosion: rims of 28 pixels share 8, the rims of 36 around them share 12; the image's border has 76.
    assert result["boundary_iou"] == pytest.approx((8 / 48 + (12 + 76) / (60 + 76)) / 2)


def test_contour_of_one_map_only_scores_zero():
    result = scores(square(left=4), torch.zeros(1, 20, 20, dtype=torch.int32), 2)
    only_the_border = (0 / 28 + 76 / (36 + 76)) / 2
    assert result == {
        "boundary_f@1": 0,
        "boundary_f@3": 0,
        "boundary_f@5": 0,
        "boundary_iou": pytest.approx(only_the_border),
    }


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 1), (3, 2), (23, 31)])
def test_contour_and_reach_match_distance_transform(shape, narrow):
    num_labels = 4
    maps = [random_map(seed, *shape, num_labels) for seed in range(2)]
    ignored = maps[0] < 0
    maps[1][ignored] = -1
    tensors = [torch.from_numpy(m)[None] for m in maps]
    contours = [t.where(contour(t), -1) for t in tensors]
    reaches = contour_reach(*contours, num_labels=num_labels if narrow else 1000)
    for c in range(num_labels):
        expected = [reference_contour(m, c) for m in maps]
        for own, other, found, reach in zip(expected, expected[::-1], contours, reaches, strict=True):
            assert np.array_equal(found[0].numpy() == c, own)
            distance = ndimage.distance_transform_edt(~other) if other.any() else np.full(shape, np.inf)
            misses = sum((distance > d).astype(int) for d in DISTANCES)
            assert np.array_equal(reach[0].numpy()[own], misses[own])


@pytest.mark.parametrize("radius", [1, 2, 3, 7])
@pytest.mark.parametrize("ignored", [0, 0.15])
@pytest.mark.parametrize("shape", [(1, 6), (24, 33)])
def test_band_is_the_eroded_rim_of_every_class(shape, ignored, radius):
    class_map = random_map(7, *shape, scale=2.5, ignored=ignored)
    found = band(torch.from_numpy(class_map)[None], radius)[0].numpy()
    for c in range(4):
        assert np.array_equal(found & (class_map == c), reference_band(class_map, c, radius))
    assert not found[class_map < 0].any()


def test_band_reaches_across_a_strip_of_ignored_pixels():
    row = torch.tensor([0] * 7 + [-1] + [1] * 7, dtype=torch.int32)
    strip = row.expand(1, 9, 15)
    assert band(strip, 1)[0, 4].tolist() == [True] + [False] * 13 + [True]
    assert band(strip, 2)[0, 4].tolist() == [True] * 2 + [False] * 4 + [True, False, True] + [False] * 4 + [True] * 2


def official_boundary(mask: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """`mask_to_boundary` of boundary_iou_api, with SciPy for OpenCV."""
    height, width = mask.shape
    dilation = max(1, int(round(dilation_ratio * np.sqrt(height**2 + width**2))))
    padded = np.pad(mask, 1)  # so that the image's border is a boundary
    eroded = ndimage.binary_erosion(padded, np.ones((3, 3)), iterations=dilation, border_value=1)
    return mask & ~eroded[1:-1, 1:-1]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(5, 5), (40, 60), (120, 160), (1, 80)])
def test_boundary_iou_is_the_official_one(shape, dtype):
    num_labels, maps = (
        4,
        [[random_map(10 * image + side, *shape, ignored=0) for side in range(2)] for image in range(2)],
    )
    expected = []
    for c in range(num_labels):
        pairs = [[official_boundary(one == c) for one in image] for image in maps]
        union = sum((a | b).sum() for a, b in pairs)
        expected += [sum((a & b).sum() for a, b in pairs) / union] if union else []
    truth, prediction = (torch.from_numpy(np.stack([image[side] for image in maps])).to(dtype) for side in range(2))
    assert scores(truth, prediction, num_labels)["boundary_iou"] == pytest.approx(np.mean(expected), rel=1e-12)
    parts = [boundary_counts(truth[i, None], prediction[i, None], num_labels) for i in range(2)]
    summed = {name: parts[0][name].sum(0) + parts[1][name].sum(0) for name in parts[0]}  # image by image
    assert boundary_scores(summed)["boundary_iou"] == pytest.approx(np.mean(expected), rel=1e-12)
