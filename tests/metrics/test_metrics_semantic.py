import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from metrics_reference import blobs, perturbed, reference_metrics
from PIL import Image
from sklearn.metrics import confusion_matrix

from hf_bcd.metrics import SemanticMetrics
from hf_bcd.utils.messages import UserError


KEYS = [
    "mean_iou", "mean_accuracy", "overall_accuracy", "per_class_iou", "classes_averaged", "boundary_f@1", "boundary_f@3",
    "boundary_f@5", "boundary_iou", "completeness", "connectivity", "fragments", "missed",
]  # fmt: skip


def random_batch(images, height, width, num_labels, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.stack([blobs(rng, height, width, num_labels) for _ in range(images)])
    predictions = np.stack([perturbed(rng, label, num_labels) for label in labels])
    return torch.from_numpy(predictions), torch.from_numpy(labels)


def evaluated(predictions, labels, num_labels, **options):
    metrics = SemanticMetrics(num_labels, **options)
    metrics.update(predictions, labels)
    return metrics.compute()


def assert_close(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


@pytest.mark.parametrize(("height", "width", "num_labels"), [(37, 53, 5), (64, 41, 3), (1, 200, 2), (75, 3, 9)])
def test_matches_reference(height, width, num_labels):
    predictions, labels = random_batch(3, height, width, num_labels)
    assert (labels == 255).any() and (predictions != labels).any()
    expected = reference_metrics(predictions.numpy(), labels.numpy(), num_labels)
    assert_close(evaluated(predictions, labels, num_labels), expected)


def test_real_masks_match_reference(shared_data):
    files = sorted((shared_data / "camvid" / "test" / "masks").iterdir())[::80]
    rng = np.random.default_rng(0)
    labels = [np.asarray(Image.open(file)).astype(np.int64) for file in files]
    labels = [np.where(label == 11, 255, label) for label in labels]
    predictions = [perturbed(rng, label, 11, scale=3, share=0.2) for label in labels]
    metrics = SemanticMetrics(11)
    for prediction, label in zip(predictions, labels, strict=True):
        metrics.update(torch.from_numpy(prediction)[None], torch.from_numpy(label)[None])
    result = metrics.compute()
    assert_close(result, reference_metrics(predictions, labels, 11))
    assert 0.3 < result["mean_iou"] < 0.9 and result["boundary_f@1"] < result["boundary_f@5"]


def test_confusion_matches_sklearn():
    predictions, labels = random_batch(4, 33, 29, 6)
    counts = SemanticMetrics(8).counts(predictions, labels)["confusion"]
    for image, confusion in enumerate(counts):
        valid = labels[image] != 255
        expected = confusion_matrix(labels[image][valid], predictions[image][valid], labels=range(8))
        assert np.array_equal(confusion.numpy(), expected)
    total = confusion_matrix(labels[labels != 255], predictions[labels != 255], labels=range(6))
    iou = total.diagonal() / (total.sum(0) + total.sum(1) - total.diagonal())
    assert evaluated(predictions, labels, 8)["mean_iou"] == pytest.approx(iou.mean())


def test_counts_are_int64_rows_per_image():
    metrics = SemanticMetrics(6)
    shapes = []
    for images, height, width in ((1, 9, 14), (3, 20, 11), (0, 5, 5)):
        maps = torch.randint(0, 6, (images, height, width), generator=torch.Generator().manual_seed(0))
        counts = metrics.counts(maps, maps)
        assert all(count.dtype == torch.int64 and len(count) == images for count in counts.values())
        shapes.append({name: count.shape[1:] for name, count in counts.items()})
    assert shapes[0] == shapes[1] == shapes[2]


def test_batch_size_and_order_do_not_matter():
    predictions, labels = random_batch(7, 45, 38, 5)
    expected = evaluated(predictions, labels, 5)
    assert not any(math.isnan(value) for name, value in expected.items() if name != "per_class_iou")

    together = SemanticMetrics(5).counts(predictions, labels)
    metrics = SemanticMetrics(5)
    for batches in (range(7), [6, 2, 4, 0, 1, 3, 5]):
        metrics.reset()
        for image in batches:
            metrics.update(one := predictions[image : image + 1], own := labels[image : image + 1])
            assert all(
                torch.equal(together[name][image], count[0]) for name, count in metrics.counts(one, own).items()
            )
        assert metrics.compute() == expected


@pytest.mark.parametrize("kinds", [("uint8", "uint8"), ("int64", "uint8"), ("int16", "int32")])
def test_integer_types_and_predictions_at_ignored_pixels_do_not_matter(kinds):
    predictions, labels = random_batch(2, 40, 40, 4)
    expected = evaluated(predictions, labels, 4)
    assert evaluated(predictions.to(getattr(torch, kinds[0])), labels.to(getattr(torch, kinds[1])), 4) == expected
    changed = torch.where(labels == 255, 3 - predictions, predictions)
    assert not torch.equal(changed, predictions)
    assert evaluated(changed, labels, 4) == expected


def test_perfect_prediction():
    _, labels = random_batch(2, 50, 50, 5)
    result = evaluated(labels.clone(), labels, 7)  # 255 in a prediction is fine where the label is ignored
    assert list(result) == KEYS
    assert result["missed"] == 0 and result["fragments"] == 1 and result["classes_averaged"] == 5
    ones = set(KEYS) - {"missed", "fragments", "classes_averaged", "per_class_iou"}
    assert {result[name] for name in ones} == {1.0}
    assert result["per_class_iou"][:5] == [1.0] * 5 and all(map(math.isnan, result["per_class_iou"][5:]))


@pytest.mark.parametrize("updates", [0, 1])
def test_nothing_to_count_gives_nan(updates):
    metrics = SemanticMetrics(3)
    for _ in range(updates):
        metrics.update(torch.zeros(2, 9, 9, dtype=torch.int64), torch.full((2, 9, 9), 255))
    result = metrics.compute()
    assert list(result) == KEYS
    assert result.pop("classes_averaged") == 0
    assert all(map(math.isnan, result.pop("per_class_iou")))
    assert all(map(math.isnan, result.values()))


def test_class_in_prediction_alone_lowers_mean_iou_but_not_mean_accuracy():
    labels = torch.zeros(1, 2, 4, dtype=torch.int64)
    predictions = labels.clone()
    predictions[0, 0, 0] = 1
    result = evaluated(predictions, labels, 3)
    assert result["mean_iou"] == pytest.approx((7 / 8 + 0) / 2) and result["classes_averaged"] == 2
    assert result["mean_accuracy"] == result["overall_accuracy"] == pytest.approx(7 / 8)


def test_other_ignore_index():
    predictions, labels = random_batch(1, 30, 30, 4)
    found = evaluated(predictions, labels.where(labels != 255, -100), 4, ignore_index=-100)
    assert found == evaluated(predictions, labels, 4)
    # A negative ignore_index must not wrap around to a class in uint8.
    maps = torch.full((1, 2, 2), 156, dtype=torch.uint8)
    assert evaluated(maps, maps, 200, ignore_index=-100)["overall_accuracy"] == 1


def test_ids_out_of_range_are_errors():
    metrics = SemanticMetrics(3)
    good, bad = torch.zeros(1, 2, 2, dtype=torch.int64), torch.tensor([[[0, 7], [-1, 1]]])
    for predictions, labels, message in (
        (good, bad, r"label ids \[-1, 7\] .* \[0, 3\) .* ignore_index=255.*label rule"),
        (bad, good, r"predicted ids \[-1, 7\] .* \[0, 3\).*num_labels"),
        (bad, bad, "label ids.*; predicted ids"),
        (good.new_zeros(1, 1, 20), torch.arange(20).view(1, 1, 20), r"\[3, 4, 5, 6, 7, 8, 9, 10, 11, 12\] and 7 more"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.update(predictions, labels)
    assert metrics.compute()["classes_averaged"] == 0  # a refused batch leaves no trace


def test_wrong_shapes_and_types_are_errors():
    metrics, maps = SemanticMetrics(3), torch.zeros(2, 4, 4, dtype=torch.int64)
    for predictions, labels, message in (
        (maps, maps.new_zeros(2, 4, 5), r"\(2, 4, 4\) and labels \(2, 4, 5\)"),
        (maps[0], maps[0], r"\[B, H, W\]"),
        (maps.float(), maps, "predictions are torch.float32.*arg-max"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.update(predictions, labels)


def test_memory_does_not_grow_with_the_number_of_maps():
    metrics, sizes = SemanticMetrics(150), []
    for count in (1, 30):
        for seed in range(count):
            metrics.update(*random_batch(1, 9, 14 + seed % 3, 150))
        sizes.append(len(pickle.dumps(vars(metrics))))
    assert sizes[0] == sizes[1]


@pytest.mark.gpu
def test_cuda_counts_equal_cpu_counts():
    predictions, labels = random_batch(3, 61, 83, 5)
    metrics = SemanticMetrics(5)
    expected = metrics.counts(predictions, labels)
    found = metrics.counts(predictions.cuda(), labels.cuda())
    assert all(count.is_cuda and torch.equal(count.cpu(), expected[name]) for name, count in found.items())
    metrics.update(predictions.cuda(), labels.cuda())
    assert metrics.compute() == evaluated(predictions, labels, 5)


@pytest.mark.slow
def test_import_leaves_evaluate_alone():
    code = "import sys, hf_bcd.metrics; sys.exit('evaluate' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("ignore_index", [0, 2])
def test_an_ignore_index_that_is_a_class_is_refused(ignore_index):
    with pytest.raises(UserError, match=f"ignore_index {ignore_index} is one of the 3 classes"):
        SemanticMetrics(3, ignore_index)
    assert SemanticMetrics(3, -1).ignore_index == -1
