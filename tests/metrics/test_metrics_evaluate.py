import math

import numpy as np
import pytest
import torch
from metrics_reference import blobs, perturbed


evaluate = pytest.importorskip("evaluate")

from hf_bcd.metrics import SemanticMetrics, load_evaluate_metric


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    return load_evaluate_metric(4)


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    labels = np.stack([blobs(rng, 40, 35, 4) for _ in range(3)])
    return np.stack([perturbed(rng, label, 4) for label in labels]), labels


@pytest.fixture
def expected(maps):
    metrics = SemanticMetrics(4)
    metrics.update(*map(torch.from_numpy, maps))
    return metrics.compute()


@pytest.mark.parametrize("as_input", [np.asarray, torch.from_numpy, np.ndarray.tolist, list])
def test_batches_as_arrays_tensors_or_lists(metric, maps, expected, as_input):
    predictions, labels = maps
    metric.add_batch(predictions=as_input(predictions[:2]), references=as_input(labels[:2]))
    metric.add_batch(predictions=as_input(predictions[2:]), references=as_input(labels[2:]))
    assert metric.compute() == expected


def test_compute_adds_its_arguments_and_resets(metric, maps, expected):
    predictions, labels = maps
    for _ in range(2):
        metric.add(prediction=predictions[0], reference=labels[0])
        assert metric.compute(predictions=predictions[1:], references=labels[1:]) == expected
    assert math.isnan(metric.compute()["mean_iou"])


def test_images_of_different_sizes_and_read_only_arrays(metric):
    small, large = np.zeros((3, 5), dtype=np.uint8), np.ones((4, 2), dtype=np.uint8)
    small.flags.writeable = False
    metric.add_batch(predictions=[small, large], references=[small, large])
    assert metric.compute()["per_class_iou"][:2] == [1, 1]


def test_combines_with_other_metrics_of_evaluate(metric, maps, expected):
    assert isinstance(metric, evaluate.Metric) and set(metric.features) == {"predictions", "references"}
    combined = evaluate.combine([metric])
    combined.add_batch(predictions=maps[0], references=maps[1])
    assert combined.compute() == expected


def test_keeps_no_maps(metric, maps, tmp_path):
    metric.add_batch(predictions=maps[0], references=maps[1])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_unequal_batches_are_errors(metric, maps):
    with pytest.raises(ValueError, match="2 predictions for 3 references"):
        metric.add_batch(predictions=maps[0][:2], references=maps[1])
    with pytest.raises(ValueError, match="3 predictions for none references"):
        metric.compute(predictions=maps[0])
