import numpy as np
import pytest
import torch
from metrics_reference import blobs, perturbed, reference_connectivity

from hf_bcd.metrics.connectivity import connectivity_counts, connectivity_scores


def scores(truth, prediction, num_labels=2):
    counts = connectivity_counts(truth, prediction, num_labels)
    return connectivity_scores({name: count.sum(0) for name, count in counts.items()})


def ones(height, width):
    return torch.ones(1, height, width, dtype=torch.int32)


def test_region_split_in_two():
    prediction = ones(10, 21)
    prediction[..., 14] = 0
    result = scores(ones(10, 21), prediction)
    assert result == pytest.approx({"completeness": 140 / 210, "connectivity": 140 / 200, "fragments": 2, "missed": 0})


def test_pieces_that_touch_at_a_corner_are_one():
    prediction = torch.zeros(1, 10, 10, dtype=torch.int32)
    prediction[:, :5, :5] = prediction[:, 5:, 5:] = 1
    assert scores(ones(10, 10), prediction) == {"completeness": 0.5, "connectivity": 1, "fragments": 1, "missed": 0}


def test_fragments_have_one_percent_of_the_region():
    prediction = torch.zeros(1, 10, 20, dtype=torch.int32)
    prediction[:, :, :10] = 1
    prediction[:, 0, 13:15] = 1  # 2 of 200 pixels count, 1 does not
    prediction[:, 9, 18] = 1
    assert scores(ones(10, 20), prediction)["fragments"] == 2


def test_missed_region_has_no_connectivity():
    truth, prediction = ones(8, 17), ones(8, 17)
    truth[..., 8] = prediction[..., 8] = -1
    prediction[..., 9:] = 0
    assert scores(truth, prediction) == {"completeness": 0.5, "connectivity": 1, "fragments": 0.5, "missed": 0.5}


def test_pieces_belong_to_their_own_region():
    truth, prediction = ones(8, 17), torch.zeros(1, 8, 17, dtype=torch.int32)
    truth[..., 8] = 0
    prediction[..., 6:11] = 1  # one piece of the prediction, but two columns in each of the two regions
    result = scores(truth, prediction)
    assert result == {"completeness": 0.25, "connectivity": 1, "fragments": 1, "missed": 0}


@pytest.mark.parametrize(("height", "regions"), [(8, 1), (7, 0)])
def test_small_regions_do_not_count(height, regions):
    counts = connectivity_counts(ones(height, 8), ones(height, 8), 2)
    assert counts["regions"].tolist() == [[0, regions]]
    assert np.isnan(scores(ones(height, 8), ones(height, 8))["completeness"]) == (regions == 0)


def test_counts_belong_to_image_and_class():
    truth = torch.stack([torch.zeros(8, 8), torch.full((8, 8), 2)]).int()
    counts = connectivity_counts(truth, truth, 3)
    assert counts["regions"].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert counts["completeness"].tolist() == [[2**32, 0, 0], [0, 0, 2**32]]


@pytest.mark.parametrize("shape", [(41, 67), (90, 53)])
def test_matches_reference(shape):
    rng = np.random.default_rng(shape[0])
    labels = [blobs(rng, *shape, 4, scale=5) for _ in range(3)]
    pairs = []
    for label in labels:
        void = label == 255
        prediction = perturbed(rng, label, 4, scale=1.5, share=0.4)
        pairs.append((np.where(void, -1, label), np.where(void, -1, prediction)))
    truth, prediction = (torch.from_numpy(np.stack(maps)) for maps in zip(*pairs, strict=True))
    result = scores(truth, prediction, 4)
    assert result == pytest.approx(reference_connectivity(pairs, 4), rel=1e-9)
    assert 0 < result["completeness"] < result["connectivity"] < 1 < result["fragments"]
